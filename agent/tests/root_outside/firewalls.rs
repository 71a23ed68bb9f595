//! Firewalls that know connections, and floods of first packets.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ebpf_tests::{
    arena::ip,
    bench::live::{Generator, MANY_FROM},
    frames::{Carried, SYN, frame},
    places::without_offload,
    servers::Server,
    tables::at,
};
use keelson_agent::proxy::{self, show::Question};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use serde_json::{Value, json};

use super::{Agent, NODE, PATIENCE, World, ask_maps, service, slices};

/// Both families' rules of a cautious host, as Docker's, ufw's and others together, where `iptables` keeps them: nothing
/// is forwarded but pods' traffic, and nothing passes that belongs to no connection.
fn shut_the_firewall() -> Result<()> {
    let rules = [("ip", "10.244.0.0/16"), ("ip6", "fd00:244::/32")].map(|(family, pods)| {
        let all = "ct state invalid drop; ct state related,established accept;";
        let hook = |hook: &str, policy: &str| format!("type filter hook {hook} priority 0; policy {policy}; {all}");
        let (input, forward) = (hook("input", "accept"), hook("forward", "drop"));
        format!(
            "table {family} filter {{ chain INPUT {{ {input} }}; chain FORWARD {{ {forward} {family} saddr {pods} accept; \
             {family} daddr {pods} accept; }}; }}\n"
        )
    });
    nft(&[&rules.concat()]).map(drop)
}

/// Whether netfilter sees the packets of bridges, where the kernel can do that.
fn set_bridge_netfilter(value: &str) -> Result<()> {
    for name in ["iptables", "ip6tables"] {
        let setting = format!("/proc/sys/net/bridge/bridge-nf-call-{name}");
        if std::path::Path::new(&setting).exists() {
            std::fs::write(setting, value)?;
        }
    }
    Ok(())
}

/// What nftables' program says.
fn nft(arguments: &[&str]) -> Result<String> {
    let output = std::process::Command::new("nft").args(arguments).output().context("run nft")?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "nft {}: {complaint}", arguments.join(" "));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn stateful_firewalls_let_clients_outside_pass() -> Result<()> {
    let world = World::make()?;
    shut_the_firewall()?;
    let cluster = json!({"type": "LoadBalancer"});
    let local = json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local"});
    let all = || -> (Vec<Value>, Vec<Value>) {
        let services = vec![
            service("near", 30001, &cluster),
            service("far", 30002, &cluster),
            service("local", 30003, &local),
        ];
        let slices = [slices("near", true, false), slices("far", false, true), slices("local", true, true)];
        (services, slices.concat())
    };
    // With the bridge's packets seen by netfilter as they come, as container hosts often have it, and without.
    for value in ["1", "0"] {
        set_bridge_netfilter(value)?;
        let (services, slices) = all();
        let agent = Agent::start(&world, services, slices)?;
        for node_port in [30001, 30002, 30003] {
            for (node, udp) in NODE.iter().flat_map(|node| [(node, false), (node, true)]) {
                let dialled = SocketAddr::new(node.parse()?, node_port).to_string();
                world
                    .ask(&dialled, udp)?
                    .with_context(|| format!("dial {dialled}, UDP {udp}, with bridge netfilter {value}"))?;
            }
        }
        agent.stop()?;
    }
    // What others' packets meet is as it was.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(proxy::cleanup(&world.arena.pin_dir, "10.96.0.0/12,fd00:96::/108"))?;
    for (family, pods) in [("ip", "10.244.0.0/16"), ("ip6", "fd00:244::/32")] {
        let rules = nft(&["list", "chain", family, "filter", "FORWARD"])?;
        ensure!(rules.contains(pods) && !rules.contains("0x00001000"), "{rules}");
    }
    ensure!(!nft(&["list", "tables"])?.contains("keelson"), "a table of ours stays");
    Ok(())
}

