//! ADD of a main plugin: what the pod can do afterwards, and what is left after a refusal.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::super::super::case::{Case, same};
use super::super::context::{Pod, T, with, without};
use super::super::subject::{BRIDGE, Kind};
use super::super::traffic::{ANY4, ANY6, Server, seen_by};
use super::{check, group};

pub(super) fn cases(kind: Kind) -> Vec<Case<T>> {
    let add = group(kind, "ADD");
    let refused = group(kind, "ADD refused");
    vec![
        check(
            add,
            "the interface is in the pod, up, with address, MTU and hardware address of the result",
            result,
        ),
        check(add, "the result names bridge, host end and pod end", interfaces),
        check(add, "every address refers to the pod's interface", address_index),
        check(add, "pods reach each other, and host and pods reach each other", reach),
        check(add, "IPv6", ipv6),
        check(add, "both families", dual_stack),
        check(add, "IPv6 addresses can be used at once", no_duplicate_detection),
        check(add, "two pods get different addresses", two_pods),
        check(add, "two interfaces of one pod", two_interfaces),
        check(add, "two bridges", two_bridges),
        check(add, "without IPAM the pod has an interface and no address", without_ipam),
        check(add, "the capability mac gives the hardware address", mac),
        check(add, "the configuration's dns is in the result", dns),
        check(add, "isGateway false: the bridge gets no address", no_gateway),
        check(add, "hairpinMode is set on the port", hairpin),
        check(add, "a bridge that exists is used as it is", existing_bridge),
        check(add, "ten at once", ten_at_once),
        check(refused, "again for the same pod: an error, the first stays", again),
        check(refused, "the interface exists: an error, address and pair taken back", exists),
        check(refused, "the name of the bridge is that of another kind of link", not_a_bridge),
        check(refused, "mtu that no interface takes: an error and a clean host", bad_mtu),
        check(refused, "mac that is none: an error and a clean host", bad_mac),
        check(refused, "no IPAM executable: an error and a clean host", no_executable),
        check(refused, "addresses exhausted: an error and a clean host", exhausted),
        check(refused, "ipam without type: an error", ipam_without_type),
        check(refused, "bridge a number: code 6 or 7", |t| bad_key(t, "bridge", &json!(5))),
        check(refused, "bridge with too long a name", |t| {
            bad_key(t, "bridge", &json!("a-name-of-many-letters"))
        }),
        check(refused, "isGateway a string: code 6 or 7", |t| bad_key(t, "isGateway", &json!("yes"))),
    ]
}

fn link_of(t: &T, pod: &Pod) -> Result<Value> {
    t.need_link(&pod.netns, "eth0")
}

fn pod_interface(result: &Value, pod: &Pod) -> Result<Value> {
    let all = result["interfaces"].as_array().context("no interfaces")?;
    let path = pod.netns.display().to_string();
    let found = all.iter().find(|one| one["sandbox"] == path.as_str());
    found.cloned().with_context(|| format!("no interface with sandbox {path} in {result}"))
}

/// The first address of a family, without its prefix.
fn address(result: &Value, v6: bool) -> Result<IpAddr> {
    let all = result["ips"].as_array().context("no ips")?;
    let mut texts = all.iter().filter_map(|ip| ip["address"].as_str());
    let text = texts
        .find(|text| text.contains(':') == v6)
        .with_context(|| format!("no such address in {result}"))?;
    Ok(text.split('/').next().unwrap_or_default().parse()?)
}

fn result(t: &T) -> Result<()> {
    let pod = t.pod()?;
    let result = t.add(&pod, &t.config())?;
    let interface = pod_interface(&result, &pod)?;
    same("the name", interface["name"].as_str(), Some("eth0"))?;
    let link = link_of(t, &pod)?;
    same("the hardware address", link["address"].as_str(), interface["mac"].as_str())?;
    same("the MTU", link["mtu"].as_u64(), Some(1400))?;
    ensure!(link["operstate"] == "UP" || link["flags"].to_string().contains("\"UP\""), "it is down: {link}");
    let wanted = result["ips"][0]["address"].as_str().unwrap_or_default().to_owned();
    same("the addresses", t.addresses(&pod.netns, "eth0")?, vec![wanted])?;
    same("the gateway", result["ips"][0]["gateway"].as_str(), Some("10.91.0.1"))?;
    let routes = t.ip_json(&pod.netns, "route show default")?;
    same(
        "the default route's gateway",
        routes.first().map(|route| route["gateway"].clone()),
        Some(json!("10.91.0.1")),
    )
}

