//! `bench node`, second part: what a full node's own processes take, idle and with probes, and how long its metrics take.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde::Serialize;

use super::crowd::{Crowd, Kind};
use super::{Sides, measured, usage};
use crate::bench::beside::Beside;
use crate::bench::peer::{self, About, Peer};
use crate::bench::reference::{NODE, Reference};
use crate::bench::stats::{Round, Summary, median, summary};
use crate::paths::Layout;
use crate::process::Record;

/// What to look at, and how long.
#[derive(Debug, clap::Args)]
pub(crate) struct Full {
    /// Seconds of each look.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Pods of the full node; more than 110 where the cluster was started with `up --max-pods N`.
    #[arg(long, default_value_t = 110, value_parser = clap::value_parser!(u16).range(1..))]
    pods: u16,
    /// Interleaved rounds with a peer; without one there is one round.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    #[command(flatten)]
    peer: peer::Arguments,
}

/// One look at a full node.
#[derive(Debug, Serialize)]
struct Look {
    start_seconds: f64,
    idle: Vec<usage::Line>,
    probed: Vec<usage::Line>,
    cadvisor_milliseconds: Vec<f64>,
}

#[derive(Serialize)]
struct Report {
    pods: usize,
    start_seconds: f64,
    agent_and_cri_rss_mib: f64,
    agent_and_cri_percent: f64,
    probed_percent: f64,
    cadvisor_milliseconds: Summary,
    looks: Vec<Look>,
    peer_looks: Vec<Look>,
    compared: Vec<Compared>,
    peer_is: Option<About>,
    /// Of other machines' runs.
    reference: [Reference; 5],
}

/// One figure of the whole node, containerd included, on both sides.
#[derive(Serialize)]
struct Compared {
    what: &'static str,
    unit: &'static str,
    ours: Summary,
    peer: Beside,
}

/// Measures, prints and saves.
pub(in crate::bench) fn idle(layout: &Layout, full: &Full) -> Result<()> {
    let mut peer = full.peer.start(layout)?;
    let peer_is = peer.as_ref().map(|peer| peer.about().clone());
    let span = Duration::from_secs(full.seconds);
    let rounds = if peer.is_some() { full.rounds } else { 1 };
    let theirs = peer.as_ref().map(Peer::processes).transpose()?;
    let (pods, looks, peer_looks) = measured(layout, peer.as_mut(), async |sides| {
        let pods = wanted(sides, usize::from(full.pods)).await?;
        let ours = usage::of_node(layout, sides.ours.node())?;
        let (mut looks, mut peer_looks) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            looks.push(look(&sides.ours, "ours", &ours, pods, span).await?);
            if let (Some(crowd), Some(records)) = (&sides.peer, &theirs) {
                peer_looks.push(look(crowd, "peer", records, pods, span).await?);
            }
        }
        Ok((pods, looks, peer_looks))
    })?;
    crate::bench::save(layout, "node-pods", &report(pods, looks, peer_looks, peer_is))
}

/// As many pods as asked for, or why not; the usual number is cut down to what there is room for.
async fn wanted(sides: &Sides, asked: usize) -> Result<usize> {
    let room = sides.room().await?;
    ensure!(
        asked <= room.max(110),
        "--pods {asked}: there is room for {room}; start the cluster with `cargo xtask up --detach --max-pods {asked}`"
    );
    Ok(asked.min(room))
}

async fn look(crowd: &Crowd, whose: &str, records: &[Record], pods: usize, span: Duration) -> Result<Look> {
    let start_seconds = crowd.start(pods, Kind::Idle).await?.as_secs_f64();
    let idle = usage::over(records, span).await?;
    show(&format!("{whose}: {pods} idle pods, Ready after {start_seconds:.3} s"), &idle);
    let cadvisor_milliseconds = crowd.cadvisor(20).await?;
    crowd.clear().await?;
    crowd.start(pods, Kind::Probed).await?;
    let probed = usage::over(records, span).await?;
    show(&format!("{whose}: {pods} pods with an exec and an http probe every 10 s"), &probed);
    crowd.clear().await?;
    Ok(Look { start_seconds, idle, probed, cadvisor_milliseconds })
}

