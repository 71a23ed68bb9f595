//! The container's tree of mounts. Runs in the child, in its new mount namespace.
//!
//! Bind mounts come as open detached trees, made and adjusted by the parent; new file systems are made here, because
//! they belong to the container's namespaces. Everything is put in place by descriptors that were looked up inside the root.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, FileType, Mode, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags,
};

use super::in_root::{self, Kind};
use super::sys::{self, MountAttr};
use crate::plan::ContainerPlan;
use crate::plan::devices::DevicePlan;
use crate::plan::mounts::{FsPlan, MountPlan, Source};
use crate::plan::options::attr;
use crate::steps::{At, Failure, Outcome, Step};

const PROC_MAGIC: u64 = 0x9fa0;

/// All mounts, devices and links, up to but without the pivot.
pub(crate) fn tree(plan: &ContainerPlan) -> Outcome<()> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change(c"/", private).at(Step::PrivateMounts)?;
    attach_root(plan).at(Step::AttachRoot)?;
    let root = plan.root.tree.as_fd();
    for (index, mount) in plan.mounts.iter().enumerate() {
        one(root, mount, index)?;
    }
    rustix::process::umask(Mode::empty());
    for (index, device) in plan.devices.iter().enumerate() {
        make_device(root, device).at_index(Step::Device, index)?;
    }
    for (index, link) in plan.links.iter().enumerate() {
        make_link(root, &link.directory, &link.name, &link.target, link.replace)
            .at_index(Step::DeviceLink, index)?;
    }
    rustix::process::umask(Mode::from_raw_mode(0o022));
    Ok(())
}

fn attach_root(plan: &ContainerPlan) -> Result<(), Errno> {
    let to = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    if let Some(path) = &plan.root_path {
        // Where it is on the host, because hooks look there.
        match rustix::mount::move_mount(&plan.root.tree, c"", CWD, path.as_c_str(), to) {
            // A user namespace's root may not see the way.
            Err(Errno::ACCESS) => {}
            other => return other,
        }
    }
    // Over this process's root: lookups still begin below it, and no directory has to be reachable.
    rustix::mount::move_mount(&plan.root.tree, c"", CWD, c"/", to)
}

fn one(root: BorrowedFd<'_>, mount: &MountPlan, index: usize) -> Outcome<()> {
    let kind = if mount.directory { Kind::Directory } else { Kind::File };
    let target = in_root::make(root, &mount.target, kind).at_index(Step::MountTarget, index)?;
    if mount.no_links {
        // A link here would put the new procfs or sysfs where the image wants it.
        in_root::open(root, &mount.target, ResolveFlags::NO_SYMLINKS).at_index(Step::MountTarget, index)?;
    }
    if !mount.inside_proc {
        let inside = rustix::fs::fstatfs(&target).at_index(Step::MountTarget, index)?.f_type;
        if u64::try_from(inside) == Ok(PROC_MAGIC) {
            return Err(Errno::PERM).at_index(Step::MountTarget, index);
        }
    }
    match &mount.source {
        Source::Tree(tree) => put(tree.as_fd(), &target).at_index(Step::Mount, index),
        Source::New(fs) => {
            let mode = if fs.keep_mode {
                Some(rustix::fs::fstat(&target).at_index(Step::MountTarget, index)?.st_mode)
            } else {
                None
            };
            let made = new_fs(fs, mode).at_index(Step::MountMake, index)?;
            put(made.as_fd(), &target).at_index(Step::Mount, index)
        }
    }
}

/// Puts a detached tree on a place.
fn put(tree: BorrowedFd<'_>, target: &OwnedFd) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(tree, c"", target, c"", flags)
}

fn new_fs(plan: &FsPlan, mode: Option<u32>) -> Result<OwnedFd, Errno> {
    let context = rustix::mount::fsopen(plan.kind.as_c_str(), FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(context.as_fd(), c"source", plan.source.as_c_str())?;
    for (key, value) in &plan.parameters {
        match value {
            Some(value) => {
                rustix::mount::fsconfig_set_string(context.as_fd(), key.as_c_str(), value.as_c_str())?;
            }
            None => rustix::mount::fsconfig_set_flag(context.as_fd(), key.as_c_str())?,
        }
    }
    if let Some(mode) = mode {
        let mut text = [0_u8; 8];
        rustix::mount::fsconfig_set_string(context.as_fd(), c"mode", octal(mode & 0o7777, &mut text))?;
    }
    rustix::mount::fsconfig_create(context.as_fd())?;
    let attributes = u32::try_from(plan.attributes.set).unwrap_or(0);
    let mount = rustix::mount::fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::from_bits_retain(attributes),
    )?;
    for (change, recursive) in &plan.later {
        sys::mount_setattr(mount.as_fd(), *recursive, change)?;
    }
    Ok(mount)
}

/// A number as octal digits.
fn octal(mut value: u32, text: &mut [u8; 8]) -> &CStr {
    let mut at = 7;
    while at > 0 {
        at -= 1;
        if let Some(place) = text.get_mut(at) {
            *place = b'0' + u8::try_from(value & 7).unwrap_or(0);
        }
        value >>= 3;
    }
    CStr::from_bytes_until_nul(text).unwrap_or(c"0")
}

