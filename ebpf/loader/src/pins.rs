//! The pin directory: where it lies, who holds it, how a set of maps becomes the current one, and how all goes away.
//!
//! ```text
//! <pin dir>/maps/        the current maps, by name
//! <pin dir>/maps-next/   new maps that are being filled; become `maps` once the links run on them
//! <pin dir>/links/       one link per hook
//! ```
//! A set of maps is complete once its meta map holds the layout version; an unfinished one is thrown away.

use std::{
    fs::{self, File},
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount, umount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};
use thiserror::Error;

use crate::{devices, sys};

/// Where everybody expects the BPF file system.
const BPFFS: &str = "/sys/fs/bpf";
/// How mounts of ours are told from others.
const MOUNT_SOURCE: &str = "keelson";

/// The pin directory cannot be used.
#[derive(Debug, Error)]
pub enum PinError {
    /// A file operation failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Another process holds it.
    #[error("another process runs the data plane pinned at {}", path.display())]
    Busy {
        /// The pin directory.
        path: PathBuf,
    },
}

/// An open pin directory, held against other processes.
pub(crate) struct PinDir {
    root: PathBuf,
    /// Released by the kernel when the process ends, however it ends.
    lock: Arc<Flock<File>>,
}

impl PinDir {
    /// Makes the directory, mounting the BPF file system where there is none, and locks it.
    pub(crate) fn open(root: &Path) -> Result<Self, PinError> {
        ensure_bpffs(root)?;
        create_dir(root)?;
        create_dir(&root.join("links"))?;
        let dir = File::open(root).map_err(|source| failed("open", root, source))?;
        let lock = Flock::lock(dir, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            Errno::EWOULDBLOCK => PinError::Busy { path: root.to_owned() },
            errno => failed("lock", root, errno.into()),
        })?;
        Ok(Self { root: root.to_owned(), lock: Arc::new(lock) })
    }

    /// The same directory, held by the same lock until both are gone.
    pub(crate) fn share(&self) -> Self {
        Self { root: self.root.clone(), lock: Arc::clone(&self.lock) }
    }

    /// The current maps.
    pub(crate) fn maps(&self) -> PathBuf {
        self.root.join("maps")
    }

    /// The maps that shall become the current ones.
    pub(crate) fn next_maps(&self) -> PathBuf {
        self.root.join("maps-next")
    }

    /// Where all links are.
    pub(crate) fn links(&self) -> PathBuf {
        self.root.join("links")
    }

    /// The pin of a link.
    pub(crate) fn link(&self, name: &str) -> PathBuf {
        self.root.join("links").join(name)
    }

    /// Makes an empty directory for new maps, in place of an unfinished one.
    pub(crate) fn start_next_maps(&self) -> Result<PathBuf, PinError> {
        let next = self.next_maps();
        remove_flat_dir(&next)?;
        create_dir(&next)?;
        Ok(next)
    }

    /// Throws new maps away that never became the current ones.
    pub(crate) fn discard_next_maps(&self) -> Result<(), PinError> {
        remove_flat_dir(&self.next_maps())
    }

    /// Makes the new maps the current ones, after every link runs on them.
    pub(crate) fn promote_next_maps(&self) -> Result<(), PinError> {
        let (current, next) = (self.maps(), self.next_maps());
        if !next.exists() {
            return Ok(());
        }
        remove_flat_dir(&current)?;
        fs::rename(&next, &current).map_err(|source| failed("rename", &next, source))
    }
}

/// Detaches and removes everything below a pin directory, and the file system if it was mounted for it. Needs no
/// running process and no cooperation of one. True where there was something to remove.
pub fn unload(root: &Path) -> Result<bool, PinError> {
    if !root.exists() {
        remove_empty_parents(root)?;
        unmount_ours(root);
        return Ok(false);
    }
    let links = root.join("links");
    for (pin, _) in devices::device_pins(&links) {
        devices::release(&pin).map_err(|source| failed("detach", &pin, source))?;
    }
    for maps in [root.join("maps"), root.join("maps-next")] {
        devices::restore_all(&maps);
    }
    for link in list(&links)? {
        // Detaching makes it immediate; a link that is already dead only needs its pin removed.
        if let Ok(fd) = sys::get_pinned(&link)
            && let Err(error) = sys::link_detach(fd.as_fd())
        {
            tracing::debug!(link = %link.display(), %error, "link was not attached any more");
        }
    }
    for dir in [links, root.join("maps"), root.join("maps-next")] {
        remove_flat_dir(&dir)?;
    }
    fs::remove_dir(root).map_err(|source| failed("remove", root, source))?;
    remove_empty_parents(root)?;
    unmount_ours(root);
    Ok(true)
}

