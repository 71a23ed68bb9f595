//! A plugin behind others: it passes the result on, and works behind and before foreign ones.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::super::super::case::{Case, same, skip};
use super::super::context::{T, VERSIONS, with, without};
use super::super::subject::Kind;
use super::{check, group, ready, ready_for};

pub(super) fn cases(kind: Kind) -> Vec<Case<T>> {
    let add = group(kind, "ADD");
    vec![
        check(add, "passes the result on, whole, in each version", passes_on),
        check(add, "without prevResult: code 7", no_result),
        check(add, "with nothing to do passes the result on", nothing_to_do),
        check(add, "a result with interfaces and no addresses is passed on", no_addresses),
        check(add, "behind Debian's bridge", |t| behind(t, "/usr/lib/cni/bridge", "host-local")),
        check(add, "before Debian's tuning", before_foreign),
    ]
}

/// What must come out: interfaces, addresses, routes and DNS as they came in.
fn equal(found: &Value, wanted: &Value, kind: Kind) -> Result<()> {
    for key in ["ips", "routes", "dns"] {
        // An empty one may as well be left out.
        let or_none = |value: &Value| if *value == json!({}) { Value::Null } else { value.clone() };
        same(key, or_none(&found[key]), or_none(&wanted[key]))?;
    }
    let names = |result: &Value| -> Vec<Value> {
        result["interfaces"].as_array().into_iter().flatten().map(|one| one["name"].clone()).collect()
    };
    // A shaper may add the device that it made.
    let (found, wanted) = (names(found), names(wanted));
    let kept =
        if kind == Kind::Bandwidth { found.get(..wanted.len()).unwrap_or_default() } else { &found[..] };
    same("the interfaces", kept, &wanted[..])
}

fn passes_on(t: &T) -> Result<()> {
    for version in VERSIONS.into_iter().filter(|version| t.supports(version)) {
        let (pod, config) = ready_for(t, version)?;
        let result = t.add(&pod, &config)?;
        same("cniVersion", result["cniVersion"].as_str(), Some(version))?;
        equal(&result, &config["prevResult"], t.subject().kind)?;
        t.del(&pod, &config)?;
    }
    Ok(())
}

fn no_result(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    t.ask("ADD", &pod, &without(&config, "prevResult"))?.refused_with(&[7])?.names(&["prevResult"])
}

fn nothing_to_do(t: &T) -> Result<()> {
    let (pod, result) = t.wired(t.newest())?;
    let config = json!({
        "cniVersion": t.newest(), "name": "conformance", "type": t.subject().name, "prevResult": result,
        "dataDir": t.dir().join("tuning"), "stateDir": t.dir().join("state"),
        "logFile": t.dir().join("cni.log"),
    });
    let passed = t.add(&pod, &config)?;
    equal(&passed, &result, t.subject().kind)?;
    t.del(&pod, &config)
}

fn no_addresses(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    let mut config = without(&config, "runtimeConfig");
    for key in ["ips", "routes"] {
        config["prevResult"] = without(&config["prevResult"], key);
    }
    let result = t.add(&pod, &config)?;
    ensure!(result["interfaces"].as_array().is_some_and(|all| all.len() >= 3), "{result}");
    t.del(&pod, &config)
}

/// Runs a foreign main plugin before the plugin under test.
fn behind(t: &T, main: &str, ipam: &str) -> Result<()> {
    if !std::path::Path::new(main).is_file() {
        return skip(format!("{main} is not installed"));
    }
    // Debian's speak 1.0.0 at the most.
    let version = "1.0.0";
    let pod = t.pod()?;
    let foreign = json!({
        "cniVersion": version, "name": "conformance", "type": "bridge", "bridge": "cnf0", "isGateway": true,
        "ipam": {
            "type": ipam, "dataDir": t.dir().join("ipam"), "ranges": [[{"subnet": "10.91.0.0/29"}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    });
    let ask = |verb: &str, config: &Value| {
        let mut call = t.call(verb, &pod, config).set("CNI_PATH", "/usr/lib/cni");
        call.file = main.into();
        t.run(&call)?.ok()
    };
    let result = ask("ADD", &foreign)?;
    let config = with(&t.config_of(version), "prevResult", result.clone());
    let passed = t.add(&pod, &config)?;
    equal(&passed, &result, t.subject().kind)?;
    t.check(&pod, &config, &passed)?.ok()?;
    t.del(&pod, &with(&config, "prevResult", passed))?;
    ask("DEL", &foreign)?;
    Ok(())
}

fn before_foreign(t: &T) -> Result<()> {
    let file = std::path::Path::new("/usr/lib/cni/tuning");
    if !file.is_file() {
        return skip(format!("{} is not installed", file.display()));
    }
    let (pod, config) = ready_for(t, "1.0.0")?;
    let result = t.add(&pod, &config)?;
    let foreign = json!({
        "cniVersion": "1.0.0", "name": "conformance", "type": "tuning", "dataDir": t.dir().join("foreign"),
        "mtu": 1300, "prevResult": result,
    });
    let mut call = t.call("ADD", &pod, &foreign);
    call.file = file.to_owned();
    t.run(&call)?.ok()?;
    same("the MTU", t.need_link(&pod.netns, "eth0")?["mtu"].as_u64(), Some(1300))?;
    t.del(&pod, &config)
}
