//! `cargo xtask bench …`: measurements; a table on the terminal, JSON below `target/bench/`.

mod beside;
mod cni;
mod cri;
mod interrupt;
mod lb;
mod machine;
mod node;
pub(crate) mod overlay;
mod peer;
mod pods;
mod reference;
mod start;
mod stats;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::paths::Layout;
use crate::process::write_atomic;

/// What to measure.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum What {
    /// The service data plane beside iptables and nftables: connections, programming, memory.
    Lb(lb::Arguments),
    /// `kubectl apply` of the example, and pods made at once, until all are Ready, images present; then how soon the end of a
    /// container is told. Needs `up`.
    Start {
        /// Repetitions.
        #[arg(long, default_value_t = 5)]
        runs: u32,
        #[command(flatten)]
        peer: peer::Arguments,
    },
    /// keelson-cri beside containerd's own CRI plugin: times, CPU per exec, memory per pod.
    Cri(cri::Arguments),
    /// The tunnel between nodes beside flannel's, as a ratio to none; between the nodes that are up, or two of its own.
    Overlay(overlay::Arguments),
    /// keelson-bridge beside Debian's bridge plugin: ADD, DEL, a hundred at once, GC, size.
    Cni(cni::Arguments),
    /// Memory of every component as it is, then memory and processor time with a full node: idle, and with probes. Needs `up`.
    Node(pods::Full),
    /// First process of the peer's node.
    #[command(hide = true)]
    PeerNode,
}

/// Runs one measurement.
pub(crate) fn run(layout: &Layout, what: &What) -> Result<()> {
    match what {
        What::Lb(arguments) => lb::run(layout, arguments),
        What::Start { runs, peer } => {
            interrupt::watch()?;
            let mut peer = peer.start(layout)?;
            start::run(layout, *runs, peer.as_mut())?;
            pods::starts(layout, *runs, peer.as_mut())?;
            reference::show(&reference::STARTS);
            Ok(())
        }
        What::Cri(arguments) => cri::run(layout, arguments),
        What::Overlay(arguments) => overlay::run(layout, arguments),
        What::Cni(arguments) => cni::run(layout, arguments),
        What::Node(full) => {
            interrupt::watch()?;
            node::run(layout)?;
            pods::idle(layout, full)?;
            reference::show(&reference::NODE);
            Ok(())
        }
        What::PeerNode => peer::run_first_process(&layout.repo),
    }
}

fn save(layout: &Layout, name: &str, report: &impl Serialize) -> Result<()> {
    let file = layout.repo.join("target/bench").join(format!("{name}.json"));
    write_atomic(&file, &serde_json::to_vec_pretty(report)?).context("saving the report")?;
    println!("\nsaved: {}", file.display());
    Ok(())
}
