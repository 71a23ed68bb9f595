//! DEL: once, again, late, without namespace, without anything; and always only what is asked.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::super::super::case::Case;
use super::super::context::{Pod, T, with, without};
use super::super::subject::Kind;
use super::{check, group, ready, ready_for};

pub(super) fn cases(kind: Kind) -> Vec<Case<T>> {
    let area = group(kind, "DEL");
    let mut all = vec![
        check(area, "after ADD takes everything back and prints nothing", plain),
        check(area, "again and again", again),
        check(area, "without an ADD before", never_added),
        check(area, "of a container that nobody knows", unknown),
        check(area, "without prevResult", without_result),
        check(area, "of each supported version", each_version),
        check(area, "then ADD of the same container", add_again),
        check(area, "of one container leaves the other's", other_stays),
    ];
    if kind != Kind::Ipam {
        all.extend([
            check(area, "with CNI_NETNS of a namespace that is gone", netns_gone),
            check(area, "with an empty CNI_NETNS", netns_empty),
            check(area, "without CNI_NETNS", netns_missing),
        ]);
    }
    if kind.attaches() {
        all.extend([
            check(area, "when it returns the pod is unreachable and its address free", at_return),
            check(area, "with prevResult of ADD", with_result),
            check(area, "after the host's end was deleted by hand", pair_deleted),
            check(area, "after the bridge was deleted by hand", bridge_deleted),
            check(area, "late, when the namespace has been given to another container", late),
            check(area, "before ADD has run: nothing is left of either order", before_add),
            check(area, "with the IPAM directory gone", ipam_directory_gone),
        ]);
    }
    all
}

/// The configuration of DEL: with the result of ADD, as runtimes keep it.
fn with_prev(t: &T, config: &Value, result: &Value) -> Value {
    if t.subject().kind == Kind::Ipam { config.clone() } else { with(config, "prevResult", result.clone()) }
}

/// What ADD made is gone.
fn clean(t: &T, pod: &Pod) -> Result<()> {
    match t.subject().kind {
        kind if kind.attaches() => {
            t.gone(|| Ok(t.link(&pod.netns, "eth0").is_ok_and(|link| link.is_none())), "eth0 is left")?;
            t.nothing_left()
        }
        Kind::Ipam => t.addresses_free(),
        _ => Ok(()),
    }
}

fn plain(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    let result = t.add(&pod, &config)?;
    t.del(&pod, &with_prev(t, &config, &result))?;
    clean(t, &pod)
}

fn again(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    let result = t.add(&pod, &config)?;
    for _ in 0..3 {
        t.del(&pod, &with_prev(t, &config, &result))?;
    }
    clean(t, &pod)
}

fn never_added(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    t.del(&pod, &config)
}

fn unknown(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    t.add(&pod, &config)?;
    let stranger = Pod { id: "never-heard-of".to_owned(), netns: t.dir().join("netns/none") };
    t.del(&stranger, &without(&config, "prevResult"))?;
    if t.subject().kind.attaches() {
        t.need_link(&pod.netns, "eth0").context("the other container's interface is gone")?;
    }
    t.del(&pod, &config)
}

fn without_result(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    t.add(&pod, &config)?;
    t.del(&pod, &without(&config, "prevResult"))?;
    clean(t, &pod)
}

fn each_version(t: &T) -> Result<()> {
    for version in super::super::context::VERSIONS.into_iter().filter(|version| t.supports(version)) {
        let (pod, config) = ready_for(t, version)?;
        let result = t.add(&pod, &config)?;
        t.del(&pod, &with_prev(t, &config, &result)).with_context(|| version.to_owned())?;
        clean(t, &pod)?;
    }
    Ok(())
}

fn add_again(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    for _ in 0..3 {
        t.add(&pod, &config)?;
        t.del(&pod, &config)?;
        if t.subject().kind.attaches() {
            t.gone(|| Ok(t.link(&pod.netns, "eth0")?.is_none()), "eth0 is left")?;
        }
    }
    clean(t, &pod)
}

