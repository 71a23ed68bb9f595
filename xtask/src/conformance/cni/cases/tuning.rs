//! Sysctls and attributes of the pod's interface, and their way back.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::super::super::case::{Case, same};
use super::super::context::{Pod, T, with, without};
use super::super::subject::Kind;
use super::{check, group, need, ready};

pub(super) fn cases(kind: Kind) -> Vec<Case<T>> {
    let area = group(kind, "settings");
    let refused = group(kind, "settings refused");
    vec![
        check(area, "a sysctl is set in the pod and not on the host", sysctl),
        check(area, "a sysctl whose name has IFNAME for the interface", sysctl_ifname),
        check(area, "mtu", |t| link(t, "mtu", &json!(1300), "mtu")),
        check(area, "mac, which is in the result too", mac),
        check(area, "mac of the capability", mac_capability),
        check(area, "promisc", |t| flag(t, "promisc", "PROMISC")),
        check(area, "allmulti", |t| flag(t, "allmulti", "ALLMULTI")),
        check(area, "txQLen", |t| link(t, "txQLen", &json!(77), "txqlen")),
        check(area, "DEL puts the interface's attributes back", restored),
        check(area, "CHECK sees a changed sysctl", |t| {
            damaged(t, |t, pod| {
                t.inside(&pod.netns, "sysctl", &["-qw", "net.ipv4.conf.eth0.log_martians=0"]).map(drop)
            })
        }),
        check(area, "CHECK sees a changed MTU", |t| {
            damaged(t, |t, pod| t.ip(&pod.netns, "link set eth0 mtu 1234").map(drop))
        }),
        check(refused, "a sysctl that is none", |t| {
            bad(t, "sysctl", &json!({"net.ipv4.nothing_here": "1"}), &["nothing_here"])
        }),
        check(refused, "a sysctl outside net", |t| {
            bad(t, "sysctl", &json!({"kernel.hostname": "x"}), &["kernel"])
        }),
        check(refused, "a sysctl with a way out of /proc/sys", |t| {
            bad(t, "sysctl", &json!({"net/../../../tmp/x": "1"}), &["sysctl", "net/..", "/tmp/x"])
        }),
        check(refused, "a value that the kernel refuses", |t| {
            bad(t, "sysctl", &json!({"net.ipv4.conf.eth0.log_martians": "many"}), &["log_martians"])
        }),
        check(refused, "mac that is none", |t| bad(t, "mac", &json!("zz"), &["zz", "mac"])),
        check(refused, "mtu that no interface takes", |t| {
            bad(t, "mtu", &json!(10_000_000), &["mtu", "10000000"])
        }),
    ]
}

fn read(t: &T, netns: &std::path::Path, name: &str) -> Result<String> {
    Ok(t.inside(netns, "sysctl", &["-n", name])?.trim().to_owned())
}

fn sysctl(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    let config = with(&config, "sysctl", json!({"net.ipv4.ip_default_ttl": "77"}));
    t.add(&pod, &config)?;
    same("in the pod", read(t, &pod.netns, "net.ipv4.ip_default_ttl")?.as_str(), "77")?;
    ensure!(read(t, t.host(), "net.ipv4.ip_default_ttl")? != "77", "it is set on the host");
    Ok(())
}

fn sysctl_ifname(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    t.add(&pod, &with(&config, "sysctl", json!({"net.ipv4.conf.IFNAME.arp_filter": "1"})))?;
    same("arp_filter of eth0", read(t, &pod.netns, "net.ipv4.conf.eth0.arp_filter")?.as_str(), "1")
}

fn link(t: &T, key: &str, value: &Value, shown: &str) -> Result<()> {
    let (pod, config) = ready(t)?;
    t.add(&pod, &with(&config, key, value.clone()))?;
    same(key, &t.need_link(&pod.netns, "eth0")?[shown], value)
}

fn mac(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    let result = t.add(&pod, &with(&config, "mac", json!("02:11:22:33:44:55")))?;
    same("of the link", t.need_link(&pod.netns, "eth0")?["address"].as_str(), Some("02:11:22:33:44:55"))?;
    let shown =
        result["interfaces"].as_array().into_iter().flatten().find(|one| one["name"] == "eth0").cloned();
    same("of the result", shown.unwrap_or_default()["mac"].as_str(), Some("02:11:22:33:44:55"))
}

fn mac_capability(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    let config = with(&config, "runtimeConfig", json!({"mac": "02:11:22:33:44:66"}));
    t.add(&pod, &with(&config, "capabilities", json!({"mac": true})))?;
    same("of the link", t.need_link(&pod.netns, "eth0")?["address"].as_str(), Some("02:11:22:33:44:66"))
}

fn flag(t: &T, key: &str, shown: &str) -> Result<()> {
    let (pod, config) = ready(t)?;
    t.add(&pod, &with(&config, key, json!(true)))?;
    let link = t.need_link(&pod.netns, "eth0")?;
    let set = link["flags"].to_string().contains(&format!("\"{shown}\""))
        || link[key].as_u64().is_some_and(|count| count > 0);
    ensure!(set, "no {shown} in {link}");
    Ok(())
}

fn restored(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    let before = t.need_link(&pod.netns, "eth0")?;
    let mut config = with(&config, "mtu", json!(1300));
    config["mac"] = json!("02:11:22:33:44:55");
    config["promisc"] = json!(true);
    let result = t.add(&pod, &config)?;
    t.del(&pod, &with(&config, "prevResult", result))?;
    let after = t.need_link(&pod.netns, "eth0")?;
    for key in ["mtu", "address", "promiscuity"] {
        same(key, &after[key], &before[key])?;
    }
    Ok(())
}

fn damaged(t: &T, damage: fn(&T, &Pod) -> Result<()>) -> Result<()> {
    need(t, "0.4.0")?;
    let (pod, config) = ready(t)?;
    let config = with(&config, "mtu", json!(1300));
    let result = t.add(&pod, &config)?;
    t.check(&pod, &config, &result)?.ok_silent()?;
    damage(t, &pod)?;
    t.check(&pod, &config, &result)?.refused_somehow()?;
    Ok(())
}

fn bad(t: &T, key: &str, value: &Value, words: &[&str]) -> Result<()> {
    let (pod, config) = ready(t)?;
    let config = with(&without(&config, "sysctl"), key, value.clone());
    t.ask("ADD", &pod, &config)?.refused_somehow()?.names(words)
}
