//! How many packets from outside a NodePort forwards in a second, and what one costs the processor: our program in the
//! driver (XDP), ours behind it (TCX), and each peer's rules.
//!
//! ```text
//! around: wire N ─ veth ─ outer N │ node │ back N ─ veth ─ sink N: around
//! ```
//! Everything happens on one processor, with one generator for all ([`super::live`]): frames of one connection that is
//! open already, from a client outside to a NodePort, whose one endpoint is on another node, behind the device `back`.
//! They are counted where they arrive, and dropped there. The way "dropped at once" drops them at the first device: what
//! the generator takes, which is in every other figure too. Rounds go A B B A.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4},
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ebpf_loader::{DataPlane, DesiredWay, Device, Side, SourcePrefix};
use serde::Serialize;

use super::{
    live::{Generator, swallow},
    namespaces::pin,
    peers::Peer,
    scene::{Scene, Tested},
    statistics::{Interval, interval, median},
};
use crate::{
    arena::{Arena, ip},
    frames::{ACK, Carried, frame},
    places::{Place, forward, without_offload},
};

/// The processor that does all of it.
const CPU: usize = 1;
/// What the peers are: the one that the goals name.
const BASE: &str = "iptables";
/// Payload that makes a frame 64 bytes long.
const PAYLOAD: [u8; 10] = [7; 10];
/// Frames before anything counts.
const WARM: u32 = 20_000;
/// Link addresses: the node's devices', as frames of the tests are addressed, and the neighbour's behind them.
const NODE_MAC: &str = "02:00:00:00:00:01";
const NEXT_MAC: &str = "02:00:00:00:09:09";

/// What to measure.
#[derive(Clone)]
pub struct Options {
    /// Rounds, two blocks of each way.
    pub rounds: u32,
    /// How long a block shall take.
    pub block: Duration,
    /// Who is measured beside us.
    pub peers: Vec<Arc<dyn Peer>>,
}

/// What came out.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Rounds that were measured.
    pub rounds: u32,
    /// Every way, measured or absent.
    pub ways: Vec<WayReport>,
}

/// A way of forwarding.
#[derive(Clone, Debug, Serialize)]
pub struct WayReport {
    /// Its name.
    pub name: String,
    /// Program and version, of a peer.
    pub version: Option<String>,
    /// Why it was not measured.
    pub absent: Option<String>,
    /// Packets that arrived in a second: the median of all blocks.
    pub per_sec: f64,
    /// The slowest and the fastest block.
    pub spread: (f64, f64),
    /// Nanoseconds of the processor for one that arrived, the generator's part included.
    pub cpu_ns: f64,
    /// Share of the packets that were lost on the way.
    pub lost: f64,
    /// Packets in a second ÷ the iptables peer's, where it was measured.
    pub over_iptables: Option<Interval>,
}

/// A way that is ready.
struct Way {
    name: String,
    version: Option<String>,
    generator: Arc<Generator>,
    /// The device around where packets are counted.
    counted: String,
    /// Frames of a block.
    count: u32,
    blocks: Vec<Block>,
    /// What holds namespaces, and programs on devices.
    _held: (Option<Place>, OwnedFd),
}

/// A block of one way.
#[derive(Clone, Copy)]
struct Block {
    per_sec: f64,
    cpu_ns: f64,
    lost: f64,
}

/// Addresses and names of a way's devices.
#[derive(Clone)]
struct Ground {
    number: u8,
    outer: String,
    wire: String,
    back: String,
    sink: String,
}

impl Ground {
    fn new(number: u8) -> Self {
        let name = |what: &str| format!("{what}{number}");
        Self { number, outer: name("outer"), wire: name("wire"), back: name("back"), sink: name("sink") }
    }

    fn node(&self) -> Ipv4Addr {
        Ipv4Addr::new(198, 18, self.number, 1)
    }

    fn node_port(&self) -> SocketAddrV4 {
        SocketAddrV4::new(self.node(), 30_000 + u16::from(self.number))
    }

    fn client(&self) -> SocketAddr {
        SocketAddr::new(Ipv4Addr::new(198, 18, self.number, 2).into(), 40_000)
    }

