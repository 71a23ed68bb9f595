//! Directories and files of sandboxes and containers.

use std::collections::HashSet;
use std::hash::BuildHasher;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use cri_shim_core::oci::mounts::SandboxFiles;
use cri_shim_core::record::SandboxRecord;
use cri_shim_core::resolv;

use super::mounts;
use crate::error::RuntimeError;
use crate::exec::OwnShim;

/// What a sandbox has on disk.
#[derive(Clone, Debug)]
pub struct SandboxDirs {
    /// Persistent: the files its containers see.
    pub root: PathBuf,
    /// Volatile: its shared memory.
    pub state: PathBuf,
    /// Where its own shim listens; one that was killed leaves it.
    pub socket: PathBuf,
}

impl SandboxDirs {
    /// The directories of sandbox `id`.
    pub fn new(root_dir: &Path, state_dir: &Path, id: &str) -> Self {
        Self {
            root: root_dir.join("sandboxes").join(id),
            state: state_dir.join("sandboxes").join(id),
            socket: OwnShim::socket(state_dir, id),
        }
    }

    fn shm(&self) -> PathBuf {
        self.state.join("shm")
    }

    /// The paths its containers mount. `host_ipc` shares the node's memory instead of the pod's.
    pub fn files(&self, host_ipc: bool) -> SandboxFiles {
        let path = |path: PathBuf| path.to_string_lossy().into_owned();
        SandboxFiles {
            hostname: path(self.root.join("hostname")),
            hosts: path(self.root.join("hosts")),
            resolv_conf: path(self.root.join("resolv.conf")),
            shm: if host_ipc { "/dev/shm".to_owned() } else { path(self.shm()) },
        }
    }

    /// Makes everything; what an earlier try left is replaced.
    pub fn make(&self, record: &SandboxRecord, host_ipc: bool) -> Result<(), RuntimeError> {
        std::fs::create_dir_all(&self.root).map_err(RuntimeError::host("make", &self.root))?;
        let hostname = if record.host_network() { node_hostname() } else { record.config.hostname.clone() };
        write(&self.root.join("hostname"), &format!("{hostname}\n"))?;
        write(&self.root.join("hosts"), &read_or_empty(Path::new("/etc/hosts"))?)?;
        let node_resolver = read_or_empty(Path::new("/etc/resolv.conf"))?;
        let resolver = resolv::render(record.config.dns_config.as_ref(), &node_resolver);
        write(&self.root.join("resolv.conf"), &resolver)?;
        std::fs::create_dir_all(&self.state).map_err(RuntimeError::host("make", &self.state))?;
        if host_ipc {
            return Ok(());
        }
        mounts::unmount(&self.shm())?;
        mounts::mount_shm(&self.shm())
    }

    /// Takes the shared memory away; the files stay until the sandbox is removed.
    pub fn release(&self) -> Result<(), RuntimeError> {
        mounts::unmount(&self.shm())
    }

    /// Removes everything.
    pub fn remove(&self) -> Result<(), RuntimeError> {
        self.release()?;
        // What is there is known; the mount table of a busy node is long, and is only read when something else is.
        for file in ["hostname", "hosts", "resolv.conf"] {
            drop(std::fs::remove_file(self.root.join(file)));
        }
        for directory in [&self.shm(), &self.state, &self.root] {
            drop(std::fs::remove_dir(directory));
        }
        remove_tree(&self.state)?;
        remove_file(&self.socket)?;
        remove_tree(&self.root)
    }
}

/// Removes the sockets of shims whose sandboxes are not among `known`.
pub fn remove_forgotten_sockets<S: BuildHasher>(
    state_dir: &Path,
    known: &HashSet<String, S>,
) -> Result<(), RuntimeError> {
    let kept: HashSet<PathBuf> = known.iter().map(|id| OwnShim::socket(state_dir, id)).collect();
    let directory = OwnShim::sockets(state_dir);
    for path in names_in(&directory)?.into_iter().map(|name| directory.join(name)) {
        if !kept.contains(&path) {
            remove_file(&path)?;
        }
    }
    Ok(())
}

/// The node's own name.
pub fn node_hostname() -> String {
    nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Removes a directory with everything in it, without following what is mounted there; none is fine.
pub fn remove_tree(path: &Path) -> Result<(), RuntimeError> {
    // Most containers have no such directory, and the mount table of a busy node is long.
    if matches!(path.symlink_metadata(), Err(error) if error.kind() == io::ErrorKind::NotFound) {
        return Ok(());
    }
    mounts::unmount_below(path)?;
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(RuntimeError::host("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// Removes a file; none is fine.
pub fn remove_file(path: &Path) -> Result<(), RuntimeError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(RuntimeError::host("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// Names of what is in a directory; none when it does not exist.
pub fn names_in(directory: &Path) -> Result<Vec<String>, RuntimeError> {
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(RuntimeError::host("list", directory))?,
    };
    entries
        .map(|entry| {
            entry
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .map_err(RuntimeError::host("list", directory))
        })
        .collect()
}

/// The real path of a mount's source. One that does not exist becomes a directory, as users of hostPath volumes expect.
pub fn mount_source(path: &str) -> Result<PathBuf, RuntimeError> {
    let place = Path::new(path);
    let found = match place.canonicalize() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            std::fs::create_dir_all(place).and_then(|()| place.canonicalize())
        }
        other => other,
    };
    found.map_err(|error| {
        let problem = format!("{path}: {error}");
        RuntimeError::Invalid { field: "mounts.host_path", problem }
    })
}

fn write(path: &Path, text: &str) -> Result<(), RuntimeError> {
    std::fs::write(path, text).map_err(RuntimeError::host("write", path))
}

fn read_or_empty(path: &Path) -> Result<String, RuntimeError> {
    match std::fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        other => other.map_err(RuntimeError::host("read", path)),
    }
}

/// The text of a file of the kernel's (proc, sysfs, cgroups); empty where there is none. Such files have no size to ask for, and
/// the standard library, which asks, reads them in small pieces: figures of a full node come from thousands of them.
pub fn kernel_text(path: &Path) -> String {
    let Ok(mut file) = std::fs::File::open(path) else { return String::new() };
    let mut all = Vec::new();
    let mut piece = [0; 4096];
    loop {
        match file.read(&mut piece) {
            Ok(0) => return String::from_utf8(all).unwrap_or_default(),
            Ok(count) => all.extend_from_slice(&piece[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return String::new(),
        }
    }
}