fn interfaces(t: &T) -> Result<()> {
    let pod = t.pod()?;
    let result = t.add(&pod, &t.config())?;
    let all = result["interfaces"].as_array().context("no interfaces")?.clone();
    ensure!(
        all.iter().any(|one| one["name"] == BRIDGE && one.get("sandbox").is_none()),
        "no bridge in {all:?}"
    );
    for one in all.iter().filter(|one| one.get("sandbox").is_none()) {
        let name = one["name"].as_str().context("a name")?;
        let link = t.need_link(t.host(), name)?;
        same("the hardware address", link["address"].as_str(), one["mac"].as_str())?;
    }
    let pairs = t.pairs()?;
    ensure!(
        pairs.iter().all(|pair| all.iter().any(|one| one["name"] == pair.as_str())),
        "{pairs:?} not in {all:?}"
    );
    Ok(())
}

fn address_index(t: &T) -> Result<()> {
    let pod = t.pod()?;
    let result = t.add(&pod, &t.config())?;
    for ip in result["ips"].as_array().context("no ips")? {
        let index = usize::try_from(ip["interface"].as_u64().context("no interface")?)?;
        same("the interface", result["interfaces"][index]["name"].as_str(), Some("eth0"))?;
    }
    Ok(())
}

fn reach(t: &T) -> Result<()> {
    let (first, second) = (t.pod()?, t.pod()?);
    let one = address(&t.add(&first, &t.config())?, false)?;
    let two = address(&t.add(&second, &t.config())?, false)?;
    let _server = Server::start(&second.netns, ANY4, 7000)?;
    same("the client's address", seen_by(&first.netns, SocketAddr::new(two, 7000))?, one)?;
    seen_by(t.host(), SocketAddr::new(two, 7000))?;
    let _host = Server::start(t.host(), ANY4, 7001)?;
    let gateway = SocketAddr::new("10.91.0.1".parse()?, 7001);
    same("the client's address", seen_by(&first.netns, gateway)?, one)
}

fn with_ranges(t: &T, ranges: Value) -> Value {
    let mut config = t.config();
    config["ipam"]["ranges"] = ranges;
    config["ipam"]["routes"] = json!([]);
    config
}

fn ipv6(t: &T) -> Result<()> {
    let config = with_ranges(t, json!([[{"subnet": "fd91::/120"}]]));
    let (first, second) = (t.pod()?, t.pod()?);
    t.add(&first, &config)?;
    let two = address(&t.add(&second, &config)?, true)?;
    let _server = Server::start(&second.netns, ANY6, 7000)?;
    seen_by(&first.netns, SocketAddr::new(two, 7000))?;
    let routes = t.ip_json(&first.netns, "-6 route show default")?;
    same(
        "the default route's gateway",
        routes.first().map(|route| route["gateway"].clone()),
        Some(json!("fd91::1")),
    )
}

fn dual_stack(t: &T) -> Result<()> {
    let config = with_ranges(t, json!([[{"subnet": "10.91.0.0/29"}], [{"subnet": "fd91::/120"}]]));
    let (first, second) = (t.pod()?, t.pod()?);
    t.add(&first, &config)?;
    let result = t.add(&second, &config)?;
    let _four = Server::start(&second.netns, ANY4, 7004)?;
    seen_by(&first.netns, SocketAddr::new(address(&result, false)?, 7004))?;
    let _six = Server::start(&second.netns, ANY6, 7006)?;
    seen_by(&first.netns, SocketAddr::new(address(&result, true)?, 7006))?;
    same("the number of addresses", t.addresses(&second.netns, "eth0")?.len(), 2)?;
    t.del(&first, &config)?;
    t.del(&second, &config)?;
    t.nothing_left()
}

fn no_duplicate_detection(t: &T) -> Result<()> {
    let config = with_ranges(t, json!([[{"subnet": "fd91::/120"}]]));
    let pod = t.pod()?;
    t.add(&pod, &config)?;
    let shown = t.ip(&pod.netns, "-6 addr show dev eth0 scope global")?;
    ensure!(!shown.contains("tentative"), "tentative when ADD returned: {shown}");
    Ok(())
}

fn two_pods(t: &T) -> Result<()> {
    let one = address(&t.add(&t.pod()?, &t.config())?, false)?;
    let two = address(&t.add(&t.pod()?, &t.config())?, false)?;
    ensure!(one != two, "both have {one}");
    Ok(())
}