fn report(pods: usize, looks: Vec<Look>, peer_looks: Vec<Look>, peer_is: Option<About>) -> Report {
    let middle = |of: &dyn Fn(&Look) -> f64| median(&looks.iter().map(of).collect::<Vec<_>>());
    let rss = middle(&|look| own(&look.idle, |line| line.rss_mib));
    let percent = middle(&|look| own(&look.idle, |line| line.percent));
    let probed = middle(&|look| own(&look.probed, |line| line.percent));
    let start_seconds = middle(&|look| look.start_seconds);
    let cadvisor =
        summary(&looks.iter().flat_map(|look| look.cadvisor_milliseconds.clone()).collect::<Vec<_>>());
    println!(
        "\nagent + CRI: {rss:.1} MiB (goal ≤ 50), {percent:.1} % of a core (goal ≤ 2), with probes {probed:.1} % (goal ≤ 10)"
    );
    println!(
        "/metrics/cadvisor through the API server: median {:.1} ms ({:.1}-{:.1}), goal ≤ 20 ms",
        cadvisor.median, cadvisor.min, cadvisor.max
    );
    let compared = compare(&looks, &peer_looks);
    for Compared { what, unit, ours, peer } in &compared {
        println!("{what}: {:.3} {unit} ({:.3}-{:.3}); {}", ours.median, ours.min, ours.max, peer.line(unit));
    }
    Report {
        pods,
        start_seconds,
        agent_and_cri_rss_mib: rss,
        agent_and_cri_percent: percent,
        probed_percent: probed,
        cadvisor_milliseconds: cadvisor,
        looks,
        peer_looks,
        compared,
        peer_is,
        reference: NODE,
    }
}

/// Agent, CRI server and containerd beside kubelet and containerd, round by round.
fn compare(looks: &[Look], peer_looks: &[Look]) -> Vec<Compared> {
    type Figure = (&'static str, &'static str, fn(&Look) -> Vec<f64>);
    let figures: [Figure; 5] = [
        ("all pods Ready after", "s", |look| vec![look.start_seconds]),
        ("the node's daemons, containerd included, idle", "MiB", |look| {
            vec![all(&look.idle, |line| line.rss_mib)]
        }),
        ("their processor time, idle", "% of a core", |look| vec![all(&look.idle, |line| line.percent)]),
        ("… with probes", "% of a core", |look| vec![all(&look.probed, |line| line.percent)]),
        ("/metrics/cadvisor", "ms", |look| look.cadvisor_milliseconds.clone()),
    ];
    let compared = |(what, unit, of): Figure| {
        let theirs = |index: usize| peer_looks.get(index).map(of).unwrap_or_default();
        let rounds: Vec<Round> =
            looks.iter().enumerate().map(|(index, look)| (of(look), theirs(index))).collect();
        let ours: Vec<f64> = rounds.iter().flat_map(|round| &round.0).copied().collect();
        Compared { what, unit, ours: summary(&ours), peer: Beside::of(&rounds) }
    };
    figures.into_iter().map(compared).collect()
}

/// The sum over the node agent and the CRI server.
fn own(lines: &[usage::Line], of: impl Fn(&usage::Line) -> f64) -> f64 {
    lines.iter().filter(|line| matches!(line.name.as_str(), "agent" | "cri")).map(of).sum()
}

/// The sum over all that a node is made of, on either side.
fn all(lines: &[usage::Line], of: impl Fn(&usage::Line) -> f64) -> f64 {
    let is_nodes =
        |line: &&usage::Line| matches!(line.name.as_str(), "agent" | "cri" | "containerd" | "kubelet");
    lines.iter().filter(is_nodes).map(of).sum()
}

fn show(what: &str, lines: &[usage::Line]) {
    println!("{what}");
    for line in lines {
        println!("  {:<12} {:>6.1} MiB  {:>5.1} % of a core", line.name, line.rss_mib, line.percent);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(names: &[(&str, f64)]) -> Look {
        let line = |(name, rss_mib): &(&str, f64)| usage::Line {
            name: (*name).to_owned(),
            rss_mib: *rss_mib,
            percent: 1.0,
        };
        let lines = || names.iter().map(line).collect();
        Look { start_seconds: 1.0, idle: lines(), probed: lines(), cadvisor_milliseconds: vec![5.0] }
    }

    #[test]
    fn a_node_is_compared_with_a_node() {
        let ours = || taken(&[("agent", 30.0), ("cri", 20.0), ("containerd", 50.0), ("control", 40.0)]);
        let theirs = || taken(&[("kubelet", 124.0), ("containerd", 76.0)]);
        let found = report(110, vec![ours(), ours(), ours()], vec![theirs(), theirs(), theirs()], None);
        assert!((found.agent_and_cri_rss_mib - 50.0).abs() < 1e-9);
        let value = serde_json::to_value(&found).unwrap();
        let memory = &value["compared"][1];
        assert_eq!(memory["ours"]["median"], 100.0, "the control plane is no part of a node");
        assert_eq!(memory["peer"]["ours_to_peer"]["value"], 0.5);
        let alone = report(110, vec![ours()], vec![], None);
        assert_eq!(serde_json::to_value(&alone).unwrap()["compared"][0]["peer"], "absent");
    }
}
