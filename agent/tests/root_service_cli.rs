//! `keelson-agent service …` and what the operator is told about objects that make no sense: a real agent with only its
//! proxy beside a pretended API server.

use std::{net::SocketAddr, path::Path, process::Output};

use anyhow::{Context, Result, ensure};
use ebpf_tests::{
    agent::Agent,
    api::{self, Api},
    arena::Arena,
    servers::{DEADLINE, Server, ask_tcp},
    tables::{at, ips, key, service},
};
use serde_json::{Value, json};

const WEB: &str = "10.96.0.10:80";

struct Node {
    agent: Agent,
    api: Api,
    _arena: Arena,
    _servers: [Server; 2],
}

/// A node with the Service `web`, its endpoints answering, and whatever else the API server has.
fn node(more: impl FnOnce(&Api)) -> Result<Node> {
    let arena = Arena::enter(&ips(&["10.244.0.1", "10.244.0.2"]))?;
    let servers = [Server::tcp(at("10.244.0.1:8080"))?, Server::tcp(at("10.244.0.2:8080"))?];
    let api = Api::start()?;
    api.put("services", api::service("default", "web", at(WEB), "TCP"));
    api.put("endpointslices", slice("web", 0, &["10.244.0.1:8080", "10.244.0.2:8080"]));
    more(&api);
    let agent = agent(&arena, &api)?;
    let mut node = Node { agent, api, _arena: arena, _servers: servers };
    node.agent.start()?;
    node.agent.wait_for_syncs(1)?;
    Ok(node)
}

fn agent(arena: &Arena, api: &Api) -> Result<Agent> {
    Agent::new(Path::new(env!("CARGO_BIN_EXE_keelson-agent")), arena, &api.kubeconfig())
}

