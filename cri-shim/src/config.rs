//! The configuration file: YAML, every field checked, an unknown or wrong one named.

use std::path::{Path, PathBuf};

use anyhow::Context;
use cri_shim_core::cgroup::Driver;
use serde::{Deserialize, Serialize};

use crate::containerd::snapshots::SNAPSHOTTER;
use crate::images;

/// What `keelson-cri` is started with.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Config {
    /// The CRI socket to serve.
    pub listen: PathBuf,
    /// containerd's socket.
    pub containerd_socket: PathBuf,
    /// The containerd namespace that is ours alone.
    #[serde(default = "default_namespace")]
    pub containerd_namespace: String,
    /// Volatile state: FIFOs, shared memory.
    pub state_dir: PathBuf,
    /// Persistent state: records, files of sandboxes.
    pub root_dir: PathBuf,
    /// Where network namespaces are pinned; ours alone.
    pub netns_dir: PathBuf,
    /// Pod networks.
    pub cni: Cni,
    /// Registry configuration in containerd's `certs.d` layout.
    pub registry_config_dir: PathBuf,
    /// The server of exec, attach and port-forward.
    #[serde(default)]
    pub streaming: Streaming,
    /// Only `builtin`: the pause program comes inside this executable.
    #[serde(default)]
    pub pause_image: PauseImage,
    /// How images are pulled and unpacked.
    #[serde(default)]
    pub images: images::Settings,
    /// Who makes cgroups; the kubelet asks for it and does the same.
    #[serde(default)]
    pub cgroup_driver: CgroupDriver,
    /// What may run containers. Without a list: `keelson`, `runc` and `crun`, each where its program is found.
    #[serde(default)]
    pub handlers: Option<Vec<HandlerConfig>>,
    /// The handler of pods that name none. Without one `keelson`, and where that does not work on this node, the next one
    /// that does.
    #[serde(default)]
    pub default_handler: Option<String>,
    /// Our own shim; without it `containerd-shim-keelson-v1` beside this executable, or in PATH.
    #[serde(default)]
    pub shim_binary: Option<PathBuf>,
    /// Where files that describe CDI devices are; a later directory has priority.
    #[serde(default = "default_cdi_dirs")]
    pub cdi_dirs: Vec<PathBuf>,
    /// Where the figures of this process are served.
    #[serde(default)]
    pub metrics: Metrics,
}

/// A runtime handler, as RuntimeClasses name it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HandlerConfig {
    /// Its name.
    pub name: String,
    /// How it runs containers.
    pub kind: HandlerKind,
    /// Kind `runc`: the program, by name or path; without one the handler's name. Kind `keelson`: another shim.
    #[serde(default)]
    pub binary: Option<PathBuf>,
}

/// How a handler runs containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum HandlerKind {
    /// By our own shim.
    Keelson,
    /// By containerd's shim for runc, with runc or a program that takes the same arguments.
    Runc,
}

/// Where Prometheus finds the figures of this process; nowhere, unless a port or a socket is given.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Metrics {
    /// Address.
    pub address: std::net::IpAddr,
    /// Port; 0 lets the kernel choose.
    pub port: Option<u16>,
    /// A Unix socket, which only root may use.
    pub socket: Option<PathBuf>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self { address: std::net::Ipv4Addr::LOCALHOST.into(), port: None, socket: None }
    }
}

/// Where CNI's files are.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Cni {
    /// Network configurations; the first one counts.
    pub conf_dir: PathBuf,
    /// Plugins.
    pub bin_dir: PathBuf,
    /// Results of ADD, kept for DEL.
    pub cache_dir: PathBuf,
}

/// Where the streaming server listens.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Streaming {
    /// Address.
    pub address: std::net::IpAddr,
    /// Port; 0 lets the kernel choose.
    pub port: u16,
}

impl Default for Streaming {
    fn default() -> Self {
        Self { address: std::net::Ipv4Addr::LOCALHOST.into(), port: 0 }
    }
}

/// What a sandbox's first process comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PauseImage {
    /// From this executable.
    #[default]
    Builtin,
}

/// Who makes cgroups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CgroupDriver {
    /// The runtime itself, as directories.
    #[default]
    Cgroupfs,
    /// systemd, asked over its bus.
    Systemd,
}

impl From<CgroupDriver> for Driver {
    fn from(driver: CgroupDriver) -> Self {
        match driver {
            CgroupDriver::Cgroupfs => Self::Cgroupfs,
            CgroupDriver::Systemd => Self::Systemd,
        }
    }
}

fn default_cdi_dirs() -> Vec<PathBuf> {
    vec!["/etc/cdi".into(), "/var/run/cdi".into()]
}

fn default_namespace() -> String {
    "keelson".to_owned()
}

