//! `bench start`, second part: from the creation of pods at once to the last one Ready, image present, and from a
//! container's end to its status.

use anyhow::Result;
use serde::Serialize;

use super::crowd::Kind;
use super::{Sides, measured, percentile};
use crate::bench::beside::Beside;
use crate::bench::peer::{About, Peer};
use crate::bench::reference::{Reference, STARTS};
use crate::bench::stats::{Round, Summary, summary};
use crate::paths::Layout;

/// Pods of one batch, and seconds until the last one shall be ready.
const BATCHES: [(usize, f64); 4] = [(1, 0.3), (10, 0.8), (50, 3.0), (110, 7.0)];
/// Milliseconds until the end of a container is told, of nearly all.
const EXIT_GOAL: f64 = 50.0;
/// Containers that are ended to see when that is told; with a peer in so many interleaved rounds.
const EXITS: usize = 100;
const EXIT_ROUNDS: usize = 5;

#[derive(Serialize)]
struct Batch {
    pods: usize,
    seconds: Vec<f64>,
    summary: Summary,
    goal_seconds: f64,
    peer: Beside,
}

#[derive(Serialize)]
struct Starts {
    batches: Vec<Batch>,
    exit_milliseconds: Vec<f64>,
    exit_p99: f64,
    exit_peer: Beside,
    peer_is: Option<About>,
    /// Of another machine's run.
    reference: [Reference; 5],
}

/// Measures, prints and saves.
pub(in crate::bench) fn starts(layout: &Layout, runs: u32, peer: Option<&mut Peer>) -> Result<()> {
    let peer_is = peer.as_ref().map(|peer| peer.about().clone());
    let (batches, exits) = measured(layout, peer, async |sides| {
        Ok((measure_batches(sides, runs).await?, measure_exits(sides).await?))
    })?;
    let exit_milliseconds: Vec<f64> = exits.iter().flat_map(|round| &round.0).copied().collect();
    let exit_p99 = percentile(&exit_milliseconds, 99);
    println!(
        "container's end → status at the API: median {:.1} ms, p99 {exit_p99:.1} ms of {}, goal ≤ {EXIT_GOAL} ms",
        summary(&exit_milliseconds).median,
        exit_milliseconds.len()
    );
    let exit_peer = Beside::of(&exits);
    println!("  {}", exit_peer.line("ms"));
    let report = Starts { batches, exit_milliseconds, exit_p99, exit_peer, peer_is, reference: STARTS };
    crate::bench::save(layout, "start-pods", &report)
}

async fn measure_batches(sides: &Sides, runs: u32) -> Result<Vec<Batch>> {
    let room = sides.room().await?;
    // Not counted: it pulls the image.
    for side in sides.all() {
        side.start(1, Kind::Idle).await?;
        side.clear().await?;
    }
    let mut batches = Vec::new();
    println!("{:>5} pods at once  until the last is Ready (median, min-max of {runs})", "");
    for (count, goal_seconds) in BATCHES {
        // Others may have pods on the node.
        let pods = count.min(room);
        let mut rounds = Vec::new();
        for _ in 0..runs {
            let mut round = Round::default();
            round.0.push(sides.ours.start(pods, Kind::Idle).await?.as_secs_f64());
            sides.ours.clear().await?;
            if let Some(peer) = &sides.peer {
                round.1.push(peer.start(pods, Kind::Idle).await?.as_secs_f64());
                peer.clear().await?;
            }
            rounds.push(round);
        }
        let seconds: Vec<f64> = rounds.iter().flat_map(|round| &round.0).copied().collect();
        let (summary, peer) = (summary(&seconds), Beside::of(&rounds));
        println!(
            "{pods:>5}               {:.3} s ({:.3}-{:.3}), goal ≤ {goal_seconds} s",
            summary.median, summary.min, summary.max
        );
        println!("{:>5}               {}", "", peer.line("s"));
        batches.push(Batch { pods, seconds, summary, goal_seconds, peer });
    }
    Ok(batches)
}

/// Milliseconds of each end.
async fn measure_exits(sides: &Sides) -> Result<Vec<Round>> {
    let count = if sides.peer.is_some() { EXIT_ROUNDS } else { 1 };
    let pods = (EXITS / count).min(sides.room().await?);
    let mut rounds = Vec::new();
    for _ in 0..count {
        let mut round = Round::default();
        for (number, side) in sides.all().enumerate() {
            side.start(pods, Kind::Idle).await?;
            let took = side.exits().await?;
            side.clear().await?;
            let values = if number == 0 { &mut round.0 } else { &mut round.1 };
            values.extend(took.iter().map(|took| took.as_secs_f64() * 1000.0));
        }
        rounds.push(round);
    }
    Ok(rounds)
}
