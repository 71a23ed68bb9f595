//! The mounts of a container: bind mounts opened and adjusted here as detached trees, new file systems described.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::{Linux, Mount, Spec};
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::OpenTreeFlags;

use super::namespaces::id_map;
use super::options::{self, Change, Options, attr, propagation};
use super::process::c_string;
use super::{LinkPlan, UserNamespace};
use crate::cgroup;
use crate::error::Error;
use crate::host::idmap;
use crate::host::sys::{MountAttr, mount_setattr};

/// The container's root file system.
#[derive(Debug)]
pub(crate) struct RootPlan {
    /// As a detached tree.
    pub(crate) tree: OwnedFd,
    pub(crate) readonly: bool,
    /// What the root becomes at last; 0 for as it is.
    pub(crate) propagation: u64,
}

/// One mount.
#[derive(Debug)]
pub(crate) struct MountPlan {
    /// Below the root.
    pub(crate) target: CString,
    /// Whether a missing target is made as a directory.
    pub(crate) directory: bool,
    /// No part of the target may be a symbolic link.
    pub(crate) no_links: bool,
    /// Whether the target may be inside a procfs.
    pub(crate) inside_proc: bool,
    pub(crate) source: Source,
    /// For messages: the kind or the source.
    pub(crate) what: String,
}

/// What is mounted.
#[derive(Debug)]
pub(crate) enum Source {
    /// A detached tree, all attributes set.
    Tree(OwnedFd),
    /// A file system to be made by the child.
    New(FsPlan),
}

/// A new file system.
#[derive(Debug)]
pub(crate) struct FsPlan {
    pub(crate) kind: CString,
    pub(crate) source: CString,
    pub(crate) parameters: Vec<(CString, Option<CString>)>,
    pub(crate) attributes: Change,
    /// Changes after it is made; the flag is for all below it.
    pub(crate) later: Vec<(MountAttr, bool)>,
    /// A tmpfs without a mode takes that of the directory it covers.
    pub(crate) keep_mode: bool,
}

/// What mounts depend on.
pub(crate) struct Context<'a> {
    pub(crate) root_propagation: u64,
    pub(crate) label: Option<&'a str>,
    pub(crate) cgroup_namespace: bool,
    pub(crate) cgroups: &'a cgroup::Paths,
    pub(crate) user: Option<&'a UserNamespace>,
}

impl Context<'_> {
    /// Whether version 2 cannot be mounted: in a user namespace it takes a cgroup namespace of its own.
    fn bound_cgroup(&self) -> bool {
        self.user.is_some() && !self.cgroup_namespace
    }
}

/// All mounts, and what has to be done after them.
#[derive(Debug, Default)]
pub(crate) struct Mounts {
    pub(crate) list: Vec<MountPlan>,
    pub(crate) links: Vec<LinkPlan>,
    pub(crate) readonly_later: Vec<CString>,
}

/// The files inside a procfs that may be covered, as other runtimes allow (lxcfs, mostly).
const PROC_FILES: &[&str] = &[
    "proc/cpuinfo",
    "proc/diskstats",
    "proc/meminfo",
    "proc/stat",
    "proc/swaps",
    "proc/uptime",
    "proc/loadavg",
    "proc/slabinfo",
    "proc/net/dev",
    "proc/sys/kernel/ns_last_pid",
    "proc/sys/crypto/fips_enabled",
];

/// A detached copy of a mount of the host, of all below it too if wanted.
pub(crate) fn detached(path: &Path, recursive: bool) -> Result<OwnedFd, Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree = rustix::mount::open_tree(CWD, path, flags)?;
    if tree.as_raw_fd() > 2 { Ok(tree) } else { rustix::io::fcntl_dupfd_cloexec(&tree, 3) }
}

/// `linux.rootfsPropagation`.
pub(crate) fn root_propagation(linux: &Linux) -> Result<u64, Error> {
    options::root_propagation(linux.rootfs_propagation().as_deref().unwrap_or_default())
}

/// Opens the root file system.
pub(crate) fn root(spec: &Spec, linux: &Linux, rootfs: &Path) -> Result<RootPlan, Error> {
    let tree = detached(rootfs, true)
        .map_err(Error::step(format!("open the root file system {}", rootfs.display())))?;
    let wanted = root_propagation(linux)?;
    // What is mounted in the container never shows up in the host's tree.
    let first = if wanted == propagation::PRIVATE { propagation::PRIVATE } else { propagation::SLAVE };
    mount_setattr(tree.as_fd(), true, &MountAttr { propagation: first, ..MountAttr::default() })
        .map_err(Error::step("change the propagation of the root file system"))?;
    let later = if matches!(wanted, propagation::SHARED | propagation::UNBINDABLE) { wanted } else { 0 };
    let readonly = spec.root().as_ref().and_then(oci_spec::runtime::Root::readonly).unwrap_or(false);
    Ok(RootPlan { tree, readonly, propagation: later })
}

