//! The configuration files of a server under test: containerd's, keelson-cri's and the pod network's.
//!
//! Both kinds of server get the same containerd settings, the same snapshotter, the same plugins and as large a
//! network; only what makes them two kinds differs.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::host::{Kind, Options, Place, Plugins};
use crate::cmd::which;
use crate::process::write_atomic;

/// Where Debian keeps the reference plugins.
const REFERENCE_PLUGINS: &str = "/usr/lib/cni";

/// Writes every file of a server.
pub(super) fn write(place: &Place, kind: Kind, options: &Options) -> Result<()> {
    for dir in [place.run.join("net.d"), place.run.join("bin"), place.data.clone()] {
        fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    }
    let network = network(place, options.plugins);
    write_atomic(&place.run.join("net.d/10-pods.conflist"), &serde_json::to_vec_pretty(&network)?)?;
    link_plugins(place, options.plugins)?;
    write_atomic(&place.run.join("containerd.toml"), containerd(place, kind, options).as_bytes())?;
    if kind == Kind::Keelson {
        let text = serde_norway::to_string(&keelson(place, options)).context("encoding YAML")?;
        write_atomic(&place.run.join("cri.yaml"), text.as_bytes())?;
    }
    Ok(())
}

/// cniVersion 1.0.0 is the newest that containerd 1.6 knows.
fn network(place: &Place, plugins: Plugins) -> Value {
    let data = place.run.join("ipam");
    let ranges = json!([[{"subnet": place.subnet}]]);
    let (bridge, ipam) = match plugins {
        Plugins::Keelson => ("keelson-bridge", "keelson-ipam"),
        Plugins::Reference => ("bridge", "host-local"),
    };
    json!({
        "cniVersion": "1.0.0",
        "name": format!("pods-{}", place.bridge),
        "plugins": [{
            "type": bridge,
            "bridge": place.bridge,
            "isGateway": true,
            "isDefaultGateway": true,
            "hairpinMode": true,
            "ipam": {"type": ipam, "dataDir": data, "ranges": ranges},
        }],
    })
}

fn link_plugins(place: &Place, plugins: Plugins) -> Result<()> {
    let links: Vec<(&str, std::path::PathBuf)> = match plugins {
        Plugins::Keelson => ["keelson-bridge", "keelson-ipam", "keelson-loopback", "loopback"]
            .map(|name| (name, crate::binaries::file(&place.repo, "keelson-cni")))
            .into(),
        Plugins::Reference => ["bridge", "host-local", "loopback", "portmap", "bandwidth"]
            .map(|name| (name, Path::new(REFERENCE_PLUGINS).join(name)))
            .into(),
    };
    for (name, target) in links {
        anyhow::ensure!(target.is_file(), "{} is missing", target.display());
        let link = place.run.join("bin").join(name);
        fs::remove_file(&link).ok();
        std::os::unix::fs::symlink(&target, &link).with_context(|| format!("linking {}", link.display()))?;
    }
    Ok(())
}

fn containerd(place: &Place, kind: Kind, options: &Options) -> String {
    let mut disabled: Vec<String> = ["btrfs", "zfs", "aufs", "devmapper"]
        .iter()
        .map(|name| format!("\"io.containerd.snapshotter.v1.{name}\""))
        .collect();
    disabled.push("\"io.containerd.tracing.processor.v1.otlp\"".to_owned());
    if kind == Kind::Keelson {
        disabled.push("\"io.containerd.grpc.v1.cri\"".to_owned());
    }
    let mut text = format!(
        "version = 2\nroot = \"{}\"\nstate = \"{}\"\ndisabled_plugins = [{}]\n\n[grpc]\n  address = \"{}\"\n\n\
         [plugins.\"io.containerd.internal.v1.opt\"]\n  path = \"{}\"\n",
        place.data.join("containerd").display(),
        place.run.join("containerd").display(),
        disabled.join(", "),
        place.containerd_socket().display(),
        place.data.join("opt").display(),
    );
    if kind == Kind::Containerd {
        text += &plugin(place, options);
    }
    text
}

/// The plugin as a Kubernetes node has it. The out-of-memory scores are not lowered where the right to do so is missing.
fn plugin(place: &Place, options: &Options) -> String {
    let runtimes: Vec<String> = ["runc", "crun"]
        .into_iter()
        .filter(|name| which(name).is_some())
        .map(|name| {
            format!(
                "  [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.{name}]\n    runtime_type = \
                 \"io.containerd.runc.v2\"\n  [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.{name}.options]\n    \
                 BinaryName = \"{name}\"\n    SystemdCgroup = {}\n",
                options.systemd_cgroup
            )
        })
        .collect();
    format!(
        "[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"docker.io/library/pause:3.9\"\n  \
         stream_server_address = \"127.0.0.1\"\n  stream_server_port = \"0\"\n  restrict_oom_score_adj = true\n  \
         netns_mounts_under_state_dir = true\n  systemd_cgroup = false\n  \
         [plugins.\"io.containerd.grpc.v1.cri\".cni]\n    bin_dir = \"{}\"\n    conf_dir = \"{}\"\n  \
         [plugins.\"io.containerd.grpc.v1.cri\".registry]\n    config_path = \"{}\"\n  \
         [plugins.\"io.containerd.grpc.v1.cri\".containerd]\n    snapshotter = \"overlayfs\"\n    \
         default_runtime_name = \"runc\"\n{}",
        place.run.join("bin").display(),
        place.run.join("net.d").display(),
        place.certs.display(),
        runtimes.concat(),
    )
}

fn keelson(place: &Place, options: &Options) -> Value {
    let mut config = json!({
        "listen": place.endpoint_socket(Kind::Keelson),
        "containerdSocket": place.containerd_socket(),
        "containerdNamespace": "keelson",
        "stateDir": place.run.join("cri"),
        "rootDir": place.data.join("cri"),
        "netnsDir": place.run.join("netns"),
        "cni": {
            "confDir": place.run.join("net.d"),
            "binDir": place.run.join("bin"),
            "cacheDir": place.run.join("cni-cache"),
        },
        "registryConfigDir": place.certs,
        "streaming": {"address": "127.0.0.1", "port": 0},
        "pauseImage": "builtin",
        "cgroupDriver": if options.systemd_cgroup { "systemd" } else { "cgroupfs" },
    });
    for (name, value) in &options.cri_settings {
        config[name] = value.clone();
    }
    config
}
