//! What was measured, the goals, and the tables.

use std::fmt::Write as _;

use anyhow::Result;
use serde::{Deserialize, Serialize};

const MIB: f64 = 1024.0 * 1024.0;
/// Half the width of an interval at which a ratio is still judged.
const WIDEST: f64 = 0.03;

/// Everything that was measured, and on what.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    kernel: String,
    processors: usize,
    /// Load of the machine before the measurement; anything near or above the processors spoils the figures.
    load_before: String,
    quick: bool,
    /// What connections cost, by number of services.
    pub(super) connections: Vec<Way>,
    /// How long programming takes, by size.
    pub(super) programming: Vec<Programming>,
    /// What a packet from outside costs, by number of services.
    pub(super) packets: Vec<Packets>,
    /// Packets from outside that a NodePort forwards.
    pub(super) rates: Option<Rates>,
    /// Pods of one node, over a plain bridge.
    pub(super) pods: Vec<Work>,
    /// Pods of two nodes, over plain bridges and a tunnel.
    pub(super) far_pods: Vec<Work>,
    goals: Vec<Goal>,
}

/// A promise and what became of it.
#[derive(Debug, Serialize)]
struct Goal {
    what: String,
    found: String,
    met: bool,
}

/// One number of services.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Way {
    /// Services in all.
    pub(super) services: u32,
    load_ms: f64,
    peers: Vec<Peer>,
    /// Connections, requests, calls.
    pub(super) works: Vec<Work>,
    hook_service_ns: f64,
    hook_other_ns: f64,
    call_added_ns: f64,
}

#[derive(Debug, Deserialize, Serialize)]
struct Peer {
    name: String,
    version: Option<String>,
    absent: Option<String>,
    load_ms: Option<f64>,
}

/// One kind of work.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Work {
    /// `Connections`, `Requests` or `Calls`.
    #[serde(rename = "work")]
    pub(super) kind: String,
    rounds: usize,
    precise: bool,
    direct: Figure,
    /// Direct once more.
    pub(super) control: Figure,
    /// Through our hooks.
    pub(super) ours: Figure,
    /// Through the peers.
    #[serde(default)]
    pub(super) peers: Vec<(String, Figure)>,
}

/// One way of forwarding.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Figure {
    per_sec: f64,
    low: f64,
    high: f64,
    p50_us: f64,
    p99_us: f64,
    /// Rate ÷ the direct one's.
    pub(super) ratio: Option<Interval>,
}

/// A mean with its 95 % interval.
#[derive(Debug, Clone, Copy, Deserialize, Serialize)]
pub(super) struct Interval {
    /// Mean of the rounds.
    pub(super) mean: f64,
    /// Lower end.
    pub(super) low: f64,
    /// Upper end.
    pub(super) high: f64,
}

/// One size.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Programming {
    size: Size,
    cold_written: f64,
    cold_answered: f64,
    change_written_ms: f64,
    change_answered_ms: f64,
    change_answered_p99_ms: f64,
    memory: Memory,
    peers: Vec<ProgrammingPeer>,
}

#[derive(Debug, Deserialize, Serialize)]
struct Size {
    services: u32,
    endpoints: u32,
}

#[derive(Debug, Deserialize, Serialize)]
struct Memory {
    maps: u64,
    each_map: Vec<(String, u64)>,
    process: u64,
    process_peak: u64,
}

#[derive(Debug, Deserialize, Serialize)]
struct ProgrammingPeer {
    name: String,
    absent: Option<String>,
    cold: Option<f64>,
    change_ms: Option<f64>,
}

/// One number of services.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Packets {
    services: u32,
    clock_ns: f64,
    tcx_first_ns: f64,
    tcx_later_ns: f64,
    tcx_other_ns: f64,
    xdp_later_ns: Option<f64>,
    xdp_other_ns: Option<f64>,
}

/// What became of frames for a NodePort.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Rates {
    rounds: u32,
    ways: Vec<Rate>,
}

