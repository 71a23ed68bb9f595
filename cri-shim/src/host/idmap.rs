//! Mounts whose owners are shifted to the ids of a pod's user namespace: its containers' root file systems and volumes.
//!
//! Input: a snapshot's mounts or a directory, and the user namespace. Output: a mount at a directory of the container's
//! own, which any runtime can bind. What is on disk keeps the ids of the image, so layers stay shared between pods.
//! Needs Linux 5.19 (overlayfs on mapped layers) and a file system below that knows mapped mounts.
#![allow(
    unsafe_code,
    reason = "mount_setattr(2), open_tree(2) and move_mount(2) have no safe form in our libraries"
)]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use containerd_client::types::Mount;
use cri_shim_core::oci::userns::IdMaps;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::mounts;
use crate::error::RuntimeError;

/// `MOVE_MOUNT_F_EMPTY_PATH`.
const MOVE_FROM_DESCRIPTOR: libc::c_uint = 4;

/// Attaches a copy of the mount tree at `source` to `target`, its topmost mount with the owners of `namespace`.
pub fn bind(source: &Path, target: &Path, namespace: &File) -> Result<(), RuntimeError> {
    let tree = clone(source).map_err(RuntimeError::host("copy the mount of", source))?;
    map(&tree, namespace).map_err(|error| unsupported(error, source))?;
    attach(&tree, target).map_err(RuntimeError::host("mount at", target))
}

/// Attaches a copy of the mount tree at `source` to `target` as it is.
pub fn bind_plain(source: &Path, target: &Path) -> Result<(), RuntimeError> {
    let tree = clone(source).map_err(RuntimeError::host("copy the mount of", source))?;
    attach(&tree, target).map_err(RuntimeError::host("mount at", target))
}

/// Mounts a container's snapshot at `<directory>/rootfs` with the owners of `namespace`; gives that path.
pub fn root(
    snapshot: &[Mount],
    directory: &Path,
    namespace: &File,
    maps: &IdMaps,
) -> Result<PathBuf, RuntimeError> {
    let target = directory.join("rootfs");
    std::fs::create_dir_all(&target).map_err(RuntimeError::host("make", &target))?;
    let [one] = snapshot else {
        let source = io::Error::other(format!("a snapshot of {} mounts", snapshot.len()));
        return Err(RuntimeError::host("mount at", &target)(source));
    };
    if one.r#type != "overlay" {
        bind(Path::new(&one.source), &target, namespace)?;
        return Ok(target);
    }
    let option = |name: &str| one.options.iter().find_map(|option| option.strip_prefix(name));
    let (upper, work) = (option("upperdir=").unwrap_or_default(), option("workdir=").unwrap_or_default());
    own(Path::new(upper), maps)?;
    let lower: Vec<&str> = option("lowerdir=").unwrap_or_default().split(':').collect();
    let layers = directory.join("layers");
    for (index, layer) in lower.iter().enumerate() {
        let place = layers.join(index.to_string());
        std::fs::create_dir_all(&place).map_err(RuntimeError::host("make", &place))?;
        bind(Path::new(layer), &place, namespace)?;
    }
    let names: Vec<String> = (0..lower.len()).map(|index| index.to_string()).collect();
    let kept = one.options.iter().filter(|option| {
        !["lowerdir=", "upperdir=", "workdir="].iter().any(|name| option.starts_with(name))
            && !["ro", "rw"].contains(&option.as_str())
    });
    let mut data = vec![format!("lowerdir={}", names.join(":")), format!("upperdir={upper}")];
    data.push(format!("workdir={work}"));
    data.extend(kept.cloned());
    mount_from(&layers, &target, &data.join(","))
        .map_err(RuntimeError::host("mount a root file system at", &target))?;
    // The overlay holds its layers; the places they were found at are not needed any more.
    mounts::unmount_below(&layers)?;
    std::fs::remove_dir_all(&layers).map_err(RuntimeError::host("remove", &layers))?;
    Ok(target)
}

/// Gives a file of the node to the user of the pod that its owner stands for; what is mapped already stays.
pub fn own(path: &Path, maps: &IdMaps) -> Result<(), RuntimeError> {
    let metadata = path.symlink_metadata().map_err(RuntimeError::host("inspect", path))?;
    if (metadata.uid(), metadata.gid()) != (0, 0) {
        return Ok(());
    }
    let (uid, gid) = maps.root();
    std::os::unix::fs::lchown(path, Some(uid), Some(gid))
        .map_err(RuntimeError::host("change the owner of", path))
}

/// Mounts an overlay whose layers are named relative to `directory`, so that any number of them fits into one page.
fn mount_from(directory: &Path, target: &Path, data: &str) -> io::Result<()> {
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            // A working directory of this thread's own; the thread ends here.
            unshare(CloneFlags::CLONE_FS)?;
            std::env::set_current_dir(directory)?;
            mount(Some("overlay"), target, Some("overlay"), MsFlags::empty(), Some(data))?;
            Ok(())
        });
        worker.join().map_err(|_panic| io::Error::other("the mounting thread failed"))?
    })
}

fn unsupported(error: io::Error, source: &Path) -> RuntimeError {
    if error.raw_os_error() == Some(libc::EINVAL) {
        let problem = format!(
            "{}: its file system does not support id-mapped mounts, which a pod with a user namespace needs",
            source.display()
        );
        return RuntimeError::Invalid { field: "namespace_options.userns_options", problem };
    }
    RuntimeError::host("shift the owners of", source)(error)
}

fn clone(source: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(source.as_os_str().as_bytes())?;
    let flags = libc::OPEN_TREE_CLONE | libc::O_CLOEXEC.cast_unsigned() | libc::AT_RECURSIVE.cast_unsigned();
    // SAFETY: open_tree(2) reads the path, which is a live string with a zero byte at its end, and nothing else.
    let descriptor = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    let descriptor = i32::try_from(descriptor).map_err(io::Error::other)?;
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just made this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn map(tree: &OwnedFd, namespace: &File) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::try_from(namespace.as_raw_fd()).map_err(io::Error::other)?,
    };
    // SAFETY: mount_setattr(2) reads the empty path and a structure of the size given; both live until it returns, and
    // both descriptors are open.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn attach(tree: &OwnedFd, target: &Path) -> io::Result<()> {
    let path = CString::new(target.as_os_str().as_bytes())?;
    // SAFETY: move_mount(2) reads two strings that live until it returns; the descriptor is open.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            path.as_ptr(),
            MOVE_FROM_DESCRIPTOR,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
