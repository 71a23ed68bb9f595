//! The `keelson:` section: what `KubeletConfiguration` has no field for.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::Deserialize;

use super::defaults::{
    any_address, default_instance, default_log_links, default_network_name, default_proxy_healthz_port,
    default_proxy_metrics_port, default_root_dir, default_tunnel, default_vni, default_vxlan_port, localhost,
    yes,
};

/// The `keelson:` section.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct KeelsonConfig {
    /// Distinguishes instances on one host.
    #[serde(default = "default_instance")]
    pub instance: String,
    /// Node name in the API.
    pub node_name: String,
    /// Address of the node.
    #[serde(rename = "nodeIP")]
    pub node_ip: IpAddr,
    /// Labels to register with.
    #[serde(default)]
    pub node_labels: BTreeMap<String, String>,
    /// How to reach the API server; empty: there is none, and the node runs its static pods.
    #[serde(default)]
    pub kubeconfig: PathBuf,
    /// How to ask for a client certificate where there is no kubeconfig yet: the node joins by it. Empty: it does not.
    #[serde(default)]
    pub bootstrap_kubeconfig: PathBuf,
    /// Whether this agent is the node's kubelet; `false`: another one is, and only proxy and network run here.
    #[serde(default = "yes")]
    pub kubelet: bool,
    /// `<rootDir>/pods/<uid>` and the agent's state.
    #[serde(default = "default_root_dir")]
    pub root_dir: PathBuf,
    /// Certificates that the agent makes or is given; absent: `<rootDir>/pki`.
    #[serde(default)]
    pub cert_dir: Option<PathBuf>,
    /// Whether the agent sets the kernel's settings that `protectKernelDefaults` is about, where that is off.
    #[serde(default = "yes")]
    pub set_kernel_defaults: bool,
    /// `external`: a controller of the node's provider makes the node ready for pods, and knows its addresses.
    #[serde(default)]
    pub cloud_provider: String,
    /// Directory of the log links.
    #[serde(default = "default_log_links")]
    pub container_log_links_dir: PathBuf,
    /// CNI configuration that the agent writes; absent: somebody else does.
    #[serde(default)]
    pub cni: Option<CniConfig>,
    /// Service proxy; absent: off.
    #[serde(default)]
    pub proxy: Option<ProxySection>,
    /// Network between nodes; absent: somebody else makes it, or there is one node only.
    #[serde(default)]
    pub network: Option<NetworkSection>,
}

/// `keelson.network`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NetworkSection {
    /// On or off.
    #[serde(default = "yes")]
    pub enabled: bool,
    /// `vxlan`, `host-gw` or `wireguard`.
    #[serde(default)]
    pub mode: agent_core::overlay::Mode,
    /// Peers in a subnet of the underlay are reached without the tunnel.
    #[serde(default)]
    pub direct_routing: bool,
    /// Which interface carries it.
    #[serde(default)]
    pub underlay: UnderlaySection,
    /// Name of the tunnel device.
    #[serde(default = "default_tunnel")]
    pub device: String,
    /// VXLAN network identifier, the same on all nodes.
    #[serde(default = "default_vni")]
    pub vni: u32,
    /// UDP port, the same on all nodes.
    #[serde(default = "default_vxlan_port")]
    pub port: u16,
    /// MTU of pods; 0 derives it from the underlay.
    #[serde(default)]
    pub mtu: u32,
    /// Mode `wireguard`: file with a second, symmetric key in base64, the same on all nodes; absent: none.
    #[serde(default)]
    pub preshared_key_file: Option<PathBuf>,
}

/// `keelson.network.underlay`; empty: the interface that has `nodeIP`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct UnderlaySection {
    /// The interface of this name.
    pub interface: Option<String>,
    /// The interface that packets to this address leave by.
    pub route: Option<IpAddr>,
    /// Whether the tunnel uses IPv6; absent: the family of `nodeIP`.
    pub ipv6: Option<bool>,
}

