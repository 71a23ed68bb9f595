//! The figures.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::floor::Floor;
use super::side::{Added, Pod, Side};
use crate::bench::cri::report::{Goal, Row};
use crate::bench::stats::{Round, median, p90};
use crate::paths::Layout;

/// Calls at once.
const CROWD: u32 = 100;
/// Looks at the memory of a call.
const LOOKS: u32 = 20;

/// ADD and DEL, one at a time.
pub(super) fn single(ours: &Side, peer: &Side, rounds: u32) -> Result<Vec<Row>> {
    // Kept until all is measured: to take a namespace away the kernel holds, for some ten milliseconds and behind everybody's
    // back, the lock that an ADD needs, and the next one would be measured waiting for it.
    let mut used = Vec::new();
    // The first call of a side makes its bridge.
    once(ours, &mut used)?;
    once(peer, &mut used)?;
    let (mut adds, mut dels, mut cleans) = (Vec::new(), Vec::new(), Vec::new());
    let mut floor = Floor::default();
    for _ in 0..rounds {
        floor.round(ours, peer, &mut used)?;
        let (mut add, mut del, mut clean) = (Round::default(), Round::default(), Round::default());
        for (side, is_ours) in [(ours, true), (peer, false), (peer, false), (ours, true)] {
            let times = once(side, &mut used)?;
            for (round, time) in [(&mut add, times.0), (&mut del, times.1), (&mut clean, times.2)] {
                let values = if is_ours { &mut round.0 } else { &mut round.1 };
                values.push(millis(time));
            }
        }
        adds.push(add);
        dels.push(del);
        cleans.push(clean);
    }
    let group = "one call at a time";
    let row =
        |name, rounds: &[Round], statistic, goal| Row::of_rounds(group, name, "ms", rounds, statistic, goal);
    let mut all = vec![
        row("ADD, median", &adds, median, Goal::Ours(3.0)),
        row("ADD, p90", &adds, p90, Goal::None),
        row("DEL until it returns, median", &dels, median, Goal::Ours(3.0)),
        row("DEL until it returns, p90", &dels, p90, Goal::None),
        row("DEL until the link is gone, median", &cleans, median, Goal::Ours(250.0)),
        row("DEL until the link is gone, p90", &cleans, p90, Goal::None),
    ];
    all.extend(floor.rows());
    Ok(all)
}

/// One pod: ADD, DEL until it returns, DEL until the link is gone.
fn once(side: &Side, used: &mut Vec<Pod>) -> Result<(Duration, Duration, Duration)> {
    let pod = side.pod()?;
    let times = side.on_host(|| {
        let added = side.add(&pod)?;
        let begun = Instant::now();
        let del = side.del(&pod)?;
        side.wait_gone(&added.link)?;
        Ok((added.took, del, begun.elapsed()))
    });
    used.push(pod);
    times
}

/// A hundred pods at once.
pub(super) fn crowd(ours: &Side, peer: &Side, rounds: u32) -> Result<Vec<Row>> {
    let (mut totals, mut last, mut dels) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        let (mut total, mut p99, mut del) = (Round::default(), Round::default(), Round::default());
        for (side, is_ours) in [(ours, true), (peer, false), (peer, false), (ours, true)] {
            let times = together(side)?;
            for (round, time) in [(&mut total, times.0), (&mut p99, times.1), (&mut del, times.2)] {
                let values = if is_ours { &mut round.0 } else { &mut round.1 };
                values.push(millis(time));
            }
        }
        totals.push(total);
        last.push(p99);
        dels.push(del);
    }
    let group = "a hundred calls at once";
    let row = |name, rounds: &[Round], goal| Row::of_rounds(group, name, "ms", rounds, median, goal);
    Ok(vec![
        row("all ADDs done", &totals, Goal::Ours(300.0)),
        row("ADD, p99", &last, Goal::Ratio(0.2)),
        row("all DELs returned", &dels, Goal::None),
    ])
}

/// Until all ADDs are done, the p99 of one, until all DELs have returned.
fn together(side: &Side) -> Result<(Duration, Duration, Duration)> {
    let pods: Vec<Pod> = (0..CROWD).map(|_| side.pod()).collect::<Result<_>>()?;
    side.on_host(|| {
        let begun = Instant::now();
        let mut added: Vec<Added> = all_at_once(side, "ADD", &pods, super::side::Running::added)?;
        let total = begun.elapsed();
        added.sort_by_key(|one| one.took);
        let p99 = added[added.len() * 99 / 100 - 1].took;
        let begun = Instant::now();
        all_at_once(side, "DEL", &pods, super::side::Running::end)?;
        let deleted = begun.elapsed();
        added.iter().try_for_each(|one| side.wait_gone(&one.link))?;
        Ok((total, p99, deleted))
    })
}

fn all_at_once<V: Send>(
    side: &Side,
    verb: &str,
    pods: &[Pod],
    end: fn(super::side::Running) -> Result<V>,
) -> Result<Vec<V>> {
    std::thread::scope(|scope| {
        let mut waiting = Vec::new();
        for pod in pods {
            // Started from this thread, which is in the host's namespace; waited for by one of its own.
            let running = side.start(verb, pod)?;
            waiting.push(scope.spawn(move || end(running)));
        }
        waiting
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| anyhow::bail!("a waiting thread panicked")))
            .collect()
    })
}

/// GC of records whose containers never were. The peer has no GC.
pub(super) fn gc(ours: &Side, records: u32) -> Result<Row> {
    let took = ours.on_host(|| {
        for number in 0..records {
            ours.record(&format!("stale-{number}"))?;
        }
        ours.gc()
    })?;
    let goal = if records >= 10_000 { Goal::Ours(1000.0) } else { Goal::None };
    Ok(Row::plain(
        "GC (the peer has none)",
        &format!("{records} stale records"),
        "ms",
        millis(took),
        0.0,
        goal,
    ))
}

/// Files and memory.
pub(super) fn sizes(layout: &Layout, ours: &Side, peer: &Side) -> Result<Vec<Row>> {
    let group = "size";
    let bytes = |files: &[std::path::PathBuf]| -> Result<f64> {
        let mut sum = 0;
        for file in files {
            sum += std::fs::metadata(file)?.len();
        }
        Ok(mega(sum))
    };
    let peers = ["bridge", "host-local", "loopback", "portmap", "bandwidth", "tuning"];
    let peers: Vec<_> = peers.iter().map(|name| std::path::Path::new(super::PEER).join(name)).collect();
    let kib = |side: &Side| -> Result<f64> {
        let mut peak = 0;
        for _ in 0..LOOKS {
            let pod = side.pod()?;
            peak = peak.max(side.on_host(|| side.start("ADD", &pod)?.peak_kib())?);
            side.on_host(|| side.del(&pod))?;
        }
        Ok(mega(peak * 1024))
    };
    Ok(vec![
        Row::plain(
            group,
            "executables of six plugins",
            "MB",
            bytes(&[layout.binary("keelson-cni")])?,
            bytes(&peers)?,
            Goal::Ours(3.0),
        ),
        Row::plain(
            group,
            "resident memory of an ADD, peak seen",
            "MB",
            kib(ours)?,
            kib(peer)?,
            Goal::Ours(4.0),
        ),
    ])
}

pub(super) fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn mega(bytes: u64) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "some megabytes fit 52 bits")]
    let bytes = bytes as f64;
    bytes / 1e6
}
