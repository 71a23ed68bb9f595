//! A main plugin and its delegate: what the IPAM plugin is told, and what happens when it fails, half-way or wholly.

use anyhow::{Result, ensure};
use serde_json::json;

use super::super::super::case::{Case, same};
use super::super::context::T;
use super::super::fake::Fake;
use super::super::subject::{Kind, NETWORK};
use super::{check, group};

pub(super) fn cases(kind: Kind) -> Vec<Case<T>> {
    let area = group(kind, "delegation");
    vec![
        check(area, "the IPAM plugin gets the variables and the configuration", told),
        check(area, "what it gives is in the pod and in the result", given),
        check(area, "its DNS is in the result", its_dns),
        check(area, "DEL calls it with the same attachment", del_called),
        check(area, "CHECK calls it, and its refusal is passed on", check_called),
        check(area, "its error code is passed on, the host is clean", |t| code_passed(t, 11)),
        check(area, "its own error code is passed on, the host is clean", |t| code_passed(t, 123)),
        check(area, "an answer that is no JSON: an error, and it gets its DEL", |t| garbage(t, "hello")),
        check(area, "an answer that is cut short: an error, and it gets its DEL", |t| {
            garbage(t, "{\"ips\":[")
        }),
        check(area, "an answer without addresses is an error, and it gets its DEL", |t| {
            garbage(t, "{\"cniVersion\":\"1.0.0\",\"ips\":[]}")
        }),
        check(area, "an address that is none: an error, and it gets its DEL", |t| {
            garbage(
                t,
                "{\"cniVersion\":\"1.0.0\",\"ips\":[{\"address\":\"10.92.0.300/24\",\"version\":\"4\"}]}",
            )
        }),
        check(area, "a route that the kernel refuses: all is taken back", half_way),
        check(area, "a pod that has the interface: IPAM is given back what it gave", taken_back),
        check(area, "a type that is a path: refused, and nothing is run", type_is_path),
        check(area, "a failing DEL of IPAM is an error, and the pair is gone all the same", del_fails),
    ]
}

fn told(t: &T) -> Result<()> {
    let fake = Fake::new(t)?;
    let pod = t.pod()?;
    t.add(&pod, &fake.config(t))?;
    let line = format!("ADD id={} if=eth0 netns={} path=", pod.id, pod.netns.display());
    ensure!(fake.log().starts_with(&line), "expected {line:?}, it was called with {:?}", fake.log());
    let input = fake.input("ADD")?;
    same("name", input["name"].as_str(), Some(NETWORK))?;
    same("cniVersion", input["cniVersion"].as_str(), Some(t.newest()))?;
    same("its section", input["ipam"]["mark"].as_str(), Some("kept"))
}

fn given(t: &T) -> Result<()> {
    let fake = Fake::new(t)?;
    let pod = t.pod()?;
    let result = t.add(&pod, &fake.config(t))?;
    same("the address", result["ips"][0]["address"].as_str(), Some("10.92.0.2/24"))?;
    same("the addresses", t.addresses(&pod.netns, "eth0")?, vec!["10.92.0.2/24".to_owned()])
}

fn its_dns(t: &T) -> Result<()> {
    let result = t.add(&t.pod()?, &Fake::new(t)?.config(t))?;
    same("dns", result["dns"]["nameservers"][0].as_str(), Some("192.0.2.9"))
}

fn del_called(t: &T) -> Result<()> {
    let fake = Fake::new(t)?;
    let pod = t.pod()?;
    t.add(&pod, &fake.config(t))?;
    t.del(&pod, &fake.config(t))?;
    let wanted = format!("DEL id={} if=eth0", pod.id);
    ensure!(fake.log().contains(&wanted), "no {wanted:?} in {:?}", fake.log());
    same("its section", fake.input("DEL")?["ipam"]["mark"].as_str(), Some("kept"))
}