fn make_device(root: BorrowedFd<'_>, device: &DevicePlan) -> Result<(), Errno> {
    if let Some(tree) = &device.bind {
        let target = in_root::make(root, &device.path, Kind::File)?;
        return put(tree.as_fd(), &target);
    }
    let directory = in_root::make(root, &device.directory, Kind::Directory)?;
    let (kind, mode) = (FileType::from_raw_mode(device.mode), Mode::from_raw_mode(device.mode));
    match rustix::fs::mknodat(&directory, device.name.as_c_str(), kind, mode, device.number) {
        // The image's or a mount's own.
        Err(Errno::EXIST) => return Ok(()),
        other => other?,
    }
    if device.owner != (0, 0) {
        let (uid, gid) = device.owner;
        let (uid, gid) = (rustix::process::Uid::from_raw(uid), rustix::process::Gid::from_raw(gid));
        rustix::fs::chownat(
            &directory,
            device.name.as_c_str(),
            Some(uid),
            Some(gid),
            AtFlags::SYMLINK_NOFOLLOW,
        )?;
    }
    Ok(())
}

fn make_link(
    root: BorrowedFd<'_>,
    directory: &CStr,
    name: &CStr,
    target: &CStr,
    replace: bool,
) -> Result<(), Errno> {
    let directory = in_root::make(root, directory, Kind::Directory)?;
    if replace {
        match rustix::fs::unlinkat(&directory, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            other => return other,
        }
    }
    match rustix::fs::symlinkat(target, &directory, name) {
        Err(Errno::EXIST) => Ok(()),
        other => other,
    }
}

/// Puts the terminal's slave side on `/dev/console`.
pub(crate) fn console(root: BorrowedFd<'_>, slave: &OwnedFd) -> Result<(), Errno> {
    let target = in_root::make(root, c"dev/console", Kind::File)?;
    let tree = clone_tree(slave.as_fd(), false)?;
    put(tree.as_fd(), &target)
}

fn clone_tree(file: BorrowedFd<'_>, recursive: bool) -> Result<OwnedFd, Errno> {
    let mut flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    rustix::mount::open_tree(file, c"", flags)
}

/// Read-only and masked paths, delayed read-only mounts, then the pivot: after this the host's tree is gone.
pub(crate) fn seal(plan: &ContainerPlan) -> Outcome<()> {
    let root = plan.root.tree.as_fd();
    for (index, path) in plan.readonly_paths.iter().enumerate() {
        readonly(root, path).at_index(Step::ReadonlyPath, index)?;
    }
    mask(root, plan)?;
    let readonly = MountAttr { set: attr::RDONLY, ..MountAttr::default() };
    for (index, path) in plan.readonly_later.iter().enumerate() {
        in_root::open(root, path, ResolveFlags::empty())
            .and_then(|mount| sys::mount_setattr(mount.as_fd(), false, &readonly))
            .at_index(Step::MountMake, index)?;
    }
    // As runc does, and before the root becomes read-only. What stands in the way is told when it is entered.
    let _made = in_root::make(root, &plan.process.cwd, Kind::Directory);
    if plan.root.readonly {
        sys::mount_setattr(root, false, &readonly).at(Step::RootReadonly)?;
    }
    pivot(root).at(Step::PivotRoot)?;
    if plan.root.propagation != 0 {
        let change = MountAttr { propagation: plan.root.propagation, ..MountAttr::default() };
        sys::mount_setattr(root, false, &change).at(Step::RootPropagation)?;
    }
    Ok(())
}

fn readonly(root: BorrowedFd<'_>, path: &CStr) -> Result<(), Errno> {
    let target = match in_root::open(root, path, ResolveFlags::empty()) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        other => other?,
    };
    let tree = clone_tree(target.as_fd(), true)?;
    // What the mount below it forbids stays forbidden: a clone keeps its attributes.
    sys::mount_setattr(tree.as_fd(), false, &MountAttr { set: attr::RDONLY, ..MountAttr::default() })?;
    put(tree.as_fd(), &target)
}

/// Directories get one empty read-only tmpfs, files the null device.
fn mask(root: BorrowedFd<'_>, plan: &ContainerPlan) -> Outcome<()> {
    let Some(masks) = &plan.masks else { return Ok(()) };
    let mut empty: Option<OwnedFd> = None;
    let mut null_used = false;
    for (index, path) in masks.paths.iter().enumerate() {
        let at = |errno| Failure { step: Step::MaskedPath, index: u16::try_from(index).unwrap_or(0), errno };
        let target = match in_root::open(root, path, ResolveFlags::empty()) {
            Err(Errno::NOENT | Errno::NOTDIR) => continue,
            other => other.map_err(at)?,
        };
        let mode = rustix::fs::fstat(&target).map_err(at)?.st_mode;
        if FileType::from_raw_mode(mode) == FileType::Directory {
            if let Some(first) = &empty {
                let again = clone_tree(first.as_fd(), false).map_err(at)?;
                put(again.as_fd(), &target).map_err(at)?;
            } else {
                let first = new_fs(&masks.empty, None).map_err(at)?;
                put(first.as_fd(), &target).map_err(at)?;
                empty = Some(first);
            }
        } else if null_used {
            let again = clone_tree(masks.null.as_fd(), false).map_err(at)?;
            put(again.as_fd(), &target).map_err(at)?;
        } else {
            put(masks.null.as_fd(), &target).map_err(at)?;
            null_used = true;
        }
    }
    Ok(())
}

fn pivot(root: BorrowedFd<'_>) -> Result<(), Errno> {
    rustix::process::fchdir(root)?;
    // The old root comes to lie over the new one, and is taken away there: no directory is needed for it.
    rustix::process::pivot_root(c".", c".")?;
    rustix::mount::unmount(c".", UnmountFlags::DETACH)?;
    rustix::process::chdir(c"/")
}