fn slice(service: &str, number: usize, endpoints: &[&str]) -> Value {
    let endpoints: Vec<SocketAddr> = endpoints.iter().map(|text| at(text)).collect();
    api::slice("default", service, number, &endpoints, "TCP")
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

impl Node {
    /// What a question prints; it must succeed.
    fn said(&self, arguments: &[&str]) -> Result<String> {
        let output = self.agent.service(arguments)?;
        let said = text(&output);
        ensure!(output.status.success(), "{arguments:?}: {said}");
        Ok(said)
    }

    /// Waits until a question prints these words.
    fn wait_for(&self, arguments: &[&str], words: &str) -> Result<String> {
        let until = std::time::Instant::now() + DEADLINE * 3;
        loop {
            let said = text(&self.agent.service(arguments)?);
            if said.contains(words) {
                return Ok(said);
            }
            ensure!(std::time::Instant::now() < until, "{arguments:?} never says {words:?}: {said}");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }

    /// `web` answers as ever.
    fn web_answers(&self) -> Result<()> {
        let (who, peer) = ask_tcp(at(WEB)).with_context(|| self.agent.log())?;
        ensure!(who.starts_with("10.244.0.") && peer == at(WEB), "{who} as {peer}");
        Ok(())
    }
}

#[test]
fn questions_are_answered_in_the_words_of_the_api() -> Result<()> {
    let mut node = node(|api| {
        api.put("services", api::service("default", "idle", at("10.96.0.11:80"), "TCP"));
        api.put("endpointslices", slice("idle", 0, &[]));
    })?;
    for _ in 0..3 {
        node.web_answers()?;
    }
    let list = node.said(&["list"])?;
    assert!(list.contains("default/web:80/TCP/IPv4") && list.contains("10.96.0.10:80/TCP"), "{list}");
    let show = node.said(&["show", "default/web"])?;
    assert!(show.contains("10.244.0.1:8080") && show.contains("10.244.0.2:8080"), "{show}");
    assert!(node.said(&["show", "default/idle"])?.contains("no endpoints: connections are refused"));
    let trace = node.said(&["trace", "pod", WEB])?;
    assert!(trace.contains("default/web:80/TCP/IPv4; a pod is connected to one of"), "{trace}");
    let refused = node.said(&["trace", "host", "10.96.0.11:80"])?;
    assert!(refused.contains("no endpoint for a process of this node: refused at once"), "{refused}");
    assert!(node.said(&["trace", "pod", "192.0.2.7:80"])?.contains("is no service"));
    let backends = node.said(&["backends"])?;
    assert_eq!(backends.matches("default/web:80/TCP/IPv4").count(), 2, "{backends}");
    let stats: Value = serde_json::from_slice(&node.agent.service(&["-o", "json", "stats"])?.stdout)?;
    let all = stats.as_array().context("a list")?;
    let web = all.iter().find(|service| service["name"] == "default/web:80/TCP/IPv4").context("web")?;
    assert_eq!(web["stats"]["connections"], 3, "{web}");
    let unknown = text(&node.agent.service(&["show", "default/nobody"])?);
    assert!(unknown.contains("no service \"default/nobody\" is programmed here"), "{unknown}");
    for (arguments, words) in [
        (["trace", "moon", WEB], "SRC \"moon\" is none of host, pod and an address"),
        (["trace", "pod", "10.96.0.10"], "DST \"10.96.0.10\" is not an address and port"),
    ] {
        let output = node.agent.service(&arguments)?;
        assert!(!output.status.success() && text(&output).contains(words), "{}", text(&output));
    }
    assert!(node.said(&["verify"])?.contains("the maps hold what the API says"));
    // What changes while nobody follows is found.
    node.agent.kill()?;
    node.api.put("endpointslices", slice("web", 0, &["10.244.0.2:8080", "10.244.0.3:8080"]));
    node.api.put("services", api::service("default", "new", at("10.96.0.12:80"), "TCP"));
    node.api.delete("services", "default", "idle");
    let output = node.agent.service(&["verify"])?;
    let said = text(&output);
    assert!(!output.status.success(), "{said}");
    for words in [
        "default/web:80/TCP/IPv4: endpoint 10.244.0.3:8080 is missing",
        "default/web:80/TCP/IPv4: 10.244.0.1:8080 still answers",
        "default/new:80/TCP/IPv4: is not programmed",
        "default/idle:80/TCP/IPv4: is programmed, and the API has no such Service",
        "4 difference(s)",
    ] {
        assert!(said.contains(words), "{words:?} is not in:\n{said}");
    }
    // The next agent mends all of it, what nobody names any more after some time.
    node.agent.start()?;
    node.wait_for(&["verify"], "the maps hold what the API says")?;
    Ok(())
}

#[test]
fn objects_that_make_no_sense_are_named_and_the_rest_works() -> Result<()> {
    let with_ports = |name: &str, ip: &str, ports: Value| {
        let mut object =
            api::service("default", name, SocketAddr::new(ip.parse().expect("an address"), 80), "TCP");
        object["spec"]["ports"] = ports;
        object
    };
    let node = node(|api| {
        let ports = json!([{"name": "good", "port": 80}, {"name": "bad", "port": 70_000}]);
        api.put("services", with_ports("high", "10.96.1.1", ports));
        let ports = json!([{"name": "a", "port": 80}, {"name": "b", "port": 80}]);
        api.put("services", with_ports("twice", "10.96.1.2", ports));
        api.put("services", api::service("default", "mixed", at("10.96.1.3:80"), "TCP"));
        let mut mixed = slice("mixed", 0, &["10.244.0.1:8080"]);
        let addresses = ["10.244.0.1", "fd00::1", "127.0.0.1", "10.244.0.1"];
        mixed["endpoints"] = addresses.iter().map(|address| json!({"addresses": [address]})).collect();
        api.put("endpointslices", mixed);
        let many: Vec<Value> = (1..=5000).map(|n| json!({"name": format!("p{n}"), "port": n})).collect();
        api.put("services", with_ports("many", "10.96.1.4", many.into()));
        // As kube-proxy does, addresses beyond the pods' range are believed; slices wait for their Service.
        api.put("services", api::service("default", "beyond", at("10.96.1.5:80"), "TCP"));
        api.put("endpointslices", slice("beyond", 0, &["203.0.113.9:8080"]));
        api.put("endpointslices", slice("late", 0, &["10.244.0.2:8080"]));
        // Somebody else's address and port.
        api.put("services", api::service("default", "zz-thief", at(WEB), "TCP"));
    })?;
    node.web_answers()?;
    let told = |name: &str, reason: &str, words: &str| node.api.wait_for_event(reason, name, words);
    told("high", "ServicePartlyProgrammed", "spec.ports[1].port: 70000 is not a port number")?;
    told("twice", "ServicePartlyProgrammed", "spec.ports[1]: 80/TCP stands in the list twice")?;
    told("mixed", "ServicePartlyProgrammed", "endpoint fd00::1 is not of the slice's addressType")?;
    told("mixed", "ServicePartlyProgrammed", "endpoint 127.0.0.1 is no address that an endpoint can have")?;
    told(
        "zz-thief",
        "ServiceNotProgrammed",
        "10.96.0.10:80/TCP belongs to service default/web:80/TCP/IPv4 already",
    )?;
    assert_eq!(ask_tcp(at("10.96.1.3:80"))?.0, "10.244.0.1:8080", "a doubled address is one endpoint");
    assert!(node.said(&["show", "default/high"])?.contains("10.96.1.1:80/TCP"));
    assert_eq!(node.said(&["show", "default/many"])?.matches("10.96.1.4:").count(), 5000);
    assert!(node.said(&["trace", "pod", "10.96.1.5:80"])?.contains("203.0.113.9:8080"));
    // The slices' Service appears.
    node.api.put("services", api::service("default", "late", at("10.96.1.6:80"), "TCP"));
    node.wait_for(&["trace", "pod", "10.96.1.6:80"], "10.244.0.2:8080")?;
    // More endpoints than a service can have: it keeps those that it had.
    let endpoint = |n: u32| format!("10.{}.{}.{}:8080", 128 + (n >> 16), n >> 8 & 0xff, n & 0xff);
    for number in 0..70_u32 {
        let endpoints: Vec<String> = (0..1000).map(|n| endpoint(number * 1000 + n)).collect();
        let endpoints: Vec<&str> = endpoints.iter().map(String::as_str).collect();
        node.api.put("endpointslices", slice("late", 1 + number as usize, &endpoints));
    }
    told("late", "ServiceNotProgrammed", "endpoints are more than the 65535 one service may have")?;
    node.wait_for(&["trace", "pod", "10.96.1.6:80"], "10.244.0.2:8080")?;
    let metrics = node.agent.metrics()?;
    assert!(
        metrics.contains("keelson_service_refused 2\n"),
        "the thief, and the one with too many endpoints"
    );
    // Each thing is said once.
    let events = node.api.events();
    let said =
        events.iter().filter(|(reason, name, _)| reason == "ServicePartlyProgrammed" && name == "high");
    assert_eq!(said.count(), 1, "{events:?}");
    node.web_answers()
}

#[test]
fn an_api_that_flaps_and_replays_changes_nothing() -> Result<()> {
    let node = node(|_| {})?;
    for round in 0..5 {
        node.api.set_down(true);
        node.api.break_watches();
        node.web_answers()?;
        node.api.set_down(false);
        // The same object again, and a change that must arrive through all of this.
        node.api.put("services", api::service("default", "web", at(WEB), "TCP"));
        let endpoint = format!("10.244.0.{}:8080", 1 + round % 2);
        node.api.put("endpointslices", slice("web", 0, &[&endpoint]));
        node.api.break_watches();
        let until = std::time::Instant::now() + DEADLINE * 6;
        loop {
            let (who, _) = ask_tcp(at(WEB))?;
            if who == endpoint {
                break;
            }
            ensure!(std::time::Instant::now() < until, "round {round}: {who} answers\n{}", node.agent.log());
        }
    }
    Ok(())
}

#[test]
fn a_foreign_program_and_a_foreign_owner_are_left_alone() -> Result<()> {
    // Another data plane hangs on the same cgroup: it goes on beside ours.
    let arena = Arena::enter(&ips(&["10.244.0.1", "10.244.0.2"]))?;
    let _servers = [Server::tcp(at("10.244.0.1:8080"))?, Server::tcp(at("10.244.0.2:8080"))?];
    let mut config = arena.config();
    let mut other_pins = arena.pin_dir.clone().into_os_string();
    other_pins.push("-other");
    config.pin_dir = other_pins.into();
    let foreign_vip = at("10.97.0.1:80");
    let mut foreign = ebpf_loader::DataPlane::open(config.clone())?;
    let table =
        [(key("foreign"), service(ebpf_common::Protocol::Tcp, &[foreign_vip], &[at("10.244.0.2:8080")]))];
    foreign.replace_all(&table.into());
    foreign.attach()?;
    let api = Api::start()?;
    api.put("services", api::service("default", "web", at(WEB), "TCP"));
    api.put("endpointslices", slice("web", 0, &["10.244.0.1:8080"]));
    // Our pins are held by another process at first.
    let held = arena.open()?;
    let mut agent = agent(&arena, &api)?;
    agent.start()?;
    let outcome =
        api.wait_for_event("ServiceProxyUnavailable", "bench", "another process runs the data plane");
    outcome.with_context(|| agent.log())?;
    drop(held);
    agent.kill()?;
    agent.start()?;
    agent.wait_for_syncs(1)?;
    assert_eq!(ask_tcp(at(WEB))?.0, "10.244.0.1:8080");
    assert_eq!(ask_tcp(foreign_vip)?.0, "10.244.0.2:8080", "the foreign program still runs");
    agent.kill()?;
    assert_eq!(ask_tcp(foreign_vip)?.1, foreign_vip);
    drop(foreign);
    ebpf_loader::unload(&config.pin_dir)?;
    Ok(())
}
