//! Versions, variables and the shape of answers: what every plugin owes its caller.

use anyhow::{Result, ensure};
use serde_json::Value;

use super::super::super::case::Case;
use super::super::context::{Call, T, VERSIONS};
use super::super::subject::Kind;
use super::{check, group, need, ready, ready_for};

pub(super) fn cases(kind: Kind) -> Vec<Case<T>> {
    let version = group(kind, "VERSION");
    let env = group(kind, "environment");
    let mut all = vec![
        check(version, "supports 0.3.1", |t| supports(t, "0.3.1")),
        check(version, "supports 0.4.0", |t| supports(t, "0.4.0")),
        check(version, "supports 1.0.0", |t| supports(t, "1.0.0")),
        check(version, "supports 1.1.0", |t| supports(t, "1.1.0")),
        check(version, "answers in the version that was asked", version_echo),
        check(version, "needs no variable but CNI_COMMAND", version_alone),
        check(version, "an unknown version in the question is no error", version_unknown),
        check(version, "an ADD of each supported version answers in that version", each_version),
        check(env, "CNI_COMMAND missing: code 4", |t| command(t, None)),
        check(env, "CNI_COMMAND unknown: code 4", |t| command(t, Some("FROBNICATE"))),
        check(env, "CNI_COMMAND in small letters: code 4", |t| command(t, Some("add"))),
        check(env, "ADD without CNI_CONTAINERID: code 4", |t| missing(t, "ADD", "CNI_CONTAINERID")),
        check(env, "ADD without CNI_NETNS: code 4", |t| missing(t, "ADD", "CNI_NETNS")),
        check(env, "ADD without CNI_IFNAME: code 4", |t| missing(t, "ADD", "CNI_IFNAME")),
        check(env, "DEL without CNI_CONTAINERID: code 4", |t| missing(t, "DEL", "CNI_CONTAINERID")),
        check(env, "DEL without CNI_IFNAME: code 4", |t| missing(t, "DEL", "CNI_IFNAME")),
        check(env, "CHECK without CNI_CONTAINERID: code 4", |t| missing(t, "CHECK", "CNI_CONTAINERID")),
        check(env, "CHECK without CNI_NETNS: code 4", |t| missing(t, "CHECK", "CNI_NETNS")),
        check(env, "CHECK without CNI_IFNAME: code 4", |t| missing(t, "CHECK", "CNI_IFNAME")),
        check(env, "CNI_CONTAINERID with a path: code 4", |t| wrong(t, "CNI_CONTAINERID", "../../x")),
        check(env, "CNI_CONTAINERID with a blank: code 4", |t| wrong(t, "CNI_CONTAINERID", "a b")),
        check(env, "CNI_CONTAINERID that begins with a dash: code 4", |t| wrong(t, "CNI_CONTAINERID", "-x")),
        check(env, "CNI_ARGS of Kubernetes are accepted", kubernetes_args),
    ];
    if kind != Kind::Loopback {
        all.extend([
            check(env, "CNI_IFNAME too long: code 4", |t| wrong(t, "CNI_IFNAME", "sixteen-letters-")),
            check(env, "CNI_IFNAME with a slash: code 4", |t| wrong(t, "CNI_IFNAME", "a/b")),
            check(env, "CNI_IFNAME with a colon: code 4", |t| wrong(t, "CNI_IFNAME", "a:b")),
            check(env, "CNI_IFNAME with a blank: code 4", |t| wrong(t, "CNI_IFNAME", "a b")),
            check(env, "CNI_IFNAME two dots: code 4", |t| wrong(t, "CNI_IFNAME", "..")),
        ]);
    }
    if !matches!(kind, Kind::Ipam | Kind::Portmap | Kind::Masquerade) {
        all.extend([
            check(env, "CNI_NETNS that does not exist: refused", |t| bad_netns(t, "/run/netns/not-there")),
            check(env, "CNI_NETNS that is a plain file: refused", |t| bad_netns(t, "/etc/hostname")),
            check(env, "CNI_NETNS that is a directory: refused", |t| bad_netns(t, "/run")),
        ]);
    }
    if kind.attaches() {
        all.push(check(env, "CNI_NETNS of the host itself: refused, and the host is as it was", own_netns));
    }
    if !kind.attaches() {
        all.push(check(env, "CNI_PATH is optional without delegates", path_optional));
    }
    all
}

fn supports(t: &T, version: &str) -> Result<()> {
    ensure!(t.supports(version), "supportedVersions has no {version}");
    Ok(())
}

fn version_call(t: &T, input: &str) -> Call {
    Call {
        file: t.subject().file.clone(),
        env: vec![("CNI_COMMAND", "VERSION".to_owned())],
        input: input.as_bytes().to_vec(),
    }
}

