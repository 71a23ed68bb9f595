//! The success result of ADD, kept in its newest form and converted at the edges.
//!
//! Input: a result object of any supported version. Output: [`CniResult`], and from it an object of
//! any supported version. Fields a version does not know are left out when converting down.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{ipnet::IpNet, version::Version};

/// What ADD attached, in the terms of version 1.1.0.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CniResult {
    /// Version of the object this was read from, or is to be written as.
    #[serde(default)]
    pub cni_version: Version,
    /// Interfaces made, on the host and in the sandbox. IPAM plugins leave it empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<Interface>,
    /// Addresses given.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ips: Vec<IpConfig>,
    /// Routes set in the sandbox.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<Route>,
    /// Resolver configuration.
    #[serde(default, skip_serializing_if = "Dns::is_empty")]
    pub dns: Dns,
}

/// One interface.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its hardware address, where it has one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mac: String,
    /// Its MTU (1.1.0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Path of the network namespace; empty for the host.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub sandbox: String,
    /// Path of a socket that stands for the interface (1.1.0).
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub socket_path: String,
    /// PCI id of the device (1.1.0).
    #[serde(default, rename = "pciID", skip_serializing_if = "String::is_empty")]
    pub pci_id: String,
}

/// One address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpConfig {
    /// Address with prefix.
    pub address: IpNet,
    /// Default gateway of that subnet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// Index into [`CniResult::interfaces`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<u32>,
}

/// One route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Destination.
    pub dst: IpNet,
    /// Next hop; absent means the gateway of the address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
    /// Path MTU (1.1.0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Advertised maximal segment size (1.1.0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advmss: Option<u32>,
    /// Metric (1.1.0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<u32>,
    /// Routing table (1.1.0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<u32>,
    /// Scope (1.1.0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<u8>,
}

impl Route {
    /// A route with only a destination.
    pub fn to(dst: IpNet) -> Self {
        Self { dst, gw: None, mtu: None, advmss: None, priority: None, table: None, scope: None }
    }
}

/// Resolver configuration.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Dns {
    /// Name servers, by priority.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    /// Local domain.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub domain: String,
    /// Search domains, by priority.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// Resolver options.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

impl Dns {
    /// Whether nothing is configured.
    pub fn is_empty(&self) -> bool {
        *self == Dns::default()
    }
}

impl CniResult {
    /// Reads a result of any supported version. An object without `cniVersion` is taken as
    /// `assumed`, which is the version the plugin was asked for.
    pub fn from_value(mut value: Value, assumed: Version) -> Result<Self, serde_json::Error> {
        if let Some(object) = value.as_object_mut() {
            object.entry("cniVersion").or_insert_with(|| assumed.as_str().into());
        }
        serde_json::from_value(value)
    }

    /// The result as an object of `version`.
    pub fn to_value(&self, version: Version) -> Value {
        let mut converted = self.clone();
        converted.cni_version = version;
        if version < Version::V1_1_0 {
            converted.drop_1_1_fields();
        }
        let mut value =
            serde_json::to_value(&converted).expect("the type has string keys only, so it always serialises");
        if version < Version::V1_0_0 {
            add_ip_versions(&mut value, &converted.ips);
        }
        value
    }

    /// First address of each family with its interface, as runtimes report pod addresses.
    pub fn addresses_in_sandbox(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.ips.iter().map(|ip| ip.address.addr())
    }

    fn drop_1_1_fields(&mut self) {
        for interface in &mut self.interfaces {
            interface.mtu = None;
            interface.socket_path.clear();
            interface.pci_id.clear();
        }
        for route in &mut self.routes {
            *route = Route { dst: route.dst, gw: route.gw, ..Route::to(route.dst) };
        }
    }
}

/// Before 1.0.0 every address carries its family as `"version": "4"`.
fn add_ip_versions(value: &mut Value, ips: &[IpConfig]) {
    let Some(objects) = value.get_mut("ips").and_then(Value::as_array_mut) else { return };
    for (object, ip) in objects.iter_mut().zip(ips) {
        let family = if ip.address.addr().is_ipv4() { "4" } else { "6" };
        if let Some(object) = object.as_object_mut() {
            object.insert("version".to_owned(), family.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn sample() -> CniResult {
        CniResult {
            cni_version: Version::V1_1_0,
            interfaces: vec![Interface {
                name: "eth0".to_owned(),
                mac: "0a:58:0a:f4:00:02".to_owned(),
                mtu: Some(1450),
                sandbox: "/run/netns/a".to_owned(),
                ..Interface::default()
            }],
            ips: vec![IpConfig {
                address: "10.244.0.2/24".parse().unwrap(),
                gateway: Some("10.244.0.1".parse().unwrap()),
                interface: Some(0),
            }],
            routes: vec![Route { priority: Some(100), ..Route::to("0.0.0.0/0".parse().unwrap()) }],
            dns: Dns::default(),
        }
    }

    #[test]
    fn newest_version_round_trips() {
        let value = sample().to_value(Version::V1_1_0);
        assert_eq!(CniResult::from_value(value, Version::V0_3_0).unwrap(), sample());
    }

    #[test]
    fn older_versions_get_only_fields_they_know() {
        let value = sample().to_value(Version::V0_4_0);
        assert_eq!(
            value,
            json!({
                "cniVersion": "0.4.0",
                "interfaces": [{"name": "eth0", "mac": "0a:58:0a:f4:00:02", "sandbox": "/run/netns/a"}],
                "ips": [{"version": "4", "address": "10.244.0.2/24", "gateway": "10.244.0.1", "interface": 0}],
                "routes": [{"dst": "0.0.0.0/0"}],
            })
        );
        let value = sample().to_value(Version::V1_0_0);
        assert_eq!(value["ips"][0].get("version"), None);
        assert_eq!(value["interfaces"][0].get("mtu"), None);
    }

    #[test]
    fn old_results_are_read_with_their_family_field() {
        let old =
            json!({"cniVersion": "0.3.1", "ips": [{"version": "6", "address": "fd00::2/64"}], "dns": {}});
        let result = CniResult::from_value(old, Version::V1_1_0).unwrap();
        assert_eq!(result.cni_version, Version::V0_3_1);
        assert_eq!(result.ips[0].address.to_string(), "fd00::2/64");
    }
}
