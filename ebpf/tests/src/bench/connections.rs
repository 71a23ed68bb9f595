//! How much a ClusterIP costs: connections, requests and the call `connect` itself through it, over those straight to
//! the pod.
//!
//! Each round works off one block per way of forwarding and then the same blocks backwards (A B B A), so that a slow
//! drift of the machine cancels out; rounds are repeated until the 95 % interval of our ratio is narrow enough or the
//! time is up. A second direct block is the control: how far the machine alone moves a ratio. "Direct" is a client in a
//! cgroup without hooks, through a node without rules. The hook's own time comes from the kernel's program statistics,
//! taken apart because they cost time themselves.

use std::{
    net::SocketAddrV4,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ebpf_common::Protocol;
use ebpf_loader::{Capacity, Config, DataPlane};
use serde::Serialize;

use super::{
    client::{Block, Client, Task, Work},
    lanes::{Ground, Lane, Port},
    peers::Peer,
    scene::Scene,
    statistics::{Figure, Interval, Series},
};
use crate::{
    arena::Arena,
    tables::{key, service},
};

/// Rounds before an interval is believed.
const LEAST_ROUNDS: usize = 10;

/// What to measure.
#[derive(Clone)]
pub struct Options {
    /// Services in all, those under test included.
    pub services: u32,
    /// Endpoints of each service that nobody dials.
    pub endpoints: u32,
    /// Stop when the 95 % interval of our ratio is within this fraction.
    pub precision: f64,
    /// Stop a kind of work anyway after this long.
    pub limit: Duration,
    /// Repetitions per block.
    pub block: u32,
    /// Who is measured beside us.
    pub peers: Vec<Arc<dyn Peer>>,
}

/// What came out.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Services in all.
    pub services: u32,
    /// Milliseconds to write all services into our maps.
    pub load_ms: f64,
    /// Every peer, measured or absent.
    pub peers: Vec<PeerReport>,
    /// Connections, requests, calls.
    pub works: Vec<WorkReport>,
    /// The connect hook's own nanoseconds where the address is a service: the primary figure.
    pub hook_service_ns: f64,
    /// And where it is not.
    pub hook_other_ns: f64,
    /// Nanoseconds that our hooks add to a call of `connect` with a service's address, seen by the caller.
    pub call_added_ns: f64,
}

/// What a peer is.
#[derive(Clone, Debug, Serialize)]
pub struct PeerReport {
    /// Its name.
    pub name: String,
    /// Program and version, where it was measured.
    pub version: Option<String>,
    /// Why it was not.
    pub absent: Option<String>,
    /// Milliseconds to load all services.
    pub load_ms: Option<f64>,
}

/// One kind of work.
#[derive(Clone, Debug, Serialize)]
pub struct WorkReport {
    /// Which.
    pub work: Work,
    /// Rounds that were measured.
    pub rounds: usize,
    /// Whether our interval became as narrow as asked for.
    pub precise: bool,
    /// Straight to the pod.
    pub direct: Figure,
    /// The same once more.
    pub control: Figure,
    /// Through our hooks.
    pub ours: Figure,
    /// Through each peer that is there, by name.
    pub peers: Vec<(String, Figure)>,
}

/// A way to the server.
struct Way {
    name: String,
    lane: Lane,
    /// The cgroup in which the client takes it.
    cgroup: PathBuf,
    through_service: bool,
}

impl Way {
    fn target(&self, port: Port) -> SocketAddrV4 {
        if self.through_service { self.lane.vip(port) } else { self.lane.direct(port) }
    }
}

/// Measures. Needs root.
pub fn measure(options: &Options) -> Result<Report> {
    ensure!(ebpf_loader::is_built(), "built without the BPF programs: run `cargo xtask build-ebpf` first");
    let arena = Arena::enter(&[])?;
    let mut ground = Ground::new(&arena)?;
    let direct = ground.lane()?;
    let (plane, load) = fill(&arena, options, &direct)?;
    let (plain, served) = (ground.plain.clone(), ground.served.clone());
    let mut peers = Vec::new();
    let mut ways = Vec::new();
    for peer in &options.peers {
        let lane = ground.lane()?;
        let report = load_peer(peer, &lane, options);
        if report.absent.is_none() {
            let name = report.name.clone();
            ways.push(Way { name, lane, cgroup: plain.clone(), through_service: true });
        }
        peers.push(report);
    }
    let own = Own { direct, plain, served };
    let works = [Work::Connections, Work::Requests, Work::Calls];
    let works: Vec<WorkReport> = works
        .into_iter()
        .map(|work| measure_work(&mut ground, &own, &ways, work, options))
        .collect::<Result<_>>()?;
    ground.dialler.live_in(&own.served)?;
    let hook_service_ns = hook_ns(&mut ground, own.direct.vip(Port::Byte), options.block)?;
    let hook_other_ns = hook_ns(&mut ground, own.direct.direct(Port::Byte), options.block)?;
    drop(plane);
    let calls = works.iter().find(|report| report.work == Work::Calls).context("calls were measured")?;
    Ok(Report {
        services: options.services,
        load_ms: load.as_secs_f64() * 1000.0,
        peers,
        hook_service_ns,
        hook_other_ns,
        call_added_ns: (calls.ours.p50_us - calls.direct.p50_us) * 1000.0,
        works,
    })
}

/// Our own way and the direct one: the same node, another cgroup.
struct Own {
    direct: Lane,
    plain: PathBuf,
    served: PathBuf,
}