fn two_interfaces(t: &T) -> Result<()> {
    let pod = t.pod()?;
    let config = with(&t.config(), "isDefaultGateway", json!(false));
    let config = {
        let mut config = config;
        config["ipam"]["routes"] = json!([]);
        config
    };
    t.add(&pod, &config)?;
    let second = t.call("ADD", &pod, &config).set("CNI_IFNAME", "eth1");
    let result = t.run(&second)?.ok()?;
    t.need_link(&pod.netns, "eth1")?;
    t.run(&t.call("DEL", &pod, &config).set("CNI_IFNAME", "eth1"))?.ok()?;
    t.gone(|| Ok(t.link(&pod.netns, "eth1")?.is_none()), "eth1 is still there")?;
    t.need_link(&pod.netns, "eth0").context("DEL of eth1 took eth0 with it")?;
    ensure!(!t.addresses(&pod.netns, "eth0")?.is_empty(), "eth0 has no address; eth1 was {result}");
    t.del(&pod, &config)?;
    t.nothing_left()
}

fn two_bridges(t: &T) -> Result<()> {
    let mut other = with(&t.config(), "bridge", json!("cnf1"));
    other["name"] = json!("conformance2");
    other["ipam"]["ranges"] = json!([[{"subnet": "10.93.0.0/29"}]]);
    let (first, second) = (t.pod()?, t.pod()?);
    t.add(&first, &t.config())?;
    let result = t.add(&second, &other)?;
    let _server = Server::start(&second.netns, ANY4, 7000)?;
    seen_by(&first.netns, SocketAddr::new(address(&result, false)?, 7000)).context("over the gateways")?;
    t.del(&second, &other)?;
    link_of(t, &first).context("DEL of another network's pod took it")?;
    Ok(())
}

fn without_ipam(t: &T) -> Result<()> {
    let config = with(&without(&t.config(), "ipam"), "isDefaultGateway", json!(false));
    let config = with(&config, "isGateway", json!(false));
    let pod = t.pod()?;
    let result = t.add(&pod, &config)?;
    ensure!(result["ips"].as_array().is_none_or(Vec::is_empty), "addresses in {result}");
    link_of(t, &pod)?;
    t.del(&pod, &config)?;
    t.gone(|| Ok(t.pairs()?.is_empty()), "the pair is still there")
}

fn mac(t: &T) -> Result<()> {
    let mut config = with(&t.config(), "capabilities", json!({"mac": true}));
    config["runtimeConfig"] = json!({"mac": "02:11:22:33:44:55"});
    let pod = t.pod()?;
    let result = t.add(&pod, &config)?;
    same("the hardware address", link_of(t, &pod)?["address"].as_str(), Some("02:11:22:33:44:55"))?;
    same("that of the result", pod_interface(&result, &pod)?["mac"].as_str(), Some("02:11:22:33:44:55"))
}

fn dns(t: &T) -> Result<()> {
    let dns = json!({"nameservers": ["192.0.2.1"], "domain": "example.org", "search": ["a.example.org"]});
    let result = t.add(&t.pod()?, &with(&t.config(), "dns", dns.clone()))?;
    same("dns", &result["dns"], &dns)
}

fn no_gateway(t: &T) -> Result<()> {
    let mut config = with(&t.config(), "isGateway", json!(false));
    config["isDefaultGateway"] = json!(false);
    config["ipam"]["routes"] = json!([]);
    t.add(&t.pod()?, &config)?;
    same("the bridge's addresses", t.addresses(t.host(), BRIDGE)?, Vec::<String>::new())
}

fn hairpin(t: &T) -> Result<()> {
    t.add(&t.pod()?, &with(&t.config(), "hairpinMode", json!(true)))?;
    let pair = t.pairs()?.pop().context("no pair")?;
    let link = t.need_link(t.host(), &pair)?;
    same("hairpin", link["linkinfo"]["info_slave_data"]["hairpin"].as_bool(), Some(true))
}

fn existing_bridge(t: &T) -> Result<()> {
    t.ip(t.host(), &format!("link add {BRIDGE} address 02:aa:bb:cc:dd:ee type bridge"))?;
    let (pod, other) = (t.pod()?, t.pod()?);
    t.add(&pod, &t.config())?;
    let result = t.add(&other, &t.config())?;
    same(
        "its hardware address",
        t.need_link(t.host(), BRIDGE)?["address"].as_str(),
        Some("02:aa:bb:cc:dd:ee"),
    )?;
    let _server = Server::start(&other.netns, ANY4, 7000)?;
    seen_by(&pod.netns, SocketAddr::new(address(&result, false)?, 7000)).map(drop)
}

