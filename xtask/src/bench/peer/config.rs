//! The files and the command lines of a node as people run it: a stock kubelet's KubeletConfiguration with fields of
//! upstream only, containerd with its CRI plugin, and Debian's plugins for the pods' network.
//!
//! What a kubelet and containerd use by default (`/var/lib/kubelet`, `/var/log/pods`, `/run/containerd`) they use here,
//! too: the node's mount namespace has places of its own there.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use base64::Engine as _;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::NODE;
use super::place::{ADDRESS, Place};
use crate::paths::Layout;
use crate::process::write_atomic;

/// containerd's socket, where kubelets expect it.
pub(super) const SOCKET: &str = "/run/containerd/containerd.sock";
/// Where Debian keeps the reference plugins.
const PLUGINS: &str = "/usr/lib/cni";
/// Addresses of the node's pods, which nobody outside of its namespace sees.
const PODS: &str = "10.253.0.0/16";
/// Keeps the scheduler from giving the node what is not meant for it.
pub(in crate::bench) const TAINT: &str = "bench.keelson.dev/peer";

/// What the node's first process starts.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Programs {
    /// containerd with its arguments.
    pub(super) containerd: Vec<String>,
    /// The kubelet with its arguments: flags of upstream only.
    pub(super) kubelet: Vec<String>,
}

/// Writes all files.
pub(super) fn write(
    cluster: &Layout,
    place: &Place,
    kubelet: &Path,
    containerd: &Path,
    pods: u32,
) -> Result<()> {
    anyhow::ensure!(
        Path::new(PLUGINS).join("bridge").is_file(),
        "the peer's pods need Debian's CNI plugins ({PLUGINS}/bridge): apt-get install containernetworking-plugins"
    );
    fs::copy("/etc/resolv.conf", place.file("resolv.conf"))
        .or_else(|_none| fs::write(place.file("resolv.conf"), "").map(|()| 0))
        .context("writing resolv.conf")?;
    write_atomic(&place.file("net.d/10-peer.conflist"), &serde_json::to_vec_pretty(&network())?)?;
    write_atomic(&place.file("containerd.toml"), containerd_config(place).as_bytes())?;
    let is_first = !Path::new("/sys/fs/cgroup/cgroup.controllers").is_file();
    let kubelet_config = serde_norway::to_string(&kubelet_configuration(place, pods, is_first))?;
    write_atomic(&place.file("kubelet.yaml"), kubelet_config.as_bytes())?;
    credentials(cluster, place)?;
    let programs = Programs {
        containerd: [
            containerd.display().to_string(),
            "--config".to_owned(),
            shown(place, "containerd.toml"),
        ]
        .into(),
        kubelet: command_line(place, kubelet),
    };
    write_atomic(&place.file("programs.json"), &serde_json::to_vec_pretty(&programs)?)
}

fn shown(place: &Place, name: &str) -> String {
    place.file(name).display().to_string()
}

/// As a unit file has it. The node joins as nodes do: by a bootstrap kubeconfig, and a certificate that the cluster
/// signs.
fn command_line(place: &Place, kubelet: &Path) -> Vec<String> {
    vec![
        kubelet.display().to_string(),
        format!("--config={}", shown(place, "kubelet.yaml")),
        format!("--bootstrap-kubeconfig={}", shown(place, "bootstrap.kubeconfig")),
        format!("--kubeconfig={}", shown(place, "kubelet.kubeconfig")),
        format!("--container-runtime-endpoint=unix://{SOCKET}"),
        format!("--node-ip={ADDRESS}"),
        format!("--hostname-override={NODE}"),
    ]
}