fn check_called(t: &T) -> Result<()> {
    let fake = Fake::new(t)?;
    let pod = t.pod()?;
    let config = fake.config(t);
    let result = t.add(&pod, &config)?;
    t.check(&pod, &config, &result)?.ok_silent()?;
    same("calls", fake.calls("CHECK"), 1)?;
    fake.fails("CHECK", 123)?;
    t.check(&pod, &config, &result)?.refused_with(&[123])?;
    Ok(())
}

fn code_passed(t: &T, code: u64) -> Result<()> {
    let fake = Fake::new(t)?;
    fake.fails("ADD", code)?;
    let pod = t.pod()?;
    t.ask("ADD", &pod, &fake.config(t))?.refused_with(&[code])?.names(&["the fake refuses"])?;
    ensure!(t.link(&pod.netns, "eth0")?.is_none(), "eth0 is left in the pod");
    t.gone(|| Ok(t.pairs()?.is_empty()), "a pair is left")
}

fn garbage(t: &T, text: &str) -> Result<()> {
    let fake = Fake::new(t)?;
    fake.prints("ADD", text)?;
    let pod = t.pod()?;
    t.ask("ADD", &pod, &fake.config(t))?.refused_somehow()?;
    ensure!(fake.calls("DEL") > 0, "IPAM may hold an address: it got no DEL: {:?}", fake.log());
    ensure!(t.link(&pod.netns, "eth0")?.is_none(), "eth0 is left in the pod");
    t.gone(|| Ok(t.pairs()?.is_empty()), "a pair is left")
}

fn half_way(t: &T) -> Result<()> {
    let fake = Fake::new(t)?;
    let mut ip = json!({"address": "10.92.0.2/24", "gateway": "10.92.0.1"});
    if t.newest() < "1.0.0" {
        ip["version"] = "4".into();
    }
    // A next hop that is on no link of the pod.
    let routes = json!([{"dst": "198.51.100.0/24", "gw": "203.0.113.1"}]);
    fake.answers("ADD", &json!({"cniVersion": t.newest(), "ips": [ip], "routes": routes}))?;
    let pod = t.pod()?;
    t.ask("ADD", &pod, &fake.config(t))?.refused_somehow()?;
    ensure!(fake.calls("DEL") > 0, "IPAM was not given back its address: {:?}", fake.log());
    ensure!(t.link(&pod.netns, "eth0")?.is_none(), "eth0 is left in the pod");
    t.gone(|| Ok(t.pairs()?.is_empty()), "a pair is left")
}

fn taken_back(t: &T) -> Result<()> {
    let fake = Fake::new(t)?;
    let pod = t.pod()?;
    t.ip(&pod.netns, "link add eth0 type ifb")?;
    t.ask("ADD", &pod, &fake.config(t))?.refused_somehow()?;
    ensure!(fake.calls("ADD") == fake.calls("DEL"), "an address is held: {:?}", fake.log());
    Ok(())
}

fn type_is_path(t: &T) -> Result<()> {
    let fake = Fake::new(t)?;
    let mut config = fake.config(t);
    let kind = config["ipam"]["type"].as_str().unwrap_or_default().to_owned();
    config["ipam"]["type"] = format!("./{kind}").into();
    t.ask("ADD", &t.pod()?, &config)?.refused_somehow()?;
    ensure!(fake.calls("ADD") == 0, "the plugin was run by a path: {:?}", fake.log());
    t.gone(|| Ok(t.pairs()?.is_empty()), "a pair is left")
}

fn del_fails(t: &T) -> Result<()> {
    let fake = Fake::new(t)?;
    let pod = t.pod()?;
    t.add(&pod, &fake.config(t))?;
    fake.fails("DEL", 11)?;
    t.ask("DEL", &pod, &fake.config(t))?.refused_with(&[11])?;
    t.gone(|| Ok(t.pairs()?.is_empty()), "the pair is left")
}
