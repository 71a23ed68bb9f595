//! The configuration files of one node, written anew at each `up`.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::cmd::Cmd;
use crate::paths::Layout;
use crate::process::write_atomic;

/// What is particular to this node.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    /// Node name: the host's name in lower case.
    pub(crate) name: String,
    /// Its address: the one used towards the default gateway.
    pub(crate) address: String,
    /// cgroup2 directory that the socket programs are attached to.
    pub cgroup2: String,
    /// How it reaches other nodes; `None`: there are none.
    pub(crate) overlay: Option<Overlay>,
}

/// The network between the nodes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::Args)]
pub(crate) struct Overlay {
    /// How nodes reach each other's pods.
    #[arg(long = "overlay", value_name = "MODE", default_value = "vxlan", requires = "nodes")]
    pub(crate) mode: Mode,
    /// Reach pods of nodes in the same subnet without the tunnel.
    #[arg(long, requires = "nodes")]
    pub(crate) direct_routing: bool,
    /// Give nodes and pods IPv6 addresses, too.
    #[arg(long, requires = "nodes")]
    pub(crate) dual_stack: bool,
}

/// How packets travel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Mode {
    /// In UDP.
    #[default]
    Vxlan,
    /// By plain routes.
    HostGw,
    /// In UDP, encrypted; needs a kernel with WireGuard.
    Wireguard,
}

/// Range of ClusterIPs.
pub(crate) const SERVICE_CIDR: &str = "10.96.0.0/12";
/// Range that the nodes' pod ranges are taken from.
pub(crate) const POD_CIDR: &str = "10.244.0.0/16";
/// The same for IPv6, with `--dual-stack`.
pub(crate) const POD_CIDR_V6: &str = "fd00:10:244::/56";
/// Ports that must be free, and who listens there.
pub(crate) const PORTS: &[(u16, &str)] =
    &[(6443, "the Kubernetes API"), (10250, "the kubelet API"), (10248, "the agent's health check")];

/// Pods of a node at most where nobody asks for more, as upstream.
pub(crate) const MAX_PODS: u16 = 110;

/// Writes every file and makes the folders they name. `nodes`: where each is, and what it is; `address`: where the
/// control plane is reached from all of them.
pub(crate) fn write(layout: &Layout, address: &str, nodes: &[(Layout, Node)]) -> Result<()> {
    write_sized(layout, address, nodes, MAX_PODS)
}

/// The same for nodes of so many pods.
pub(crate) fn write_sized(
    layout: &Layout,
    address: &str,
    nodes: &[(Layout, Node)],
    max_pods: u16,
) -> Result<()> {
    for dir in [layout.log(), layout.procs(), layout.registry_config()] {
        fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    }
    // Logs and keys are root's alone.
    restrict(&layout.data)?;
    restrict(&layout.run)?;
    write_yaml(&layout.data.join("control.yaml"), &control(layout, address, nodes, max_pods))?;
    nodes.iter().try_for_each(|(place, node)| write_node(layout, place, node, max_pods))
}

fn write_node(cluster: &Layout, layout: &Layout, node: &Node, max_pods: u16) -> Result<()> {
    for dir in [layout.log(), layout.cni_bin(), layout.run.join("cni/net.d")] {
        fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    }
    if node.overlay.is_some() {
        fs::create_dir_all(&node.cgroup2).with_context(|| format!("creating {}", node.cgroup2))?;
        write_atomic(&layout.data.join("cgroup2"), node.cgroup2.as_bytes())?;
    }
    write_yaml(&layout.data.join("cri.yaml"), &cri(cluster, layout))?;
    write_yaml(&layout.data.join("agent.yaml"), &agent(layout, node, max_pods))?;
    write_atomic(&layout.run.join("containerd/config.toml"), containerd(layout).as_bytes())?;
    // Every plugin there is; old links may lead into an earlier checkout, and are replaced.
    Cmd::new(layout.binary("keelson-cni"))
        .args(["install".as_ref(), layout.cni_bin().as_os_str()])
        .output()?;
    Ok(())
}

/// The ranges that the nodes' pod ranges are taken from, one per family.
fn pod_ranges(dual_stack: bool) -> Vec<&'static str> {
    if dual_stack { vec![POD_CIDR, POD_CIDR_V6] } else { vec![POD_CIDR] }
}

/// Name of an instance's pod network: nodes may share the host's network namespace with other instances.
pub(crate) fn network_name(layout: &Layout) -> String {
    format!("keelson-{}", layout.instance.replace('/', "-"))
}

fn restrict(dir: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
        .with_context(|| format!("closing {} to others", dir.display()))
}

fn write_yaml(path: &Path, value: &Value) -> Result<()> {
    let text = serde_norway::to_string(value).context("encoding YAML")?;
    write_atomic(path, text.as_bytes())
}

fn control(layout: &Layout, address: &str, nodes: &[(Layout, Node)], max_pods: u16) -> Value {
    let dual_stack = nodes.iter().any(|(_, node)| node.overlay.is_some_and(|overlay| overlay.dual_stack));
    let nodes: Vec<Value> = nodes.iter().map(|(place, node)| identity(place, node)).collect();
    json!({
        "dataDir": layout.data.join("control"),
        "listen": "0.0.0.0:6443",
        "advertiseAddress": address,
        "serviceCIDR": SERVICE_CIDR,
        "podCIDR": pod_ranges(dual_stack).join(","),
        "nodeCIDRMaskSizeIPv4": node_mask(max_pods),
        "nodePortRange": "30000-32767",
        "adminKubeconfig": layout.kubeconfig(),
        "roles": ["api", "scheduler", "controllers"],
        "nodes": nodes,
    })
}

