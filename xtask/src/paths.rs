//! Where everything of `up` lives: below `target/up/` (data) and `/run/keelson/up/` (run state), and nowhere else.

use std::path::{Path, PathBuf};

/// Directories and files of one `up` instance.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    /// Root of the source checkout.
    pub(crate) repo: PathBuf,
    /// Instance name, used in every path and device name.
    pub(crate) instance: String,
    /// Persistent data: `target/up`.
    pub(crate) data: PathBuf,
    /// Volatile state: `/run/keelson/up`.
    pub(crate) run: PathBuf,
}

impl Layout {
    /// The layout of the instance `up` of this checkout.
    pub(crate) fn of(repo: &Path) -> Self {
        let instance = "up".to_owned();
        Self {
            data: repo.join("target").join(&instance),
            run: Path::new("/run/keelson").join(&instance),
            repo: repo.to_owned(),
            instance,
        }
    }

    /// The place of one of several nodes of this instance.
    pub(crate) fn node(&self, name: &str) -> Self {
        Self {
            repo: self.repo.clone(),
            instance: format!("{}/{name}", self.instance),
            data: self.data.join("nodes").join(name),
            run: self.run.join("nodes").join(name),
        }
    }

    /// The nodes that have places of their own; none where there is one node, in the host's own namespace.
    pub(crate) fn nodes(&self) -> Vec<Self> {
        let names = |dir: &Path| -> Vec<String> {
            let entries = std::fs::read_dir(dir.join("nodes")).into_iter().flatten().flatten();
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
        };
        let mut names = [names(&self.data), names(&self.run)].concat();
        names.sort();
        names.dedup();
        names.iter().map(|name| self.node(name)).collect()
    }

    /// The last part of the instance's name: the node's, for one of several.
    pub(crate) fn name(&self) -> String {
        self.instance.rsplit('/').next().unwrap_or_default().to_owned()
    }

    /// The administrator's kubeconfig.
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.data.join("kubeconfig")
    }
    /// Log directory: one file per component, pod logs below `pods`.
    pub(crate) fn log(&self) -> PathBuf {
        self.data.join("log")
    }
    /// Process records, one JSON file per supervised process.
    pub(crate) fn procs(&self) -> PathBuf {
        self.run.join("procs")
    }
    /// The CNI executables' directory.
    pub(crate) fn cni_bin(&self) -> PathBuf {
        self.run.join("cni/bin")
    }
    /// containerd-style registry configuration (`certs.d`).
    pub(crate) fn registry_config(&self) -> PathBuf {
        self.run.join("certs.d")
    }
    /// containerd's socket.
    pub(crate) fn containerd_socket(&self) -> PathBuf {
        self.run.join("containerd/containerd.sock")
    }
    /// The CRI socket.
    pub(crate) fn cri_socket(&self) -> PathBuf {
        self.run.join("cri.sock")
    }
    /// The bridge device of the pods.
    pub(crate) fn bridge(&self) -> String {
        // Nodes with a namespace of their own may all use the same name.
        if self.instance.contains('/') { "kl-pods0".to_owned() } else { format!("kl-{}0", self.instance) }
    }
    /// Where BPF maps and links are pinned.
    pub(crate) fn bpf_pins(&self) -> PathBuf {
        Path::new("/sys/fs/bpf/keelson").join(&self.instance)
    }
    /// Cgroup path, in every hierarchy, below which the pods' cgroups are.
    pub(crate) fn cgroup(&self) -> String {
        format!("/keelson/{}", self.instance)
    }
    /// The built images, kept over `down` since they depend on Debian's packages only.
    pub(crate) fn images(&self) -> PathBuf {
        self.repo.join("target/images")
    }
    /// A released binary of this workspace.
    pub(crate) fn binary(&self, name: &str) -> PathBuf {
        crate::binaries::file(&self.repo, name)
    }
    /// Host settings to restore at `down`.
    pub(crate) fn host_record(&self) -> PathBuf {
        self.data.join("host.json")
    }
}

/// The root of the checkout this xtask was built from, or the one it is run in when that has moved.
pub(crate) fn repo_root() -> anyhow::Result<PathBuf> {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf);
    if let Some(root) = built.filter(|root| root.join("Cargo.toml").is_file()) {
        return Ok(root);
    }
    let here = std::env::current_dir()?;
    here.ancestors()
        .find(|dir| dir.join("xtask/Cargo.toml").is_file())
        .map(Path::to_path_buf)
        .ok_or_else(|| anyhow::anyhow!("run xtask inside the Keelson checkout"))
}