/// Plans every mount of the specification.
pub(crate) fn plan(spec: &Spec, context: &Context<'_>) -> Result<Mounts, Error> {
    let mut plans = Mounts::default();
    for (at, mount) in spec.mounts().iter().flatten().enumerate() {
        let field = format!("mounts[{at}]");
        let options =
            options::parse(mount.options().as_deref().unwrap_or_default(), &format!("{field}.options"))?;
        let target = target(mount, &field)?;
        let kind = mount.typ().as_deref().unwrap_or_default();
        if options.bind.is_some() || kind == "bind" {
            plans.list.push(bind(mount, &options, target, context, &field)?);
        } else if kind == "cgroup" && !context.cgroups.v1.is_empty() {
            cgroup_v1(&mut plans, &options, &target, context)?;
        } else if let Some(own) =
            context.cgroups.unified.as_deref().filter(|_| kind == "cgroup" && context.bound_cgroup())
        {
            plans.list.push(cgroup_v2_bound(own, &options, target, context)?);
        } else {
            new(&mut plans, mount, &options, target, context, &field)?;
        }
    }
    Ok(plans)
}

fn target(mount: &Mount, field: &str) -> Result<CString, Error> {
    let field = format!("{field}.destination");
    let path = mount.destination().as_os_str().as_encoded_bytes();
    let path = path.strip_prefix(b"/").ok_or_else(|| Error::spec(&field, "is not an absolute path"))?;
    let path = c_string(path, &field)?;
    if path.to_bytes().iter().all(|byte| *byte == b'/') {
        return Err(Error::spec(field, "the root itself cannot be covered"));
    }
    Ok(path)
}

fn inside_proc(target: &CString) -> bool {
    target.to_str().is_ok_and(|target| PROC_FILES.contains(&target))
}

fn bind(
    mount: &Mount,
    options: &Options,
    target: CString,
    context: &Context<'_>,
    field: &str,
) -> Result<MountPlan, Error> {
    let source = mount.source().as_deref().filter(|source| !source.as_os_str().is_empty());
    let source = source.ok_or_else(|| Error::spec(format!("{field}.source"), "is missing"))?;
    if let Some((name, _)) = options.parameters.first() {
        return Err(Error::spec(
            format!("{field}.options"),
            format!("option {name:?} is unknown for a bind mount"),
        ));
    }
    let step = |what: &str| Error::step(format!("mount {} on {}: {what}", source.display(), shown(&target)));
    let tree = detached(source, options.bind == Some(true)).map_err(step("open the source"))?;
    adjust(&tree, options, context).map_err(step("set its options"))?;
    if let Some(attr) = idmap_of(mount, options, context)? {
        let (recursive, userns) = attr;
        let change = MountAttr {
            set: attr::IDMAP,
            userns_fd: u64::from(userns.as_raw_fd().unsigned_abs()),
            ..MountAttr::default()
        };
        mount_setattr(tree.as_fd(), recursive, &change)
            .map_err(step("map its owners (not every file system can)"))?;
    }
    let mode = rustix::fs::fstat(&tree).map_err(step("look at the source"))?.st_mode;
    let directory = rustix::fs::FileType::from_raw_mode(mode) == rustix::fs::FileType::Directory;
    Ok(MountPlan {
        inside_proc: inside_proc(&target),
        no_links: false,
        directory,
        source: Source::Tree(tree),
        what: source.display().to_string(),
        target,
    })
}

/// Options and propagation of a detached tree.
fn adjust(tree: &OwnedFd, options: &Options, context: &Context<'_>) -> Result<(), Errno> {
    // As the host's tree would be in the container's namespace: below the root's propagation, unless it stays shared.
    let shared = context.root_propagation == propagation::SHARED;
    let inherited = match context.root_propagation {
        propagation::PRIVATE | propagation::UNBINDABLE => propagation::PRIVATE,
        _ => propagation::SLAVE,
    };
    // The kubelet's usual `rprivate` undoes what would be done here.
    let all_private = options.propagation.first().is_some_and(|(_, recursive)| *recursive)
        && options.propagation.iter().all(|(kind, _)| *kind == propagation::PRIVATE);
    if !(shared || all_private) {
        set(tree, true, MountAttr { propagation: inherited, ..MountAttr::default() })?;
    }
    // A plain `rw` does not undo what the host mounted read-only.
    let clear = options.change.clear & !attr::RDONLY;
    set(tree, false, MountAttr { set: options.change.set, clear, ..MountAttr::default() })?;
    let Change { set: recursive, clear } = options.recursive;
    set(tree, true, MountAttr { set: recursive, clear, ..MountAttr::default() })?;
    for (kind, recursive) in &options.propagation {
        set(tree, *recursive, MountAttr { propagation: *kind, ..MountAttr::default() })?;
    }
    Ok(())
}

