//! The plugin under test: what kind it is, where its executable and its delegates are, and a configuration that works.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// What a plugin is for; the cases differ by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    /// Main plugin: attaches a pod to a bridge, with a delegated IPAM plugin.
    Bridge,
    /// IPAM plugin, called as a delegate.
    Ipam,
    /// Chained plugin: host ports.
    Portmap,
    /// Chained plugin: rate limits.
    Bandwidth,
    /// Chained plugin: sysctls and attributes of the interface.
    Tuning,
    /// Chained plugin: masquerade.
    Masquerade,
    /// The pod's loopback device.
    Loopback,
    /// Main plugin: attaches a pod to the network between nodes; told what that is by a file.
    Vxlan,
}

impl Kind {
    /// All of them.
    pub(crate) const ALL: [Kind; 8] = [
        Kind::Bridge,
        Kind::Vxlan,
        Kind::Ipam,
        Kind::Portmap,
        Kind::Bandwidth,
        Kind::Tuning,
        Kind::Masquerade,
        Kind::Loopback,
    ];

    /// The word that begins its groups.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Kind::Bridge => "bridge",
            Kind::Ipam => "ipam",
            Kind::Portmap => "portmap",
            Kind::Bandwidth => "bandwidth",
            Kind::Tuning => "tuning",
            Kind::Masquerade => "masquerade",
            Kind::Loopback => "loopback",
            Kind::Vxlan => "vxlan",
        }
    }

    /// Whether it gets the result of a plugin before it.
    pub(crate) fn is_chained(self) -> bool {
        matches!(self, Kind::Portmap | Kind::Bandwidth | Kind::Tuning | Kind::Masquerade)
    }

    /// Whether it makes the pod's interface, with addresses of an IPAM plugin.
    pub(crate) fn attaches(self) -> bool {
        matches!(self, Kind::Bridge | Kind::Vxlan)
    }

    /// The kind that an executable's name tells.
    fn of_name(name: &str) -> Option<Self> {
        let name = name.strip_prefix("keelson-").unwrap_or(name);
        match name {
            "host-local" => Some(Kind::Ipam),
            other => Kind::ALL.into_iter().find(|kind| kind.word() == other),
        }
    }
}

/// An executable of a kind.
#[derive(Debug, Clone)]
pub(crate) struct Subject {
    /// What it is.
    pub(crate) kind: Kind,
    /// Its name, the `type` of a configuration.
    pub(crate) name: String,
    /// Its file.
    pub(crate) file: PathBuf,
    /// Where its delegates are, `CNI_PATH`.
    pub(crate) dir: PathBuf,
    /// The IPAM plugin that a main plugin delegates to.
    pub(crate) ipam: String,
}

/// The network of all configurations.
pub(crate) const NETWORK: &str = "conformance";
/// The file with the state of the network between nodes, in a case's directory.
pub(crate) const OVERLAY: &str = "overlay.json";
/// The bridge of all configurations.
pub(crate) const BRIDGE: &str = "cnf0";

impl Subject {
    /// An executable, with its kind told by its name unless given.
    pub(crate) fn new(file: &Path, kind: Option<Kind>) -> Result<Self> {
        let file = std::path::absolute(file)?;
        anyhow::ensure!(file.is_file(), "--plugin {}: no such file", file.display());
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some(kind) = kind.or_else(|| Kind::of_name(&name)) else {
            bail!(
                "--plugin {}: its name does not tell what it is; say --name bridge|ipam|portmap|…",
                file.display()
            );
        };
        let dir = file.parent().context("a directory")?.to_owned();
        let ours = dir.join("keelson-ipam").is_file();
        let ipam = if ours { "keelson-ipam" } else { "host-local" }.to_owned();
        Ok(Self { kind, name, file, dir, ipam })
    }

    /// A configuration that works, of a version.
    pub(crate) fn config(&self, version: &str, data: &Path) -> Value {
        // The last two are ours: other plugins do not know them, and do not mind.
        let mut config = json!({
            "cniVersion": version, "name": NETWORK, "type": self.name,
            "stateDir": data.join("state"), "logFile": data.join("cni.log"),
        });
        let more = match self.kind {
            Kind::Bridge => {
                let mut ipam = self.ipam_section(data);
                // The default route is `isDefaultGateway`'s; some refuse to be given it twice.
                ipam["routes"] = json!([]);
                json!({"bridge": BRIDGE, "isGateway": true, "isDefaultGateway": true, "mtu": 1400, "ipam": ipam})
            }
            Kind::Ipam => {
                let mut ipam = self.ipam_section(data);
                ipam["type"] = self.name.clone().into();
                json!({"ipam": ipam})
            }
            Kind::Portmap => json!({
                "capabilities": {"portMappings": true},
                "runtimeConfig": {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]},
            }),
            Kind::Bandwidth => json!({
                "ingressRate": 8_000_000, "ingressBurst": 8_000_000,
                "egressRate": 16_000_000, "egressBurst": 16_000_000,
            }),
            Kind::Tuning => json!({
                "dataDir": data.join("tuning"), "sysctl": {"net.ipv4.conf.eth0.log_martians": "1"},
            }),
            Kind::Masquerade => json!({"ipMasqExcept": ["10.0.0.0/8", "fd00::/8"]}),
            Kind::Loopback => json!({}),
            Kind::Vxlan => json!({
                "overlayFile": data.join(OVERLAY), "delegate": {"bridge": BRIDGE},
                "ipam": {"type": self.ipam, "dataDir": data.join("ipam")},
            }),
        };
        merge(&mut config, more);
        config
    }

    /// The state of the network between nodes: as many addresses as [`Subject::ipam_section`] has.
    pub(crate) fn overlay() -> Value {
        json!({"version": 1, "mode": "host-gw", "ready": true, "mtu": 1400, "podCIDRs": ["10.91.0.0/29"]})
    }

    /// Five addresses beside the gateway's, so that a leak shows.
    pub(crate) fn ipam_section(&self, data: &Path) -> Value {
        json!({
            "type": self.ipam, "dataDir": data.join("ipam"),
            "ranges": [[{"subnet": "10.91.0.0/29"}]], "routes": [{"dst": "0.0.0.0/0"}],
        })
    }
}

/// Adds the keys of one object to another.
pub(crate) fn merge(into: &mut Value, from: Value) {
    let (Some(into), Value::Object(from)) = (into.as_object_mut(), from) else { return };
    into.extend(from);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_tells_the_kind() {
        assert_eq!(Kind::of_name("keelson-ipam"), Some(Kind::Ipam));
        assert_eq!(Kind::of_name("host-local"), Some(Kind::Ipam));
        assert_eq!(Kind::of_name("portmap"), Some(Kind::Portmap));
        assert_eq!(Kind::of_name("keelson-cni"), None);
    }
}