/// Removes what a pin directory lay in, up to our part of the usual file system, unless others have something there.
fn remove_empty_parents(root: &Path) -> Result<(), PinError> {
    let ours = Path::new(BPFFS).join("keelson");
    for parent in root.ancestors().skip(1).take_while(|parent| parent.starts_with(&ours)) {
        match fs::remove_dir(parent) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => break,
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove", parent, error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Names of the current maps below a pin directory, with the bytes of kernel memory that each occupies.
pub fn map_memory(root: &Path) -> Result<Vec<(String, u64)>, PinError> {
    let sizes = list(&root.join("maps"))?.into_iter().map(|path| {
        let bytes = sys::get_pinned(&path).and_then(|map| sys::map_bytes(map.as_fd()));
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok((name, bytes.map_err(|source| failed("inspect", &path, source))?))
    });
    sizes.collect()
}

/// Whether the path, or its nearest existing ancestor, lies on a BPF file system.
pub(crate) fn on_bpffs(path: &Path) -> bool {
    path.ancestors()
        .find(|ancestor| ancestor.exists())
        .and_then(|ancestor| statfs(ancestor).ok())
        .is_some_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC)
}

/// The mount point that serves a pin directory where no BPF file system is: the usual one, or the pin directory's
/// own parent for a private directory elsewhere.
pub(crate) fn mount_point(root: &Path) -> &Path {
    let usual = Path::new(BPFFS);
    if root.starts_with(usual) { usual } else { root.parent().unwrap_or(root) }
}

fn ensure_bpffs(root: &Path) -> Result<(), PinError> {
    if on_bpffs(root) {
        return Ok(());
    }
    let point = mount_point(root);
    create_dir(point)?;
    let options = Some("mode=0700");
    mount(
        Some(MOUNT_SOURCE),
        point,
        Some("bpf"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        options,
    )
    .map_err(|errno| failed("mount a BPF file system at", point, errno.into()))?;
    tracing::info!(path = %point.display(), "mounted a BPF file system");
    Ok(())
}

/// Unmounts the file system that [`ensure_bpffs`] mounted, once it is empty.
fn unmount_ours(root: &Path) {
    let point = mount_point(root);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let ours = mounts.lines().any(|line| {
        let mut halves = line.splitn(2, " - ");
        let at = halves.next().and_then(|left| left.split(' ').nth(4));
        let mut right = halves.next().unwrap_or_default().split(' ');
        at == point.to_str() && right.next() == Some("bpf") && right.next() == Some(MOUNT_SOURCE)
    });
    // The kernel itself puts two listings into every BPF file system.
    let own =
        |entry: &PathBuf| entry.file_name().is_some_and(|name| name == "maps.debug" || name == "progs.debug");
    if !ours || !list(point).is_ok_and(|entries| entries.iter().all(own)) {
        return;
    }
    if let Err(error) = umount(point) {
        tracing::warn!(path = %point.display(), %error, "cannot unmount the BPF file system");
    }
}

fn create_dir(path: &Path) -> Result<(), PinError> {
    fs::create_dir_all(path).map_err(|source| failed("create", path, source))
}

/// Removes a directory of files; one that is not there is fine.
fn remove_flat_dir(path: &Path) -> Result<(), PinError> {
    for file in list(path)? {
        fs::remove_file(&file).map_err(|source| failed("remove", &file, source))?;
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path, error)),
        _ => Ok(()),
    }
}

fn list(path: &Path) -> Result<Vec<PathBuf>, PinError> {
    match fs::read_dir(path) {
        Ok(entries) => entries
            .map(|entry| entry.map(|entry| entry.path()).map_err(|source| failed("list", path, source)))
            .collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(failed("list", path, source)),
    }
}

fn failed(action: &'static str, path: &Path, source: io::Error) -> PinError {
    PinError::Io { action, path: path.to_owned(), source }
}
