//! The configuration of `keelson-bridge`; the keys are those of the reference plugin bridge, and `mode`.

use cni_plugins_host::netlink::{VlanRange, parse_mac};
use cni_plugins_types::{
    IpNet,
    config::{is_interface_name, is_plugin_type},
    result::Dns,
};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{call::Call, failure::Failure};

/// Highest VLAN id.
const MAX_VLAN: u16 = 4094;
/// Least and most that an interface takes; below the least there is no IPv4.
const MTU: std::ops::RangeInclusive<u32> = 68..=65_535;

/// The object on standard input.
#[allow(clippy::struct_excessive_bools, reason = "they are the configuration's independent keys")]
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct BridgeConfig {
    /// Whether pods hang on a bridge or each has a routed link of its own.
    #[serde(default)]
    pub(super) mode: Mode,
    /// Name of the bridge; made when missing.
    #[serde(default = "default_bridge")]
    pub(super) bridge: String,
    /// Whether the bridge gets the gateway's address.
    #[serde(default)]
    is_gateway: bool,
    /// Whether the pod's default route goes there; implies `isGateway`.
    #[serde(default)]
    pub(super) is_default_gateway: bool,
    /// Whether another address of the gateway's subnet is taken from the bridge.
    #[serde(default)]
    pub(super) force_address: bool,
    /// Whether a pod can reach itself through the bridge.
    #[serde(default)]
    pub(super) hairpin_mode: bool,
    /// Whether the bridge takes in every packet.
    #[serde(default)]
    pub(super) promisc_mode: bool,
    /// Whether pods reach the host only, not each other.
    #[serde(default)]
    pub(super) port_isolation: bool,
    /// Whether frames with another source address than the pod's are dropped.
    #[serde(default)]
    pub(super) macspoofchk: bool,
    /// VLAN whose untagged member the pod is; 0 for none.
    #[serde(default)]
    vlan: u16,
    /// VLANs whose tagged member the pod is.
    #[serde(default)]
    vlan_trunk: Vec<VlanTrunk>,
    /// Whether the pod stays in the bridge's default VLAN too.
    #[serde(default = "yes")]
    pub(super) preserve_default_vlan: bool,
    /// Whether duplicate address detection runs (ADD does not wait for it).
    #[serde(default)]
    pub(super) enabledad: bool,
    /// Whether the pod's interface stays down.
    #[serde(default)]
    pub(super) disable_container_interface: bool,
    /// MTU of the pair; 0 means that of the link towards the default route.
    #[serde(default)]
    pub(super) mtu: u32,
    /// Who gives addresses; without it the pair has none.
    #[serde(default)]
    pub(super) ipam: Option<IpamType>,
    /// Resolver configuration for the result, instead of IPAM's.
    #[serde(default)]
    pub(super) dns: Dns,
    /// Whether what pods send to the outside gets the node's address.
    #[serde(default)]
    pub(super) ip_masq: bool,
    /// `nftables`, where it is given.
    #[serde(default)]
    ip_masq_backend: Option<String>,
    /// Destinations outside that see the pod's own address.
    #[serde(default)]
    pub(super) ip_masq_except: Vec<IpNet>,
    #[serde(default)]
    runtime_config: RuntimeConfig,
}

/// How pods are connected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Mode {
    /// All to one bridge.
    #[default]
    Bridge,
    /// Each by a link of its own, with routes.
    Routed,
}

/// The part of the `ipam` section that says who is asked.
#[derive(Debug, Deserialize)]
pub(super) struct IpamType {
    /// Name of the plugin.
    #[serde(rename = "type", default)]
    pub(super) kind: String,
}

/// One id, or all from `minID` to `maxID`.
#[derive(Debug, Clone, Copy, Deserialize)]
struct VlanTrunk {
    #[serde(default, rename = "minID")]
    min: Option<u16>,
    #[serde(default, rename = "maxID")]
    max: Option<u16>,
    #[serde(default)]
    id: Option<u16>,
}

#[derive(Debug, Default, Deserialize)]
struct RuntimeConfig {
    #[serde(default)]
    mac: Option<String>,
}

impl BridgeConfig {
    /// Reads a call's object and refuses what cannot work. A call that takes away refuses nothing.
    pub(super) fn of(call: &Call) -> Result<Self, Failure> {
        if call.command.takes_away() {
            return Self::for_removal(&call.config);
        }
        let mut config: Self = call.parse()?;
        let section = call.config.get("ipam").and_then(Value::as_object);
        if config.ipam.as_ref().is_some_and(|ipam| ipam.kind.is_empty()) {
            if section.is_some_and(|section| !section.is_empty()) {
                return Err(Failure::config("ipam.type: is missing"));
            }
            // An empty section is how some runtimes write that there is none.
            config.ipam = None;
        }
        config.check()?;
        Ok(config)
    }

