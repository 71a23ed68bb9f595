//! The configuration of `keelson-vxlan`, and the one it makes of it and of the overlay's state for the plugin it delegates to.

use std::path::{Path, PathBuf};

use cni_plugins_host::overlay::{self, OverlayError, State, StateError};
use cni_plugins_types::{ErrorCode, IpNet, config::is_plugin_type};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::{call::Call, failure::Failure, plugins::Plugin, state};

/// The bridge unless the configuration says otherwise.
const BRIDGE: &str = "kl-pods0";
/// Keys of the list or of this plugin, which a delegate does not have of its own.
const NOT_THE_DELEGATES: [&str; 4] = ["name", "cniVersion", "ipam", "prevResult"];
/// Keys of `ipam` that follow from the overlay.
const THE_OVERLAYS: [&str; 5] = ["ranges", "subnet", "rangeStart", "rangeEnd", "gateway"];
/// Keys of the call that are handed on as they are.
const HANDED_ON: [&str; 8] = [
    "name",
    "cniVersion",
    "runtimeConfig",
    "args",
    "prevResult",
    "cni.dev/valid-attachments",
    "stateDir",
    "logFile",
];

/// The object on standard input.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct VxlanConfig {
    /// Where the agent leaves the state.
    #[serde(default)]
    overlay_file: Option<PathBuf>,
    /// Whether what pods send beyond the cluster gets the node's address.
    #[serde(default)]
    ip_masq: bool,
    /// Destinations beyond it that see the pod's own address.
    #[serde(default)]
    ip_masq_except: Vec<IpNet>,
    /// Keys of the plugin that makes the interface.
    #[serde(default)]
    delegate: Map<String, Value>,
    /// Keys of the plugin that gives addresses.
    #[serde(default)]
    ipam: Map<String, Value>,
    #[serde(default)]
    state_dir: Option<PathBuf>,
}

impl VxlanConfig {
    /// Reads a call's object and refuses what cannot work. A call that takes away refuses nothing.
    pub(super) fn of(call: &Call) -> Result<Self, Failure> {
        if call.command.takes_away() {
            return Ok(Self::for_removal(&call.config));
        }
        let config: Self = call.parse()?;
        if config.overlay_file.as_ref().is_some_and(|path| !path.is_absolute()) {
            return Err(Failure::config("overlayFile: is not an absolute path"));
        }
        if let Some(key) = NOT_THE_DELEGATES.into_iter().find(|key| config.delegate.contains_key(*key)) {
            return Err(Failure::config(format!("delegate.{key}: belongs beside delegate, not into it")));
        }
        if let Some(key) = THE_OVERLAYS.into_iter().find(|key| config.ipam.contains_key(*key)) {
            return Err(Failure::config(format!("ipam.{key}: follows from podCIDRs in overlayFile")));
        }
        let kind = config.kind();
        if !is_plugin_type(kind) || kind == Plugin::Vxlan.name() {
            return Err(Failure::config(format!("delegate.type: {kind:?} is no plugin to delegate to")));
        }
        if config.ip_masq && !config.is_ours() {
            return Err(Failure::unsupported(
                "ipMasq",
                &true,
                "only keelson-bridge spares the other nodes' pods; chain keelson-masquerade instead",
            ));
        }
        Ok(config)
    }

    /// The object without what ADD refuses. It counts where a pod's record is missing, and for GC of what has none.
    fn for_removal(object: &Value) -> Self {
        let section = |key: &str, not: &[&str]| {
            let mut section = object.get(key).and_then(Value::as_object).cloned().unwrap_or_default();
            section.retain(|key, _| !not.contains(&key.as_str()));
            section
        };
        let path = |key: &str| object.get(key).and_then(Value::as_str).map(PathBuf::from);
        // The overlay's is taken: whether a pod's was less makes no difference any more.
        let mut delegate = section("delegate", &[&NOT_THE_DELEGATES[..], &["mtu"]].concat());
        let is_usable = |kind: &str| is_plugin_type(kind) && kind != Plugin::Vxlan.name();
        if !delegate.get("type").and_then(Value::as_str).is_some_and(is_usable) {
            delegate.remove("type");
        }
        let config = Self {
            overlay_file: path("overlayFile").filter(|path| path.is_absolute()),
            ip_masq: object.get("ipMasq").is_some_and(|is| is == true),
            ip_masq_except: Vec::new(),
            delegate,
            ipam: section("ipam", &THE_OVERLAYS),
            state_dir: path("stateDir").filter(|path| path.is_absolute()),
        };
        Self { ip_masq: config.ip_masq && config.is_ours(), ..config }
    }

    /// The plugin that makes the interface.
    pub(super) fn kind(&self) -> &str {
        self.delegate.get("type").map_or(Plugin::Bridge.name(), |kind| kind.as_str().unwrap_or_default())
    }

    /// The overlay's state.
    pub(super) fn state(&self) -> Result<State, Failure> {
        let path = match &self.overlay_file {
            Some(path) => path.clone(),
            None => {
                self.state_dir.as_deref().unwrap_or(Path::new(state::DEFAULT_DIR)).join(overlay::FILE_NAME)
            }
        };
        overlay::read(&path).map_err(|error| told(&error))
    }