    fn behind(&self, host: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 244, self.number, host)
    }

    fn tested(&self) -> Tested {
        Tested {
            vip: SocketAddrV4::new(Ipv4Addr::new(10, 96, self.number, 10), 80),
            backend: SocketAddrV4::new(self.behind(2), 8080),
            node_port: Some(self.node_port()),
        }
    }

    /// Makes the node's devices in the calling thread's namespace, with their other ends around.
    fn make(&self, around: i32) -> Result<()> {
        let around = around.to_string();
        for (own, other, address) in
            [(&self.outer, &self.wire, self.node()), (&self.back, &self.sink, self.behind(1))]
        {
            let pair = ["link", "add", own, "address", NODE_MAC, "type", "veth", "peer", "name", other];
            ip(&[&pair[..], &["netns", &around]].concat())?;
            // So that it takes frames that drivers send.
            without_offload(own)?;
            ip(&["addr", "add", &format!("{address}/24"), "dev", own])?;
            ip(&["link", "set", own, "up"])?;
        }
        let next = self.behind(2).to_string();
        ip(&["neigh", "replace", &next, "lladdr", NEXT_MAC, "dev", &self.back, "nud", "permanent"])
    }

    /// The other ends; what holds the program that drops what arrives, and the generator.
    fn around(&self, around: &Place) -> Result<(OwnedFd, Arc<Generator>)> {
        let ground = self.clone();
        around.run(move || ends(&ground))?
    }

    fn way(&self, name: &str, version: Option<String>, node: Option<Place>, around: &Place) -> Result<Way> {
        let (sink, generator) = self.around(around)?;
        Ok(Way {
            name: name.to_owned(),
            version,
            generator,
            counted: self.sink.clone(),
            count: WARM,
            blocks: Vec::new(),
            _held: (node, sink),
        })
    }
}

/// Measures. Needs root, and a kernel with live frames (5.18) and TCX.
pub fn measure(options: &Options) -> Result<Report> {
    ensure!(ebpf_loader::is_built(), "built without the BPF programs: run `cargo xtask build-ebpf` first");
    let arena = Arena::enter(&[])?;
    forward()?;
    let around = Place::empty()?;
    around.run(|| pin(CPU))?;
    let (xdp, tcx) = (Ground::new(1), Ground::new(2));
    let _plane = ours(&arena, &around, &xdp, &tcx)?;
    let mut ways =
        vec![idle(&around)?, xdp.way("XDP", None, None, &around)?, tcx.way("TCX", None, None, &around)?];
    let mut absent = Vec::new();
    for (number, peer) in (3..).zip(&options.peers) {
        match theirs(peer, &Ground::new(number), &around) {
            Ok(way) => ways.push(way),
            Err(error) => absent.push((peer.name().to_owned(), format!("{error:#}"))),
        }
    }
    for way in &mut ways {
        let name = way.name.clone();
        way.start(&around, options.block).with_context(|| format!("the way {name}"))?;
    }
    for _ in 0..options.rounds {
        let order: Vec<usize> = (0..ways.len()).chain((0..ways.len()).rev()).collect();
        for index in order {
            let block = ways[index].block(&around)?;
            ways[index].blocks.push(block);
        }
    }
    let base = ways.iter().find(|way| way.name == BASE).map(|way| way.blocks.clone());
    let mut reports: Vec<WayReport> = ways.iter().map(|way| way.report(base.as_deref())).collect();
    reports.extend(absent.into_iter().map(|(name, why)| WayReport {
        name,
        version: None,
        absent: Some(why),
        per_sec: 0.0,
        spread: (0.0, 0.0),
        cpu_ns: 0.0,
        lost: 0.0,
        over_iptables: None,
    }));
    Ok(Report { rounds: options.rounds, ways: reports })
}