/// One way of forwarding them.
#[derive(Debug, Deserialize, Serialize)]
struct Rate {
    name: String,
    version: Option<String>,
    absent: Option<String>,
    per_sec: f64,
    spread: (f64, f64),
    cpu_ns: f64,
    lost: f64,
    over_iptables: Option<Interval>,
}

impl Rates {
    fn table(&self) -> String {
        let mut text = format!(
            "\n  {:<16} {:>12} {:>22} {:>14} {:>7}  ÷ iptables [95 %]   ({} rounds; packets for a NodePort, one processor)\n",
            "", "per s", "spread", "ns of the CPU", "lost", self.rounds
        );
        for way in &self.ways {
            if let Some(why) = &way.absent {
                // Writing to a String cannot fail, here and below.
                writeln!(text, "  {:<16} absent: {why}", way.name).ok();
                continue;
            }
            writeln!(
                text,
                "  {:<16} {:>12.0} {:>22} {:>14.0} {:>6.1}%  {}",
                way.name,
                way.per_sec,
                format!("{:.0}..{:.0}", way.spread.0, way.spread.1),
                way.cpu_ns,
                way.lost * 100.0,
                match way.over_iptables {
                    Some(ratio) => interval(ratio),
                    None if way.name == "iptables" => "1".to_owned(),
                    None => "not measured".to_owned(),
                },
            )
            .ok();
        }
        text
    }
}

/// What a soak told.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Soak {
    kills: u64,
    completed: u64,
    layouts: u64,
    empty_lists: u64,
    exchanges: u64,
    connections: u64,
    datagrams: u64,
    requests: u64,
    /// Everything that failed.
    pub(super) failures: Vec<String>,
    verified: String,
}

impl Soak {
    /// For people.
    pub(super) fn table(&self) -> String {
        format!(
            "\nkill -9                       {:>9}\n  starts that met a new layout {:>8}\n  with an API that listed nothing {:>5}\n  \
             exchanges of the program     {:>8}\n  completed before the next    {:>8}\nconnections                   {:>9}\n\
             datagrams                     {:>9}\nrequests on open connections  {:>9}\nfailures                      {:>9}\n{}",
            self.kills,
            self.layouts,
            self.empty_lists,
            self.exchanges,
            self.completed,
            self.connections,
            self.datagrams,
            self.requests,
            self.failures.len(),
            self.verified
        )
    }
}

impl Report {
    /// An empty report that tells what is measured on what.
    pub(super) fn new(quick: bool) -> Result<Self> {
        Ok(Self {
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            processors: std::thread::available_parallelism()?.get(),
            load_before: std::fs::read_to_string("/proc/loadavg")?.trim().to_owned(),
            quick,
            connections: Vec::new(),
            programming: Vec::new(),
            packets: Vec::new(),
            rates: None,
            pods: Vec::new(),
            far_pods: Vec::new(),
            goals: Vec::new(),
        })
    }