    /// What DEL and GC need: the bridge, whether there is a masquerade, who gave addresses. A value that cannot be is as if it
    /// were not given.
    fn for_removal(object: &Value) -> Result<Self, Failure> {
        let usable = |key: &str, is_usable: &dyn Fn(&Value) -> bool| {
            object.get(key).filter(|value| is_usable(value)).map(|value| (key.to_owned(), value.clone()))
        };
        let needed: Map<String, Value> = [
            usable("bridge", &|name| name.as_str().is_some_and(is_interface_name)),
            usable("ipMasq", &Value::is_boolean),
            // A path is no plugin's name, and is never executed.
            usable("ipam", &|ipam| ipam["type"].as_str().is_some_and(is_plugin_type)),
        ]
        .into_iter()
        .flatten()
        .collect();
        serde_json::from_value(needed.into()).map_err(|error| Failure::bug(error.to_string()))
    }

    fn check(&self) -> Result<(), Failure> {
        if !is_interface_name(&self.bridge) {
            return Err(Failure::config(format!("bridge: {:?} is not an interface name", self.bridge)));
        }
        if self.mtu != 0 && !MTU.contains(&self.mtu) {
            return Err(Failure::config(format!("mtu: {} is not between 68 and 65535", self.mtu)));
        }
        if self.vlan > MAX_VLAN {
            return Err(Failure::config(format!("vlan: {} is not between 0 and 4094", self.vlan)));
        }
        self.trunk()?;
        if self.hairpin_mode && self.promisc_mode {
            return Err(Failure::config("promiscMode: with hairpinMode a pod would get its packets twice"));
        }
        if let Some(backend) = self.ip_masq_backend.as_deref().filter(|backend| *backend != "nftables") {
            return Err(Failure::unsupported("ipMasqBackend", &backend, "only nftables is"));
        }
        if let Some(ipam) = self.ipam.as_ref().filter(|ipam| !is_plugin_type(&ipam.kind)) {
            return Err(Failure::config(format!("ipam.type: {:?} is not a plugin's name", ipam.kind)));
        }
        if self.ip_masq && self.ipam.is_none() {
            return Err(Failure::config("ipMasq: needs addresses; there is no ipam"));
        }
        if self.disable_container_interface && self.ipam.is_some() {
            return Err(Failure::config(
                "disableContainerInterface: an interface that stays down cannot have addresses; remove ipam",
            ));
        }
        if self.mode == Mode::Routed {
            let given = |is: bool| is.then(|| "true".to_owned());
            let bridge_only = [
                ("hairpinMode", given(self.hairpin_mode)),
                ("promiscMode", given(self.promisc_mode)),
                ("portIsolation", given(self.port_isolation)),
                ("macspoofchk", given(self.macspoofchk)),
                ("vlan", self.untagged().map(|vlan| vlan.to_string())),
                ("vlanTrunk", (!self.vlan_trunk.is_empty()).then(|| "a list of VLANs".to_owned())),
                ("disableContainerInterface", given(self.disable_container_interface)),
            ];
            if let Some((key, value)) = bridge_only.into_iter().find_map(|(key, value)| Some((key, value?))) {
                return Err(Failure::unsupported(key, &value, "mode \"routed\" has no bridge"));
            }
            if self.ipam.is_none() {
                return Err(Failure::config("ipam: mode \"routed\" needs addresses"));
            }
        }
        Ok(())
    }

    /// Whether the bridge is the pods' gateway.
    pub(super) fn is_gateway(&self) -> bool {
        self.is_gateway || self.is_default_gateway
    }

    /// Whether the bridge has to tell VLANs apart.
    pub(super) fn separates_vlans(&self) -> bool {
        self.vlan != 0 || !self.vlan_trunk.is_empty()
    }

    /// The VLAN of untagged frames.
    pub(super) fn untagged(&self) -> Option<u16> {
        (self.vlan != 0).then_some(self.vlan)
    }

    /// The VLANs of tagged frames.
    pub(super) fn trunk(&self) -> Result<Vec<VlanRange>, Failure> {
        let mut ranges = Vec::new();
        for (index, trunk) in self.vlan_trunk.iter().enumerate() {
            let range = match (trunk.min, trunk.max) {
                (Some(first), Some(last)) => Some(VlanRange { first, last }),
                (None, None) => None,
                _ => {
                    return Err(Failure::config(format!("vlanTrunk[{index}]: minID and maxID go together")));
                }
            };
            let single = trunk.id.map(|id| VlanRange { first: id, last: id });
            for range in range.into_iter().chain(single) {
                if range.first == 0 || range.last > MAX_VLAN || range.first > range.last {
                    return Err(Failure::config(format!(
                        "vlanTrunk[{index}]: {}-{} is no range of ids from 1 to 4094",
                        range.first, range.last
                    )));
                }
                ranges.push(range);
            }
        }
        Ok(ranges)
    }

