//! The state of the network between nodes, as the agent leaves it for `keelson-vxlan` in a file.
//!
//! Input: the file's text. Output: [`State`], checked, or [`StateError`], which names what is wrong. Whether the file is
//! there and how it is replaced is the callers' work, as this crate does no IO.

use serde::{Deserialize, Serialize};

use crate::ipnet::IpNet;

/// The version of the format that is written, and the only one understood.
pub const FORMAT: u32 = 1;
/// Least MTU of a pod, and the least where it has an IPv6 address.
const LEAST_MTU: [u32; 2] = [68, 1280];
/// Largest MTU of a pod.
const LARGEST_MTU: u32 = 65_535;

/// What pods need to know of the overlay.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// [`FORMAT`].
    pub version: u32,
    /// Boot that it is about: what an earlier one left says nothing.
    #[serde(default, rename = "bootID", skip_serializing_if = "String::is_empty")]
    pub boot_id: String,
    /// Name of the node, for people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub node: String,
    /// How packets travel (`vxlan`, `host-gw`, `wireguard`), for people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mode: String,
    /// Whether pods may be attached.
    pub ready: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// The tunnel's device, in modes that have one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// MTU of pods.
    #[serde(default)]
    pub mtu: u32,
    /// This node's part of the pod ranges.
    #[serde(default, rename = "podCIDRs")]
    pub pod_cidrs: Vec<IpNet>,
    /// Ranges of all nodes' pods, where they are known.
    #[serde(default, rename = "clusterCIDRs", skip_serializing_if = "Vec::is_empty")]
    pub cluster_cidrs: Vec<IpNet>,
}

/// Why no pod can be attached by a state.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Not JSON, or a key of the wrong type.
    #[error("cannot decode it: {0}")]
    Decode(#[source] serde_json::Error),
    /// Of a boot that is over: the agent has not been here since.
    #[error("it is of an earlier boot; the agent has not written it anew yet")]
    OtherBoot,
    /// The agent says so.
    #[error("the overlay is not ready: {0}")]
    NotReady(String),
    /// A value that cannot be.
    #[error("{field}: {why}")]
    Field {
        /// The key.
        field: String,
        /// What is wrong, with the value.
        why: String,
    },
}

impl State {
    /// Reads and checks a file's text. `boot_id` is that of now.
    pub fn parse(text: &[u8], boot_id: &str) -> Result<Self, StateError> {
        let state: Self = serde_json::from_slice(text).map_err(StateError::Decode)?;
        state.check(boot_id)?;
        Ok(state)
    }

    fn check(&self, boot_id: &str) -> Result<(), StateError> {
        let wrong = |field: &str, why: String| Err(StateError::Field { field: field.to_owned(), why });
        if self.version != FORMAT {
            return wrong(
                "version",
                format!("{} is not {FORMAT}: agent and plugins are of different releases", self.version),
            );
        }
        if !self.boot_id.is_empty() && self.boot_id != boot_id {
            return Err(StateError::OtherBoot);
        }
        if !self.ready {
            let reason = if self.reason.is_empty() { "no reason given" } else { &self.reason };
            return Err(StateError::NotReady(reason.to_owned()));
        }
        if self.pod_cidrs.is_empty() {
            return wrong("podCIDRs", "is empty".to_owned());
        }
        for (index, range) in self.pod_cidrs.iter().enumerate() {
            let field = format!("podCIDRs[{index}]");
            if range.addr() != range.network() {
                return wrong(&field, format!("{range} is not a network address"));
            }
            if let Some(other) = self.pod_cidrs[..index].iter().find(|other| other.overlaps(range)) {
                return wrong(&field, format!("{range} overlaps {other}"));
            }
        }
        let v6 = self.pod_cidrs.iter().any(|range| range.addr().is_ipv6());
        let least = LEAST_MTU[usize::from(v6)];
        if !(least..=LARGEST_MTU).contains(&self.mtu) {
            return wrong("mtu", format!("{} is not between {least} and {LARGEST_MTU}", self.mtu));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn good() -> Value {
        json!({
            "version": 1, "bootID": "b", "node": "n1", "mode": "vxlan", "ready": true, "device": "kl-vxlan", "mtu": 1450,
            "podCIDRs": ["10.244.3.0/24", "fd00:3::/64"], "clusterCIDRs": ["10.244.0.0/16"],
        })
    }

    #[test]
    fn what_is_written_is_read_back() {
        let state = State::parse(good().to_string().as_bytes(), "b").unwrap();
        assert_eq!(serde_json::to_value(&state).unwrap(), good());
        assert_eq!(state.pod_cidrs[1].to_string(), "fd00:3::/64");
    }

    #[test]
    fn mistakes_name_their_field() {
        let cases = [
            (json!({"version": 2}), "version: 2 is not 1"),
            (json!({"bootID": "a"}), "it is of an earlier boot"),
            (json!({"ready": false, "reason": "no underlay"}), "the overlay is not ready: no underlay"),
            (json!({"podCIDRs": []}), "podCIDRs: is empty"),
            (json!({"podCIDRs": ["10.0.0.1/24"]}), "podCIDRs[0]: 10.0.0.1/24 is not a network address"),
            (
                json!({"podCIDRs": ["10.0.0.0/16", "10.0.1.0/24"]}),
                "podCIDRs[1]: 10.0.1.0/24 overlaps 10.0.0.0/16",
            ),
            (json!({"mtu": 1279}), "mtu: 1279 is not between 1280 and 65535"),
            (json!({"mtu": 0, "podCIDRs": ["10.0.0.0/24"]}), "mtu: 0 is not between 68"),
            (json!({"podCIDRs": "10.0.0.0/24"}), "cannot decode it: invalid type"),
            (json!({"podCIDRs": ["10.0.0.0"]}), "invalid CIDR address \"10.0.0.0\""),
        ];
        for (change, expected) in cases {
            let mut value = good();
            value.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            let error = State::parse(value.to_string().as_bytes(), "b").unwrap_err().to_string();
            assert!(error.contains(expected), "{change}: {error}");
        }
    }
}
