//! Spells the keys of a configuration as this executable's types have them.
//!
//! The reference plugins are written in Go, whose decoder takes keys in any case and `null` for any value that is not
//! given, and runtimes count on it: containerd writes `{"HostPort": 8080, "ContainerPort": 80}` into `runtimeConfig`.
//! A key that is not taken would be a host port silently not mapped.

use serde_json::{Map, Value};

use crate::plugins::Plugin;

/// Every key of every plugin here, and of what the runtime adds.
const KNOWN: [&str; 87] = [
    "address",
    "addresses",
    "advmss",
    "allmulti",
    "args",
    "backend",
    "bandwidth",
    "bridge",
    "capabilities",
    "cni.dev/valid-attachments",
    "cniVersion",
    "conditionsV4",
    "conditionsV6",
    "containerID",
    "containerPort",
    "dataDir",
    "delegate",
    "disableContainerInterface",
    "dns",
    "domain",
    "dst",
    "egressBurst",
    "egressRate",
    "enabledad",
    "exclude",
    "externalSetMarkChain",
    "forceAddress",
    "gateway",
    "gw",
    "hairpinMode",
    "hostIP",
    "hostPort",
    "id",
    "ifname",
    "ingressBurst",
    "ingressRate",
    "ipMasq",
    "ipMasqBackend",
    "ipMasqExcept",
    "ipRanges",
    "ipam",
    "ips",
    "isDefaultGateway",
    "isGateway",
    "logFile",
    "mac",
    "macspoofchk",
    "markMasqBit",
    "masqAll",
    "maxID",
    "minID",
    "mode",
    "mtu",
    "name",
    "nameservers",
    "options",
    "overlayFile",
    "portIsolation",
    "portMappings",
    "preserveDefaultVlan",
    "prevResult",
    "priority",
    "promisc",
    "promiscMode",
    "protocol",
    "range",
    "rangeEnd",
    "rangeStart",
    "ranges",
    "resolvConf",
    "routes",
    "runtimeConfig",
    "scope",
    "search",
    "shapedSubnets",
    "snat",
    "stateDir",
    "sticky",
    "subnet",
    "sysctl",
    "sysctlAllowFile",
    "table",
    "txQLen",
    "type",
    "unshapedSubnets",
    "vlan",
    "vlanTrunk",
];
/// What is below these has keys of its own, which say something as they are written.
const VERBATIM: [&str; 4] = ["args", "capabilities", "prevResult", "sysctl"];

/// Gives known keys their spelling, and takes those away that are `null`. A key that is there in its own spelling, too,
/// stays as it is.
pub(crate) fn fold(config: &mut Value) {
    match config {
        Value::Object(object) => fold_object(object),
        Value::Array(list) => list.iter_mut().for_each(fold),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn fold_object(object: &mut Map<String, Value>) {
    let foreign: Vec<(String, &str)> = object
        .keys()
        .filter_map(|key| {
            let known = KNOWN.into_iter().find(|known| known.eq_ignore_ascii_case(key))?;
            (known != key).then(|| (key.clone(), known))
        })
        .collect();
    for (key, known) in foreign {
        if !object.contains_key(known)
            && let Some(value) = object.remove(&key)
        {
            object.insert(known.to_owned(), value);
        }
    }
    object.retain(|key, value| !value.is_null() || !KNOWN.contains(&key.as_str()));
    for (key, value) in object {
        if !VERBATIM.contains(&key.as_str()) && !is_of_another(value) {
            fold(value);
        }
    }
}

/// Whether it is the section of a plugin that is not one of these.
fn is_of_another(section: &Value) -> bool {
    let kind = section.get("type").and_then(Value::as_str);
    kind.is_some_and(|kind| Plugin::named(kind).is_none())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check(mut given: Value, expected: &Value) {
        fold(&mut given);
        assert_eq!(given, *expected);
    }

    #[test]
    fn what_containerd_writes_is_spelt_as_here() {
        check(
            json!({"runtimeConfig": {"portMappings": [
                {"HostPort": 12000, "ContainerPort": 8080, "Protocol": "tcp", "HostIP": ""}]}}),
            &json!({"runtimeConfig": {"portMappings": [
                {"hostPort": 12000, "containerPort": 8080, "protocol": "tcp", "hostIP": ""}]}}),
        );
        check(
            json!({"runtimeConfig": {"bandwidth": {"IngressRate": 1, "EgressBurst": 2},
                "ipRanges": [[{"Subnet": "10.0.0.0/24", "RangeStart": "10.0.0.9"}]]}}),
            &json!({"runtimeConfig": {"bandwidth": {"ingressRate": 1, "egressBurst": 2},
                "ipRanges": [[{"subnet": "10.0.0.0/24", "rangeStart": "10.0.0.9"}]]}}),
        );
        check(json!({"HairpinMode": true, "IPMasq": true}), &json!({"hairpinMode": true, "ipMasq": true}));
    }

    #[test]
    fn nothing_given_is_as_if_it_were_not_there() {
        check(json!({"runtimeConfig": null, "mtu": null, "other": null}), &json!({"other": null}));
    }

    #[test]
    fn what_is_not_ours_to_spell_stays() {
        let theirs = json!({
            "sysctl": {"net.core.MTU": "1"}, "args": {"cni": {"IPS": ["10.0.0.1"]}}, "capabilities": {"IPS": true},
            "ipam": {"type": "other", "Subnet": "10.0.0.0/24"}, "mac": "x", "MAC": "y", "Unknown": 1,
        });
        check(theirs.clone(), &theirs);
    }
}
