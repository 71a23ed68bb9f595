//! The configuration of `keelson-portmap`: the keys of the reference plugin portmap, and the capability `portMappings`.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use cni_plugins_types::{CniResult, ErrorCode};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::record::Claim;
use crate::{call::Call, failure::Failure};

/// Keys of the reference plugin that change what traffic does and have no counterpart here.
const UNSUPPORTED: [&str; 5] =
    ["conditionsV4", "conditionsV6", "externalSetMarkChain", "masqAll", "markMasqBit"];
/// Most ports of one pod; each is some elements in the kernel.
const MAX_PORTS: usize = 10_000;

/// The object on standard input.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PortmapConfig {
    /// Whether the node itself, the pod itself and its neighbours reach the host port, by masquerade.
    #[serde(default = "yes")]
    pub(super) snat: bool,
    /// `nftables`, where it is given.
    #[serde(default)]
    backend: Option<String>,
    #[serde(default)]
    runtime_config: RuntimeConfig,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RuntimeConfig {
    #[serde(default)]
    port_mappings: Option<Vec<PortMapping>>,
}

/// An entry of `portMappings`; wide numbers, so that a refusal can tell what was given.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PortMapping {
    #[serde(default)]
    host_port: i64,
    #[serde(default)]
    container_port: i64,
    #[serde(default)]
    protocol: String,
    #[serde(default, rename = "hostIP")]
    host_ip: String,
    /// How many ports from these on.
    #[serde(default)]
    range: Option<i64>,
}

impl PortmapConfig {
    /// The call's, checked.
    pub(super) fn of(call: &Call) -> Result<Self, Failure> {
        let config: Self = call.parse()?;
        let is_set = |value: &&Value| {
            !matches!(value, Value::Null | Value::Bool(false)) && **value != Value::Array(Vec::new())
        };
        for key in UNSUPPORTED {
            if let Some(value) = config.rest.get(key).filter(is_set) {
                return Err(Failure::unsupported(key, value, "keelson-portmap writes a table of its own"));
            }
        }
        match config.backend.as_deref() {
            None | Some("nftables") => Ok(config),
            Some(other) => Err(Failure::unsupported("backend", &other, "only nftables is")),
        }
    }

    /// What the pod is to have: every port of every entry, for each family that entry and pod share.
    pub(super) fn claims(&self, result: &CniResult) -> Result<BTreeSet<Claim>, Failure> {
        let targets = targets(result);
        let mut claims = BTreeMap::new();
        let entries = self.runtime_config.port_mappings.iter().flatten();
        for (index, entry) in entries.enumerate() {
            let entry = entry.checked().map_err(|what| {
                Failure::new(ErrorCode::InvalidConfig, format!("runtimeConfig.portMappings[{index}]: {what}"))
            })?;
            let Some(entry) = entry else { continue };
            if targets.is_empty() {
                return Err(Failure::config(format!(
                    "runtimeConfig.portMappings[{index}]: prevResult has no address of a pod for it"
                )));
            }
            let served: Vec<IpAddr> =
                targets.iter().copied().filter(|target| entry.serves(*target)).collect();
            if let Some(host_ip) = entry.host_ip.filter(|_| served.is_empty()) {
                return Err(Failure::config(format!(
                    "runtimeConfig.portMappings[{index}]: hostIP {host_ip}: the pod has no address of this family"
                )));
            }
            for claim in served.into_iter().flat_map(|target| entry.claims(target)) {
                let key = (claim.protocol, claim.host_ip, claim.host_port, claim.target.is_ipv4());
                let other = claims.insert(key, claim).filter(|other| *other != claim);
                if let Some(other) = other {
                    return Err(Failure::config(format!(
                        "runtimeConfig.portMappings[{index}]: hostPort {claim} is mapped twice, to container ports {} \
                         and {}",
                        other.target.port(),
                        claim.target.port()
                    )));
                }
            }
            if claims.len() > MAX_PORTS {
                return Err(Failure::config(format!(
                    "runtimeConfig.portMappings: more than {MAX_PORTS} ports"
                )));
            }
        }
        Ok(claims.into_values().collect())
    }
}