/// `is_first`: the machine has the first version of cgroups, which newer kubelets refuse unless they are told not to.
fn kubelet_configuration(place: &Place, pods: u32, is_first: bool) -> Value {
    let mut config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": false},
            "x509": {"clientCAFile": place.file("ca.crt")},
        },
        "authorization": {"mode": "AlwaysAllow"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": place.cgroup(),
        "clusterDomain": "cluster.local",
        "containerRuntimeEndpoint": format!("unix://{SOCKET}"),
        // The same as `up` gives our node: the disk is mostly other people's, and what lies there is kept.
        "evictionHard": {
            "memory.available": "100Mi",
            "nodefs.available": "500Mi",
            "nodefs.inodesFree": "1%",
            "imagefs.available": "500Mi",
        },
        "imageGCHighThresholdPercent": 100,
        "failSwapOn": false,
        "makeIPTablesUtilChains": false,
        "maxPods": pods,
        "registerWithTaints": [{"key": TAINT, "effect": "NoSchedule"}],
        "resolvConf": place.file("resolv.conf"),
        "rotateCertificates": true,
        "serverTLSBootstrap": true,
        "volumePluginDir": place.file("volume-plugins"),
    });
    if is_first {
        config["failCgroupV1"] = json!(false);
    }
    config
}

/// containerd 2 reads version 2 of its configuration, too.
fn containerd_config(place: &Place) -> String {
    format!(
        "version = 2\nroot = \"/var/lib/containerd\"\nstate = \"/run/containerd\"\n\
         disabled_plugins = [\"io.containerd.snapshotter.v1.btrfs\", \"io.containerd.snapshotter.v1.zfs\", \
         \"io.containerd.snapshotter.v1.aufs\", \"io.containerd.snapshotter.v1.devmapper\", \
         \"io.containerd.tracing.processor.v1.otlp\"]\n\n[grpc]\n  address = \"{SOCKET}\"\n\n\
         [plugins.\"io.containerd.internal.v1.opt\"]\n  path = \"/var/lib/containerd-opt\"\n\
         [plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"docker.io/library/pause:3.9\"\n  \
         restrict_oom_score_adj = true\n  \
         [plugins.\"io.containerd.grpc.v1.cri\".cni]\n    bin_dir = \"{PLUGINS}\"\n    conf_dir = \"{}\"\n  \
         [plugins.\"io.containerd.grpc.v1.cri\".registry]\n    config_path = \"{}\"\n  \
         [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n    \
         runtime_type = \"io.containerd.runc.v2\"\n",
        shown(place, "net.d"),
        shown(place, "certs.d"),
    )
}

/// cniVersion 1.0.0 is the newest that containerd 1.6 knows.
fn network() -> Value {
    json!({
        "cniVersion": "1.0.0",
        "name": "bench-peer",
        "plugins": [{
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": true,
            "isDefaultGateway": true,
            "hairpinMode": true,
            "ipam": {"type": "host-local", "ranges": [[{"subnet": PODS}]]},
        }],
    })
}

/// What the node joins the cluster with: the administrator's kubeconfig, by the address that the API is told to have.
fn credentials(cluster: &Layout, place: &Place) -> Result<()> {
    let read = |path: &Path| -> Result<Value> {
        let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        serde_norway::from_str(&text).with_context(|| format!("parsing {}", path.display()))
    };
    let control = read(&cluster.data.join("control.yaml"))?;
    let address = control["advertiseAddress"].as_str().context("control.yaml: no advertiseAddress")?;
    let mut kubeconfig = read(&cluster.kubeconfig())?;
    let entry = &mut kubeconfig["clusters"][0]["cluster"];
    entry["server"] = json!(format!("https://{address}:6443"));
    let authority = entry["certificate-authority-data"].as_str().context("kubeconfig: no authority")?;
    let authority =
        base64::engine::general_purpose::STANDARD.decode(authority).context("kubeconfig: the authority")?;
    write_atomic(&place.file("ca.crt"), &authority)?;
    write_atomic(&place.file("bootstrap.kubeconfig"), serde_norway::to_string(&kubeconfig)?.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stock_kubelet_is_told_nothing_that_it_does_not_know() {
        let place = Place::of(Path::new("/repo"));
        let config = kubelet_configuration(&place, 500, true);
        assert!(config.get("keelson").is_none());
        assert_eq!((config["maxPods"].as_u64(), config["failCgroupV1"].as_bool()), (Some(500), Some(false)));
        assert!(kubelet_configuration(&place, 110, false).get("failCgroupV1").is_none());
        let line = command_line(&place, Path::new("/opt/kubelet"));
        assert_eq!(line[0], "/opt/kubelet");
        assert!(line.contains(&"--hostname-override=bench-peer".to_owned()), "{line:?}");
    }
}