fn fill(arena: &Arena, options: &Options, lane: &Lane) -> Result<(DataPlane, Duration)> {
    let mut table = Scene::new(options.services, options.endpoints, lane.tested()).table();
    // For the calls of datagram sockets.
    let udp = service(Protocol::Udp, &[lane.vip(Port::Byte).into()], &[lane.direct(Port::Byte).into()]);
    table.insert(key("bench/udp:8080/UDP/IPv4"), udp);
    let backends = table.values().map(|desired| desired.backends.len()).sum();
    let capacity = Capacity::default().grown_for(table.len(), table.len(), backends);
    let capacity = capacity.context("too many services")?;
    let mut plane = DataPlane::open(Config { capacity, ..arena.config() })?;
    let start = Instant::now();
    let report = plane.replace_all(&table);
    let load = start.elapsed();
    ensure!(
        report.refused.is_empty(),
        "{} not programmed: {:?}",
        report.refused.len(),
        report.refused.first()
    );
    plane.attach()?;
    Ok((plane, load))
}

fn load_peer(peer: &Arc<dyn Peer>, lane: &Lane, options: &Options) -> PeerReport {
    let scene = Scene::new(options.services, options.endpoints, lane.tested());
    let loader = Arc::clone(peer);
    let loaded = lane.node.run(move || -> Result<(String, Duration)> {
        let version = loader.version()?;
        let start = Instant::now();
        loader.load(&scene)?;
        Ok((version, start.elapsed()))
    });
    let name = peer.name().to_owned();
    match loaded.and_then(|outcome| outcome) {
        Ok((version, load)) => {
            let load_ms = Some(load.as_secs_f64() * 1000.0);
            PeerReport { name, version: Some(version), absent: None, load_ms }
        }
        Err(error) => PeerReport { name, version: None, absent: Some(format!("{error:#}")), load_ms: None },
    }
}

fn measure_work(
    ground: &mut Ground,
    own: &Own,
    ways: &[Way],
    work: Work,
    options: &Options,
) -> Result<WorkReport> {
    let port = if work == Work::Requests { Port::Echo } else { Port::Byte };
    let direct = (own.plain.clone(), own.direct.direct(port));
    let ours = (own.served.clone(), own.direct.vip(port));
    let mut order = vec![direct.clone(), ours, direct];
    // The call itself never reaches a node.
    let ways = if work == Work::Calls { &[] } else { ways };
    order.extend(ways.iter().map(|way| (way.cgroup.clone(), way.target(port))));
    // A call is so short that a block needs more of them.
    let count = if work == Work::Calls { options.block * 10 } else { options.block };
    let names = ways.iter().map(|way| way.name.clone());
    race(&mut ground.dialler, &order, names, (work, count), (options.precision, options.limit))
}

/// Works off block after block, each way from its cgroup to its target, there and back: the direct way, ours, the direct
/// one again, and those of the peers of these names. Ends when our ratio's interval is as narrow as this, or the time is
/// up.
pub(super) fn race(
    dialler: &mut Client,
    order: &[(PathBuf, SocketAddrV4)],
    peers: impl Iterator<Item = String>,
    (work, count): (Work, u32),
    (precision, limit): (f64, Duration),
) -> Result<WorkReport> {
    let mut block = |index: usize, count: u32| -> Result<Block> {
        let (cgroup, target) = &order[index];
        dialler.live_in(cgroup)?;
        dialler.run(Task { work, target: *target, count })
    };
    // Warm caches, and see that every way works, before anything counts.
    for index in 0..order.len() {
        block(index, count.div_ceil(4))?;
    }
    let mut all: Vec<Series> = std::iter::repeat_with(Series::default).take(order.len()).collect();
    let (mut rounds, mut precise) = (0, false);
    let until = Instant::now() + limit;
    while rounds < LEAST_ROUNDS || (!precise && Instant::now() < until) {
        let there: Vec<Block> = (0..all.len()).map(|index| block(index, count)).collect::<Result<_>>()?;
        let mut back: Vec<Block> =
            (0..all.len()).rev().map(|index| block(index, count)).collect::<Result<_>>()?;
        back.reverse();
        for (series, pair) in all.iter_mut().zip(there.into_iter().zip(back)) {
            series.push(pair.0, pair.1);
        }
        rounds += 1;
        precise = all[1].ratio_to(&all[0]).is_some_and(|ratio: Interval| ratio.half_width() <= precision);
    }
    let figure = |index: usize| all[index].figure((index > 0).then_some(&all[0]));
    Ok(WorkReport {
        work,
        rounds,
        precise,
        direct: figure(0),
        ours: figure(1),
        control: figure(2),
        peers: (3..).zip(peers).map(|(index, name)| (name, figure(index))).collect(),
    })
}

/// Mean run time of the connect hook over a block, by the kernel's own clock.
fn hook_ns(ground: &mut Ground, target: SocketAddrV4, count: u32) -> Result<f64> {
    let _on = ebpf_loader::run_time_stats().context("turn program statistics on")?;
    let before = ebpf_loader::program_runs("kl_connect4")?;
    ground.dialler.run(Task { work: Work::Connections, target, count })?;
    let after = ebpf_loader::program_runs("kl_connect4")?;
    let deltas = after.into_iter().map(|now| {
        let then = before.iter().find(|then| then.id == now.id).cloned().unwrap_or_default();
        (now.count - then.count, now.nanos - then.nanos)
    });
    // Another data plane may be live on this machine; ours is the one that just ran the block.
    let (runs, nanos) = deltas.max_by_key(|(runs, _)| *runs).context("the connect hook is not loaded")?;
    ensure!(runs >= u64::from(count), "the connect hook ran {runs} times only");
    #[allow(clippy::cast_precision_loss, reason = "a mean for people")]
    Ok(nanos as f64 / runs as f64)
}