fn ten_at_once(t: &T) -> Result<()> {
    let config = with_ranges(t, json!([[{"subnet": "10.91.0.0/24"}]]));
    let pods: Vec<Pod> = (0..10).map(|_| t.pod()).collect::<Result<_>>()?;
    let results: Vec<Result<Value>> = std::thread::scope(|scope| {
        let calls: Vec<_> = pods.iter().map(|pod| scope.spawn(|| t.add(pod, &config))).collect();
        calls.into_iter().map(|call| call.join().unwrap_or_else(|_| anyhow::bail!("a panic"))).collect()
    });
    let mut given = Vec::new();
    for result in results {
        given.push(address(&result?, false)?);
    }
    given.sort();
    given.dedup();
    same("different addresses", given.len(), 10)?;
    for pod in &pods {
        t.del(pod, &config)?;
    }
    t.gone(|| Ok(t.pairs()?.is_empty()), "a pair is left")
}

fn again(t: &T) -> Result<()> {
    let (pod, other) = (t.pod()?, t.pod()?);
    let result = t.add(&pod, &t.config())?;
    t.ask("ADD", &pod, &t.config())?.refused_somehow()?.names(&["eth0"])?;
    t.add(&other, &t.config())?;
    let _server = Server::start(&pod.netns, ANY4, 7000)?;
    seen_by(&other.netns, SocketAddr::new(address(&result, false)?, 7000)).context("the first is broken")?;
    t.del(&pod, &t.config())?;
    t.del(&other, &t.config())?;
    t.nothing_left()
}

fn exists(t: &T) -> Result<()> {
    let pod = t.pod()?;
    t.ip(&pod.netns, "link add eth0 type ifb")?;
    t.ask("ADD", &pod, &t.config())?.refused_somehow()?.names(&["eth0"])?;
    same("the kind of eth0", link_of(t, &pod)?["linkinfo"]["info_kind"].as_str(), Some("ifb"))?;
    t.nothing_left()
}

fn not_a_bridge(t: &T) -> Result<()> {
    t.ip(t.host(), &format!("link add {BRIDGE} type ifb"))?;
    t.ask("ADD", &t.pod()?, &t.config())?.refused_somehow()?.names(&[BRIDGE])?;
    same("its kind", t.need_link(t.host(), BRIDGE)?["linkinfo"]["info_kind"].as_str(), Some("ifb"))?;
    t.nothing_left()
}

fn bad_mtu(t: &T) -> Result<()> {
    t.ask("ADD", &t.pod()?, &with(&t.config(), "mtu", json!(10_000_000)))?.refused_somehow()?;
    t.nothing_left()
}

fn bad_mac(t: &T) -> Result<()> {
    let config = with(&t.config(), "runtimeConfig", json!({"mac": "not-a-mac"}));
    t.ask("ADD", &t.pod()?, &config)?.refused_somehow()?.names(&["mac", "address"])?;
    t.nothing_left()
}

fn no_executable(t: &T) -> Result<()> {
    let mut config = t.config();
    config["ipam"]["type"] = json!("ipam-that-is-not-there");
    t.ask("ADD", &t.pod()?, &config)?.refused_somehow()?.names(&["ipam-that-is-not-there"])?;
    t.gone(|| Ok(t.pairs()?.is_empty()), "a pair is left")
}

fn exhausted(t: &T) -> Result<()> {
    let pods: Vec<Pod> = (0..5).map(|_| t.pod()).collect::<Result<_>>()?;
    for pod in &pods {
        t.add(pod, &t.config())?;
    }
    let late = t.pod()?;
    t.ask("ADD", &late, &t.config())?.refused_somehow()?.names(&["address"])?;
    same("pairs", t.pairs()?.len(), 5)?;
    t.del(&pods[2], &t.config())?;
    t.add(&late, &t.config()).context("after an address was given back")?;
    Ok(())
}

fn ipam_without_type(t: &T) -> Result<()> {
    t.ask("ADD", &t.pod()?, &with(&t.config(), "ipam", json!({"subnet": "10.91.0.0/24"})))?
        .refused_somehow()?;
    t.gone(|| Ok(t.pairs()?.is_empty()), "a pair is left")
}

fn bad_key(t: &T, key: &str, value: &Value) -> Result<()> {
    t.ask("ADD", &t.pod()?, &with(&t.config(), key, value.clone()))?.refused_somehow()?;
    t.nothing_left()
}
