//! Pods made straight on a node of the cluster that is up: how long until they are ready, how soon an end is told, and what the
//! node's own processes take for it.

mod crowd;
mod usage;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use self::crowd::{Crowd, Kind};
use self::usage::Usage;
use super::stats::{Summary, summary};
use crate::paths::Layout;

/// Pods of one batch, and seconds until the last one shall be ready.
const BATCHES: [(usize, f64); 4] = [(1, 0.3), (10, 0.8), (50, 3.0), (110, 7.0)];
/// Milliseconds until the end of a container is told, of nearly all.
const EXIT_GOAL: f64 = 50.0;
/// Containers that are ended to see when that is told.
const EXITS: usize = 100;
/// What upstream's figures are: stock kubelet 1.36 with containerd 2, on a machine like this one.
const STOCK: &str =
    "a stock kubelet with containerd, by the reference: 0.55-0.8, 1.5, 7.5, 17.9 s; exit 950 ms";

#[derive(Serialize)]
struct Batch {
    pods: usize,
    seconds: Vec<f64>,
    summary: Summary,
    goal_seconds: f64,
}

#[derive(Serialize)]
struct Starts {
    batches: Vec<Batch>,
    exit_milliseconds: Vec<f64>,
    exit_p99: f64,
}

/// From the creation of pods at once to the last one Ready, image present, and from a container's end to its status.
pub(super) fn starts(layout: &Layout, runs: u32) -> Result<()> {
    let report = runtime()?.block_on(async {
        let crowd = Crowd::open(layout).await?;
        let outcome = measure_starts(&crowd, runs).await;
        crowd.clear().await?;
        outcome
    })?;
    println!("{STOCK}");
    super::save(layout, "start-pods", &report)
}

async fn measure_starts(crowd: &Crowd, runs: u32) -> Result<Starts> {
    let room = crowd.room().await?;
    // Not counted: it pulls the image.
    crowd.start(1, Kind::Idle).await?;
    crowd.clear().await?;
    let mut batches = Vec::new();
    println!("{:>5} pods at once  until the last is Ready (median, min-max of {runs})", "");
    for (count, goal_seconds) in BATCHES {
        // Others may have pods on the node.
        let pods = count.min(room);
        let mut seconds = Vec::new();
        for _ in 0..runs {
            seconds.push(crowd.start(pods, Kind::Idle).await?.as_secs_f64());
            crowd.clear().await?;
        }
        let summary = summary(&seconds);
        println!(
            "{pods:>5}               {:.3} s ({:.3}-{:.3}), goal ≤ {goal_seconds} s",
            summary.median, summary.min, summary.max
        );
        batches.push(Batch { pods, seconds, summary, goal_seconds });
    }
    crowd.start(EXITS.min(room), Kind::Idle).await?;
    let exit_milliseconds: Vec<f64> =
        crowd.exits().await?.iter().map(|took| took.as_secs_f64() * 1000.0).collect();
    let exit_p99 = percentile(&exit_milliseconds, 99);
    println!(
        "container's end → status at the API: median {:.1} ms, p99 {exit_p99:.1} ms of {}, goal ≤ {EXIT_GOAL} ms",
        summary(&exit_milliseconds).median,
        exit_milliseconds.len()
    );
    Ok(Starts { batches, exit_milliseconds, exit_p99 })
}

#[derive(Serialize)]
struct Idle {
    pods: usize,
    agent_and_cri_rss_mib: f64,
    agent_and_cri_percent: f64,
    processes: Vec<usage::Line>,
    probed_percent: f64,
    probed: Vec<usage::Line>,
    cadvisor_milliseconds: Summary,
}

/// What a full node's own processes take: idle, and with probes; and how long its metrics take.
pub(super) fn idle(layout: &Layout, span: Duration) -> Result<()> {
    let report = runtime()?.block_on(async {
        let crowd = Crowd::open(layout).await?;
        let outcome = measure_idle(layout, &crowd, span).await;
        crowd.clear().await?;
        outcome
    })?;
    super::save(layout, "node-pods", &report)
}

async fn measure_idle(layout: &Layout, crowd: &Crowd, span: Duration) -> Result<Idle> {
    let pods = crowd.room().await?.min(110);
    crowd.start(pods, Kind::Idle).await?;
    let processes = Usage::over(layout, crowd.node(), span).await?;
    let (rss, percent) = (own(&processes, |line| line.rss_mib), own(&processes, |line| line.percent));
    show(&format!("{pods} idle pods"), &processes);
    println!("agent + CRI: {rss:.1} MiB (goal ≤ 50), {percent:.1} % of a core (goal ≤ 2)\n");
    let cadvisor = crowd.cadvisor(20).await?;
    let cadvisor_milliseconds = summary(&cadvisor);
    println!(
        "/metrics/cadvisor through the API server: median {:.1} ms ({:.1}-{:.1}), goal ≤ 20 ms\n",
        cadvisor_milliseconds.median, cadvisor_milliseconds.min, cadvisor_milliseconds.max
    );
    crowd.clear().await?;
    crowd.start(pods, Kind::Probed).await?;
    let probed = Usage::over(layout, crowd.node(), span).await?;
    let probed_percent = own(&probed, |line| line.percent);
    show(&format!("{pods} pods with an exec and an http probe every 10 s"), &probed);
    println!("agent + CRI: {probed_percent:.1} % of a core (goal ≤ 10)");
    Ok(Idle {
        pods,
        agent_and_cri_rss_mib: rss,
        agent_and_cri_percent: percent,
        processes,
        probed_percent,
        probed,
        cadvisor_milliseconds,
    })
}

/// The sum over the node agent and the CRI server.
fn own(lines: &[usage::Line], of: impl Fn(&usage::Line) -> f64) -> f64 {
    lines.iter().filter(|line| matches!(line.name.as_str(), "agent" | "cri")).map(of).sum()
}

fn show(what: &str, lines: &[usage::Line]) {
    println!("{what}");
    for line in lines {
        println!("  {:<12} {:>6.1} MiB  {:>5.1} % of a core", line.name, line.rss_mib, line.percent);
    }
}

/// The value that so many of a hundred do not exceed (nearest rank); 0 where there is none.
fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() * percent).div_ceil(100);
    rank.checked_sub(1).and_then(|index| sorted.get(index)).copied().unwrap_or_default()
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("a runtime")
}

/// A limit for anything that is waited for.
async fn in_time<T>(what: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
    let outcome = tokio::time::timeout(Duration::from_secs(120), work).await;
    ensure!(outcome.is_ok(), "{what}: not within two minutes");
    outcome?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearly_all_are_counted() {
        let values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert!((percentile(&values, 99) - 99.0).abs() < f64::EPSILON);
        assert!((percentile(&[7.0], 99) - 7.0).abs() < f64::EPSILON);
        assert!(percentile(&[], 99).abs() < f64::EPSILON);
    }
}
