//! CHECK: silent while all is as ADD left it, and an error for every damage.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::super::super::case::Case;
use super::super::context::{Pod, T, without};
use super::super::subject::{BRIDGE, Kind};
use super::{check, group, need, ready, ready_for};

pub(super) fn cases(kind: Kind) -> Vec<Case<T>> {
    let area = group(kind, "CHECK");
    let mut all = vec![
        check(area, "after ADD is silent, in each version that has it", fine),
        check(area, "of version 0.3.1, which has none: code 1", too_old),
        check(area, "changes nothing: ten times", ten_times),
    ];
    if !matches!(kind, Kind::Ipam | Kind::Loopback) {
        all.push(check(area, "without prevResult is refused", no_result));
    }
    if !matches!(kind, Kind::Ipam | Kind::Loopback | Kind::Portmap | Kind::Masquerade) {
        all.push(check(area, "with a namespace that is gone is refused", netns_gone));
    }
    if kind == Kind::Ipam {
        all.push(check(area, "after DEL is refused", after_del));
    }
    if kind.attaches() {
        all.extend([
            check(area, "the pod's interface was deleted", |t| damaged(t, "link del eth0", "")),
            check(area, "the pod's interface is down", |t| damaged(t, "link set eth0 down", "")),
            check(area, "the pod's address was removed", |t| damaged(t, "addr flush dev eth0", "")),
            check(area, "the pod's default route was removed", |t| damaged(t, "route del default", "")),
            check(area, "the pod's hardware address was changed", |t| {
                damaged(t, "link set eth0 address 02:00:00:00:00:99", "")
            }),
            check(area, "the host's end is down", |t| damaged(t, "", "link set PAIR down")),
            check(area, "the host's end is on no bridge", |t| damaged(t, "", "link set PAIR nomaster")),
            check(area, "the bridge is down", |t| damaged(t, "", &format!("link set {BRIDGE} down"))),
            check(area, "the bridge's gateway address was removed", |t| {
                damaged(t, "", &format!("addr flush dev {BRIDGE}"))
            }),
            check(area, "the IPAM plugin has forgotten the address", forgotten),
        ]);
    }
    all
}

fn fine(t: &T) -> Result<()> {
    for version in ["0.4.0", "1.0.0", "1.1.0"].into_iter().filter(|version| t.supports(version)) {
        let (pod, config) = ready_for(t, version)?;
        let result = t.add(&pod, &config)?;
        t.check(&pod, &config, &result)?.ok_silent()?;
        t.del(&pod, &config)?;
    }
    Ok(())
}

fn too_old(t: &T) -> Result<()> {
    need(t, "0.3.1")?;
    let (pod, config) = ready_for(t, "0.3.1")?;
    let result = t.add(&pod, &config)?;
    t.check(&pod, &config, &result)?.refused_with(&[1])?;
    Ok(())
}

fn no_result(t: &T) -> Result<()> {
    need(t, "0.4.0")?;
    let (pod, config) = ready(t)?;
    t.add(&pod, &config)?;
    t.ask("CHECK", &pod, &without(&config, "prevResult"))?.refused_somehow()?.names(&["prevResult"])
}

fn ten_times(t: &T) -> Result<()> {
    need(t, "0.4.0")?;
    let (pod, config) = ready(t)?;
    let result = t.add(&pod, &config)?;
    for _ in 0..10 {
        t.check(&pod, &config, &result)?.ok_silent()?;
    }
    t.del(&pod, &config)
}

fn netns_gone(t: &T) -> Result<()> {
    need(t, "0.4.0")?;
    let (pod, config) = ready(t)?;
    let result = t.add(&pod, &config)?;
    let gone = Pod { id: pod.id, netns: t.dir().join("netns/none") };
    t.check(&gone, &config, &result)?.refused_somehow()?;
    Ok(())
}

fn after_del(t: &T) -> Result<()> {
    need(t, "0.4.0")?;
    let (pod, config) = ready(t)?;
    let result = t.add(&pod, &config)?;
    t.del(&pod, &config)?;
    t.check(&pod, &config, &result)?.refused_somehow()?;
    Ok(())
}

fn damaged(t: &T, in_pod: &str, on_host: &str) -> Result<()> {
    need(t, "0.4.0")?;
    let pod = t.pod()?;
    let config = t.config();
    let result = t.add(&pod, &config)?;
    t.check(&pod, &config, &result)?.ok_silent()?;
    if !in_pod.is_empty() {
        t.ip(&pod.netns, in_pod)?;
    }
    if !on_host.is_empty() {
        let pair = t.pairs()?.pop().unwrap_or_default();
        t.ip(t.host(), &on_host.replace("PAIR", &pair))?;
    }
    let refusal = t.check(&pod, &config, &result)?.refused_somehow()?;
    ensure!(refusal.code != 1, "the version is supported: {}", refusal.text);
    Ok(())
}

fn forgotten(t: &T) -> Result<()> {
    need(t, "0.4.0")?;
    let pod = t.pod()?;
    let config = t.config();
    let result: Value = t.add(&pod, &config)?;
    let mut ipam = json!({"cniVersion": t.newest(), "name": config["name"], "ipam": config["ipam"]});
    ipam["type"] = config["ipam"]["type"].clone();
    let mut call = t.call("DEL", &pod, &ipam);
    call.file = t.subject().dir.join(&t.subject().ipam);
    t.run(&call)?.ok()?;
    t.check(&pod, &config, &result)?.refused_somehow()?;
    Ok(())
}