/// `keelson.cni`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CniConfig {
    /// Where `10-keelson.conflist` is written.
    pub conf_dir: PathBuf,
    /// The network's name: several agents in one network namespace need different ones.
    #[serde(default = "default_network_name")]
    pub name: String,
    /// Bridge's name.
    pub bridge: String,
    /// The address allocator's directory.
    pub data_dir: PathBuf,
    /// Where the plugins write down what they changed; absent: `/run/keelson/cni`.
    #[serde(default)]
    pub state_dir: Option<PathBuf>,
    /// The plugins' log; absent: `/var/log/keelson/cni.log`.
    #[serde(default)]
    pub log_file: Option<PathBuf>,
    /// 0: that of the uplink.
    #[serde(default)]
    pub mtu: u32,
    /// Pods reach the outside with the node's address; absent: with their own.
    #[serde(default)]
    pub masquerade: Option<MasqueradeConfig>,
    /// Whether `hostPort` of containers is served, by the plugin keelson-portmap.
    #[serde(default = "yes")]
    pub host_ports: bool,
    /// Whether the annotations for bandwidth are obeyed, by the plugin keelson-bandwidth.
    #[serde(default = "yes")]
    pub bandwidth: bool,
    /// Where the runtime keeps the pods' network namespaces; absent: running pods keep their MTU when it changes.
    #[serde(default)]
    pub netns_dir: Option<PathBuf>,
}

/// `keelson.cni.masquerade`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct MasqueradeConfig {
    /// Destinations that see the pod's own address: the pod ranges of the cluster.
    pub except: Vec<String>,
}

/// `keelson.proxy`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ProxySection {
    /// On or off.
    #[serde(default = "yes")]
    pub enabled: bool,
    /// Cgroup2 directory to attach at.
    pub cgroup_root: PathBuf,
    /// bpffs directory of this instance's pins.
    pub pin_dir: PathBuf,
    /// Service range.
    #[serde(rename = "serviceCIDR")]
    pub service_cidr: String,
    /// Node addresses (CIDRs, or the word `primary` for the node's own) that answer NodePorts; empty: all.
    #[serde(default)]
    pub node_port_addresses: Vec<String>,
    /// Whether clients outside the node are served: packet programs on its network devices.
    #[serde(default = "yes")]
    pub serve_outside: bool,
    /// Whether drivers handle packets from wire to wire (XDP).
    #[serde(default)]
    pub xdp: XdpMode,
    /// Whether pods of this node hand their packets straight to each other.
    #[serde(default)]
    pub pod_shortcut: ShortcutMode,
    /// How clients outside reach endpoints on other nodes through NodePorts, where a Service asks for direct answers.
    #[serde(default)]
    pub node_port_forwarding: ForwardingMode,
    /// Address of kube-proxy's health server.
    #[serde(default = "any_address")]
    pub healthz_bind_address: IpAddr,
    /// Port of kube-proxy's health server; 0 switches it off.
    #[serde(default = "default_proxy_healthz_port")]
    pub healthz_port: u16,
    /// Address of the proxy's metrics.
    #[serde(default = "localhost")]
    pub metrics_bind_address: IpAddr,
    /// Port of the proxy's metrics; 0 switches them off.
    #[serde(default = "default_proxy_metrics_port")]
    pub metrics_port: u16,
}

/// `keelson.proxy.nodePortForwarding`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ForwardingMode {
    /// They are hidden behind the node that they dialled, by which the answers come back.
    #[default]
    Snat,
    /// Endpoints of Services with `service.keelson.io/forwarding: dsr` answer them directly.
    Dsr,
}

/// `keelson.proxy.podShortcut`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ShortcutMode {
    /// Pods of one bridge hand their packets straight to each other, except where something wants to see them.
    #[default]
    Auto,
    /// The bridge carries everything.
    Off,
}

/// `keelson.proxy.xdp`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum XdpMode {
    /// On interfaces with a driver of their own that can, and by which pods of other nodes are reached without a tunnel.
    #[default]
    Auto,
    /// On every interface that can, virtual ones included.
    Always,
    /// Nowhere.
    Off,
}
