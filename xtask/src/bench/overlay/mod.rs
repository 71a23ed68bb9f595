//! `bench overlay`: the tunnel between two nodes of `up --nodes N`, beside a VXLAN device set up as flannel sets up its
//! own, both as a ratio to the same link without a tunnel.
//!
//! All three paths end in the same two nodes: the nodes' addresses on the fabric, the addresses of the agent's tunnel
//! devices, and those of the second pair of devices. A round measures each path twice, forth and back (A B C C B A), and
//! the next one begins with another path; a ratio is taken within a round, so that what slows the machine slows both. Rounds
//! go on until the interval of keelson ÷ flannel is narrow enough, or the time is over. Beside it stands the same ratio of
//! flannel's two measurements of a round, which must be 1 within its interval.

mod traffic;

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use super::machine::Machine;
use super::stats::{Interval, Round, paired, summary};
use crate::paths::Layout;
use crate::status::kubectl;
use crate::{config, down, fabric, up};

pub(crate) use traffic::Peer;

/// Rounds at least of a whole run.
const LEAST: usize = 12;

/// Options of `bench overlay`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Few short rounds: shows that it works; the figures are coarse.
    #[arg(long)]
    quick: bool,
    /// Half of the interval's width at which a line is done, as a part of the ratio; 0.01 when not given.
    #[arg(long)]
    within: Option<f64>,
    /// Seconds for each line at the most; 300, or 10 with --quick, when not given.
    #[arg(long)]
    seconds: Option<u64>,
    /// Milliseconds of each measurement; 250, or 100 with --quick, when not given.
    #[arg(long)]
    millis: Option<u64>,
    /// Parallel connections of the measurement with many streams.
    #[arg(long, default_value_t = 8)]
    streams: u32,
    /// Where no nodes run and two are brought up for this: take the binaries in target/release as they are.
    #[arg(long)]
    no_build: bool,
}

impl Arguments {
    fn within(&self) -> f64 {
        self.within.unwrap_or(0.01)
    }

    fn limit(&self) -> Duration {
        Duration::from_secs(self.seconds.unwrap_or(if self.quick { 10 } else { 300 }))
    }

    fn millis(&self) -> u64 {
        self.millis.unwrap_or(if self.quick { 100 } else { 250 })
    }

    /// Rounds at least, however narrow the interval is.
    fn least(&self) -> usize {
        if self.quick { 3 } else { LEAST }
    }
}

/// The peer's device: flannel's settings, with an identifier of its own.
const DEVICE: &str = "flannel.99";
const VNI: &str = "99";
/// flannel's default port, shared by both tunnels.
const PORT: &str = "8472";

/// One way between the two nodes.
struct Way {
    name: &'static str,
    to: IpAddr,
}

#[derive(Serialize)]
struct Line {
    what: &'static str,
    unit: &'static str,
    rounds: usize,
    direct: f64,
    keelson: f64,
    flannel: f64,
    /// Keelson ÷ without a tunnel; requests are counted, not timed, so that more is always better.
    keelson_to_direct: Option<Interval>,
    flannel_to_direct: Option<Interval>,
    keelson_to_flannel: Option<Interval>,
    /// The control: flannel's first measurements of the rounds ÷ its second ones.
    flannel_to_itself: Option<Interval>,
}

impl Line {
    /// Not below flannel, as far as the rounds can tell.
    fn is_met(&self) -> bool {
        self.keelson_to_flannel.is_some_and(|interval| interval.high >= 1.0)
    }
}

#[derive(Serialize)]
struct Report {
    machine: Machine,
    quick: bool,
    millis: u64,
    streams: u32,
    lines: Vec<Line>,
}

/// Measures and reports, between two nodes that run, or that are brought up for it and taken down after it.
pub(crate) fn run(layout: &Layout, arguments: &Arguments) -> Result<()> {
    super::interrupt::watch()?;
    if layout.nodes().len() >= 2 {
        return measure(layout, arguments);
    }
    if up::running(layout).is_some() {
        bail!(
            "`bench overlay` needs two nodes, and one runs: `cargo xtask down`, then again; or \
             `cargo xtask up --detach --nodes 2` for nodes that stay"
        );
    }
    let options = up::Options {
        detach: true,
        no_build: arguments.no_build,
        cgroup_root: None,
        nodes: Some(2),
        max_pods: config::MAX_PODS,
        overlay: config::Overlay::default(),
    };
    let measured = up::run(layout, &options).and_then(|()| measure(layout, arguments));
    let down = down::run(layout).context("taking the two nodes down");
    measured.and(down)
}