impl Config {
    /// Reads and checks the file.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read configuration {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("invalid configuration {}", path.display()))
    }

    /// Where the image service finds and keeps things.
    pub fn image_places(&self) -> images::Places {
        images::Places {
            registry_config_dir: self.registry_config_dir.clone(),
            state_dir: self.state_dir.clone(),
            snapshotter: SNAPSHOTTER.to_owned(),
        }
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let config: Self = serde_norway::from_str(text)?;
        let absolute = [
            ("listen", &config.listen),
            ("containerdSocket", &config.containerd_socket),
            ("stateDir", &config.state_dir),
            ("rootDir", &config.root_dir),
            ("netnsDir", &config.netns_dir),
            ("cni.confDir", &config.cni.conf_dir),
            ("cni.binDir", &config.cni.bin_dir),
            ("cni.cacheDir", &config.cni.cache_dir),
            ("registryConfigDir", &config.registry_config_dir),
        ];
        let cdi = config.cdi_dirs.iter().map(|path| ("cdiDirs", path));
        let metrics = config.metrics.socket.iter().map(|path| ("metrics.socket", path));
        for (field, path) in absolute.into_iter().chain(cdi).chain(metrics) {
            anyhow::ensure!(path.is_absolute(), "{field}: {} is not an absolute path", path.display());
        }
        let namespace = &config.containerd_namespace;
        // As containerd has it: words of letters and digits with single marks between them.
        let words = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        let ends = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
        let bytes = namespace.as_bytes();
        anyhow::ensure!(
            bytes.len() <= 76
                && bytes.iter().copied().all(words)
                && ends(bytes.first())
                && ends(bytes.last()),
            "containerdNamespace: {namespace:?} is not made of letters and digits with '-', '_' or '.' between them, 76 at most"
        );
        if let Some(shim) = &config.shim_binary {
            anyhow::ensure!(shim.is_absolute(), "shimBinary: {} is not an absolute path", shim.display());
        }
        config.check_handlers()?;
        Ok(config)
    }

    /// Whether the handlers asked for can be installed is found out later; here only what can never be right.
    fn check_handlers(&self) -> anyhow::Result<()> {
        let Some(handlers) = &self.handlers else { return Ok(()) };
        for (index, handler) in handlers.iter().enumerate() {
            anyhow::ensure!(!handler.name.is_empty(), "handlers[{index}].name: is empty");
            // It names a directory, too.
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
            anyhow::ensure!(
                handler.name.bytes().all(plain) && !handler.name.starts_with('.'),
                "handlers[{index}].name: {:?} is not made of letters, digits, '-', '_' and '.'",
                handler.name
            );
            let same = handlers.iter().filter(|other| other.name == handler.name).count();
            anyhow::ensure!(same == 1, "handlers[{index}].name: {:?} is there {same} times", handler.name);
        }
        if let Some(default) = &self.default_handler {
            let named = handlers.iter().any(|handler| handler.name == *default);
            anyhow::ensure!(named, "defaultHandler: {default:?} is none of the handlers");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "
listen: /run/k/cri.sock
containerdSocket: /run/k/containerd.sock
stateDir: /run/k/cri
rootDir: /var/lib/k/cri
netnsDir: /run/k/netns
cni: { confDir: /run/k/net.d, binDir: /opt/cni/bin, cacheDir: /run/k/cache }
registryConfigDir: /run/k/certs.d
pauseImage: builtin
cgroupDriver: cgroupfs
";

    #[test]
    fn a_good_file_with_defaults() {
        let config = Config::parse(GOOD).unwrap();
        assert_eq!(config.containerd_namespace, "keelson");
        assert_eq!(config.streaming.address.to_string(), "127.0.0.1");
    }

    #[test]
    fn a_wrong_field_is_named() {
        let cases = [
            (GOOD.replace("netnsDir", "netnsdir"), "netnsdir"),
            (format!("{GOOD}containerdNamespace: a/b"), "containerdNamespace"),
            (GOOD.replace("binDir", "bindir"), "bindir"),
            (GOOD.replace("/run/k/net.d", "net.d"), "cni.confDir"),
            (GOOD.replace("builtin", "k8s.gcr.io/pause:3.6"), "pauseImage"),
            (format!("{GOOD}streaming: {{ port: many }}\n"), "streaming.port"),
            (format!("{GOOD}shimBinary: shim\n"), "shimBinary"),
            (format!("{GOOD}handlers: [{{ name: a, kind: kata }}]\n"), "handlers[0].kind"),
            (
                format!("{GOOD}handlers: [{{ name: a, kind: runc }}]\ndefaultHandler: runc\n"),
                "defaultHandler",
            ),
            (
                format!("{GOOD}handlers: [{{ name: runc, kind: runc }}, {{ name: runc, kind: keelson }}]\n"),
                "handlers[0].name",
            ),
            (format!("{GOOD}metrics: {{ socket: here.sock }}\n"), "metrics.socket"),
        ];
        for (text, field) in cases {
            let error = format!("{:#}", Config::parse(&text).unwrap_err());
            assert!(error.contains(field), "{field} is not in: {error}");
        }
    }
}
