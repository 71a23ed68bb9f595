//! Whether anything fails while the agent is killed, exchanged and lied to: clients dial, send and talk on open
//! connections through services all the while, and every failure is told.
//!
//! One round is one `kill -9`. What comes next turns around: the same program again, new endpoints while it was away, a
//! layout of another version in the maps (an upgrade or downgrade moves everything to new ones), an API server that
//! lists nothing at first, one that lets every watch go; and another program, where one is given. Endpoints that leave
//! a service go on answering, as draining pods do, so that any failure is the data plane's.

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    path::PathBuf,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::scene::Scene;
use crate::{
    agent::Agent,
    api::{self, Api},
    arena::Arena,
    servers::{DEADLINE, Server, ask_tcp, ask_udp},
};

/// Failures that are told in full.
const TOLD: usize = 20;
/// Each kind of round twice, however slow the machine is.
const LEAST_ROUNDS: usize = 10;
const NAMESPACE: &str = "soak";
const WEB: u8 = 10;
const DNS: u8 = 11;
const ECHO: u8 = 12;

/// How long, how often, with what.
#[derive(Clone)]
pub struct Options {
    /// The keelson-agent to run.
    pub agent: PathBuf,
    /// Another one, to which it is upgraded and downgraded in turn.
    pub other: Option<PathBuf>,
    /// How long in all.
    pub duration: Duration,
    /// Time between two kills.
    pub every: Duration,
    /// Services that nobody dials.
    pub services: u32,
}

/// What happened.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// `kill -9`s.
    pub kills: u64,
    /// Starts after which the maps were written before the next kill.
    pub completed: u64,
    /// Starts that met maps of another layout.
    pub layouts: u64,
    /// Starts with an API server that listed nothing.
    pub empty_lists: u64,
    /// Exchanges of the program.
    pub exchanges: u64,
    /// Connections made.
    pub connections: u64,
    /// Datagrams answered.
    pub datagrams: u64,
    /// Requests on connections that stay open throughout.
    pub requests: u64,
    /// Everything that failed, in words; the first of many.
    pub failures: Vec<String>,
    /// What `keelson-agent service verify` said in the end.
    pub verified: String,
}

/// Counters of the clients.
#[derive(Default)]
struct Load {
    ended: AtomicBool,
    connections: AtomicU64,
    datagrams: AtomicU64,
    requests: AtomicU64,
    failures: Mutex<Vec<String>>,
}

impl Load {
    fn goes_on(&self) -> bool {
        !self.ended.load(Ordering::Acquire)
    }

    fn failed(&self, what: &str, why: &dyn std::fmt::Display) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        if failures.len() < TOLD {
            failures.push(format!("{what}: {why}"));
        }
    }
}

fn vip(number: u8) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 96, 0, number)), 80)
}

/// Soaks. Needs root.
pub fn soak(options: &Options) -> Result<Report> {
    let addresses: Vec<IpAddr> = (1..=4).map(|host| IpAddr::from([10, 244, 0, host])).collect();
    let arena = Arena::enter(&addresses)?;
    let endpoint = |port: u16| addresses.iter().map(move |ip| SocketAddr::new(*ip, port));
    let (web, dns): (Vec<_>, Vec<_>) = (endpoint(8080).collect(), endpoint(5353).collect());
    let echo = SocketAddr::new(addresses[0], 7);
    let _servers: Vec<Server> = web.iter().map(|at| Server::tcp(*at)).collect::<Result<_, _>>()?;
    let _resolvers: Vec<Server> = dns.iter().map(|at| Server::udp(*at)).collect::<Result<_, _>>()?;
    let _echo = Server::echo(echo)?;
    let api = Api::start()?;
    fill(&api, options.services);
    let endpoints = |round: usize| {
        let chosen = |all: &[SocketAddr]| vec![all[round % 4], all[(round + 1) % 4]];
        api.put("endpointslices", api::slice(NAMESPACE, "web", 0, &chosen(&web), "TCP"));
        api.put("endpointslices", api::slice(NAMESPACE, "dns", 0, &chosen(&dns), "UDP"));
    };
    endpoints(0);
    api.put("endpointslices", api::slice(NAMESPACE, "echo", 0, &[echo], "TCP"));
    let mut agent = Agent::new(&options.agent, &arena, &api.kubeconfig())?;
    agent.start()?;
    agent.wait_for_syncs(1)?;
    let load = Load::default();
    let mut report = Report::default();
    std::thread::scope(|scope| -> Result<()> {
        let clients = [
            scope.spawn(|| dial(&load)),
            scope.spawn(|| send(&load)),
            scope.spawn(|| talk(&load)),
            scope.spawn(|| talk(&load)),
        ];
        let outcome = rounds(options, &arena, &api, &mut agent, &endpoints, &mut report);
        load.ended.store(true, Ordering::Release);
        for client in clients {
            client.join().map_err(|_panic| anyhow::anyhow!("a client panicked"))?;
        }
        outcome
    })?;
    report.connections = load.connections.into_inner();
    report.datagrams = load.datagrams.into_inner();
    report.requests = load.requests.into_inner();
    report.failures = load.failures.into_inner().unwrap_or_else(PoisonError::into_inner);
    report.verified = verified(&agent)?;
    Ok(report)
}

