//! The configuration of `keelson-bridge`; the keys are those of the reference plugin bridge.

use cni_plugins_types::{CniResult, ErrorCode};
use serde::Deserialize;
use serde_json::Value;

use crate::failure::Failure;

/// Keys of the reference plugin that change what traffic does and are not implemented here: ignoring
/// them would be worse than refusing.
const UNSUPPORTED: [&str; 6] =
    ["ipMasq", "vlan", "vlanTrunk", "macspoofchk", "promiscMode", "disableContainerInterface"];

/// The object on standard input.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct BridgeConfig {
    /// Name of the bridge; made when missing.
    #[serde(default = "default_bridge")]
    pub(super) bridge: String,
    /// Whether the bridge gets the gateway's address.
    #[serde(default)]
    pub(super) is_gateway: bool,
    /// Whether the pod's default route goes there; implies `isGateway`.
    #[serde(default)]
    pub(super) is_default_gateway: bool,
    /// Whether a pod can reach itself through the bridge.
    #[serde(default)]
    pub(super) hairpin_mode: bool,
    /// MTU of the pair; 0 means that of the default route's link.
    #[serde(default)]
    pub(super) mtu: u32,
    /// Who gives addresses; without it the pair has none.
    #[serde(default)]
    pub(super) ipam: Option<IpamType>,
    /// Values of capabilities.
    #[serde(default)]
    pub(super) runtime_config: RuntimeConfig,
    /// Result of ADD, for CHECK.
    #[serde(default)]
    pub(super) prev_result: Option<CniResult>,
    #[serde(flatten)]
    rest: serde_json::Map<String, Value>,
}

/// The part of the `ipam` section that says who is asked.
#[derive(Debug, Deserialize)]
pub(super) struct IpamType {
    /// Name of the plugin.
    #[serde(rename = "type")]
    pub(super) kind: String,
}

/// Values of capabilities this plugin knows.
#[derive(Debug, Default, Deserialize)]
pub(super) struct RuntimeConfig {
    /// Hardware address in the pod.
    #[serde(default)]
    pub(super) mac: Option<String>,
}

impl BridgeConfig {
    /// Refuses what cannot work.
    pub(super) fn check(&self) -> Result<(), Failure> {
        if !cni_plugins_types::config::is_interface_name(&self.bridge) {
            return Err(Failure::config(format!("invalid bridge name {:?}", self.bridge)));
        }
        let is_set = |value: &Value| !matches!(value, Value::Null | Value::Bool(false)) && *value != 0;
        for key in UNSUPPORTED {
            if let Some(value) = self.rest.get(key).filter(|value| is_set(value)) {
                return Err(Failure::new(
                    ErrorCode::UnsupportedField,
                    format!("keelson-bridge does not support {key}: {value}"),
                ));
            }
        }
        Ok(())
    }

    /// Whether the bridge is the pods' gateway.
    pub(super) fn is_gateway(&self) -> bool {
        self.is_gateway || self.is_default_gateway
    }
}

fn default_bridge() -> String {
    "cni0".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(json: &str) -> Result<(), String> {
        let config: BridgeConfig = serde_json::from_str(json).unwrap();
        config.check().map_err(|failure| failure.to_string())
    }

    #[test]
    fn unsupported_keys_are_refused_only_when_set() {
        assert_eq!(check(r#"{"ipMasq":false,"vlan":0}"#), Ok(()));
        let refused = check(r#"{"vlan":7}"#).unwrap_err();
        assert_eq!(refused, "keelson-bridge does not support vlan: 7 (CNI error code 2)");
        assert!(check(r#"{"bridge":"a/b"}"#).unwrap_err().contains("invalid bridge name"));
    }
}