    /// The delegate's object. Without the overlay's state it has no ranges, which only ADD and STATUS need.
    pub(super) fn delegated(&self, call: &Call, state: Option<&State>) -> Result<Value, Failure> {
        let mut object = self.defaults();
        object.extend(self.delegate.clone());
        object.insert("type".to_owned(), self.kind().into());
        for key in HANDED_ON {
            if let Some(value) = call.config.get(key) {
                object.insert(key.to_owned(), value.clone());
            }
        }
        if let Some(state) = state {
            object.insert("mtu".to_owned(), self.mtu(state)?.into());
        }
        if self.ip_masq {
            let cluster = state.map(|state| [&state.cluster_cidrs[..], &state.pod_cidrs[..]].concat());
            let except: Vec<IpNet> =
                self.ip_masq_except.iter().copied().chain(cluster.unwrap_or_default()).collect();
            object.insert("ipMasq".to_owned(), true.into());
            object.insert("ipMasqExcept".to_owned(), json!(except));
        }
        let has_default_route = object.get("isDefaultGateway").is_some_and(|is| is == true);
        let ipam = self.addresses(state, has_default_route);
        object.insert("ipam".to_owned(), ipam.into());
        Ok(object.into())
    }

    /// Whether the plugin that makes the interface runs in this process.
    pub(super) fn is_ours(&self) -> bool {
        self.kind() == Plugin::Bridge.name()
    }

    fn defaults(&self) -> Map<String, Value> {
        let mut object = Map::from_iter([("isDefaultGateway".to_owned(), true.into())]);
        if self.delegate.get("mode").is_none_or(|mode| mode != "routed") {
            object.insert("bridge".to_owned(), BRIDGE.into());
            // The two do not go together.
            let promiscuous = self.delegate.get("promiscMode").is_some_and(|is| is == true);
            object.insert("hairpinMode".to_owned(), (!promiscuous).into());
        }
        object
    }

    fn mtu(&self, state: &State) -> Result<u64, Failure> {
        let Some(asked) = self.delegate.get("mtu").filter(|mtu| **mtu != 0) else {
            return Ok(state.mtu.into());
        };
        asked.as_u64().filter(|mtu| *mtu <= state.mtu.into()).ok_or_else(|| {
            Failure::config(format!(
                "delegate.mtu: {asked} is not a number up to {}, which the overlay carries",
                state.mtu
            ))
        })
    }

    /// One set of ranges for each family, so that a pod has one address of each; routes to all pods where no default
    /// route leads there.
    fn addresses(&self, state: Option<&State>, has_default_route: bool) -> Map<String, Value> {
        let mut ipam = self.ipam.clone();
        ipam.entry("type").or_insert_with(|| Plugin::Ipam.name().into());
        let Some(state) = state else { return ipam };
        let of_family = |v6: bool| -> Vec<Value> {
            let ranges = state.pod_cidrs.iter().filter(|range| range.addr().is_ipv6() == v6);
            ranges.map(|range| json!({"subnet": range})).collect()
        };
        let sets: Vec<Vec<Value>> =
            [false, true].into_iter().map(of_family).filter(|set| !set.is_empty()).collect();
        ipam.insert("ranges".to_owned(), json!(sets));
        if !has_default_route {
            let routes = ipam.entry("routes").or_insert_with(|| json!([]));
            if let Some(routes) = routes.as_array_mut() {
                routes.extend(state.cluster_cidrs.iter().map(|range| json!({"dst": range})));
            }
        }
        ipam
    }
}

/// The code for a state that pods cannot be attached by: what comes about by itself may be tried again.
fn told(error: &OverlayError) -> Failure {
    let code = match error {
        OverlayError::Absent(_) => ErrorCode::TryAgainLater,
        OverlayError::Read { .. } => ErrorCode::Io,
        OverlayError::State { source, .. } => match source {
            StateError::OtherBoot | StateError::NotReady(_) => ErrorCode::TryAgainLater,
            StateError::Decode(_) => ErrorCode::Decode,
            StateError::Field { .. } => ErrorCode::InvalidConfig,
        },
    };
    Failure::new(code, format!("overlayFile: {}", crate::failure::chain(error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_away_leaves_out_what_cannot_be() {
        let object = json!({
            "overlayFile": "relative", "ipMasq": true, "ipMasqExcept": ["1.2.3.4"], "stateDir": 7,
            "delegate": {"type": "../x", "bridge": "b0", "mtu": 70_000, "ipam": {}},
            "ipam": {"dataDir": "/d", "subnet": "10.0.0.0/24"},
        });
        let config = VxlanConfig::for_removal(&object);
        assert_eq!((config.kind(), config.ip_masq), ("keelson-bridge", true));
        assert_eq!((&config.overlay_file, &config.state_dir), (&None, &None));
        assert_eq!(Value::from(config.delegate), json!({"bridge": "b0"}));
        assert_eq!(Value::from(config.ipam), json!({"dataDir": "/d"}));
        let foreign = VxlanConfig::for_removal(&json!({"ipMasq": true, "delegate": {"type": "bridge"}}));
        assert_eq!((foreign.kind(), foreign.ip_masq), ("bridge", false));
        assert!(VxlanConfig::for_removal(&json!({"delegate": 7, "ipam": "x"})).is_ours());
    }
}
