//! `cargo xtask bench …`: measurements; a table on the terminal, JSON below `target/bench/`.

mod cni;
mod cri;
mod interrupt;
mod lb;
mod machine;
mod node;
pub(crate) mod overlay;
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
    /// `kubectl apply` of the example to all pods Ready, images present. Needs `up`.
    Start {
        /// Repetitions.
        #[arg(long, default_value_t = 5)]
        runs: u32,
    },
    /// keelson-cri beside containerd's own CRI plugin: times, CPU per exec, memory per pod.
    Cri(cri::Arguments),
    /// The tunnel between nodes beside flannel's, as a ratio to none; between the nodes that are up, or two of its own.
    Overlay(overlay::Arguments),
    /// keelson-bridge beside Debian's bridge plugin: ADD, DEL, a hundred at once, GC, size.
    Cni(cni::Arguments),
    /// Memory of every component after the walk. Needs `up`.
    Node,
}

/// Runs one measurement.
pub(crate) fn run(layout: &Layout, what: &What) -> Result<()> {
    match what {
        What::Lb(arguments) => lb::run(layout, arguments),
        What::Start { runs } => start::run(layout, *runs),
        What::Cri(arguments) => cri::run(layout, arguments),
        What::Overlay(arguments) => overlay::run(layout, arguments),
        What::Cni(arguments) => cni::run(layout, arguments),
        What::Node => node::run(layout),
    }
}

fn save(layout: &Layout, name: &str, report: &impl Serialize) -> Result<()> {
    let file = layout.repo.join("target/bench").join(format!("{name}.json"));
    write_atomic(&file, &serde_json::to_vec_pretty(report)?).context("saving the report")?;
    println!("\nsaved: {}", file.display());
    Ok(())
}