fn identity(layout: &Layout, node: &Node) -> Value {
    let identity = layout.data.join("node");
    json!({
        "name": node.name,
        "addresses": [node.address],
        "kubeconfig": identity.join("agent.kubeconfig"),
        "servingCert": identity.join("kubelet.crt"),
        "servingKey": identity.join("kubelet.key"),
        "clientCA": identity.join("ca.crt"),
    })
}

fn cri(cluster: &Layout, layout: &Layout) -> Value {
    json!({
        "listen": layout.cri_socket(),
        "containerdSocket": layout.containerd_socket(),
        "containerdNamespace": "keelson",
        "stateDir": layout.run.join("cri"),
        "rootDir": layout.data.join("cri"),
        "netnsDir": layout.run.join("netns"),
        "cni": {
            "confDir": layout.run.join("cni/net.d"),
            "binDir": layout.cni_bin(),
            "cacheDir": layout.run.join("cni/cache"),
        },
        "registryConfigDir": cluster.registry_config(),
        "streaming": {"address": "127.0.0.1", "port": 0},
        "metrics": {"socket": layout.run.join("cri-metrics.sock")},
        "pauseImage": "builtin",
        "cgroupDriver": "cgroupfs",
    })
}

/// Prefix length of a node's pod range: twice as many addresses as pods, so that those of ended pods rest a while.
fn node_mask(max_pods: u16) -> u32 {
    32 - (u32::from(max_pods) * 2).next_power_of_two().ilog2().max(8)
}

fn agent(layout: &Layout, node: &Node, max_pods: u16) -> Value {
    let identity = layout.data.join("node");
    let dual_stack = node.overlay.is_some_and(|overlay| overlay.dual_stack);
    let mut config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": "0.0.0.0",
        "port": 10250,
        "containerRuntimeEndpoint": format!("unix://{}", layout.cri_socket().display()),
        "authentication": {
            "x509": {"clientCAFile": identity.join("ca.crt")},
            "anonymous": {"enabled": false},
        },
        "tlsCertFile": identity.join("kubelet.crt"),
        "tlsPrivateKeyFile": identity.join("kubelet.key"),
        "cgroupRoot": layout.cgroup(),
        "cgroupDriver": "cgroupfs",
        "clusterDomain": "cluster.local",
        "clusterDNS": [],
        "healthzPort": 10248,
        "podLogsDir": layout.log().join("pods"),
        "maxPods": max_pods,
        "staticPodPath": layout.data.join("manifests"),
        // The disk is mostly other people's: as full as it is, this node works until there is really nothing left.
        "evictionHard": {
            "memory.available": "100Mi",
            "nodefs.available": "500Mi",
            "nodefs.inodesFree": "1%",
            "imagefs.available": "500Mi",
        },
        "imageGCHighThresholdPercent": 100,
        // The machine is somebody's: it may swap, and its kernel stays as it is.
        "failSwapOn": false,
        "keelson": {
            "instance": layout.instance,
            "nodeName": node.name,
            "nodeIP": node.address,
            "kubeconfig": identity.join("agent.kubeconfig"),
            "rootDir": layout.data.join("kubelet"),
            "setKernelDefaults": false,
            "containerLogLinksDir": layout.log().join("containers"),
            "cni": {
                "confDir": layout.run.join("cni/net.d"),
                "name": network_name(layout),
                "bridge": layout.bridge(),
                "dataDir": layout.run.join("cni/ipam"),
                "stateDir": layout.run.join("cni/state"),
                "logFile": layout.log().join("cni.log"),
                "mtu": 0,
                "netnsDir": layout.run.join("netns"),
                // Other nodes' pods see a pod's own address.
                "masquerade": {"except": pod_ranges(dual_stack)},
            },
            "proxy": {
                "enabled": true,
                "cgroupRoot": node.cgroup2,
                "pinDir": layout.bpf_pins(),
                "serviceCIDR": SERVICE_CIDR,
                "nodePortAddresses": [],
            },
        },
    });
    if let Some(overlay) = node.overlay {
        // Its own loopback is not `status`'s.
        config["healthzBindAddress"] = json!(node.address);
        config["keelson"]["network"] = json!({"mode": overlay.mode, "directRouting": overlay.direct_routing});
    }
    config
}

fn containerd(layout: &Layout) -> String {
    format!(
        "version = 2\nroot = \"{}\"\nstate = \"{}\"\n\
         disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.snapshotter.v1.btrfs\", \
         \"io.containerd.snapshotter.v1.zfs\", \"io.containerd.snapshotter.v1.aufs\", \
         \"io.containerd.snapshotter.v1.devmapper\", \"io.containerd.tracing.processor.v1.otlp\"]\n\n\
         [grpc]\n  address = \"{}\"\n\n[ttrpc]\n  address = \"\"\n",
        layout.data.join("containerd").display(),
        layout.run.join("containerd").display(),
        layout.containerd_socket().display(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_has_twice_as_many_addresses_as_pods() {
        assert_eq!([1, MAX_PODS, 128, 129, 500, 512].map(node_mask), [24, 24, 24, 23, 22, 22]);
    }
}