    /// Holds the figures against the goals.
    pub(super) fn judge(&mut self) {
        let mut goals = Vec::new();
        for way in &self.connections {
            for work in &way.works {
                let goal = match work.kind.as_str() {
                    "Connections" => 0.975,
                    "Requests" => 0.99,
                    _ => continue,
                };
                let Some(ratio) = work.ours.ratio else { continue };
                // A wide interval reaches anything, and tells nothing.
                let wide = ratio.high - ratio.low > 2.0 * WIDEST;
                goals.push(Goal {
                    what: format!("{} ÷ direct at {} services reach {goal}", work.kind, way.services),
                    found: format!("{}{}", interval(ratio), if wide { " too wide to tell" } else { "" }),
                    met: ratio.high >= goal && !wide,
                });
            }
        }
        let near = self.pods.iter().map(|work| (work, "one node ÷ plain bridge"));
        let far = self.far_pods.iter().map(|work| (work, "two nodes ÷ plain tunnel"));
        for (work, of) in near.chain(far) {
            let Some(ratio) = work.ours.ratio else { continue };
            goals.push(Goal {
                what: format!("{} of pods of {of} reach 1.04", work.kind),
                found: interval(ratio),
                met: ratio.high >= 1.04 && ratio.high - ratio.low <= 2.0 * WIDEST,
            });
        }
        for way in self.rates.iter().flat_map(|rates| &rates.ways) {
            let goal = match way.name.as_str() {
                "XDP" => 4.0,
                "TCX" => 1.5,
                _ => continue,
            };
            let Some(ratio) = way.over_iptables else { continue };
            goals.push(Goal {
                what: format!("packets per second, {} ÷ iptables reach {goal}", way.name),
                found: interval(ratio),
                met: ratio.mean >= goal,
            });
        }
        for size in &self.programming {
            let name = format!("{} × {}", size.size.services, size.size.endpoints);
            let mut at_most = |what: &str, found: f64, limit: f64, unit: &str| {
                goals.push(Goal {
                    what: format!("{name}: {what} ≤ {limit} {unit}"),
                    found: format!("{found:.3} {unit}"),
                    met: found <= limit,
                });
            };
            match (size.size.services, size.size.endpoints) {
                (5000, 3) => at_most("from nothing to the last write", size.cold_written, 0.05, "s"),
                (10_000, 10) => {
                    at_most("from nothing to the last write", size.cold_written, 0.3, "s");
                    at_most("maps and agent", mib(size.memory.maps + size.memory.process), 32.0, "MiB");
                    at_most("change to correct connection, p99", size.change_answered_p99_ms, 50.0, "ms");
                }
                _ => continue,
            }
            at_most("one endpoint changed", size.change_written_ms, 0.2, "ms");
        }
        self.goals = goals;
    }

    /// Tables on the terminal.
    pub(super) fn print(&self) {
        println!(
            "\nservice data plane; kernel {}, {} processors, load before {}{}",
            self.kernel,
            self.processors,
            self.load_before,
            if self.quick { " (quick: coarse figures)" } else { "" }
        );
        for way in &self.connections {
            print!("{}", way.table());
        }
        if !self.programming.is_empty() {
            print!("{}", programming_table(&self.programming));
        }
        if !self.pods.is_empty() {
            println!(
                "\npods of one node: a ClusterIP with everything on, over the pod's address and a plain bridge"
            );
            print!("{}", works_table(&self.pods));
        }
        if !self.far_pods.is_empty() {
            println!(
                "\npods of two nodes: a ClusterIP with everything on, over the pod's address, plain bridges and a plain tunnel"
            );
            print!("{}", works_table(&self.far_pods));
        }
        if !self.packets.is_empty() {
            print!("{}", packets_table(&self.packets));
        }
        if let Some(rates) = &self.rates {
            print!("{}", rates.table());
        }
        println!();
        for goal in &self.goals {
            let met = if goal.met { "met" } else { "NOT MET" };
            println!("  {:<58} {:<26} {met}", goal.what, goal.found);
        }
        let met = self.goals.iter().filter(|goal| goal.met).count();
        println!("goals met: {met} of {}", self.goals.len());
    }
}

impl Way {
    fn table(&self) -> String {
        let mut text = format!(
            "\n{} services: hook {:.0} ns per connect of a service, {:.0} ns of another address; a call of connect takes \
             {:.0} ns more\n",
            self.services, self.hook_service_ns, self.hook_other_ns, self.call_added_ns
        );
        for peer in &self.peers {
            let line = match (&peer.absent, &peer.version) {
                (Some(why), _) => format!("absent: {why}"),
                (None, version) => version.clone().unwrap_or_default(),
            };
            // Writing to a String cannot fail, here and below.
            writeln!(text, "  {}: {line}", peer.name).ok();
        }
        text + &works_table(&self.works)
    }
}