/// What the maps hold must be what the API says, once everything has settled.
fn verified(agent: &Agent) -> Result<String> {
    let until = Instant::now() + DEADLINE * 12;
    loop {
        let output = agent.service(&["verify"])?;
        let said =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if output.status.success() {
            return Ok(said.trim().to_owned());
        }
        ensure!(Instant::now() < until, "the maps are not as they should be: {said}\n{}", agent.log());
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn fill(api: &Api, services: u32) {
    let scene = Scene { others: services, endpoints: 3, tested: Vec::new() };
    let name = |number: u32| format!("service-{number:06}");
    let all = scene.services().map(|one| api::service(NAMESPACE, &name(one.number), one.vip.into(), "TCP"));
    api.put_all("services", all.collect::<Vec<_>>());
    let slices = scene.services().map(|one| {
        let endpoints: Vec<SocketAddr> = one.endpoints.iter().copied().map(Into::into).collect();
        api::slice(NAMESPACE, &name(one.number), 0, &endpoints, "TCP")
    });
    api.put_all("endpointslices", slices.collect::<Vec<_>>());
    api.put("services", api::service(NAMESPACE, "web", vip(WEB), "TCP"));
    api.put("services", api::service(NAMESPACE, "dns", vip(DNS), "UDP"));
    api.put("services", api::service(NAMESPACE, "echo", vip(ECHO), "TCP"));
}

fn rounds(
    options: &Options,
    arena: &Arena,
    api: &Api,
    agent: &mut Agent,
    endpoints: &impl Fn(usize),
    report: &mut Report,
) -> Result<()> {
    let until = Instant::now() + options.duration;
    let mut round = 0_usize;
    while Instant::now() < until || round < LEAST_ROUNDS {
        round += 1;
        agent.kill()?;
        report.kills += 1;
        let kind = round % 5;
        match kind {
            1 => endpoints(round),
            2 => {
                ebpf_loader::pretend_layout(&arena.pin_dir, u32::try_from(1000 + round)?)
                    .context("write another layout's number into the maps")?;
                report.layouts += 1;
            }
            3 => {
                api.set_empty(true);
                report.empty_lists += 1;
            }
            4 => {
                if let Some(other) = &options.other {
                    let next = if report.exchanges.is_multiple_of(2) { other } else { &options.agent };
                    agent.replace_binary(next);
                    report.exchanges += 1;
                }
            }
            _ => {}
        }
        let listed = api.lists("services");
        agent.start()?;
        if kind == 3 {
            // It must have listed, and must not have believed what it saw.
            wait_until(|| api.lists("services") > listed, "the agent lists the Services")?;
            std::thread::sleep(options.every);
            api.set_empty(false);
            // The next listing is true.
            api.break_watches();
        } else if round.is_multiple_of(2) {
            agent.wait_for_syncs(1)?;
            report.completed += 1;
            endpoints(round);
            std::thread::sleep(options.every);
        } else {
            std::thread::sleep(options.every);
        }
    }
    // Whatever the last round was, an undisturbed start comes last.
    agent.kill()?;
    agent.start()?;
    agent.wait_for_syncs(1)
}

fn wait_until(condition: impl Fn() -> bool, what: &str) -> Result<()> {
    let until = Instant::now() + DEADLINE * 6;
    while !condition() {
        ensure!(Instant::now() < until, "not seen in time: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// New connections, one after the other.
fn dial(load: &Load) {
    while load.goes_on() {
        match ask_tcp(vip(WEB)) {
            Ok((_, peer)) if peer != vip(WEB) => load.failed("getpeername", &peer),
            Ok(_) => {
                load.connections.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => load.failed("connect", &error),
        }
    }
}

/// Datagrams from sockets that are not connected.
fn send(load: &Load) {
    while load.goes_on() {
        let answer = UdpSocket::bind("0.0.0.0:0").and_then(|socket| ask_udp(&socket, vip(DNS)));
        match answer {
            Ok((_, from)) if from != vip(DNS) => load.failed("recvfrom", &from),
            Ok(_) => {
                load.datagrams.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => load.failed("datagram", &error),
        }
    }
}

/// Requests on a connection that was opened before anything happened, and stays.
fn talk(load: &Load) {
    let talked = || -> std::io::Result<()> {
        let mut stream = TcpStream::connect_timeout(&vip(ECHO), DEADLINE)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.set_nodelay(true)?;
        while load.goes_on() {
            stream.write_all(b"x")?;
            stream.read_exact(&mut [0])?;
            load.requests.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    };
    if let Err(error) = talked() {
        load.failed("open connection", &error);
    }
}
