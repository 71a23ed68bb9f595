//! The configuration file of `keelson-control`. Unknown fields are errors that name the field.

use std::{
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use control_server::Ipv4Range;
use serde::Deserialize;

/// Everything that can be configured.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct ControlConfig {
    /// The store and, below `pki/`, all keys.
    pub(crate) data_dir: PathBuf,
    /// Where the API is served.
    #[serde(default = "default_listen")]
    pub(crate) listen: SocketAddr,
    /// The address by which pods and nodes reach the API.
    pub(crate) advertise_address: IpAddr,
    /// Addresses of Services.
    #[serde(default = "default_service_range", rename = "serviceCIDR")]
    pub(crate) service_cidr: String,
    /// Addresses of pods: an IPv4 range, or one per family with a comma between; each node gets a part of each.
    #[serde(default = "default_pod_range", rename = "podCIDR")]
    pub(crate) pod_cidr: String,
    /// Prefix length of a node's part of the IPv4 range.
    #[serde(default = "default_node_mask_v4", rename = "nodeCIDRMaskSizeIPv4")]
    pub(crate) node_mask_v4: u8,
    /// Prefix length of a node's part of the IPv6 range.
    #[serde(default = "default_node_mask_v6", rename = "nodeCIDRMaskSizeIPv6")]
    pub(crate) node_mask_v6: u8,
    /// Ports of NodePort Services.
    #[serde(default = "default_node_ports")]
    pub(crate) node_port_range: String,
    /// Where the administrator's kubeconfig is written; not at all where empty.
    #[serde(default)]
    pub(crate) admin_kubeconfig: PathBuf,
    /// What runs in this process.
    #[serde(default = "all_roles")]
    pub(crate) roles: Vec<Role>,
    /// Kubeconfig for roles that run without the API server; empty means the own API over loopback.
    #[serde(default)]
    pub(crate) manager_kubeconfig: PathBuf,
    /// Names and addresses, beside the usual ones, that the serving certificate is valid for.
    #[serde(default)]
    pub(crate) server_names: Vec<String>,
    /// Nodes whose credentials are issued at start.
    #[serde(default)]
    pub(crate) nodes: Vec<NodeConfig>,
}

/// A part of the control plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Role {
    /// The API server and its store.
    Api,
    /// The scheduler.
    Scheduler,
    /// The controllers.
    Controllers,
}

/// A node's credentials and where they are written.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct NodeConfig {
    /// The node's name.
    pub(crate) name: String,
    /// Addresses of its kubelet API.
    pub(crate) addresses: Vec<IpAddr>,
    /// The agent's kubeconfig.
    pub(crate) kubeconfig: PathBuf,
    /// Certificate of the kubelet API.
    pub(crate) serving_cert: PathBuf,
    /// Key of the kubelet API.
    pub(crate) serving_key: PathBuf,
    /// The authority that the node checks clients with.
    #[serde(rename = "clientCA")]
    pub(crate) client_ca: PathBuf,
}

impl ControlConfig {
    /// Read and check the file.
    pub(crate) fn load(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        let config: Self =
            serde_norway::from_str(&text).with_context(|| format!("parse {}", path.display()))?;
        config.check().with_context(|| format!("check {}", path.display()))?;
        Ok(config)
    }

    fn check(&self) -> anyhow::Result<()> {
        self.service_range()?;
        self.node_ports()?;
        self.check_pod_ranges()?;
        anyhow::ensure!(
            !self.advertise_address.is_unspecified(),
            "advertiseAddress: must be an address of this machine"
        );
        anyhow::ensure!(!self.roles.is_empty(), "roles: name at least one of api, scheduler, controllers");
        anyhow::ensure!(
            self.runs(Role::Api) || !self.manager_kubeconfig.as_os_str().is_empty(),
            "managerKubeconfig: is needed where roles does not contain api"
        );
        Ok(())
    }