fn works_table(works: &[Work]) -> String {
    let mut text = format!(
        "  {:<12} {:<16} {:>10} {:>19} {:>9} {:>9}  ÷ direct [95 %]\n",
        "", "", "per s", "spread of 5", "p50 µs", "p99 µs"
    );
    for work in works {
        let note = format!("{} rounds{}", work.rounds, if work.precise { "" } else { ", wider than asked" });
        let own = [("direct", &work.direct), ("direct again", &work.control), ("keelson", &work.ours)];
        let peers = work.peers.iter().map(|(name, figure)| (name.as_str(), figure));
        for (index, (name, figure)) in own.into_iter().chain(peers).enumerate() {
            let head = if index == 0 { work.kind.as_str() } else { "" };
            writeln!(
                text,
                "  {head:<12} {name:<16} {:>10.0} {:>19} {:>9.2} {:>9.2}  {}{}",
                figure.per_sec,
                format!("{:.0}..{:.0}", figure.low, figure.high),
                figure.p50_us,
                figure.p99_us,
                figure.ratio.map_or("1".to_owned(), interval),
                if index == 0 { format!("   ({note})") } else { String::new() }
            )
            .ok();
        }
    }
    text
}

fn programming_table(all: &[Programming]) -> String {
    let mut text = format!(
        "\n  {:<12} {:<16} {:>12} {:>12} {:>13} {:>13} {:>10}  memory\n",
        "programming", "", "cold: write", "to answer", "change: write", "to answer", "p99"
    );
    for size in all {
        writeln!(
            text,
            "  {:<12} {:<16} {:>10.3} s {:>10.3} s {:>10.3} ms {:>10.3} ms {:>7.2} ms  maps {:.1} MiB, agent {:.1} MiB (peak {:.1})",
            format!("{} × {}", size.size.services, size.size.endpoints),
            "keelson",
            size.cold_written,
            size.cold_answered,
            size.change_written_ms,
            size.change_answered_ms,
            size.change_answered_p99_ms,
            mib(size.memory.maps),
            mib(size.memory.process),
            mib(size.memory.process_peak),
        )
        .ok();
        for peer in &size.peers {
            match (&peer.absent, peer.cold, peer.change_ms) {
                (None, Some(cold), Some(change)) => writeln!(
                    text,
                    "  {:<12} {:<16} {cold:>10.3} s {:>12} {change:>10.3} ms",
                    "", peer.name, "-"
                ),
                (why, _, _) => {
                    writeln!(
                        text,
                        "  {:<12} {:<16} absent: {}",
                        "",
                        peer.name,
                        why.clone().unwrap_or_default()
                    )
                }
            }
            .ok();
        }
    }
    text
}

fn packets_table(all: &[Packets]) -> String {
    let mut text = format!(
        "\n  {:<12} {:>10} {:>10} {:>14} {:>10} {:>14}  ns a packet by BPF_PROG_TEST_RUN, the clock's taken off\n",
        "services", "TCX: first", "later", "of no service", "XDP: later", "of no service"
    );
    let or_none = |ns: Option<f64>| ns.map_or("none".to_owned(), |ns| format!("{ns:.0}"));
    for one in all {
        let net = |ns: f64| (ns - one.clock_ns).max(0.0);
        writeln!(
            text,
            "  {:<12} {:>10.0} {:>10.0} {:>14.0} {:>10} {:>14}",
            one.services,
            net(one.tcx_first_ns),
            net(one.tcx_later_ns),
            one.tcx_other_ns,
            or_none(one.xdp_later_ns.map(net)),
            or_none(one.xdp_other_ns),
        )
        .ok();
    }
    text
}

fn interval(ratio: Interval) -> String {
    format!("{:.3} [{:.3}, {:.3}]", ratio.mean, ratio.low, ratio.high)
}

fn mib(bytes: u64) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "megabytes for people")]
    let bytes = bytes as f64;
    bytes / MIB
}