fn other_stays(t: &T) -> Result<()> {
    let (first, config) = ready(t)?;
    let (second, other) = ready(t)?;
    let second_config = {
        let mut config = other;
        // Two pods cannot have the same host port.
        if t.subject().kind == Kind::Portmap {
            config["runtimeConfig"]["portMappings"][0]["hostPort"] = json!(8081);
        }
        config
    };
    t.add(&first, &config)?;
    let result = t.add(&second, &second_config)?;
    t.del(&first, &config)?;
    if t.supports("0.4.0") && t.subject().kind != Kind::Ipam {
        t.check(&second, &second_config, &result)?.ok().context("the other is damaged")?;
    }
    t.del(&second, &second_config)
}

fn netns_gone(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    let result = t.add(&pod, &config)?;
    cni_plugins_host::netns::remove(&pod.netns)?;
    for _ in 0..2 {
        t.del(&pod, &with_prev(t, &config, &result))?;
    }
    if t.subject().kind.attaches() { t.nothing_left() } else { Ok(()) }
}

fn netns_empty(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    t.add(&pod, &config)?;
    t.run(&t.call("DEL", &pod, &config).set("CNI_NETNS", ""))?.ok_silent()
}

fn netns_missing(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    t.add(&pod, &config)?;
    t.run(&t.call("DEL", &pod, &config).unset("CNI_NETNS"))?.ok_silent()
}

fn at_return(t: &T) -> Result<()> {
    let (pod, other) = (t.pod()?, t.pod()?);
    t.add(&other, &t.config())?;
    let result = t.add(&pod, &t.config())?;
    let address = result["ips"][0]["address"].as_str().unwrap_or_default();
    let target = format!("{}:7000", address.split('/').next().unwrap_or_default()).parse()?;
    let _server = super::super::traffic::Server::start(&pod.netns, super::super::traffic::ANY4, 7000)?;
    super::super::traffic::seen_by(&other.netns, target)?;
    t.del(&pod, &t.config())?;
    super::super::traffic::unreachable(&other.netns, target)?;
    super::super::traffic::unreachable(t.host(), target)?;
    t.del(&other, &t.config())?;
    t.addresses_free()
}

fn with_result(t: &T) -> Result<()> {
    let pod = t.pod()?;
    let result = t.add(&pod, &t.config())?;
    t.del(&pod, &with(&t.config(), "prevResult", result))?;
    t.nothing_left()
}

fn pair_deleted(t: &T) -> Result<()> {
    let pod = t.pod()?;
    t.add(&pod, &t.config())?;
    for pair in t.pairs()? {
        t.ip(t.host(), &format!("link del {pair}"))?;
    }
    t.del(&pod, &t.config())?;
    t.nothing_left()
}

fn bridge_deleted(t: &T) -> Result<()> {
    let pod = t.pod()?;
    t.add(&pod, &t.config())?;
    t.ip(t.host(), &format!("link del {}", super::super::subject::BRIDGE))?;
    t.del(&pod, &t.config())?;
    t.nothing_left()
}

fn late(t: &T) -> Result<()> {
    let old = t.pod()?;
    t.add(&old, &t.config())?;
    // The runtime forgot the first DEL: the old interface went with its namespace, and a new container has the path now.
    for pair in t.pairs()? {
        t.ip(t.host(), &format!("link del {pair}"))?;
    }
    let new = Pod { id: "newcomer".to_owned(), netns: old.netns.clone() };
    t.add(&new, &t.config())?;
    t.del(&old, &t.config())?;
    t.need_link(&new.netns, "eth0").context("the DEL of the old container took the new one's interface")?;
    ensure!(!t.addresses(&new.netns, "eth0")?.is_empty(), "the new container has lost its address");
    t.del(&new, &t.config())?;
    t.nothing_left()
}

fn before_add(t: &T) -> Result<()> {
    let pod = t.pod()?;
    t.del(&pod, &t.config())?;
    t.add(&pod, &t.config())?;
    t.need_link(&pod.netns, "eth0")?;
    t.del(&pod, &t.config())?;
    t.nothing_left()
}

fn ipam_directory_gone(t: &T) -> Result<()> {
    let pod = t.pod()?;
    t.add(&pod, &t.config())?;
    std::fs::remove_dir_all(t.dir().join("ipam")).context("the IPAM plugin keeps nothing below dataDir")?;
    t.del(&pod, &t.config())?;
    t.nothing_left()
}
