//! `bench lb`: the service data plane beside kube-proxy-shaped iptables and nftables, on one machine, without a cluster.
//!
//! The measuring program, `lb-bench` of ebpf/tests, makes its own network namespaces, cgroups and pins, and prints JSON;
//! here it is built, run, judged by the goals and drawn.

mod report;
mod svg;

use anyhow::{Context, Result, ensure};
use serde::de::DeserializeOwned;

use self::report::{Packets, Programming, Rates, Report, Soak, Way, Work};
use crate::cmd::{Cmd, step};
use crate::paths::Layout;
use crate::process::write_atomic;

/// The command line.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Arguments {
    /// Few rounds and small sizes: shows in minutes that it works; the figures are coarse.
    #[arg(long)]
    quick: bool,
    /// Only these parts.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Services in all, one measurement of connections each; 1,1000,5000,30000 when not given.
    #[arg(long)]
    services: Option<String>,
    /// Services × endpoints to program; 5000x3,10000x10,30000x10,1x10000 when not given.
    #[arg(long)]
    sizes: Option<String>,
    /// Peers to measure (iptables, iptables-legacy, nftables); iptables and nftables when not given, `none` for none.
    #[arg(long)]
    peer: Option<String>,
    /// Seconds after which a kind of work ends although its interval is wider than 1 %; 600 when not given.
    #[arg(long)]
    seconds: Option<u32>,
    /// Only kill and exchange the agent under load, for so many seconds; anything that fails is an error.
    #[arg(long, value_name = "SECONDS")]
    soak: Option<u32>,
    /// With --soak: another keelson-agent to upgrade and downgrade to in turn.
    #[arg(long, requires = "soak")]
    other_agent: Option<std::path::PathBuf>,
    /// Take the release binaries as they are.
    #[arg(long)]
    no_build: bool,
}

/// A part of the measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// What a connection through a ClusterIP costs.
    Connections,
    /// How long programming takes, and what it occupies.
    Programming,
    /// What a packet from outside costs, and how many of them are forwarded.
    Packets,
    /// What pods of one node, and of two, gain by their short way.
    Pods,
}

impl Arguments {
    fn does(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }

    fn services(&self) -> &str {
        self.services.as_deref().unwrap_or(if self.quick { "1,1000" } else { "1,1000,5000,30000" })
    }

    fn sizes(&self) -> &str {
        self.sizes.as_deref().unwrap_or(if self.quick {
            "1000x3"
        } else {
            "5000x3,10000x10,30000x10,1x10000"
        })
    }

    fn seconds(&self) -> u32 {
        self.seconds.unwrap_or(if self.quick { 5 } else { 600 })
    }

    fn peers(&self) -> &str {
        self.peer.as_deref().unwrap_or("iptables,nftables")
    }
}

/// Builds, measures, prints and saves.
pub(crate) fn run(layout: &Layout, arguments: &Arguments) -> Result<()> {
    crate::preflight::require_root()?;
    crate::setup::forwarding_peers()?;
    if !arguments.no_build {
        crate::build_ebpf::run(&layout.repo)?;
        step("building lb-bench and keelson-agent", || {
            crate::binaries::build_only(&layout.repo, &["lb-bench", "keelson-agent"])
        })?;
    }
    if let Some(seconds) = arguments.soak {
        return soak(layout, arguments, seconds);
    }
    let mut report = Report::new(arguments.quick)?;
    if arguments.does(Part::Connections) {
        report.connections = step("connections", || connections(layout, arguments))?;
    }
    if arguments.does(Part::Programming) {
        report.programming = step("programming", || programming(layout, arguments))?;
    }
    if arguments.does(Part::Packets) {
        report.packets = step("packets", || packets(layout, arguments))?;
        report.rates = Some(step("rates of packets", || rates(layout, arguments))?);
    }
    if arguments.does(Part::Pods) {
        report.pods = step("pods of one node", || pods(layout, arguments, &[]))?;
        report.far_pods = step("pods of two nodes", || pods(layout, arguments, &["--far"]))?;
    }
    report.judge();
    report.print();
    let picture = layout.repo.join("target/bench/lb.svg");
    write_atomic(&picture, svg::chart(&report).as_bytes()).context("saving the picture")?;
    super::save(layout, "lb", &report)
}

fn connections(layout: &Layout, arguments: &Arguments) -> Result<Vec<Way>> {
    let seconds = arguments.seconds().to_string();
    let block = if arguments.quick { "500" } else { "2000" };
    measured(
        layout,
        &[
            "connections",
            "--services",
            arguments.services(),
            "--seconds",
            &seconds,
            "--block",
            block,
            "--peer",
            arguments.peers(),
        ],
    )
}

fn pods(layout: &Layout, arguments: &Arguments, which: &[&str]) -> Result<Vec<Work>> {
    let seconds = arguments.seconds().to_string();
    let block = if arguments.quick { "500" } else { "2000" };
    measured(layout, &[&["pods", "--seconds", &seconds, "--block", block], which].concat())
}

fn packets(layout: &Layout, arguments: &Arguments) -> Result<Vec<Packets>> {
    let runs = if arguments.quick { "1000" } else { "4000" };
    measured(layout, &["packets", "--services", arguments.services(), "--runs", runs])
}

fn rates(layout: &Layout, arguments: &Arguments) -> Result<Rates> {
    let (rounds, block) = if arguments.quick { ("2", "100") } else { ("10", "1000") };
    measured(layout, &["rates", "--rounds", rounds, "--block", block, "--peer", arguments.peers()])
}

fn programming(layout: &Layout, arguments: &Arguments) -> Result<Vec<Programming>> {
    let agent = layout.binary("keelson-agent");
    let agent = agent.to_str().context("a checkout path in UTF-8")?;
    let changes = if arguments.quick { "20" } else { "500" };
    measured(
        layout,
        &[
            "programming",
            "--agent",
            agent,
            "--sizes",
            arguments.sizes(),
            "--changes",
            changes,
            "--peer",
            arguments.peers(),
        ],
    )
}

/// Kills and exchanges the agent under load; anything that failed is an error.
fn soak(layout: &Layout, arguments: &Arguments, seconds: u32) -> Result<()> {
    let agent = layout.binary("keelson-agent");
    let agent = agent.to_str().context("a checkout path in UTF-8")?;
    let seconds = seconds.to_string();
    let mut options = vec!["soak", "--agent", agent, "--seconds", &seconds];
    if let Some(other) = &arguments.other_agent {
        options.extend(["--other", other.to_str().context("a path in UTF-8")?]);
    }
    let soak: Soak = step("killing and exchanging the agent under load", || measured(layout, &options))?;
    println!("{}", soak.table());
    super::save(layout, "lb-soak", &soak)?;
    ensure!(soak.failures.is_empty(), "not everything went on:\n  {}", soak.failures.join("\n  "));
    Ok(())
}

fn measured<T: DeserializeOwned>(layout: &Layout, options: &[&str]) -> Result<T> {
    let text = Cmd::new(layout.binary("lb-bench")).args(options).output_with_progress()?;
    serde_json::from_str(&text).context("parsing what lb-bench printed")
}