/// A valid entry.
#[derive(Debug, Clone, Copy)]
struct Entry {
    protocol: u8,
    host_ip: Option<IpAddr>,
    /// Only this family, for `0.0.0.0` and `::`.
    only_v4: Option<bool>,
    host_port: u16,
    container_port: u16,
    count: u16,
}

impl Entry {
    fn serves(&self, target: IpAddr) -> bool {
        self.host_ip.is_none_or(|address| address.is_ipv4() == target.is_ipv4())
            && self.only_v4.is_none_or(|v4| v4 == target.is_ipv4())
    }

    fn claims(self, target: IpAddr) -> impl Iterator<Item = Claim> {
        (0..self.count).map(move |offset| Claim {
            protocol: self.protocol,
            host_ip: self.host_ip,
            host_port: self.host_port + offset,
            target: SocketAddr::new(target, self.container_port + offset),
        })
    }
}

impl PortMapping {
    /// The entry with its numbers checked; nothing for a host port of 0, which asks for none.
    fn checked(&self) -> Result<Option<Entry>, String> {
        if self.host_port == 0 {
            return Ok(None);
        }
        let port = |name: &str, value: i64| {
            let port = u16::try_from(value).ok().filter(|port| *port > 0);
            port.ok_or_else(|| format!("{name} {value} is not a port: expected 1 to 65535"))
        };
        let (host_port, container_port) =
            (port("hostPort", self.host_port)?, port("containerPort", self.container_port)?);
        let count = self.range.unwrap_or(1);
        let count = u16::try_from(count)
            .ok()
            .filter(|count| *count > 0 && *count <= 65535 - host_port.max(container_port) + 1);
        let count = count.ok_or_else(|| {
            format!("range {} from port {host_port} goes beyond 65535 or is none", self.range.unwrap_or(1))
        })?;
        let protocol = match self.protocol.to_ascii_lowercase().as_str() {
            "tcp" | "" => 6,
            "udp" => 17,
            "sctp" => 132,
            other => return Err(format!("protocol {other:?} is unknown: expected tcp, udp or sctp")),
        };
        let address: Option<IpAddr> = match self.host_ip.as_str() {
            "" => None,
            text => Some(text.parse().map_err(|error| format!("hostIP {text:?}: {error}"))?),
        };
        if let Some(group) = address.filter(IpAddr::is_multicast) {
            return Err(format!("hostIP {group} is a multicast address, which no host has"));
        }
        if address == Some(Ipv4Addr::BROADCAST.into()) {
            return Err(format!("hostIP {} is the broadcast address, which no host has", self.host_ip));
        }
        let only_v4 = address.filter(IpAddr::is_unspecified).map(|any| any.is_ipv4());
        let host_ip = address.filter(|address| !address.is_unspecified());
        Ok(Some(Entry { protocol, host_ip, only_v4, host_port, container_port, count }))
    }
}

/// The pod's first address of each family.
fn targets(result: &CniResult) -> Vec<IpAddr> {
    let in_pod = |index: u32| {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        result.interfaces.get(index).is_some_and(|interface| !interface.sandbox.is_empty())
    };
    let inside = result.ips.iter().filter(|ip| ip.interface.is_none_or(in_pod)).map(|ip| ip.address.addr());
    let all: Vec<IpAddr> = inside.collect();
    let first = |v4: bool| all.iter().copied().find(|address| address.is_ipv4() == v4);
    first(true).into_iter().chain(first(false)).collect()
}