/// Our data plane with both ways, in the arena's namespace.
fn ours(arena: &Arena, around: &Place, xdp: &Ground, tcx: &Ground) -> Result<DataPlane> {
    let grounds = [xdp, tcx];
    for ground in grounds {
        ground.make(around.thread)?;
    }
    let tested = grounds.iter().map(|ground| ground.tested()).collect();
    let mut plane = arena.open()?;
    let report = plane.replace_all(&Scene::new(2, 1, tested).table());
    ensure!(report.refused.is_empty(), "not programmed: {:?}", report.refused);
    let own = grounds.iter().map(|ground| IpAddr::V4(ground.node())).collect();
    plane.set_node_addresses(&own, &own)?;
    plane.hide_clients(Some(xdp.node()), None)?;
    let (mut devices, mut ways) = (Vec::new(), Vec::new());
    for (ground, early) in [(xdp, true), (tcx, false)] {
        for (name, source) in [(&ground.outer, ground.node()), (&ground.back, ground.behind(1))] {
            devices.push(Device {
                index: nix::net::if_::if_nametoindex(name.as_str())?,
                name: name.clone(),
                side: Side::Outer,
                ethernet: true,
                source_v4: Some(source),
                source_v6: None,
                early,
            });
        }
        ways.push(DesiredWay {
            to: SourcePrefix { address: ground.behind(0).into(), bits: 24 },
            device: nix::net::if_::if_nametoindex(ground.back.as_str())?,
            via: None,
            link: Some((link_address(NEXT_MAC)?, link_address(NODE_MAC)?)),
            mtu: 1500,
        });
    }
    let failed = plane.serve_devices(devices);
    ensure!(failed.is_empty(), "{failed:?}");
    plane.set_ways(&ways)?;
    Ok(plane)
}

/// A peer's rules in a namespace of their own.
fn theirs(peer: &Arc<dyn Peer>, ground: &Ground, around: &Place) -> Result<Way> {
    let node = Place::empty()?;
    let (loader, made, thread) = (Arc::clone(peer), ground.clone(), around.thread);
    let version = node.run(move || -> Result<String> {
        let version = loader.version()?;
        forward()?;
        made.make(thread)?;
        loader.load(&Scene::new(1, 1, vec![made.tested()]))?;
        Ok(version)
    })??;
    ground.way(peer.name(), Some(version), Some(node), around)
}

/// What the generator alone takes: frames that the first device drops.
fn idle(around: &Place) -> Result<Way> {
    let ground = Ground::new(0);
    let made = ground.clone();
    let (program, generator) = around.run(move || -> Result<_> {
        ip(&["link", "add", &made.sink, "type", "veth", "peer", "name", &made.wire])?;
        ends(&made)
    })??;
    Ok(Way {
        name: "dropped at once".to_owned(),
        version: None,
        generator,
        counted: ground.sink.clone(),
        count: WARM,
        blocks: Vec::new(),
        _held: (None, program),
    })
}

impl Way {
    /// Sees that packets arrive, and how many of them take as long as a block shall.
    fn start(&mut self, around: &Place, block: Duration) -> Result<()> {
        // The first ones make the connection known, and are not those that are measured.
        self.block(around)?;
        let seen = self.block(around)?;
        ensure!(seen.lost < 0.5, "{:.0} of 100 packets are lost", seen.lost * 100.0);
        let wanted = seen.per_sec * block.as_secs_f64();
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "kept within the range")]
        let count = wanted.clamp(f64::from(WARM), f64::from(u32::MAX / 2)) as u32;
        self.count = count;
        Ok(())
    }

    /// Sends a block and counts what arrives.
    fn block(&self, around: &Place) -> Result<Block> {
        let (generator, counted, count) = (Arc::clone(&self.generator), self.counted.clone(), self.count);
        around.run(move || -> Result<Block> {
            let before = (arrived(&counted)?, busy()?);
            let start = Instant::now();
            generator.send(count)?;
            let seconds = start.elapsed().as_secs_f64();
            let (packets, busy) = (arrived(&counted)? - before.0, busy()?.saturating_sub(before.1));
            #[allow(clippy::cast_precision_loss, reason = "rates for people")]
            let packets = packets as f64;
            ensure!(packets > 0.0, "no packet arrives at {counted}");
            Ok(Block {
                per_sec: packets / seconds,
                cpu_ns: busy.as_secs_f64() * 1e9 / packets,
                lost: (1.0 - packets / f64::from(count)).max(0.0),
            })
        })?
    }

    fn report(&self, base: Option<&[Block]>) -> WayReport {
        let all = |figure: fn(&Block) -> f64| self.blocks.iter().map(figure).collect::<Vec<f64>>();
        let rates = all(|block| block.per_sec);
        let over_iptables = base.and_then(|base| interval(&ratios(&self.blocks, base)));
        WayReport {
            name: self.name.clone(),
            version: self.version.clone(),
            absent: None,
            per_sec: median(&rates),
            spread: (
                rates.iter().copied().fold(f64::INFINITY, f64::min),
                rates.iter().copied().fold(0.0, f64::max),
            ),
            cpu_ns: median(&all(|block| block.cpu_ns)),
            lost: median(&all(|block| block.lost)),
            over_iptables: over_iptables.filter(|_| self.name != BASE),
        }
    }
}

