//! What is mounted into a container: the kernel's file systems, the pod's files, and CRI's mounts with their propagation.

use cri_shim_api::v1::{Mount as CriMount, MountPropagation};
use oci_spec::runtime::{Mount, MountBuilder};

use super::{NodeFacts, SpecError};

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
}

impl From<&CriMount> for WantedMount {
    fn from(mount: &CriMount) -> Self {
        Self {
            container_path: mount.container_path.clone(),
            readonly: mount.readonly,
            recursive_readonly: mount.recursive_read_only,
            propagation: mount.propagation(),
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

/// The mounts of a container in the order they are made, and the root's propagation where a mount needs one.
pub fn for_container(
    host_mounts: &[HostMount],
    files: &SandboxFiles,
    privileged: bool,
    readonly_root: bool,
    node: &NodeFacts,
) -> Result<(Vec<Mount>, Option<String>), SpecError> {
    let taken = |path: &str| host_mounts.iter().any(|mount| clean(&mount.wanted.container_path) == path);
    let mut mounts = kernel_mounts(privileged)?;
    mounts.retain(|mount| !taken(&mount.destination().to_string_lossy()));
    let access = if readonly_root { "ro" } else { "rw" };
    let pod_files = [
        ("/etc/hostname", &files.hostname, access),
        ("/etc/hosts", &files.hosts, access),
        ("/etc/resolv.conf", &files.resolv_conf, access),
        ("/dev/shm", &files.shm, "rw"),
    ];
    for (path, source, access) in pod_files {
        if !source.is_empty() && !taken(path) {
            mounts.push(bind(source, path, &["rbind", "rprivate", access])?);
        }
    }
    let mut ordered: Vec<&HostMount> = host_mounts.iter().collect();
    // A mount below another one must come after it.
    ordered.sort_by_key(|mount| clean(&mount.wanted.container_path).matches('/').count());
    let mut root = None;
    for mount in ordered {
        let (propagation, needs_root) = propagation(mount)?;
        root = stronger(root, needs_root);
        let mut options = vec!["rbind", propagation, if mount.wanted.readonly { "ro" } else { "rw" }];
        if mount.wanted.recursive_readonly {
            options.push(recursive_readonly(mount, node)?);
        }
        mounts.push(bind(&mount.source, &clean(&mount.wanted.container_path), &options)?);
    }
    Ok((mounts, root.map(str::to_owned)))
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

fn kernel_mounts(privileged: bool) -> Result<Vec<Mount>, SpecError> {
    let access = if privileged { "rw" } else { "ro" };
    Ok(vec![
        kernel("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"])?,
        kernel("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"])?,
        kernel(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        )?,
        kernel("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"])?,
        kernel("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", access])?,
        kernel("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", access])?,
    ])
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

/// The path without trailing or double slashes.
fn clean(path: &str) -> String {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
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
        let (mounts, root) = for_container(&wanted, &files, false, false, &NodeFacts::default()).unwrap();
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
        let build = |mount: &HostMount| {
            for_container(
                std::slice::from_ref(mount),
                &SandboxFiles::default(),
                false,
                false,
                &NodeFacts::default(),
            )
        };
        assert!(build(&bidirectional).unwrap_err().to_string().contains("needs the host mount to be shared"));
        bidirectional.host.shared = true;
        assert_eq!(build(&bidirectional).unwrap().1.as_deref(), Some("rshared"));
    }
}