fn measure(layout: &Layout, arguments: &Arguments) -> Result<()> {
    let machine = Machine::look()?;
    let nodes = layout.nodes();
    let [one, two, ..] = nodes.as_slice() else { bail!("two nodes are needed, {} are there", nodes.len()) };
    let target = pod_network(layout, &two.name())?;
    let _peer = FlannelLike::make(one, two)?;
    let paths = [
        Way { name: "direct", to: node_address(two)?.into() },
        Way { name: "keelson", to: target },
        Way { name: "flannel", to: Ipv4Addr::new(10, 99, 2, 0).into() },
    ];
    let server = traffic::Server::start(two)?;
    let kinds = [
        ("1 stream", "Gbit/s", traffic::Kind::Stream(1)),
        ("many streams", "Gbit/s", traffic::Kind::Stream(arguments.streams)),
        ("request/response", "1/s", traffic::Kind::Request),
    ];
    let mut lines = Vec::new();
    for (what, unit, kind) in kinds {
        let measure = |index: usize| {
            super::interrupt::check()?;
            let path: &Way = &paths[index];
            let value = server.measure(one, path.to, kind, arguments.millis());
            value.with_context(|| format!("{what} over {}", path.name))
        };
        // Warms caches and congestion windows up.
        (0..paths.len()).try_for_each(|index| measure(index).map(drop))?;
        let values = rounds(arguments, measure)?;
        lines.push(line(what, unit, &values));
    }
    let report = Report {
        machine,
        quick: arguments.quick,
        millis: arguments.millis(),
        streams: arguments.streams,
        lines,
    };
    print(&report);
    super::save(layout, "overlay", &report)
}

/// Measurements of the three paths, by round.
type Values = [Vec<Vec<f64>>; 3];

fn rounds(arguments: &Arguments, measure: impl Fn(usize) -> Result<f64>) -> Result<Values> {
    let end = Instant::now() + arguments.limit();
    let mut values: Values = [const { Vec::new() }; 3];
    loop {
        let first = values[0].len();
        let forth = (0..3).map(|step| (first + step) % 3);
        let mut found = [const { Vec::new() }; 3];
        for index in forth.clone().chain(forth.rev()) {
            found[index].push(measure(index)?);
        }
        values.iter_mut().zip(found).for_each(|(all, round)| all.push(round));
        let narrow = against(&values[1], &values[2]).is_some_and(|it| it.uncertainty() <= arguments.within());
        if values[0].len() >= arguments.least() && (narrow || Instant::now() >= end) {
            return Ok(values);
        }
    }
}

fn against(ours: &[Vec<f64>], base: &[Vec<f64>]) -> Option<Interval> {
    let rounds: Vec<Round> = ours.iter().cloned().zip(base.iter().cloned()).collect();
    paired(&rounds)
}

fn line(what: &'static str, unit: &'static str, [direct, keelson, flannel]: &Values) -> Line {
    let middle = |rounds: &[Vec<f64>]| summary(&rounds.concat()).median;
    let part = |index: usize| -> Vec<Vec<f64>> { flannel.iter().map(|round| vec![round[index]]).collect() };
    Line {
        what,
        unit,
        rounds: direct.len(),
        direct: middle(direct),
        keelson: middle(keelson),
        flannel: middle(flannel),
        keelson_to_direct: against(keelson, direct),
        flannel_to_direct: against(flannel, direct),
        keelson_to_flannel: against(keelson, flannel),
        flannel_to_itself: against(&part(0), &part(1)),
    }
}

