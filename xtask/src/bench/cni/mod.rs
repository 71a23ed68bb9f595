//! `bench cni`: keelson-bridge with keelson-ipam beside Debian's bridge with host-local: same machine, same run,
//! interleaved A B B A, each side in a network namespace of its own that plays the host.
//!
//! Times are what a runtime sees: from starting the executable to its end with everything read. A peer that only returns
//! when the kernel has deleted the pair is shown both ways, until it returns and until the host is clean.

mod floor;
mod rows;
mod side;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;

use self::side::Side;
use super::cri::report::{self, Row};
use super::machine::Machine;
use crate::cmd::{Cmd, step};
use crate::paths::Layout;

/// The command line.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Arguments {
    /// Few rounds, few records: shows that it works; the figures are coarse.
    #[arg(long)]
    quick: bool,
    /// Interleaved rounds of single calls; 60, or 5 with --quick, when not given.
    #[arg(long)]
    rounds: Option<u32>,
    /// Stale records for GC; 10000, or 500 with --quick, when not given.
    #[arg(long)]
    records: Option<u32>,
    /// Take the release binary as it is.
    #[arg(long)]
    no_build: bool,
}

impl Arguments {
    fn rounds(&self) -> u32 {
        self.rounds.unwrap_or(if self.quick { 5 } else { 60 })
    }

    fn records(&self) -> u32 {
        self.records.unwrap_or(if self.quick { 500 } else { 10_000 })
    }

    /// Rounds of a hundred calls at once.
    fn crowds(&self) -> u32 {
        if self.quick { 1 } else { 5 }
    }
}

/// Everything that was measured, and on what.
#[derive(Debug, Serialize)]
struct Report {
    machine: Machine,
    peer: String,
    rounds: u32,
    quick: bool,
    rows: Vec<Row>,
}

const PEER: &str = "/usr/lib/cni";
/// Where a run keeps its things, followed by its process's number.
const PLACE: &str = "/tmp/kbench-cni-";

/// Builds, measures, prints, and saves the report.
pub(crate) fn run(layout: &Layout, arguments: &Arguments) -> Result<()> {
    crate::preflight::require_root()?;
    if !Path::new(PEER).join("bridge").is_file() {
        step("installing Debian's reference CNI plugins", || {
            Cmd::new("apt-get")
                .args(["install", "-y", "-qq", "--no-install-recommends", "containernetworking-plugins"])
                .output()
        })?;
    }
    if !arguments.no_build {
        step("building keelson-cni", || crate::binaries::build_only(&layout.repo, &["keelson-cni"]))?;
    }
    super::interrupt::watch()?;
    remove_leftovers().context("removing what a run that was ended left")?;
    let dir = PathBuf::from(format!("{PLACE}{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let result = measure(layout, arguments, &dir);
    std::fs::remove_dir_all(&dir).with_context(|| format!("removing {}", dir.display()))?;
    let report = result?;
    report.print();
    super::save(layout, "cni", &report)
}

/// Removes the places of runs that are no more: each holds mounted network namespaces.
fn remove_leftovers() -> Result<()> {
    let place = Path::new(PLACE);
    let (Some(parent), Some(prefix)) = (place.parent(), place.file_name().and_then(|name| name.to_str()))
    else {
        return Ok(());
    };
    for entry in std::fs::read_dir(parent)? {
        let entry = entry?;
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(prefix)?.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            for side in ["ours", "peer"] {
                Side::remove_namespaces(&entry.path().join(side));
            }
            std::fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

fn measure(layout: &Layout, arguments: &Arguments, dir: &Path) -> Result<Report> {
    let machine = Machine::look()?;
    let bin = dir.join("bin");
    Cmd::new(layout.binary("keelson-cni")).args(["install"]).args([&bin]).output()?;
    let ours = Side::new("keelson", &bin, "keelson-bridge", "keelson-ipam", &dir.join("ours"))?;
    let peer = Side::new("reference", Path::new(PEER), "bridge", "host-local", &dir.join("peer"))?;
    let mut rows = step("single calls, interleaved", || rows::single(&ours, &peer, arguments.rounds()))?;
    rows.extend(step("a hundred at once", || rows::crowd(&ours, &peer, arguments.crowds()))?);
    rows.push(step("GC of stale records", || rows::gc(&ours, arguments.records()))?);
    rows.extend(rows::sizes(layout, &ours, &peer)?);
    let version =
        Cmd::new("dpkg-query").args(["-W", "-f", "${Version}", "containernetworking-plugins"]).output();
    Ok(Report {
        machine,
        peer: format!("containernetworking-plugins {}", version.unwrap_or_else(|_| "unknown".to_owned())),
        rounds: arguments.rounds(),
        quick: arguments.quick,
        rows,
    })
}

impl Report {
    fn print(&self) {
        println!(
            "\nkeelson-bridge and keelson-ipam beside {}\n{}; {} interleaved rounds{}",
            self.peer,
            self.machine,
            self.rounds,
            if self.quick { " (quick: coarse figures)" } else { "" }
        );
        report::print_rows(&self.rows);
        report::print_goals(&self.rows);
    }
}
