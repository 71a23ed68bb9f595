//! The pod's loopback device.

use anyhow::{Result, ensure};

use super::super::super::case::{Case, same};
use super::super::context::{Pod, T};
use super::super::subject::Kind;
use super::{check, group};

pub(super) fn cases(kind: Kind) -> Vec<Case<T>> {
    let add = group(kind, "ADD");
    vec![
        check(add, "lo is up and has its addresses", up),
        check(add, "the result names lo and its addresses", result),
        check(add, "again is no error", again),
        check(add, "CHECK sees lo down", damaged),
    ]
}

/// A pod whose loopback device is down.
fn down(t: &T) -> Result<Pod> {
    let pod = t.pod()?;
    t.ip(&pod.netns, "link set lo down")?;
    Ok(pod)
}

fn up(t: &T) -> Result<()> {
    let pod = down(t)?;
    t.add(&pod, &t.config())?;
    let link = t.need_link(&pod.netns, "lo")?;
    ensure!(link["flags"].to_string().contains("\"UP\""), "lo is down: {link}");
    let shown = t.ip(&pod.netns, "addr show dev lo")?;
    ensure!(shown.contains("127.0.0.1/8") && shown.contains("::1/128"), "{shown}");
    Ok(())
}

fn result(t: &T) -> Result<()> {
    let pod = down(t)?;
    let result = t.add(&pod, &t.config())?;
    same("the interface", result["interfaces"][0]["name"].as_str(), Some("lo"))?;
    same(
        "its sandbox",
        result["interfaces"][0]["sandbox"].as_str(),
        Some(pod.netns.display().to_string().as_str()),
    )?;
    ensure!(result["ips"].to_string().contains("127.0.0.1/8"), "no 127.0.0.1/8 in {result}");
    Ok(())
}

fn again(t: &T) -> Result<()> {
    let pod = t.pod()?;
    t.add(&pod, &t.config())?;
    t.add(&pod, &t.config())?;
    t.del(&pod, &t.config())
}

fn damaged(t: &T) -> Result<()> {
    super::need(t, "0.4.0")?;
    let pod = t.pod()?;
    let result = t.add(&pod, &t.config())?;
    t.check(&pod, &t.config(), &result)?.ok_silent()?;
    t.ip(&pod.netns, "link set lo down")?;
    t.check(&pod, &t.config(), &result)?.refused_somehow()?;
    Ok(())
}
