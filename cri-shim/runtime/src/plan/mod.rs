//! What the child will do, made in the parent from the specification: every string, descriptor and number it needs.

pub(crate) mod caps;
pub(crate) mod devices;
pub(crate) mod home;
pub(crate) mod mounts;
pub(crate) mod namespaces;
pub(crate) mod options;
pub(crate) mod process;
pub(crate) mod refuse;
pub(crate) mod schedule;
pub(crate) mod words;

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::path::Path;

use oci_spec::runtime::{Linux, LinuxPersonalityDomain, Spec};

use crate::cgroup::Entry;
use crate::error::Error;
use crate::hooks::Hooks;
use crate::host::namespaces::Join;
use devices::DevicePlan;
use mounts::{FsPlan, MountPlan, RootPlan};
use process::ProcessPlan;

/// The whole set-up of a container's first process.
#[derive(Debug)]
pub(crate) struct ContainerPlan {
    pub(crate) process: ProcessPlan,
    /// `tasks` files of version 1 that the process writes itself into.
    pub(crate) enter: Vec<OwnedFd>,
    /// The version 2 cgroup that it is made in.
    pub(crate) into: Option<OwnedFd>,
    /// Namespaces to join, but user and (without a user namespace) PID.
    pub(crate) join: Vec<Join>,
    /// The PID namespace to be made in.
    pub(crate) pids: Option<Join>,
    pub(crate) user: Option<UserNamespace>,
    /// `CLONE_NEW*` to make, but user and cgroup.
    pub(crate) new_namespaces: u32,
    pub(crate) new_cgroup_namespace: bool,
    pub(crate) hostname: Option<Vec<u8>>,
    pub(crate) domainname: Option<Vec<u8>>,
    /// Files below `/proc/sys`, and what to write.
    pub(crate) sysctls: Vec<(CString, Vec<u8>)>,
    pub(crate) root: RootPlan,
    pub(crate) mounts: Vec<MountPlan>,
    pub(crate) devices: Vec<DevicePlan>,
    pub(crate) links: Vec<LinkPlan>,
    pub(crate) readonly_paths: Vec<CString>,
    pub(crate) masks: Option<Masks>,
    /// Mounts that become read-only when all is made in them.
    pub(crate) readonly_later: Vec<CString>,
    pub(crate) personality: Option<u64>,
    /// Where the root is put before it becomes the root: where hooks expect it, if there are hooks.
    pub(crate) root_path: Option<CString>,
    pub(crate) hooks: Option<Hooks>,
}

/// The user namespace of the container.
#[derive(Debug)]
pub(crate) enum UserNamespace {
    /// An existing one.
    Join(Join),
    /// A new one with these maps, as the kernel's files take them.
    New { uid_map: String, gid_map: String },
}

/// A symbolic link in the container's root.
#[derive(Debug)]
pub(crate) struct LinkPlan {
    pub(crate) directory: CString,
    pub(crate) name: CString,
    pub(crate) target: CString,
    /// Whether it takes the place of what is there.
    pub(crate) replace: bool,
}

/// Paths that are hidden.
#[derive(Debug)]
pub(crate) struct Masks {
    pub(crate) paths: Vec<CString>,
    /// What lies over files: the host's null device, as a detached mount.
    pub(crate) null: OwnedFd,
    /// What lies over directories.
    pub(crate) empty: FsPlan,
}

/// Parts of the plan that come from elsewhere.
pub(crate) struct Given<'a> {
    pub(crate) rootfs: &'a Path,
    pub(crate) process: ProcessPlan,
    pub(crate) entry: Entry,
    pub(crate) cgroups: &'a crate::cgroup::Paths,
    pub(crate) hooks: Option<Hooks>,
}

