//! A main plugin that is told by a file what the network between nodes is: it gives what that says, and waits for it.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::super::super::case::{Case, same};
use super::super::context::{Pod, T, with};
use super::super::fake::Fake;
use super::super::subject::{Kind, OVERLAY, Subject};
use super::{check, group};

pub(super) fn cases(kind: Kind) -> Vec<Case<T>> {
    let area = group(kind, "overlay");
    let delegation = group(kind, "delegation");
    vec![
        check(area, "ADD gives an address of the node's range, the overlay's MTU and a default route", given),
        check(area, "both families, where the node has a range of each", both_families),
        check(area, "no file: ADD is to be tried again, STATUS says not available", |t| {
            std::fs::remove_file(t.dir().join(OVERLAY))?;
            waits(t, &[11], "does not exist")
        }),
        check(area, "not ready: ADD is to be tried again and tells the reason", |t| {
            told(t, &json!({"ready": false, "reason": "no underlay"}))?;
            waits(t, &[11], "no underlay")
        }),
        check(area, "of an earlier boot: as if there were none", |t| {
            told(t, &json!({"bootID": "another"}))?;
            waits(t, &[11], "boot")
        }),
        check(area, "cut short: code 6", |t| {
            std::fs::write(t.dir().join(OVERLAY), "{\"version\": 1")?;
            waits(t, &[6], OVERLAY)
        }),
        check(area, "of an unknown version: code 7 that names it", |t| {
            told(t, &json!({"version": 99}))?;
            waits(t, &[7], "99")
        }),
        check(area, "without ranges: code 7 that names them", |t| {
            told(t, &json!({"podCIDRs": []}))?;
            waits(t, &[7], "podCIDRs")
        }),
        check(area, "an MTU that cannot be: code 7 that names it", |t| {
            told(t, &json!({"mtu": 20}))?;
            waits(t, &[7], "mtu")
        }),
        check(area, "the tunnel's device is missing: STATUS says limited connectivity", no_device),
        check(area, "DEL and GC need no file", leaves),
        check(area, "CHECK after the state has changed", changed),
        check(delegation, "the IPAM plugin gets the ranges", ranges_told),
        check(delegation, "its error code is passed on, the host is clean", ipam_fails),
    ]
}

/// Changes the file.
fn told(t: &T, change: &Value) -> Result<()> {
    let mut state = Subject::overlay();
    super::super::subject::merge(&mut state, change.clone());
    std::fs::write(t.dir().join(OVERLAY), state.to_string())?;
    Ok(())
}

fn status(t: &T) -> Result<super::super::answer::Answer> {
    t.ask("STATUS", &Pod { id: String::new(), netns: t.dir().to_owned() }, &t.config())
}

fn waits(t: &T, codes: &[u64], word: &str) -> Result<()> {
    let pod = t.pod()?;
    t.ask("ADD", &pod, &t.config())?.refused_with(codes)?.names(&[word])?;
    ensure!(t.link(&pod.netns, "eth0")?.is_none(), "eth0 is left in the pod");
    status(t)?.refused_with(&[50])?.names(&[word])?;
    t.nothing_left()
}

fn given(t: &T) -> Result<()> {
    let pod = t.pod()?;
    let result = t.add(&pod, &t.config())?;
    same("the address", result["ips"][0]["address"].as_str(), Some("10.91.0.2/29"))?;
    same("the MTU", t.need_link(&pod.netns, "eth0")?["mtu"].as_u64(), Some(1400))?;
    let routes = t.ip(&pod.netns, "route show default")?;
    ensure!(routes.contains("via 10.91.0.1"), "{routes}");
    t.del(&pod, &t.config())
}

fn both_families(t: &T) -> Result<()> {
    told(t, &json!({"podCIDRs": ["10.91.0.0/29", "fd91::/64"]}))?;
    let pod = t.pod()?;
    t.add(&pod, &t.config())?;
    let wanted = vec!["10.91.0.2/29".to_owned(), "fd91::2/64".to_owned()];
    same("the addresses", t.addresses(&pod.netns, "eth0")?, wanted)?;
    t.del(&pod, &t.config())
}

fn no_device(t: &T) -> Result<()> {
    told(t, &json!({"device": "tun7"}))?;
    status(t)?.refused_with(&[51])?.names(&["tun7"])?;
    t.ip(t.host(), "link add tun7 type bridge")?;
    status(t)?.refused_with(&[51])?.names(&["tun7"])?;
    t.ip(t.host(), "link set tun7 up")?;
    status(t)?.ok_silent()
}

fn leaves(t: &T) -> Result<()> {
    let (one, two) = (t.pod()?, t.pod()?);
    t.add(&one, &t.config())?;
    t.add(&two, &t.config())?;
    std::fs::remove_file(t.dir().join(OVERLAY))?;
    t.del(&one, &t.config())?;
    t.gc(&t.config(), &[])?.ok_silent()?;
    t.nothing_left()
}

fn changed(t: &T) -> Result<()> {
    let pod = t.pod()?;
    let result = t.add(&pod, &t.config())?;
    told(t, &json!({"mtu": 1300, "podCIDRs": ["10.92.0.0/24"]}))?;
    t.check(&pod, &t.config(), &result)?.ok_silent()?;
    t.del(&pod, &t.config())?;
    t.nothing_left()
}

fn ranges_told(t: &T) -> Result<()> {
    let fake = Fake::new(t)?;
    let pod = t.pod()?;
    t.add(&pod, &fake.config(t))?;
    let input = fake.input("ADD")?;
    same("the ranges", &input["ipam"]["ranges"], &json!([[{"subnet": "10.91.0.0/29"}]]))?;
    same("its own key", input["ipam"]["mark"].as_str(), Some("kept"))?;
    t.del(&pod, &with(&fake.config(t), "prevResult", Value::Null))
}

fn ipam_fails(t: &T) -> Result<()> {
    let fake = Fake::new(t)?;
    fake.fails("ADD", 123)?;
    let pod = t.pod()?;
    t.ask("ADD", &pod, &fake.config(t))?.refused_with(&[123])?.names(&["the fake refuses"])?;
    t.gone(|| Ok(t.pairs()?.is_empty()), "a pair is left")
}