    fn check_pod_ranges(&self) -> anyhow::Result<()> {
        let ranges = self.pod_ranges();
        let (v6, v4): (Vec<&String>, Vec<&String>) = ranges.iter().partition(|range| range.contains(':'));
        anyhow::ensure!(
            v4.len() == 1 && v6.len() <= 1,
            "podCIDR: {:?} must be an IPv4 range, or one range per family with a comma between",
            self.pod_cidr
        );
        let pods: Result<Ipv4Range, String> = v4[0].parse();
        pods.map_err(|why| anyhow::anyhow!("podCIDR: {why}"))?;
        for (field, range, mask, widest) in v4
            .iter()
            .map(|range| ("nodeCIDRMaskSizeIPv4", range, self.node_mask_v4, 32))
            .chain(v6.iter().map(|range| ("nodeCIDRMaskSizeIPv6", range, self.node_mask_v6, 128)))
        {
            let prefix = range.split_once('/').and_then(|(address, prefix)| {
                address.parse::<IpAddr>().ok().and_then(|_valid| prefix.parse::<u8>().ok())
            });
            let Some(prefix) = prefix.filter(|prefix| *prefix <= widest) else {
                anyhow::bail!("podCIDR: {range:?} is not an address range");
            };
            anyhow::ensure!(
                (prefix..=widest).contains(&mask),
                "{field}: a node's part of {range} cannot be a /{mask}"
            );
        }
        Ok(())
    }

    /// The ranges of pods, one per family.
    pub(crate) fn pod_ranges(&self) -> Vec<String> {
        let parts = self.pod_cidr.split(',').map(str::trim).filter(|part| !part.is_empty());
        parts.map(str::to_owned).collect()
    }

    /// Whether a role runs here.
    pub(crate) fn runs(&self, role: Role) -> bool {
        self.roles.contains(&role)
    }

    /// Addresses of Services.
    pub(crate) fn service_range(&self) -> anyhow::Result<Ipv4Range> {
        self.service_cidr.parse().map_err(|why: String| anyhow::anyhow!("serviceCIDR: {why}"))
    }

    /// Ports of NodePort Services.
    pub(crate) fn node_ports(&self) -> anyhow::Result<RangeInclusive<u16>> {
        let parsed = self.node_port_range.split_once('-').and_then(|(first, last)| {
            Some((first.trim().parse::<u16>().ok()?, last.trim().parse::<u16>().ok()?))
        });
        match parsed {
            Some((first, last)) if first > 0 && first <= last => Ok(first..=last),
            _ => anyhow::bail!(
                "nodePortRange: \"{}\" is not a range such as 30000-32767",
                self.node_port_range
            ),
        }
    }
}

fn default_listen() -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], 6443))
}

fn default_service_range() -> String {
    "10.96.0.0/12".to_owned()
}

fn default_node_mask_v4() -> u8 {
    24
}

fn default_node_mask_v6() -> u8 {
    64
}

fn default_pod_range() -> String {
    "10.244.0.0/16".to_owned()
}

fn default_node_ports() -> String {
    "30000-32767".to_owned()
}

fn all_roles() -> Vec<Role> {
    vec![Role::Api, Role::Scheduler, Role::Controllers]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(extra: &str) -> anyhow::Result<ControlConfig> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.yaml");
        std::fs::write(&path, format!("dataDir: /d\nadvertiseAddress: 10.0.0.1\n{extra}")).unwrap();
        ControlConfig::load(&path)
    }

    #[track_caller]
    fn refused(extra: &str, want: &str) {
        let error = format!("{:#}", load(extra).unwrap_err());
        assert!(error.contains(want), "{error}");
    }

    #[test]
    fn mistakes_are_named() {
        load("").unwrap();
        refused("lisen: 0.0.0.0:1\n", "unknown field `lisen`");
        refused("listen: 6443\n", "listen");
        refused("roles: [api, kubelet]\n", "unknown variant `kubelet`");
        refused("roles: [scheduler]\n", "managerKubeconfig");
        refused("serviceCIDR: 10.96.0.1/12\n", "serviceCIDR: \"10.96.0.1/12\" has host bits set");
        refused("nodePortRange: 30000\n", "nodePortRange");
        refused("nodes: [{name: a, addresses: [x]}]\n", "addresses");
    }
}