/// Connections that connection tracking of the calling thread's namespace knows.
fn tracked() -> Result<u64> {
    Ok(std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count")?.trim().parse()?)
}

/// `KEELSON_FLOOD_SECONDS` makes the flood last.
#[test]
#[allow(clippy::print_stderr, reason = "the rate is what one wants to know of a flood that lasts")]
fn a_flood_of_first_packets_is_no_connection_to_anybody() -> Result<()> {
    const LEAST: u32 = 40_000;
    let world = World::make()?;
    // As frames of the tests are addressed.
    ip(&["link", "set", "uplink", "address", "02:00:00:00:00:01"])?;
    without_offload("uplink")?;
    shut_the_firewall()?;
    set_bridge_netfilter("0")?;
    let _server = world.near.run(|| Server::echo(at("10.244.1.2:9090")))??;
    let mut echo = slices("echo", true, false);
    echo[0]["ports"][0]["port"] = 9090.into();
    let cluster = json!({"type": "NodePort"});
    let services = vec![service("near", 30001, &cluster), service("echo", 30002, &cluster)];
    let agent = Agent::start(&world, services, [slices("near", true, false), echo].concat())?;
    let mut open = world.outside.run(|| TcpStream::connect_timeout(&at("203.0.113.1:30002"), PATIENCE))??;
    open.set_read_timeout(Some(PATIENCE))?;
    let mut talk = || -> Result<()> {
        open.write_all(b"x")?;
        open.read_exact(&mut [0]).context("the open connection is silent")
    };
    talk()?;
    let before = tracked()?;
    let flood = world.outside.run(|| {
        let first = frame(MANY_FROM.into(), at("203.0.113.1:30001"), Carried::Tcp(SYN), b"");
        Generator::of_many(first, nix::net::if_::if_nametoindex("eth0")?)
    })??;
    let flood = Arc::new(flood);
    let seconds = std::env::var("KEELSON_FLOOD_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    let (until, started) = (Instant::now() + Duration::from_secs(seconds), Instant::now());
    // A flood that lasts is to show what the node bears, so the backend's stack does not answer it.
    let sink = format!(
        "table netdev flood {{ chain sink {{ type filter hook ingress device eth0 priority 0; ip saddr {}/15 drop; }}; }}",
        MANY_FROM.ip()
    );
    if seconds > 0 {
        world.near.run(move || nft(&[&sink]).map(drop))??;
    }
    let sent = Arc::new(AtomicU32::new(0));
    let pour = {
        let sent = Arc::clone(&sent);
        move |processor: usize| -> Result<()> {
            let mut here = CpuSet::new();
            here.set(processor)?;
            sched_setaffinity(Pid::from_raw(0), &here)?;
            while sent.load(Ordering::Relaxed) < LEAST || Instant::now() < until {
                flood.send(LEAST / 8)?;
                sent.fetch_add(LEAST / 8, Ordering::Relaxed);
            }
            Ok(())
        }
    };
    // Threads that are begun there are in its network namespace.
    let lanes = world.outside.run(move || {
        [0, 1].map(|processor| {
            let pour = pour.clone();
            std::thread::spawn(move || pour(processor))
        })
    })?;
    while lanes.iter().any(|lane| !lane.is_finished()) {
        talk()?;
    }
    for lane in lanes {
        lane.join().expect("a lane ends")?;
    }
    let sent = sent.load(Ordering::Relaxed);
    let rate = f64::from(sent) / started.elapsed().as_secs_f64();
    eprintln!(
        "{sent} first packets, {rate:.0} in a second; connection tracking: {before}, then {}",
        tracked()?
    );
    ensure!(tracked()? < before + 100, "connection tracking knows {} connections", tracked()?);
    world.ask("203.0.113.1:30001", false)?.context("a new client after the flood")?;
    let flows = ask_maps(&world, &Question::Flows { limit: 1_000_000 })?;
    ensure!(flows.lines().filter(|line| line.contains("203.0.113.2")).count() >= 2, "{flows}");
    talk()?;
    agent.stop()
}
