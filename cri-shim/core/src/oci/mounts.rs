//! What is mounted into a container: the kernel's file systems, the pod's files, and CRI's mounts with their propagation.

use cri_shim_api::v1::{Mount as CriMount, MountPropagation};
use oci_spec::runtime::{Mount, MountBuilder};

use super::userns::IdMaps;
use super::{NodeFacts, SpecError, cdi};

/// The group `tty`.
const TERMINALS_GROUP: u32 = 5;

/// A CRI mount whose host path the caller has found (symbolic links followed).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostMount {
    /// The real host path.
    pub source: String,
    /// Where CRI wants it and how.
    pub wanted: WantedMount,
    /// How the host mounts below it propagate.
    pub host: HostPropagation,
}

/// The parts of a CRI mount that matter besides its source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WantedMount {
    /// Path in the container.
    pub container_path: String,
    /// Whether it is read-only.
    pub readonly: bool,
    /// Whether what is mounted below it is read-only too.
    pub recursive_readonly: bool,
    /// How mounts made later travel.
    pub propagation: MountPropagation,
    /// Further mount options.
    pub extra: &'static [&'static str],
}

impl From<&CriMount> for WantedMount {
    fn from(mount: &CriMount) -> Self {
        Self {
            container_path: mount.container_path.clone(),
            readonly: mount.readonly,
            recursive_readonly: mount.recursive_read_only,
            propagation: mount.propagation(),
            extra: &[],
        }
    }
}

/// How the mount that a path is on propagates, from the node's mount table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostPropagation {
    /// It is in a peer group.
    pub shared: bool,
    /// It receives from one.
    pub slave: bool,
}

/// Reads the propagation of the mount that `path` is on from the text of `/proc/self/mountinfo`.
pub fn propagation_of(mountinfo: &str, path: &str) -> HostPropagation {
    let mut best: Option<(usize, HostPropagation)> = None;
    for line in mountinfo.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let (Some(point), Some(end)) = (fields.get(4), fields.iter().position(|field| *field == "-")) else {
            continue;
        };
        let inside = *point == "/"
            || path.strip_prefix(point).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        // Later lines are mounted over earlier ones on the same point.
        if inside && best.is_none_or(|(length, _)| point.len() >= length) {
            let optional = fields.get(6..end).unwrap_or_default();
            let has = |prefix: &str| optional.iter().any(|field| field.starts_with(prefix));
            best = Some((point.len(), HostPropagation { shared: has("shared:"), slave: has("master:") }));
        }
    }
    best.map(|(_, propagation)| propagation).unwrap_or_default()
}

/// Files of the sandbox that its containers see.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SandboxFiles {
    /// For `/etc/hostname`; empty on the host's network.
    pub hostname: String,
    /// For `/etc/hosts`.
    pub hosts: String,
    /// For `/etc/resolv.conf`.
    pub resolv_conf: String,
    /// For `/dev/shm`.
    pub shm: String,
}

/// The mounts of the pause process: only what runc itself needs.
pub fn for_sandbox() -> Result<Vec<Mount>, SpecError> {
    Ok(vec![
        kernel("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"])?,
        kernel("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=64k"])?,
    ])
}

/// Everything that decides about a container's mounts.
#[derive(Clone, Debug)]
pub struct Layout<'a> {
    /// CRI's mounts, image volumes and image-declared volumes.
    pub host_mounts: &'a [HostMount],
    /// Mounts that devices bring.
    pub cdi_mounts: &'a [cdi::file::Mount],
    /// Files of the sandbox.
    pub files: &'a SandboxFiles,
    /// Whether the container is privileged.
    pub privileged: bool,
    /// Whether its root is read-only.
    pub readonly_root: bool,
    /// Whether it is on the node's network.
    pub host_network: bool,
    /// The pod's user namespace.
    pub id_maps: Option<&'a IdMaps>,
    /// What the node can do.
    pub node: &'a NodeFacts,
}