fn set(tree: &OwnedFd, recursive: bool, mut change: MountAttr) -> Result<(), Errno> {
    if change == MountAttr::default() {
        return Ok(());
    }
    // The ways to keep access times exclude each other, so the kernel wants all cleared when one is set.
    if change.set & attr::ATIME != 0 {
        change.clear |= attr::ATIME;
    }
    mount_setattr(tree.as_fd(), recursive, &change)
}

/// The user namespace by which owners are mapped, when they are.
fn idmap_of(
    mount: &Mount,
    options: &Options,
    context: &Context<'_>,
) -> Result<Option<(bool, OwnedFd)>, Error> {
    let own = (mount.uid_mappings().as_deref(), mount.gid_mappings().as_deref());
    let (uids, gids) = match own {
        (Some(uids), Some(gids)) if !uids.is_empty() && !gids.is_empty() => (id_map(uids), id_map(gids)),
        _ if options.idmap.is_none() => return Ok(None),
        _ => match context.user {
            None => {
                return Err(Error::spec(
                    "mounts[].uidMappings",
                    "idmap without mappings needs a user namespace",
                ));
            }
            Some(UserNamespace::Join(namespace)) => {
                let file = namespace.file.try_clone().map_err(Error::step("copy a descriptor"))?;
                return Ok(Some((options.idmap == Some(true), file)));
            }
            Some(UserNamespace::New { uid_map, gid_map }) => (uid_map.clone(), gid_map.clone()),
        },
    };
    let userns = idmap::user_namespace(&uids, &gids)?;
    Ok(Some((options.idmap == Some(true), userns)))
}

fn new(
    plans: &mut Mounts,
    mount: &Mount,
    options: &Options,
    target: CString,
    context: &Context<'_>,
    field: &str,
) -> Result<(), Error> {
    let kind = match mount.typ().as_deref() {
        None | Some("" | "none") => return Err(Error::spec(format!("{field}.type"), "is missing")),
        Some("cgroup") => "cgroup2",
        Some(kind) => kind,
    };
    let source =
        mount.source().as_deref().map_or(kind.as_bytes(), |path| path.as_os_str().as_encoded_bytes());
    let mut fs = fs(kind, source, options, field)?;
    if let Some(label) = context.label.filter(|_| takes_label(kind)) {
        fs.parameters.push((c"context".to_owned(), Some(c_string(label.as_bytes(), "linux.mountLabel")?)));
    }
    // Nodes and mount points are made in these first.
    let later = fs.attributes.set & attr::RDONLY != 0 && (kind == "tmpfs" || target.as_c_str() == c"dev");
    if later {
        fs.attributes.set &= !attr::RDONLY;
        plans.readonly_later.push(target.clone());
    } else if fs.attributes.set & attr::RDONLY != 0 {
        fs.parameters.push((c"ro".to_owned(), None));
    }
    plans.list.push(MountPlan {
        inside_proc: inside_proc(&target),
        no_links: matches!(kind, "proc" | "sysfs"),
        directory: true,
        what: kind.to_owned(),
        source: Source::New(fs),
        target,
    });
    Ok(())
}

/// SELinux labels go to file systems whose files are the container's.
fn takes_label(kind: &str) -> bool {
    !matches!(kind, "proc" | "sysfs" | "mqueue" | "cgroup2" | "cgroup")
        && Path::new("/sys/fs/selinux/enforce").exists()
}

fn fs(kind: &str, source: &[u8], options: &Options, field: &str) -> Result<FsPlan, Error> {
    let field = format!("{field}.options");
    let parameters = options
        .parameters
        .iter()
        .map(|(key, value)| {
            let value = value.as_ref().map(|value| c_string(value.as_bytes(), &field)).transpose()?;
            Ok((c_string(key.as_bytes(), &field)?, value))
        })
        .collect::<Result<Vec<_>, Error>>()?;
    let mut later = Vec::new();
    let Change { set, clear } = options.recursive;
    if !options.recursive.is_empty() {
        let clear = if set & attr::ATIME != 0 { clear | attr::ATIME } else { clear };
        later.push((MountAttr { set, clear, ..MountAttr::default() }, true));
    }
    for (kind, recursive) in &options.propagation {
        later.push((MountAttr { propagation: *kind, ..MountAttr::default() }, *recursive));
    }
    Ok(FsPlan {
        keep_mode: kind == "tmpfs" && !options.parameters.iter().any(|(key, _)| key == "mode"),
        kind: c_string(kind.as_bytes(), &field)?,
        source: c_string(source, &field)?,
        parameters,
        attributes: options.change,
        later,
    })
}