fn version_echo(t: &T) -> Result<()> {
    for version in VERSIONS {
        let object = t.run(&version_call(t, &format!("{{\"cniVersion\":\"{version}\"}}")))?.ok()?;
        ensure!(object["cniVersion"] == version, "asked in {version}, answered {object}");
    }
    Ok(())
}

fn version_alone(t: &T) -> Result<()> {
    let object = t.run(&version_call(t, "{\"cniVersion\":\"1.0.0\"}"))?.ok()?;
    let list = object["supportedVersions"].as_array().cloned().unwrap_or_default();
    ensure!(!list.is_empty(), "no supportedVersions in {object}");
    Ok(())
}

fn version_unknown(t: &T) -> Result<()> {
    let object = t.run(&version_call(t, "{\"cniVersion\":\"99.0.0\"}"))?.ok()?;
    ensure!(object["supportedVersions"].is_array(), "no supportedVersions in {object}");
    Ok(())
}

fn each_version(t: &T) -> Result<()> {
    for version in VERSIONS.into_iter().filter(|version| t.supports(version)) {
        let (pod, config) = ready_for(t, version)?;
        let result = t.add(&pod, &config)?;
        ensure!(result["cniVersion"] == version, "asked in {version}, answered {result}");
        for ip in result["ips"].as_array().into_iter().flatten() {
            let old = version < "1.0.0";
            ensure!(ip.get("version").is_some() == old, "{version}: `version` in {ip}");
            ensure!(ip["address"].as_str().is_some_and(|address| address.contains('/')), "no prefix in {ip}");
        }
        for interface in result["interfaces"].as_array().into_iter().flatten() {
            let new = version >= "1.1.0";
            ensure!(new || interface.get("mtu").is_none(), "{version}: `mtu` in {interface}");
        }
        t.del(&pod, &config)?;
    }
    Ok(())
}

fn command(t: &T, value: Option<&'static str>) -> Result<()> {
    let (pod, config) = ready(t)?;
    let call = t.call("ADD", &pod, &config);
    let call = match value {
        Some(value) => call.set("CNI_COMMAND", value),
        None => call.unset("CNI_COMMAND"),
    };
    t.run(&call)?.refused_with(&[4])?.names(&["CNI_COMMAND", "FROBNICATE", "\"add\"", " add"])
}

fn missing(t: &T, verb: &str, variable: &'static str) -> Result<()> {
    if verb == "CHECK" {
        need(t, "0.4.0")?;
    }
    let (pod, config) = ready(t)?;
    t.run(&t.call(verb, &pod, &config).unset(variable))?.refused_with(&[4])?.names(&[variable])?;
    // An empty value is as good as none.
    t.run(&t.call(verb, &pod, &config).set(variable, ""))?.refused_with(&[4])?.names(&[variable])
}

fn wrong(t: &T, variable: &'static str, value: &str) -> Result<()> {
    let (pod, config) = ready(t)?;
    t.run(&t.call("ADD", &pod, &config).set(variable, value))?.refused_with(&[4])?;
    Ok(())
}

fn bad_netns(t: &T, path: &str) -> Result<()> {
    let (pod, config) = ready(t)?;
    let before = t.pairs()?;
    t.run(&t.call("ADD", &pod, &config).set("CNI_NETNS", path))?.refused_somehow()?;
    ensure!(t.pairs()? == before, "a pair was left: {:?}", t.pairs()?);
    if t.subject().kind.attaches() { t.addresses_free() } else { Ok(()) }
}

fn own_netns(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    let before = t.ip(t.host(), "-o link")?;
    let host = t.host().display().to_string();
    t.run(&t.call("ADD", &pod, &config).set("CNI_NETNS", host))?
        .refused_somehow()?
        .names(&["CNI_NETNS", "netns"])?;
    let after = t.ip(t.host(), "-o link")?;
    ensure!(before == after, "the host had {before}, it has {after}");
    t.addresses_free()
}

fn kubernetes_args(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    let args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=coredns-1;\
                K8S_POD_INFRA_CONTAINER_ID=0123456789ab;K8S_POD_UID=6f1c";
    t.run(&t.call("ADD", &pod, &config).set("CNI_ARGS", args))?.ok()?;
    t.run(&t.call("DEL", &pod, &config).set("CNI_ARGS", args))?.ok()?;
    Ok(())
}

fn path_optional(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    let added: Value = t.run(&t.call("ADD", &pod, &config).unset("CNI_PATH"))?.ok()?;
    ensure!(added.is_object(), "no result");
    t.run(&t.call("DEL", &pod, &config).unset("CNI_PATH"))?.ok()?;
    Ok(())
}