impl Layout<'_> {
    /// The mounts in the order they are made, and the root's propagation where a mount needs one.
    pub fn build(&self) -> Result<(Vec<Mount>, Option<String>), SpecError> {
        let mut wanted = Vec::new();
        let mut root = None;
        for mount in self.host_mounts {
            let destination = destination(&mount.wanted.container_path, &mount.source)?;
            let (propagation, needs_root) = propagation(mount)?;
            root = stronger(root, needs_root);
            let mut options = vec!["rbind", propagation, if mount.wanted.readonly { "ro" } else { "rw" }];
            if mount.wanted.recursive_readonly {
                options.push(recursive_readonly(mount, self.node)?);
            }
            options.extend_from_slice(mount.wanted.extra);
            wanted.push(bind(&mount.source, &destination, &options)?);
        }
        for mount in self.cdi_mounts {
            wanted.push(cdi_mount(mount)?);
        }
        let taken = |path: &str| wanted.iter().any(|mount| mount.destination().as_os_str() == path);
        let mut mounts = self.kernel_mounts()?;
        // Who brings a /dev of their own brings all of it.
        let own_dev = taken("/dev");
        mounts.retain(|mount| {
            let path = mount.destination().to_string_lossy();
            let hidden = own_dev && path.starts_with("/dev/");
            !hidden && !taken(&path)
        });
        for (path, source, access) in self.pod_files() {
            if !source.is_empty() && !taken(path) {
                mounts.push(bind(source, path, &["rbind", "rprivate", access])?);
            }
        }
        mounts.extend(wanted);
        // A mount below another one must come after it.
        mounts.sort_by_key(|mount| mount.destination().components().count());
        Ok((mounts, root.map(str::to_owned)))
    }

    fn pod_files(&self) -> [(&'static str, &str, &'static str); 4] {
        let access = if self.readonly_root { "ro" } else { "rw" };
        [
            ("/etc/hostname", &self.files.hostname, access),
            ("/etc/hosts", &self.files.hosts, access),
            ("/etc/resolv.conf", &self.files.resolv_conf, access),
            ("/dev/shm", &self.files.shm, "rw"),
        ]
    }

    fn kernel_mounts(&self) -> Result<Vec<Mount>, SpecError> {
        let access = if self.privileged { "rw" } else { "ro" };
        let mut terminals = vec!["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"];
        // The group that owns terminals everywhere, where the pod has it.
        if self.id_maps.is_none_or(|maps| maps.host_gid(TERMINALS_GROUP).is_some()) {
            terminals.push("gid=5");
        }
        // sysfs shows a network; only who owns that network may mount it anew.
        let sysfs = if self.id_maps.is_some() && self.host_network {
            bind("/sys", "/sys", &["rbind", "rprivate", "nosuid", "noexec", "nodev", access])?
        } else {
            kernel("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", access])?
        };
        Ok(vec![
            kernel("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"])?,
            kernel("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"])?,
            kernel("/dev/pts", "devpts", "devpts", &terminals)?,
            kernel("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"])?,
            sysfs,
            kernel("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", access])?,
        ])
    }
}

/// Files of `/proc` that may be mounted over: those that tools replace to show a container its own limits.
const REPLACEABLE: [&str; 10] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/net/dev",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/uptime",
];

/// Where a mount goes, in its plainest form; refused where it would hide what confines the container.
fn destination(path: &str, source: &str) -> Result<String, SpecError> {
    let refuse = |problem: &str| {
        let problem = format!("{path:?} {problem}");
        Err(SpecError::Invalid { field: "mounts.container_path", problem })
    };
    if path.is_empty() || path.contains('\0') {
        return refuse("is no path");
    }
    let clean = clean(path);
    if clean == "/" {
        return refuse("is the root, which is the image's");
    }
    let below_proc = clean.starts_with("/proc/") && !REPLACEABLE.contains(&clean.as_str());
    if below_proc || (clean == "/proc" && source != "/proc") {
        return refuse("is inside /proc, which must be the kernel's");
    }
    Ok(clean)
}

/// A mount that a device brings, with the options its file gives it.
fn cdi_mount(mount: &cdi::file::Mount) -> Result<Mount, SpecError> {
    let path = destination(&mount.container_path, &mount.host_path)?;
    let kind = if mount.kind.is_empty() { "bind" } else { &mount.kind };
    let mut options: Vec<&str> = mount.options.iter().map(String::as_str).collect();
    if kind == "bind" && !options.iter().any(|option| ["bind", "rbind"].contains(option)) {
        options.push("rbind");
    }
    kernel(&path, kind, &mount.host_path, &options)
}

fn recursive_readonly(mount: &HostMount, node: &NodeFacts) -> Result<&'static str, SpecError> {
    let refuse = |problem: &str| {
        let problem = format!("{}: {problem}", mount.wanted.container_path);
        Err(SpecError::Unsupported { field: "recursive_read_only", problem })
    };
    if !mount.wanted.readonly {
        return refuse("needs readonly as well");
    }
    if mount.wanted.propagation != MountPropagation::PropagationPrivate {
        return refuse("needs private propagation");
    }
    if !node.recursive_readonly {
        return refuse("this node's kernel or runc cannot do it");
    }
    Ok("rro")
}

