//! How long it takes to program many services from nothing, and to follow one change: a real agent with only its proxy
//! beside a pretended API server, and the peers' rule sets beside it.
//!
//! "Written" is from the events read to the last kernel write, as the agent itself counts it; "answered" is from the
//! start of the process, or from the change of the object, to the first connection that reaches the right endpoint.
//! Peers are timed from the text of their rules to the end of the program that loads it, which leaves out what their own
//! proxy does before.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::Value;

use super::{
    memory::Memory,
    namespaces::Namespace,
    peers::Peer,
    scene::Scene,
    statistics::{median, p99},
};
use crate::{
    agent::{Agent, sync_count, sync_seconds},
    api::{self, Api},
    arena::Arena,
    servers::{Server, ask_tcp},
};

/// Longest wait for a size to be programmed.
const LIMIT: Duration = Duration::from_mins(5);
/// How long the agent rests before its memory is looked at.
const REST: Duration = Duration::from_secs(2);
/// Peers are not asked for more endpoints than this: their rules would take them many minutes.
const PEER_ENDPOINTS: u32 = 100_000;
/// Endpoints per slice, as Kubernetes' controller has them.
const PER_SLICE: usize = 100;
const NAMESPACE: &str = "bench";

/// How many of what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Size {
    /// Services beside the one that is dialled.
    pub services: u32,
    /// Endpoints of each.
    pub endpoints: u32,
}

/// What to measure.
#[derive(Clone)]
pub struct Options {
    /// The keelson-agent to run.
    pub agent: PathBuf,
    /// Changes of one endpoint.
    pub changes: u32,
    /// How long a peer's changes may take in all.
    pub peer_limit: Duration,
    /// Who is measured beside us.
    pub peers: Vec<Arc<dyn Peer>>,
}

/// One size.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Which.
    pub size: Size,
    /// From nothing: seconds from the last listed event to the last kernel write.
    pub cold_written: f64,
    /// From nothing: seconds from the start of the process to the first answer.
    pub cold_answered: f64,
    /// One endpoint changed: mean milliseconds from the event to the last kernel write.
    pub change_written_ms: f64,
    /// One endpoint changed: milliseconds from the change of the object to the first answer of the new endpoint.
    pub change_answered_ms: f64,
    /// The same, 99th percentile.
    pub change_answered_p99_ms: f64,
    /// What all of it occupies.
    pub memory: Memory,
    /// The peers' figures.
    pub peers: Vec<PeerReport>,
}

/// A peer at one size.
#[derive(Clone, Debug, Serialize)]
pub struct PeerReport {
    /// Its name.
    pub name: String,
    /// Why it has no figures.
    pub absent: Option<String>,
    /// From nothing, in seconds.
    pub cold: Option<f64>,
    /// One endpoint changed: the median, in milliseconds.
    pub change_ms: Option<f64>,
}

/// Measures one size. Needs root.
pub fn measure(options: &Options, size: Size) -> Result<Report> {
    let mut report = measure_ours(&options.agent, size, options.changes)
        .with_context(|| format!("{} services with {} endpoints", size.services, size.endpoints))?;
    report.peers = options.peers.iter().map(|peer| measure_peer(peer, size, options)).collect();
    Ok(report)
}

/// Where the dialled service is, and its two endpoints.
struct Dialled {
    vip: SocketAddr,
    endpoints: [SocketAddr; 2],
    _servers: [Server; 2],
}

fn measure_ours(agent: &Path, size: Size, changes: u32) -> Result<Report> {
    let ips: Vec<IpAddr> = [[10, 244, 0, 1], [10, 244, 0, 2]].map(IpAddr::from).to_vec();
    let arena = Arena::enter(&ips)?;
    let endpoints = [SocketAddr::new(ips[0], 8080), SocketAddr::new(ips[1], 8080)];
    let servers = [Server::tcp(endpoints[0])?, Server::tcp(endpoints[1])?];
    let vip = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)), 80);
    let dialled = Dialled { vip, endpoints, _servers: servers };
    let api = Api::start()?;
    fill(&api, size, &dialled);
    let mut agent = Agent::new(agent, &arena, &api.kubeconfig())?;
    let start = Instant::now();
    agent.start()?;
    until_answered(vip, endpoints[0], &mut agent)?;
    let cold_answered = start.elapsed().as_secs_f64();
    agent.wait_for_syncs(1)?;
    let cold = agent.metrics()?;
    let cold_written = sync_seconds(&cold);
    // What a listing left is given back right after it was written, which nothing outside tells of.
    std::thread::sleep(REST);
    let memory = Memory::of(&arena.pin_dir, agent.pid()?)?;
    let mut answered = Vec::new();
    for change in 0..changes {
        let target = dialled.endpoints[(change as usize + 1) % 2];
        let slice = api::slice(NAMESPACE, "dialled", 0, &[target], "TCP");
        let begin = Instant::now();
        api.put("endpointslices", slice);
        until_answered(vip, target, &mut agent)?;
        answered.push(begin.elapsed().as_secs_f64() * 1000.0);
    }
    let warm = agent.metrics()?;
    let syncs = sync_count(&warm) - sync_count(&cold);
    ensure!(syncs > 0 || changes == 0, "{changes} changes were answered, and none was counted");
    #[allow(clippy::cast_precision_loss, reason = "a mean of few")]
    let change_written_ms = (sync_seconds(&warm) - cold_written) * 1000.0 / syncs.max(1) as f64;
    Ok(Report {
        size,
        cold_written,
        cold_answered,
        change_written_ms,
        change_answered_ms: median(&answered),
        change_answered_p99_ms: p99(&answered),
        memory,
        peers: Vec::new(),
    })
}

