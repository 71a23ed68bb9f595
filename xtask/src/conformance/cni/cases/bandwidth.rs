//! Rate limits: what the kernel's shapers say, and what is refused.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::super::super::case::Case;
use super::super::context::{Pod, T, with, without};
use super::super::subject::Kind;
use super::{check, group, need, ready};

pub(super) fn cases(kind: Kind) -> Vec<Case<T>> {
    let area = group(kind, "limits");
    let refused = group(kind, "limits refused");
    vec![
        check(area, "both directions are shaped after ADD and not after DEL", shaped),
        check(area, "the capability bandwidth gives the rates", |t| {
            capability(t, ["ingressRate", "ingressBurst", "egressRate", "egressBurst"])
        }),
        check(area, "the same with capitals, as containerd writes them", |t| {
            capability(t, ["IngressRate", "IngressBurst", "EgressRate", "EgressBurst"])
        }),
        check(area, "CHECK sees a removed shaper", check_damage),
        check(refused, "a burst without rate", |t| bad(t, &json!({"egressBurst": 8000}))),
        check(refused, "a negative rate", |t| bad(t, &json!({"ingressRate": -8000, "ingressBurst": 8000}))),
        check(refused, "a rate that is no number", |t| {
            bad(t, &json!({"ingressRate": "8M", "ingressBurst": 8000}))
        }),
        check(refused, "a burst beyond 4 GiB", |t| {
            bad(t, &json!({"ingressRate": 8_000_000, "ingressBurst": 1_u64 << 40}))
        }),
    ]
}

/// Queueing disciplines of host and pod that shape.
fn shapers(t: &T, pod: &Pod) -> Result<Vec<String>> {
    let text =
        t.inside(t.host(), "tc", &["qdisc", "show"])? + &t.inside(&pod.netns, "tc", &["qdisc", "show"])?;
    let shaping = ["tbf", "htb", "clsact", "ingress", "fq"];
    Ok(text
        .lines()
        .filter(|line| shaping.iter().any(|kind| line.contains(&format!("qdisc {kind} "))))
        .map(str::to_owned)
        .collect())
}

fn shaped(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    let before = shapers(t, &pod)?;
    let result = t.add(&pod, &config)?;
    let during = shapers(t, &pod)?;
    ensure!(during.len() >= before.len() + 2, "not two shapers more: {during:?}");
    t.del(&pod, &with(&config, "prevResult", result))?;
    t.gone(|| Ok(shapers(t, &pod)? == before), "shapers are left")
}

fn capability(t: &T, keys: [&str; 4]) -> Result<()> {
    let (pod, config) = ready(t)?;
    let mut config = plain(config);
    let rates = keys.into_iter().zip([1_000_000, 1_000_000, 2_000_000, 2_000_000]);
    config["runtimeConfig"]["bandwidth"] = rates.map(|(key, bits)| (key.to_owned(), json!(bits))).collect();
    t.add(&pod, &config)?;
    let shown = shapers(t, &pod)?.join("\n");
    ensure!(
        shown.contains("1Mbit") && shown.contains("2Mbit"),
        "the capability's rates are not there: {shown}"
    );
    Ok(())
}

fn check_damage(t: &T) -> Result<()> {
    need(t, "0.4.0")?;
    let (pod, config) = ready(t)?;
    let result = t.add(&pod, &config)?;
    t.check(&pod, &config, &result)?.ok_silent()?;
    for pair in t.pairs()? {
        for place in ["root", "clsact", "ingress"] {
            // The one that is there goes.
            t.inside(t.host(), "tc", &["qdisc", "del", "dev", &pair, place]).ok();
        }
    }
    t.check(&pod, &config, &result)?.refused_somehow()?;
    Ok(())
}

/// The configuration without rates of its own.
fn plain(config: Value) -> Value {
    let rates = ["ingressRate", "ingressBurst", "egressRate", "egressBurst"];
    rates.into_iter().fold(config, |config, key| without(&config, key))
}

fn bad(t: &T, keys: &Value) -> Result<()> {
    let (pod, config) = ready(t)?;
    let mut config = plain(config);
    super::super::subject::merge(&mut config, keys.clone());
    let before = shapers(t, &pod)?;
    t.ask("ADD", &pod, &config)?.refused_somehow()?.names(&["rate", "burst"])?;
    ensure!(shapers(t, &pod)? == before, "a shaper is left");
    Ok(())
}