    /// The hardware address asked for: by the `mac` capability, `args.cni.mac` or `CNI_ARGS`.
    pub(super) fn mac(&self, call: &Call) -> Result<Option<[u8; 6]>, Failure> {
        let conventional = call.cni_arg("mac").and_then(Value::as_str);
        let asked = [
            ("runtimeConfig.mac", self.runtime_config.mac.as_deref()),
            ("args.cni.mac", conventional),
            ("CNI_ARGS MAC", call.arg("MAC")),
        ];
        let found = asked.into_iter().find_map(|(field, text)| Some((field, text?)));
        let Some((field, text)) = found.filter(|(_, text)| !text.is_empty()) else { return Ok(None) };
        // The lowest bit of the first byte is set in group addresses, which no interface can have.
        match parse_mac(text).filter(|mac| mac[0] & 1 == 0 && *mac != [0; 6]) {
            Some(mac) => Ok(Some(mac)),
            None => Err(Failure::config(format!("{field}: {text:?} is not the address of an interface"))),
        }
    }
}

fn default_bridge() -> String {
    "cni0".to_owned()
}

fn yes() -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(json: &str, expected: &str) {
        let config: BridgeConfig = serde_json::from_str(json).unwrap();
        let found = config.check().map_or_else(|failure| failure.to_string(), |()| "ok".to_owned());
        assert_eq!(found, expected);
    }

    #[test]
    fn what_cannot_work_is_named() {
        check(r#"{"vlan":0,"macspoofchk":true}"#, "ok");
        check(r#"{"bridge":"a/b"}"#, r#"bridge: "a/b" is not an interface name (CNI error code 7)"#);
        check(r#"{"mtu":20}"#, "mtu: 20 is not between 68 and 65535 (CNI error code 7)");
        check(r#"{"vlan":5000}"#, "vlan: 5000 is not between 0 and 4094 (CNI error code 7)");
        check(
            r#"{"vlanTrunk":[{"id":3},{"minID":9,"maxID":7}]}"#,
            "vlanTrunk[1]: 9-7 is no range of ids from 1 to 4094 (CNI error code 7)",
        );
        check(
            r#"{"mode":"routed","portIsolation":true}"#,
            "portIsolation: true is not supported: mode \"routed\" has no bridge (CNI error code 2)",
        );
        check(
            r#"{"mode":"routed","vlan":3}"#,
            "vlan: 3 is not supported: mode \"routed\" has no bridge (CNI error code 2)",
        );
        check(r#"{"bridge":"b%d"}"#, r#"bridge: "b%d" is not an interface name (CNI error code 7)"#);
        check(
            r#"{"hairpinMode":true,"promiscMode":true}"#,
            "promiscMode: with hairpinMode a pod would get its packets twice (CNI error code 7)",
        );
        check(
            r#"{"ipMasqBackend":"iptables"}"#,
            "ipMasqBackend: iptables is not supported: only nftables is (CNI error code 2)",
        );
        check(r#"{"ipMasqBackend":"nftables"}"#, "ok");
        check(
            r#"{"ipam":{"type":"../bin/true"}}"#,
            r#"ipam.type: "../bin/true" is not a plugin's name (CNI error code 7)"#,
        );
        check(
            r#"{"disableContainerInterface":true,"ipam":{"type":"x"}}"#,
            "disableContainerInterface: an interface that stays down cannot have addresses; remove ipam (CNI error code 7)",
        );
    }

    #[test]
    fn what_takes_away_refuses_nothing() {
        let read = |json: &str| {
            let config = BridgeConfig::for_removal(&serde_json::from_str(json).unwrap()).unwrap();
            (config.bridge, config.ip_masq, config.ipam.map(|ipam| ipam.kind))
        };
        let ours = Some("keelson-ipam".to_owned());
        let wrong = r#"{"hairpinMode":true,"promiscMode":true,"mtu":"x","ipMasqBackend":7,"ipMasqExcept":["1.2.3.4"],
            "runtimeConfig":[],"vlan":5000,"mode":"none","dns":1,
            "bridge":"b0","ipMasq":true,"ipam":{"type":"keelson-ipam","ranges":7}}"#;
        assert_eq!(read(wrong), ("b0".to_owned(), true, ours));
        for ipam in [r#""x""#, "[]", "{}", "7", r#"{"type":7}"#, r#"{"type":"../bin/true"}"#] {
            let wrong = format!(r#"{{"bridge":"a/b","ipMasq":"yes","ipam":{ipam}}}"#);
            assert_eq!(read(&wrong), ("cni0".to_owned(), false, None), "{ipam}");
        }
    }

    #[test]
    fn trunks_are_ranges_and_single_ids() {
        let json = r#"{"vlanTrunk":[{"minID":10,"maxID":20},{"id":7}]}"#;
        let config: BridgeConfig = serde_json::from_str(json).unwrap();
        let expected = [VlanRange { first: 10, last: 20 }, VlanRange { first: 7, last: 7 }];
        assert_eq!(config.trunk().unwrap(), expected);
    }
}