/// All objects of a size, and the dialled service.
fn fill(api: &Api, size: Size, dialled: &Dialled) {
    let scene = Scene { others: size.services, endpoints: size.endpoints, tested: Vec::new() };
    let name = |number: u32| format!("service-{number:06}");
    let mut services: Vec<Value> = scene
        .services()
        .map(|one| api::service(NAMESPACE, &name(one.number), one.vip.into(), "TCP"))
        .collect();
    services.push(api::service(NAMESPACE, "dialled", dialled.vip, "TCP"));
    api.put_all("services", services);
    for one in scene.services() {
        let endpoints: Vec<SocketAddr> = one.endpoints.into_iter().map(Into::into).collect();
        let slices = endpoints.chunks(PER_SLICE).enumerate();
        let slices = slices.map(|(index, part)| api::slice(NAMESPACE, &name(one.number), index, part, "TCP"));
        api.put_all("endpointslices", slices);
    }
    api.put("endpointslices", api::slice(NAMESPACE, "dialled", 0, &dialled.endpoints[..1], "TCP"));
}

/// Dials until this endpoint answers.
fn until_answered(vip: SocketAddr, endpoint: SocketAddr, agent: &mut Agent) -> Result<()> {
    let until = Instant::now() + LIMIT;
    loop {
        let answer = ask_tcp(vip).map(|(who, _)| who);
        if answer.as_ref().is_ok_and(|who| *who == endpoint.to_string()) {
            return Ok(());
        }
        ensure!(Instant::now() < until, "{vip} answers {answer:?}, not {endpoint}\n{}", agent.log());
        agent.still_runs()?;
        std::thread::yield_now();
    }
}

fn measure_peer(peer: &Arc<dyn Peer>, size: Size, options: &Options) -> PeerReport {
    let name = peer.name().to_owned();
    if size.services.saturating_mul(size.endpoints) > PEER_ENDPOINTS {
        let why = format!("not measured above {PEER_ENDPOINTS} endpoints, which take it minutes");
        return PeerReport { name, absent: Some(why), cold: None, change_ms: None };
    }
    let (worker, limit, changes) = (Arc::clone(peer), options.peer_limit, options.changes);
    let outcome = Namespace::start(None)
        .and_then(|namespace| namespace.run(move || time_peer(worker.as_ref(), size, changes, limit)))
        .and_then(|outcome| outcome);
    match outcome {
        Ok((cold, change_ms)) => {
            PeerReport { name, absent: None, cold: Some(cold), change_ms: Some(change_ms) }
        }
        Err(error) => PeerReport { name, absent: Some(format!("{error:#}")), cold: None, change_ms: None },
    }
}

/// Seconds to load, and median milliseconds of a change.
fn time_peer(peer: &dyn Peer, size: Size, changes: u32, limit: Duration) -> Result<(f64, f64)> {
    peer.version()?;
    let scene = Scene { others: size.services, endpoints: size.endpoints, tested: Vec::new() };
    let start = Instant::now();
    peer.load(&scene)?;
    let cold = start.elapsed().as_secs_f64();
    let mut taken = Vec::new();
    let until = Instant::now() + limit;
    for change in 0..changes {
        let (old, new) = (scene.other(0, change), scene.other(0, change + 1));
        let begin = Instant::now();
        peer.change(&scene, &old, &new)?;
        taken.push(begin.elapsed().as_secs_f64() * 1000.0);
        if Instant::now() > until {
            break;
        }
    }
    Ok((cold, median(&taken)))
}