/// Logarithms of the ratio of rates, round by round: a round's two blocks lie around those of the other way.
fn ratios(own: &[Block], base: &[Block]) -> Vec<f64> {
    let rate = |pair: &[Block]| pair.iter().map(|block| 1.0 / block.per_sec).sum::<f64>();
    own.chunks_exact(2).zip(base.chunks_exact(2)).map(|(own, base)| (rate(base) / rate(own)).ln()).collect()
}

/// What drops what arrives at the far end, and the generator at the near one; in their namespace.
fn ends(ground: &Ground) -> Result<(OwnedFd, Arc<Generator>)> {
    for device in [&ground.wire, &ground.sink] {
        ip(&["link", "set", device, "up"])?;
    }
    let sink = swallow(&ground.sink)?;
    let frame = frame(ground.client(), ground.node_port().into(), Carried::Tcp(ACK), &PAYLOAD);
    let generator = Generator::new(frame, nix::net::if_::if_nametoindex(ground.wire.as_str())?)?;
    Ok((sink, Arc::new(generator)))
}

/// Packets that have arrived at a device of the calling thread's namespace.
fn arrived(device: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/thread-self/net/dev")?;
    let mut lines = text.lines().filter_map(|line| line.trim().strip_prefix(device)?.strip_prefix(':'));
    let packets = lines.find_map(|line| line.split_ascii_whitespace().nth(1)?.parse().ok());
    packets.with_context(|| format!("the kernel does not count the packets of {device}"))
}

/// How long the processor was not idle.
fn busy() -> Result<Duration> {
    busy_of(&fs::read_to_string("/proc/stat")?, CPU)
        .or_else(|| busy_of(&fs::read_to_string("/proc/stat").ok()?, 0))
        .context("/proc/stat does not tell what the processor does")
}

fn busy_of(stat: &str, cpu: usize) -> Option<Duration> {
    /// What the kernel counts in here: a hundredth of a second.
    const TICK_MS: u64 = 10;
    let name = format!("cpu{cpu}");
    let line = stat.lines().find(|line| line.split(' ').next() == Some(&name))?;
    // user, nice, system, idle, waiting for input and output, interrupts, soft interrupts, stolen
    let ticks: Vec<u64> = line.split(' ').skip(1).filter_map(|field| field.parse().ok()).collect();
    let busy = [0, 1, 2, 5, 6].into_iter().map(|index| ticks.get(index).copied().unwrap_or(0)).sum::<u64>();
    Some(Duration::from_millis(busy * TICK_MS))
}

fn link_address(text: &str) -> Result<[u8; 6]> {
    let bytes: Result<Vec<u8>, _> = text.split(':').map(|part| u8::from_str_radix(part, 16)).collect();
    bytes?.try_into().ok().context("a link address has six bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_taken_round_by_round() {
        let block = |per_sec: f64| Block { per_sec, cpu_ns: 0.0, lost: 0.0 };
        let (own, base) = ([block(400.0), block(800.0)], [block(100.0), block(200.0)]);
        let found = ratios(&own, &base);
        assert!((found[0] - 4.0_f64.ln()).abs() < 1e-9, "{found:?}");
        assert!(ratios(&own[..1], &base).is_empty(), "a round has two blocks");
    }

    #[test]
    fn idle_and_waiting_time_is_not_busy() {
        let stat = "cpu  9 9 9 9\ncpu0 1 2 3 1000 500 4 5 6 0 0\ncpu1 0 0 0 7\n";
        assert_eq!(busy_of(stat, 0), Some(Duration::from_millis(150)));
        assert_eq!(busy_of(stat, 1), Some(Duration::ZERO));
        assert_eq!(busy_of(stat, 2), None);
    }
}