/// The mount option, and what the container's root must be for it.
fn propagation(mount: &HostMount) -> Result<(&'static str, Option<&'static str>), SpecError> {
    let refuse = |wanted, needed| Err(SpecError::Propagation { path: mount.source.clone(), wanted, needed });
    match mount.wanted.propagation {
        MountPropagation::PropagationPrivate => Ok(("rprivate", None)),
        MountPropagation::PropagationHostToContainer if mount.host.shared || mount.host.slave => {
            Ok(("rslave", Some("rslave")))
        }
        MountPropagation::PropagationHostToContainer => refuse("HostToContainer", "shared or slave"),
        MountPropagation::PropagationBidirectional if mount.host.shared => Ok(("rshared", Some("rshared"))),
        MountPropagation::PropagationBidirectional => refuse("Bidirectional", "shared"),
    }
}

fn stronger(one: Option<&'static str>, other: Option<&'static str>) -> Option<&'static str> {
    if one == Some("rshared") || other == Some("rshared") { Some("rshared") } else { one.or(other) }
}

fn kernel(destination: &str, kind: &str, source: &str, options: &[&str]) -> Result<Mount, SpecError> {
    Ok(MountBuilder::default()
        .destination(destination)
        .typ(kind)
        .source(source)
        .options(options.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>())
        .build()?)
}

fn bind(source: &str, destination: &str, options: &[&str]) -> Result<Mount, SpecError> {
    kernel(destination, "bind", source, options)
}