/// What lies over masked directories.
pub(crate) fn empty_tmpfs(label: Option<&str>) -> Result<FsPlan, Error> {
    let options = Options { change: Change { set: attr::RDONLY, clear: 0 }, ..Options::default() };
    let mut fs = fs("tmpfs", b"tmpfs", &options, "linux.maskedPaths")?;
    fs.keep_mode = false;
    fs.parameters.push((c"ro".to_owned(), None));
    if let Some(label) = label.filter(|_| takes_label("tmpfs")) {
        fs.parameters.push((c"context".to_owned(), Some(c_string(label.as_bytes(), "linux.mountLabel")?)));
    }
    Ok(fs)
}

/// The container's own cgroup, where the hierarchy itself cannot be mounted.
fn cgroup_v2_bound(
    own: &Path,
    options: &Options,
    target: CString,
    context: &Context<'_>,
) -> Result<MountPlan, Error> {
    let step = || Error::step(format!("mount the cgroup {}", own.display()));
    let tree = detached(own, true).map_err(step())?;
    adjust(&tree, options, context).map_err(step())?;
    Ok(MountPlan {
        target,
        directory: true,
        no_links: false,
        inside_proc: false,
        source: Source::Tree(tree),
        what: own.display().to_string(),
    })
}

/// On hosts with version 1 controllers: a tmpfs with one directory for each hierarchy, and links for joint ones. `ro` is for
/// the hierarchies; the tmpfs stays as other runtimes leave it.
fn cgroup_v1(
    plans: &mut Mounts,
    options: &Options,
    target: &CString,
    context: &Context<'_>,
) -> Result<(), Error> {
    let field = "mounts[].destination";
    let readonly = options.change.set & attr::RDONLY != 0;
    let below = |name: &str| c_string(&[target.to_bytes(), b"/", name.as_bytes()].concat(), field);
    let flags = attr::NOSUID | attr::NODEV | attr::NOEXEC;
    let plain = Options {
        change: Change { set: flags, clear: 0 },
        parameters: vec![("mode".to_owned(), Some("755".to_owned()))],
        propagation: options.propagation.clone(),
        ..Options::default()
    };
    plans.list.push(MountPlan {
        target: target.clone(),
        directory: true,
        no_links: false,
        inside_proc: false,
        source: Source::New(fs("tmpfs", b"tmpfs", &plain, field)?),
        what: "tmpfs".to_owned(),
    });
    for hierarchy in cgroup::hierarchies()?.into_iter().filter(|hierarchy| !hierarchy.unified) {
        let name = hierarchy.directory_name();
        let place = below(&name)?;
        let source = if context.cgroup_namespace {
            let change = Change { set: flags | if readonly { attr::RDONLY } else { 0 }, clear: 0 };
            let parameters = hierarchy.mount_parameters();
            let own = Options { change, parameters, ..Options::default() };
            let source: &[u8] = if name == "systemd" { b"systemd" } else { b"cgroup" };
            let fs = fs("cgroup", source, &own, field)?;
            Source::New(fs)
        } else {
            let Some(path) = hierarchy.keys().find_map(|key| context.cgroups.v1.get(key)) else { continue };
            let step = || Error::step(format!("mount the cgroup {}", path.display()));
            let tree = detached(path, true).map_err(step())?;
            let bound = Options { propagation: options.propagation.clone(), ..options.clone() };
            adjust(&tree, &bound, context).map_err(step())?;
            Source::Tree(tree)
        };
        plans.list.push(MountPlan {
            target: place,
            directory: true,
            no_links: false,
            inside_proc: false,
            source,
            what: format!("cgroup {name}"),
        });
        if name.contains(',') {
            for part in name.split(',') {
                plans.links.push(LinkPlan {
                    directory: target.clone(),
                    name: c_string(part.as_bytes(), field)?,
                    target: c_string(name.as_bytes(), field)?,
                    replace: false,
                });
            }
        }
    }
    Ok(())
}

/// A target as the specification has it, for messages.
pub(crate) fn shown(target: &CString) -> String {
    format!("/{}", target.to_string_lossy())
}
