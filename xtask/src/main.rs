//! Everything a developer, an operator or CI runs: `cargo xtask <command>`.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command-line tool talks to its user")]

mod bench;
mod binaries;
mod build_ebpf;
mod cmd;
mod config;
mod conformance;
mod cri_hosts;
mod down;
mod fabric;
mod foreign;
mod fuzz;
mod host;
mod images;
mod lanes;
mod paths;
mod preflight;
mod process;
mod registry;
mod setup;
mod status;
mod supervise;
mod test;
mod tidy;
mod up;
mod vm;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Keelson's chores.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what is missing for building, running and testing.
    Setup,
    /// Build the BPF programs.
    BuildEbpf,
    /// Build and start a cluster, and wait until it is Ready.
    Up(up::Options),
    /// End the cluster and remove all its traces.
    Down,
    /// Show what runs, with pids, memory and health.
    Status {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Run a command inside one of several nodes (`up --nodes N`): in its network namespace and cgroup.
    Node {
        /// Node name.
        name: String,
        /// Command and arguments.
        #[arg(trailing_var_arg = true, required = true)]
        command: Vec<String>,
    },
    /// Run the test tiers (all when none is named).
    Test {
        /// Tiers to run.
        tiers: Vec<test::Tier>,
        #[command(flatten)]
        guests: vm::Choice,
    },
    /// Measure, interleaved with the peer; tables on the terminal, JSON below target/bench/.
    Bench {
        #[command(subcommand)]
        what: bench::What,
    },
    /// Check an endpoint against the interface it implements; JUnit output, any endpoint.
    Conformance {
        #[command(subcommand)]
        what: conformance::What,
    },
    /// Fuzz the parsers of foreign bytes of the CRI server and the CNI plugins.
    Fuzz(fuzz::Options),
    /// Check crate edges, purity, module docs and file lengths.
    Tidy,
    /// Make the demo images (`up` does it too).
    Images,
    /// The whole gate, as CI runs it.
    Ci,
    #[command(hide = true)]
    Supervise,
    /// One side of the traffic of `bench overlay`.
    #[command(hide = true)]
    OverlayPeer {
        #[command(subcommand)]
        side: bench::overlay::Peer,
    },
    /// First process of a test guest.
    #[command(hide = true)]
    VmInit,
    /// Runs the jobs of a test guest.
    #[command(hide = true)]
    VmGuest,
    /// A node inside a test guest.
    #[command(hide = true)]
    VmNode {
        #[command(subcommand)]
        act: vm::node::Act,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    let code = |well: bool| if well { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    // In a test guest there is no checkout, and a peer needs none.
    match &command {
        Command::VmInit => return vm::guest::init().map(|()| ExitCode::SUCCESS),
        Command::VmGuest => return vm::guest::run().map(|()| ExitCode::SUCCESS),
        Command::VmNode { act } => return act.run().map(|()| ExitCode::SUCCESS),
        Command::OverlayPeer { side } => return side.run().map(|()| ExitCode::SUCCESS),
        _ => {}
    }
    let repo = paths::repo_root()?;
    let layout = paths::Layout::of(&repo);
    match command {
        Command::Setup => setup::run(&repo, setup::Scope::Test)?,
        Command::BuildEbpf => {
            setup::run(&repo, setup::Scope::Run)?;
            build_ebpf::run(&repo)?;
        }
        Command::Up(options) => up::run(&layout, &options)?,
        Command::Down => down::run(&layout)?,
        Command::Status { json } => return status::run(&layout, json).map(code),
        Command::Node { name, command } => return fabric::run(&layout, &name, &command),
        Command::Test { tiers, guests } => test::run(&repo, &tiers, &guests)?,
        Command::Bench { what } => bench::run(&layout, &what)?,
        Command::Conformance { what } => return conformance::run(&layout, &what).map(code),
        Command::Fuzz(options) => fuzz::run(&repo, &options)?,
        Command::Tidy => tidy::run(&repo)?,
        Command::Images => images::ensure(&layout.images()).map(drop)?,
        Command::Ci => test::run(&repo, &[], &vm::Choice::default())?,
        Command::Supervise => supervise::run(&layout)?,
        Command::VmInit | Command::VmGuest | Command::VmNode { .. } | Command::OverlayPeer { .. } => {}
    }
    Ok(ExitCode::SUCCESS)
}