/// Makes the plan.
pub(crate) fn plan(spec: &Spec, given: Given<'_>) -> Result<ContainerPlan, Error> {
    let linux = spec.linux().as_ref().ok_or_else(|| Error::spec("linux", "is missing"))?;
    refuse::unsupported(spec, linux)?;
    let namespaces = namespaces::plan(linux)?;
    let root = mounts::root(spec, linux, given.rootfs)?;
    let label = linux.mount_label().as_deref().filter(|label| !label.is_empty());
    let context = mounts::Context {
        root_propagation: mounts::root_propagation(linux)?,
        label,
        cgroup_namespace: namespaces.new_cgroup,
        cgroups: given.cgroups,
        user: namespaces.user.as_ref(),
    };
    let mounts = mounts::plan(spec, &context)?;
    let own_dev = devices::wanted(spec);
    let device_nodes = if own_dev { devices::plan(linux, namespaces.user.is_some())? } else { Vec::new() };
    let mut links = mounts.links;
    if own_dev {
        links.extend(devices::links()?);
    }
    let rootfs = given.rootfs.as_os_str().as_encoded_bytes();
    let hooks_look = given.hooks.as_ref().is_some_and(Hooks::before_root);
    Ok(ContainerPlan {
        root_path: if hooks_look { Some(process::c_string(rootfs, "root.path")?) } else { None },
        hooks: given.hooks,
        process: given.process,
        enter: given.entry.enter,
        into: given.entry.into,
        join: namespaces.join,
        pids: namespaces.pids,
        user: namespaces.user,
        new_namespaces: namespaces.new,
        new_cgroup_namespace: namespaces.new_cgroup,
        hostname: name(spec.hostname().as_deref(), namespaces.has_uts, "hostname")?,
        domainname: name(spec.domainname().as_deref(), namespaces.has_uts, "domainname")?,
        sysctls: sysctls(linux)?,
        root,
        mounts: mounts.list,
        devices: device_nodes,
        links,
        readonly_paths: paths(linux.readonly_paths().as_deref(), "linux.readonlyPaths")?,
        masks: masks(linux, label)?,
        readonly_later: mounts.readonly_later,
        personality: linux.personality().as_ref().map(|personality| match personality.domain() {
            LinuxPersonalityDomain::PerLinux => 0,
            LinuxPersonalityDomain::PerLinux32 => 8,
        }),
    })
}

fn name(name: Option<&str>, own_uts: bool, field: &str) -> Result<Option<Vec<u8>>, Error> {
    let Some(name) = name.filter(|name| !name.is_empty()) else { return Ok(None) };
    if !own_uts {
        return Err(Error::spec(field, "needs a UTS namespace of the container's own"));
    }
    if name.len() > 64 {
        return Err(Error::spec(field, format!("{name:?} is longer than 64 bytes")));
    }
    Ok(Some(name.as_bytes().to_vec()))
}

fn sysctls(linux: &Linux) -> Result<Vec<(CString, Vec<u8>)>, Error> {
    let mut sorted: Vec<_> = linux.sysctl().iter().flatten().collect();
    sorted.sort();
    sorted
        .into_iter()
        .map(|(key, value)| {
            let field = format!("linux.sysctl[{key}]");
            if key.is_empty() || key.starts_with('/') || key.split(['.', '/']).any(str::is_empty) {
                return Err(Error::spec(field, "is not a kernel parameter"));
            }
            // Dots part the names, unless it is written as a path, where dots belong to interface names.
            let path = if key.contains('/') { key.clone() } else { key.replace('.', "/") };
            let path = process::c_string(format!("/proc/sys/{path}").as_bytes(), &field)?;
            Ok((path, value.as_bytes().to_vec()))
        })
        .collect()
}

/// Absolute paths as paths below the root.
fn paths(paths: Option<&[String]>, field: &str) -> Result<Vec<CString>, Error> {
    let paths = paths.unwrap_or_default();
    paths.iter().map(|path| process::c_string(path.trim_start_matches('/').as_bytes(), field)).collect()
}

fn masks(linux: &Linux, label: Option<&str>) -> Result<Option<Masks>, Error> {
    let paths = paths(linux.masked_paths().as_deref(), "linux.maskedPaths")?;
    if paths.is_empty() {
        return Ok(None);
    }
    let null = mounts::detached(Path::new("/dev/null"), false).map_err(Error::step("clone /dev/null"))?;
    Ok(Some(Masks { paths, null, empty: mounts::empty_tmpfs(label)? }))
}