fn yes() -> bool {
    true
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn claims(mappings: &Value) -> Result<Vec<String>, String> {
        let config: PortmapConfig =
            serde_json::from_value(json!({"runtimeConfig": {"portMappings": mappings}})).unwrap();
        let result: CniResult = serde_json::from_value(json!({
            "cniVersion": "1.1.0", "interfaces": [{"name": "eth0", "sandbox": "/x"}],
            "ips": [{"address": "10.1.0.2/24", "interface": 0}, {"address": "fd00::2/64", "interface": 0}],
        }))
        .unwrap();
        let claims = config.claims(&result).map_err(|failure| failure.to_string())?;
        Ok(claims.iter().map(|claim| format!("{claim} > {}", claim.target)).collect())
    }

    #[test]
    fn an_entry_is_for_both_families_unless_it_names_one() {
        let one = |entry: Value| claims(&json!([entry]));
        assert_eq!(
            one(json!({"hostPort": 8080, "containerPort": 80})).unwrap(),
            ["8080/tcp > 10.1.0.2:80", "8080/tcp > [fd00::2]:80"]
        );
        let entry = json!({"hostPort": 53, "containerPort": 53, "protocol": "UDP", "hostIP": "0.0.0.0"});
        assert_eq!(one(entry).unwrap(), ["53/udp > 10.1.0.2:53"]);
        let entry = json!({"hostPort": 1, "containerPort": 2, "hostIP": "fd00::1", "range": 2});
        assert_eq!(one(entry).unwrap(), ["1/tcp on fd00::1 > [fd00::2]:2", "2/tcp on fd00::1 > [fd00::2]:3"]);
        assert_eq!(one(json!({"hostPort": 0, "containerPort": 80})).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn a_host_address_of_a_family_that_the_pod_lacks_is_told() {
        let mapping = json!({"hostPort": 80, "containerPort": 80, "hostIP": "fd00::1"});
        let config: PortmapConfig =
            serde_json::from_value(json!({"runtimeConfig": {"portMappings": [mapping]}})).unwrap();
        let v4_only = json!({"cniVersion": "1.1.0", "ips": [{"address": "10.1.0.2/24"}]});
        let told = config.claims(&serde_json::from_value(v4_only).unwrap()).unwrap_err().to_string();
        assert!(told.starts_with("runtimeConfig.portMappings[0]: hostIP fd00::1: the pod has no"), "{told}");
    }

    #[test]
    fn mistakes_name_entry_field_and_value() {
        let cases = [
            (json!({"hostPort": 70000, "containerPort": 80}), "portMappings[0]: hostPort 70000"),
            (json!({"hostPort": 80}), "portMappings[0]: containerPort 0"),
            (json!({"hostPort": 80, "containerPort": 80, "protocol": "icmp"}), "protocol \"icmp\""),
            (json!({"hostPort": 80, "containerPort": 80, "hostIP": "x"}), "hostIP \"x\""),
            (
                json!({"hostPort": 80, "containerPort": 80, "hostIP": "224.0.0.1"}),
                "hostIP 224.0.0.1 is a multicast",
            ),
            (
                json!({"hostPort": 80, "containerPort": 80, "hostIP": "255.255.255.255"}),
                "hostIP 255.255.255.255 is the broadcast",
            ),
            (json!({"hostPort": 65000, "containerPort": 80, "range": 600}), "range 600"),
        ];
        for (entry, message) in cases {
            let error = claims(&json!([entry])).unwrap_err();
            assert!(error.contains(message), "{error}");
        }
        let twice = [(80, 80, 80), (80, 80, 81)].map(|(from, to, other)| {
            let one = json!({"hostPort": from, "containerPort": to});
            claims(&json!([one, {"hostPort": from, "containerPort": other}]))
        });
        assert_eq!(twice[0].as_ref().unwrap().len(), 2, "said twice is mapped once for each family");
        let error = twice[1].as_ref().unwrap_err();
        assert!(error.contains("portMappings[1]: hostPort 80/tcp is mapped twice"), "{error}");
    }
}