/// The absolute path without `.`, `..`, double and trailing slashes. Nothing is above the root.
pub fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTINFO: &str = "22 1 8:1 / / rw - ext4 /dev/sda rw\n\
        30 22 0:5 / /var/lib rw shared:7 - tmpfs tmpfs rw\n\
        31 30 0:6 / /var/lib/x rw master:7 - tmpfs tmpfs rw\n";

    fn mount(path: &str, propagation: MountPropagation) -> HostMount {
        let wanted = WantedMount { container_path: path.into(), propagation, ..WantedMount::default() };
        HostMount { source: "/data".into(), wanted, host: HostPropagation::default() }
    }

    fn layout<'a>(host_mounts: &'a [HostMount], files: &'a SandboxFiles) -> Layout<'a> {
        static PLAIN: std::sync::LazyLock<NodeFacts> = std::sync::LazyLock::new(NodeFacts::default);
        Layout {
            host_mounts,
            cdi_mounts: &[],
            files,
            privileged: false,
            readonly_root: false,
            host_network: false,
            id_maps: None,
            node: &PLAIN,
        }
    }

    fn destinations(mounts: &[Mount]) -> Vec<String> {
        mounts.iter().map(|mount| mount.destination().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn the_deepest_mount_decides_propagation() {
        assert_eq!(propagation_of(MOUNTINFO, "/etc"), HostPropagation::default());
        assert!(propagation_of(MOUNTINFO, "/var/lib/kubelet").shared);
        assert!(propagation_of(MOUNTINFO, "/var/lib/x/y").slave);
        assert!(!propagation_of(MOUNTINFO, "/var/library").shared, "a prefix is not a parent");
    }

    #[test]
    fn nested_mounts_come_after_their_parent_and_replace_defaults() {
        let wanted = [
            mount("/a/b/c", MountPropagation::PropagationPrivate),
            mount("/a/", MountPropagation::PropagationPrivate),
            mount("/etc/hosts", MountPropagation::PropagationPrivate),
            mount("/sys", MountPropagation::PropagationPrivate),
        ];
        let files =
            SandboxFiles { hosts: "/s/hosts".into(), shm: "/s/shm".into(), ..SandboxFiles::default() };
        let (mounts, root) = layout(&wanted, &files).build().unwrap();
        let all = destinations(&mounts);
        let position = |path: &str| all.iter().position(|known| known == path).unwrap();
        assert!(position("/a") < position("/a/b/c"));
        assert_eq!(all.iter().filter(|path| *path == "/etc/hosts").count(), 1);
        assert_eq!(all.iter().filter(|path| *path == "/sys").count(), 1);
        assert!(all.contains(&"/dev/shm".to_owned()) && root.is_none());
    }

    #[test]
    fn propagation_needs_the_hosts_consent() {
        let mut bidirectional = mount("/m", MountPropagation::PropagationBidirectional);
        let files = SandboxFiles::default();
        let build = |mount: &HostMount| layout(std::slice::from_ref(mount), &files).build();
        assert!(build(&bidirectional).unwrap_err().to_string().contains("needs the host mount to be shared"));
        bidirectional.host.shared = true;
        assert_eq!(build(&bidirectional).unwrap().1.as_deref(), Some("rshared"));
    }

    #[test]
    fn a_mount_of_a_parent_does_not_hide_the_pods_files() {
        let wanted = [mount("/etc", MountPropagation::PropagationPrivate)];
        let files = SandboxFiles { hosts: "/s/hosts".into(), ..SandboxFiles::default() };
        let all = destinations(&layout(&wanted, &files).build().unwrap().0);
        let position = |path: &str| all.iter().position(|known| known == path).unwrap();
        assert!(position("/etc") < position("/etc/hosts"), "{all:?}");
    }

    #[test]
    fn a_dev_of_ones_own_replaces_everything_below() {
        let wanted = [mount("/dev", MountPropagation::PropagationPrivate)];
        let all = destinations(&layout(&wanted, &SandboxFiles::default()).build().unwrap().0);
        assert!(!all.contains(&"/dev/pts".to_owned()) && all.contains(&"/dev".to_owned()), "{all:?}");
    }

    #[test]
    fn destinations_stay_below_the_root_and_off_proc() {
        for (path, expected) in [("/a/../../b/", "/b"), ("a/./b", "/a/b"), ("/proc/meminfo", "/proc/meminfo")]
        {
            assert_eq!(destination(path, "/data").unwrap(), expected);
        }
        for path in ["", "/", "/x/..", "/proc", "/proc/sys", "/tmp/../proc/1/mem", "/a\0b"] {
            let error = destination(path, "/data").unwrap_err().to_string();
            assert!(error.starts_with("mounts.container_path"), "{path}: {error}");
        }
        assert_eq!(destination("/proc", "/proc").unwrap(), "/proc", "the node's own proc may be shown");
    }

    #[test]
    fn recursive_readonly_has_conditions() {
        let can = NodeFacts { recursive_readonly: true, ..NodeFacts::default() };
        let build = |readonly, propagation, node: &NodeFacts| {
            let wanted = WantedMount {
                container_path: "/m".into(),
                readonly,
                recursive_readonly: true,
                propagation,
                ..WantedMount::default()
            };
            let host = HostPropagation { shared: true, slave: false };
            let mounts = [HostMount { source: "/data".into(), wanted, host }];
            let files = SandboxFiles::default();
            let layout = Layout { node, ..layout(&mounts, &files) };
            layout.build().map(|(mounts, _)| {
                let found = mounts.iter().find(|mount| mount.destination().as_os_str() == "/m");
                found.and_then(|mount| mount.options().clone()).unwrap()
            })
        };
        let private = MountPropagation::PropagationPrivate;
        assert!(build(true, private, &can).unwrap().contains(&"rro".to_owned()));
        for refused in [
            build(false, private, &can),
            build(true, MountPropagation::PropagationHostToContainer, &can),
            build(true, private, &NodeFacts::default()),
        ] {
            assert!(refused.unwrap_err().to_string().starts_with("recursive_read_only: /m"));
        }
    }

    #[test]
    fn a_pods_own_users_on_the_nodes_network_see_the_nodes_sysfs() {
        use cri_shim_api::v1::{IdMapping, NamespaceMode, NamespaceOption, UserNamespace};
        let map = vec![IdMapping { host_id: 65_536, container_id: 0, length: 4 }];
        let user = UserNamespace { mode: NamespaceMode::Pod.into(), uids: map.clone(), gids: map };
        let options = NamespaceOption { userns_options: Some(user), ..NamespaceOption::default() };
        let maps = IdMaps::of(Some(&options)).unwrap();
        let files = SandboxFiles::default();
        let built = Layout { host_network: true, id_maps: maps.as_ref(), ..layout(&[], &files) }.build();
        let mounts = built.unwrap().0;
        let at = |path: &str| mounts.iter().find(|mount| mount.destination().as_os_str() == path).unwrap();
        assert_eq!(at("/sys").typ().as_deref(), Some("bind"));
        let terminals = at("/dev/pts").options().clone().unwrap();
        assert!(!terminals.contains(&"gid=5".to_owned()), "a group the pod does not have");
    }
}
