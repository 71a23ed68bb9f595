//! Host ports: reachable from wherever they must be, closed afterwards, refused when taken.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::super::super::case::{Case, same};
use super::super::context::{Pod, T, with};
use super::super::subject::Kind;
use super::super::traffic::{ANY4, ANY6, Server, seen_by, udp, udp_echo, unreachable};
use super::{check, group};

pub(super) fn cases(kind: Kind) -> Vec<Case<T>> {
    let area = group(kind, "ports");
    let refused = group(kind, "ports refused");
    vec![
        check(area, "TCP from another node, which the pod sees as the client", from_outside),
        check(area, "TCP from another node over IPv6", from_outside_v6),
        check(area, "TCP from the node to its own address", from_node),
        check(area, "TCP from the node to 127.0.0.1", from_localhost),
        check(area, "TCP from the node to ::1", from_localhost_v6),
        check(area, "TCP from the pod itself to the node's address", hairpin),
        check(area, "TCP from the pod itself over IPv6", hairpin_v6),
        check(area, "TCP from another pod of the bridge to the node's address", from_neighbour),
        check(area, "UDP from another node", udp_outside),
        check(area, "several ports of a pod", several),
        check(area, "the same port for TCP and UDP of different pods", both_protocols),
        check(area, "hostIP: only on that address", host_ip),
        check(area, "hostIP 0.0.0.0 and empty are every address", any_ip),
        check(area, "hostPort 0 maps nothing", port_zero),
        check(area, "protocol in capitals and protocol missing", protocol_words),
        check(area, "keys with capitals, as containerd writes them", capitals),
        check(area, "DEL closes the port", del_closes),
        check(area, "DEL of one pod keeps the other's ports", del_keeps),
        check(area, "UDP: a flow that was open before ADD reaches the pod", udp_stale_before),
        check(area, "UDP: a flow to a removed pod reaches the next one", udp_stale_after),
        check(area, "CHECK sees a removed rule", check_damage),
        check(area, "GC removes the ports of stale attachments", gc_removes),
        check(refused, "a port that another pod holds: an error that names port and holder", collision),
        check(refused, "a port held on one address, asked for on all", collision_any),
        check(refused, "a host port of 70000", |t| {
            bad(t, &json!({"hostPort": 70000, "containerPort": 80}), &["70000", "hostPort"])
        }),
        check(refused, "a negative host port", |t| {
            bad(t, &json!({"hostPort": -1, "containerPort": 80}), &["-1", "hostPort"])
        }),
        check(refused, "a container port of 0", |t| {
            bad(t, &json!({"hostPort": 8080, "containerPort": 0}), &["containerPort", "container port"])
        }),
        check(refused, "no container port", |t| {
            bad(t, &json!({"hostPort": 8080}), &["containerPort", "container port"])
        }),
        check(refused, "a protocol that has no ports", |t| {
            bad(t, &json!({"hostPort": 8080, "containerPort": 80, "protocol": "icmp"}), &["icmp"])
        }),
        check(refused, "a host address that is none", |t| {
            bad(
                t,
                &json!({"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "here"}),
                &["here"],
            )
        }),
        check(refused, "portMappings that are no list", |t| {
            let (pod, config) = pod(t, &json!("8080:80"))?;
            t.ask("ADD", &pod, &config)?.refused_with(&[6, 7])?;
            Ok(())
        }),
    ]
}

const NODE4: &str = "192.0.2.1";
const NODE6: &str = "2001:db8::1";

/// Another node on a link of the host.
fn outside(t: &T) -> Result<PathBuf> {
    let node = t.namespace("outside")?;
    let target = node.display();
    t.ip(t.host(), &format!("link add up0 type veth peer name eth0 netns {target}"))?;
    for line in [
        format!("addr add {NODE4}/24 dev up0"),
        format!("addr add {NODE6}/64 dev up0 nodad"),
        "link set up0 up".into(),
    ] {
        t.ip(t.host(), &line)?;
    }
    for line in
        ["addr add 192.0.2.2/24 dev eth0", "addr add 2001:db8::2/64 dev eth0 nodad", "link set eth0 up"]
    {
        t.ip(&node, line)?;
    }
    Ok(node)
}

/// A wired pod and the configuration that maps its ports.
fn pod(t: &T, mappings: &Value) -> Result<(Pod, Value)> {
    let (pod, result) = t.wired(t.newest())?;
    let mut config = with(&t.config(), "prevResult", result);
    config["runtimeConfig"]["portMappings"] = mappings.clone();
    Ok((pod, config))
}

fn tcp(host: u16) -> Value {
    json!([{"hostPort": host, "containerPort": 80, "protocol": "tcp"}])
}

fn at(address: &str, port: u16) -> Result<SocketAddr> {
    Ok(SocketAddr::new(address.parse()?, port))
}

fn from_outside(t: &T) -> Result<()> {
    let (pod, config) = pod(t, &tcp(8080))?;
    let node = outside(t)?;
    t.add(&pod, &config)?;
    let _server = Server::start(&pod.netns, ANY4, 80)?;
    same("the client's address", seen_by(&node, at(NODE4, 8080)?)?, "192.0.2.2".parse::<IpAddr>()?)
}

fn from_outside_v6(t: &T) -> Result<()> {
    let (pod, config) = pod(t, &tcp(8080))?;
    let node = outside(t)?;
    t.add(&pod, &config)?;
    let _server = Server::start(&pod.netns, ANY6, 80)?;
    same("the client's address", seen_by(&node, at(NODE6, 8080)?)?, "2001:db8::2".parse::<IpAddr>()?)
}

fn reached(t: &T, from: Option<&Pod>, address: &str) -> Result<()> {
    let (pod, config) = pod(t, &tcp(8080))?;
    outside(t)?;
    t.add(&pod, &config)?;
    let any = if address.contains(':') { ANY6 } else { ANY4 };
    let _server = Server::start(&pod.netns, any, 80)?;
    let from = from.map_or_else(|| t.host().to_owned(), |pod| pod.netns.clone());
    seen_by(&from, at(address, 8080)?).map(drop)
}

fn from_node(t: &T) -> Result<()> {
    reached(t, None, NODE4)
}

fn from_localhost(t: &T) -> Result<()> {
    reached(t, None, "127.0.0.1")
}

fn from_localhost_v6(t: &T) -> Result<()> {
    reached(t, None, "::1")
}

fn hairpin_at(t: &T, address: &str, any: IpAddr) -> Result<()> {
    let (pod, config) = pod(t, &tcp(8080))?;
    outside(t)?;
    t.add(&pod, &config)?;
    let _server = Server::start(&pod.netns, any, 80)?;
    seen_by(&pod.netns, at(address, 8080)?).map(drop)
}

fn hairpin(t: &T) -> Result<()> {
    hairpin_at(t, NODE4, ANY4)
}

fn hairpin_v6(t: &T) -> Result<()> {
    hairpin_at(t, NODE6, ANY6)
}

fn from_neighbour(t: &T) -> Result<()> {
    let (neighbour, _) = t.wired(t.newest())?;
    reached(t, Some(&neighbour), NODE4)
}

fn udp_outside(t: &T) -> Result<()> {
    let (pod, config) = pod(t, &json!([{"hostPort": 5353, "containerPort": 53, "protocol": "udp"}]))?;
    let node = outside(t)?;
    t.add(&pod, &config)?;
    let (server, client) = (udp(&pod.netns, ANY4, 53)?, udp(&node, ANY4, 0)?);
    ensure!(udp_echo(&client, at(NODE4, 5353)?, &server, Duration::from_secs(10))?, "no echo");
    Ok(())
}

fn several(t: &T) -> Result<()> {
    let list = json!([
        {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
        {"hostPort": 8443, "containerPort": 443, "protocol": "tcp"},
        {"hostPort": 9000, "containerPort": 9000, "protocol": "tcp"},
    ]);
    let (pod, config) = pod(t, &list)?;
    let node = outside(t)?;
    t.add(&pod, &config)?;
    for (host, inside) in [(8080, 80), (8443, 443), (9000, 9000)] {
        let _server = Server::start(&pod.netns, ANY4, inside)?;
        seen_by(&node, at(NODE4, host)?)?;
    }
    Ok(())
}

fn both_protocols(t: &T) -> Result<()> {
    let (first, tcp_config) = pod(t, &json!([{"hostPort": 53, "containerPort": 53, "protocol": "tcp"}]))?;
    let (second, udp_config) = pod(t, &json!([{"hostPort": 53, "containerPort": 53, "protocol": "udp"}]))?;
    let node = outside(t)?;
    t.add(&first, &tcp_config)?;
    t.add(&second, &udp_config)?;
    let _server = Server::start(&first.netns, ANY4, 53)?;
    seen_by(&node, at(NODE4, 53)?)?;
    let (server, client) = (udp(&second.netns, ANY4, 53)?, udp(&node, ANY4, 0)?);
    ensure!(udp_echo(&client, at(NODE4, 53)?, &server, Duration::from_secs(10))?, "no echo");
    Ok(())
}

fn host_ip(t: &T) -> Result<()> {
    let list = json!([{"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "192.0.2.77"}]);
    let (pod, config) = pod(t, &list)?;
    let node = outside(t)?;
    t.ip(t.host(), "addr add 192.0.2.77/24 dev up0")?;
    t.add(&pod, &config)?;
    let _server = Server::start(&pod.netns, ANY4, 80)?;
    seen_by(&node, at("192.0.2.77", 8080)?)?;
    unreachable(&node, at(NODE4, 8080)?)
}

fn any_ip(t: &T) -> Result<()> {
    let list = json!([
        {"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "0.0.0.0"},
        {"hostPort": 8081, "containerPort": 80, "protocol": "tcp", "hostIP": ""},
    ]);
    let (pod, config) = pod(t, &list)?;
    let node = outside(t)?;
    t.add(&pod, &config)?;
    let _server = Server::start(&pod.netns, ANY4, 80)?;
    seen_by(&node, at(NODE4, 8080)?)?;
    seen_by(&node, at(NODE4, 8081)?).map(drop)
}

fn port_zero(t: &T) -> Result<()> {
    let (first, config) = pod(t, &json!([{"hostPort": 0, "containerPort": 80, "protocol": "tcp"}]))?;
    let (second, other) = pod(t, &json!([{"hostPort": 0, "containerPort": 80, "protocol": "tcp"}]))?;
    t.add(&first, &config)?;
    t.add(&second, &other)?;
    t.del(&first, &config)?;
    t.del(&second, &other)
}

fn protocol_words(t: &T) -> Result<()> {
    let list = json!([
        {"hostPort": 8080, "containerPort": 80, "protocol": "TCP"},
        {"hostPort": 8081, "containerPort": 80},
    ]);
    let (pod, config) = pod(t, &list)?;
    let node = outside(t)?;
    t.add(&pod, &config)?;
    let _server = Server::start(&pod.netns, ANY4, 80)?;
    seen_by(&node, at(NODE4, 8080)?)?;
    seen_by(&node, at(NODE4, 8081)?).map(drop)
}

/// containerd's structures carry no JSON names; the reference plugins' decoder takes keys in any case.
fn capitals(t: &T) -> Result<()> {
    let list = json!([{"HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": ""}]);
    let (pod, config) = pod(t, &list)?;
    let node = outside(t)?;
    t.add(&pod, &config)?;
    let _server = Server::start(&pod.netns, ANY4, 80)?;
    seen_by(&node, at(NODE4, 8080)?).map(drop)
}

fn del_closes(t: &T) -> Result<()> {
    let (pod, config) = pod(t, &tcp(8080))?;
    let node = outside(t)?;
    t.add(&pod, &config)?;
    let _server = Server::start(&pod.netns, ANY4, 80)?;
    seen_by(&node, at(NODE4, 8080)?)?;
    t.del(&pod, &config)?;
    unreachable(&node, at(NODE4, 8080)?)?;
    unreachable(t.host(), at("127.0.0.1", 8080)?)
}

fn del_keeps(t: &T) -> Result<()> {
    let (first, config) = pod(t, &tcp(8080))?;
    let (second, other) = pod(t, &tcp(8081))?;
    let node = outside(t)?;
    t.add(&first, &config)?;
    t.add(&second, &other)?;
    t.del(&first, &config)?;
    let _server = Server::start(&second.netns, ANY4, 80)?;
    seen_by(&node, at(NODE4, 8081)?)?;
    seen_by(t.host(), at("127.0.0.1", 8081)?).map(drop)
}

fn udp_stale_before(t: &T) -> Result<()> {
    let (pod, config) = pod(t, &json!([{"hostPort": 5353, "containerPort": 53, "protocol": "udp"}]))?;
    let node = outside(t)?;
    let (server, client) = (udp(&pod.netns, ANY4, 53)?, udp(&node, ANY4, 0)?);
    let target = at(NODE4, 5353)?;
    let early = udp_echo(&client, target, &server, Duration::from_millis(100))?;
    ensure!(!early, "an echo before ADD");
    t.add(&pod, &config)?;
    ensure!(
        udp_echo(&client, target, &server, Duration::from_secs(5))?,
        "the old flow does not reach the pod"
    );
    Ok(())
}

fn udp_stale_after(t: &T) -> Result<()> {
    let list = json!([{"hostPort": 5353, "containerPort": 53, "protocol": "udp"}]);
    let (first, config) = pod(t, &list)?;
    let (second, other) = pod(t, &list)?;
    let node = outside(t)?;
    let (old, new, client) =
        (udp(&first.netns, ANY4, 53)?, udp(&second.netns, ANY4, 53)?, udp(&node, ANY4, 0)?);
    let target = at(NODE4, 5353)?;
    t.add(&first, &config)?;
    ensure!(udp_echo(&client, target, &old, Duration::from_secs(10))?, "no echo of the first pod");
    t.del(&first, &config)?;
    t.add(&second, &other)?;
    ensure!(udp_echo(&client, target, &new, Duration::from_secs(5))?, "the flow is stuck at the first pod");
    Ok(())
}

fn check_damage(t: &T) -> Result<()> {
    super::need(t, "0.4.0")?;
    let (pod, config) = pod(t, &tcp(8080))?;
    let result = t.add(&pod, &config)?;
    t.check(&pod, &config, &result)?.ok_silent()?;
    t.inside(t.host(), "nft", &["flush", "ruleset"]).context("nft")?;
    t.check(&pod, &config, &result)?.refused_somehow()?;
    Ok(())
}

fn gc_removes(t: &T) -> Result<()> {
    super::need(t, "1.1.0")?;
    let (first, config) = pod(t, &tcp(8080))?;
    let (second, other) = pod(t, &tcp(8081))?;
    let node = outside(t)?;
    t.add(&first, &config)?;
    t.add(&second, &other)?;
    t.gc(&t.config(), &[&second])?.ok_silent()?;
    let _server = Server::start(&second.netns, ANY4, 80)?;
    seen_by(&node, at(NODE4, 8081)?)?;
    let _stale = Server::start(&first.netns, ANY4, 80)?;
    unreachable(&node, at(NODE4, 8080)?)
}

fn collision(t: &T) -> Result<()> {
    let (first, config) = pod(t, &tcp(8080))?;
    let (second, other) = pod(t, &tcp(8080))?;
    let node = outside(t)?;
    t.add(&first, &config)?;
    let refusal = t.ask("ADD", &second, &other)?.refused_somehow()?;
    refusal.names(&["8080"])?;
    refusal.names(&[&first.id])?;
    let _server = Server::start(&first.netns, ANY4, 80)?;
    seen_by(&node, at(NODE4, 8080)?).context("the holder's port")?;
    t.del(&second, &other)?;
    seen_by(&node, at(NODE4, 8080)?).context("the holder's port after the DEL of the refused one")?;
    t.del(&first, &config)?;
    t.add(&second, &other).map(drop)
}

fn collision_any(t: &T) -> Result<()> {
    let list = json!([{"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "127.0.0.1"}]);
    let (first, config) = pod(t, &list)?;
    let (second, other) = pod(t, &tcp(8080))?;
    t.add(&first, &config)?;
    t.ask("ADD", &second, &other)?.refused_somehow()?.names(&["8080"])
}

fn bad(t: &T, mapping: &Value, words: &[&str]) -> Result<()> {
    let (pod, config) = pod(t, &json!([mapping]))?;
    t.ask("ADD", &pod, &config)?.refused_somehow()?.names(words)
}