fn print(report: &Report) {
    let is_quick = if report.quick { " (quick: coarse figures)" } else { "" };
    println!("\nthe network between nodes{is_quick}\n{}\n", report.machine);
    println!(
        "{:<17} {:>6} {:>6} {:>9} {:>9} {:>9}  {:<20} {:<20} {:<20} {:<20}",
        "",
        "",
        "rounds",
        "no tunnel",
        "keelson",
        "flannel",
        "keelson ÷ none",
        "flannel ÷ none",
        "keelson ÷ flannel",
        "flannel ÷ itself"
    );
    let shown = |interval: Option<Interval>| {
        interval
            .map_or_else(|| "-".to_owned(), |it| format!("{:.3} ({:.3}–{:.3})", it.value, it.low, it.high))
    };
    for line in &report.lines {
        println!(
            "{:<17} {:>6} {:>6} {:>9.2} {:>9.2} {:>9.2}  {:<20} {:<20} {:<20} {:<20}",
            line.what,
            line.unit,
            line.rounds,
            line.direct,
            line.keelson,
            line.flannel,
            shown(line.keelson_to_direct),
            shown(line.flannel_to_direct),
            shown(line.keelson_to_flannel),
            shown(line.flannel_to_itself)
        );
    }
    let met = report.lines.iter().filter(|line| line.is_met()).count();
    println!(
        "\ngoal: keelson ÷ flannel not below 1 within its interval, in every line\ngoals met: {met} of {}",
        report.lines.len()
    );
}

fn node_address(node: &Layout) -> Result<Ipv4Addr> {
    Ok(fabric::address(fabric::number(&node.name()).context("a node without a number")?))
}

/// The address of a node's tunnel device: the first of its pod range.
fn pod_network(layout: &Layout, node: &str) -> Result<IpAddr> {
    let range = kubectl(layout, &["get", "node", node, "-o", "jsonpath={.spec.podCIDR}"])?;
    let network = range.trim().split('/').next().unwrap_or_default().parse();
    network.with_context(|| format!("node {node} has the pod range {range:?}"))
}

/// The second tunnel; goes at the end.
struct FlannelLike<'l>([&'l Layout; 2]);

impl<'l> FlannelLike<'l> {
    fn make(one: &'l Layout, two: &'l Layout) -> Result<Self> {
        let this = Self([one, two]);
        this.remove();
        let mut macs = Vec::new();
        for (number, node) in (1..).zip(this.0) {
            let local = node_address(node)?.to_string();
            ip(
                node,
                &[
                    "link",
                    "add",
                    DEVICE,
                    "mtu",
                    "1450",
                    "type",
                    "vxlan",
                    "id",
                    VNI,
                    "dev",
                    "eth0",
                    "local",
                    &local,
                    "dstport",
                    PORT,
                    "nolearning",
                ],
            )?;
            ip(node, &["address", "add", &format!("10.99.{number}.0/32"), "dev", DEVICE])?;
            ip(node, &["link", "set", DEVICE, "up"])?;
            let shown = ip(node, &["-o", "link", "show", DEVICE])?;
            let mac = shown.split_whitespace().skip_while(|word| *word != "link/ether").nth(1);
            macs.push(mac.context("a tunnel device without an address")?.to_owned());
        }
        for (own, other) in [(0, 1), (1, 0)] {
            let (node, number) = (this.0[own], other + 1);
            let (gateway, mac) = (format!("10.99.{number}.0"), &macs[other]);
            let remote = node_address(this.0[other])?.to_string();
            ip(node, &["neigh", "add", &gateway, "lladdr", mac, "dev", DEVICE, "nud", "permanent"])?;
            inside(node, "bridge", &["fdb", "add", mac, "dev", DEVICE, "dst", &remote])?;
            ip(
                node,
                &["route", "add", &format!("10.99.{number}.0/24"), "via", &gateway, "dev", DEVICE, "onlink"],
            )?;
        }
        Ok(this)
    }

    fn remove(&self) {
        for node in self.0 {
            // Not there is what is wanted.
            ip(node, &["link", "del", DEVICE]).ok();
        }
    }
}

impl Drop for FlannelLike<'_> {
    fn drop(&mut self) {
        self.remove();
    }
}

fn ip(node: &Layout, args: &[&str]) -> Result<String> {
    inside(node, "ip", args)
}

fn inside(node: &Layout, program: &str, args: &[&str]) -> Result<String> {
    let output = fabric::inside(node, Path::new(program))?.args(args).output()?;
    ensure!(
        output.status.success(),
        "{program} {}: {}",
        args.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
