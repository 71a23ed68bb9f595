//! Pods made straight on a node of the cluster that is up: how long until they are ready, how soon an end is told, and what the
//! node's own processes take for it. With a peer the same on its node in turn.

mod crowd;
mod full;
mod starts;
mod usage;

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use self::crowd::Crowd;
pub(super) use self::full::{Full, idle};
pub(super) use self::starts::starts;
use super::interrupt;
use super::peer::{NODE, Peer};
use crate::paths::Layout;
use crate::process::ProcessId;
use crate::status::kubectl;

/// Our node, and the peer's where there is one.
struct Sides {
    ours: Crowd,
    peer: Option<Crowd>,
}

impl Sides {
    async fn open(layout: &Layout, peer: Option<&Peer>) -> Result<Self> {
        let ours = Crowd::open(layout).await?;
        let other = match peer {
            Some(peer) => Some(ours.on_peer(peer.first_process()).await?),
            None => None,
        };
        Ok(Self { ours, peer: other })
    }

    /// In the order of their turns.
    fn all(&self) -> impl Iterator<Item = &Crowd> {
        std::iter::once(&self.ours).chain(&self.peer)
    }

    /// How many more pods each of them takes.
    async fn room(&self) -> Result<usize> {
        let ours = self.ours.room().await?;
        Ok(match &self.peer {
            Some(peer) => ours.min(peer.room().await?),
            None => ours,
        })
    }
}

/// Runs a measurement and takes its pods away, however it went; what went wrong first is told.
fn measured<T>(
    layout: &Layout,
    peer: Option<&mut Peer>,
    measure: impl AsyncFnOnce(&Sides) -> Result<T>,
) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("a runtime")?;
    runtime.block_on(async {
        let sides = Sides::open(layout, peer.as_deref()).await?;
        let outcome = measure(&sides).await;
        let outcome = match (outcome, peer) {
            // Before pods are waited for that nobody ends any more.
            (Err(error), Some(peer)) => Err(peer.explain(error)),
            (outcome, _) => outcome,
        };
        let cleared = sides.ours.clear_at_last().await;
        outcome.and_then(|found| cleared.map(|()| found))
    })
}

/// Name of the node that [`Crowd::open`] takes.
pub(super) fn first_node(layout: &Layout) -> Result<String> {
    let names = kubectl(layout, &["get", "nodes", "-o", "jsonpath={.items[*].metadata.name}"])?;
    let ours = names.split_whitespace().find(|name| *name != NODE).context("the cluster has no node")?;
    Ok(ours.to_owned())
}

/// The value that so many of a hundred do not exceed (nearest rank); 0 where there is none.
fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() * percent).div_ceil(100);
    rank.checked_sub(1).and_then(|index| sorted.get(index)).copied().unwrap_or_default()
}

/// A limit for anything that is waited for, however many pods it is about.
async fn in_time<T>(what: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
    let outcome = tokio::time::timeout(Duration::from_secs(300), work).await;
    ensure!(outcome.is_ok(), "{what}: not within five minutes");
    outcome?
}

/// The same for what is measured: a signal ends it, and the end of the process that the node lives by.
async fn attentive<T>(
    what: &str,
    node: Option<ProcessId>,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    let trouble = async {
        loop {
            tokio::time::sleep(Duration::from_millis(200)).await;
            interrupt::check()?;
            if node.is_some_and(|process| !process.is_alive()) {
                bail!("{what}: the peer's node has ended");
            }
        }
    };
    // Cancel-safe: whichever ends first, the other is not asked for any more.
    tokio::select! {
        outcome = in_time(what, work) => outcome,
        outcome = trouble => outcome,
    }
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
