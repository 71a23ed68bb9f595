//! The mounted cgroup hierarchies and directories in them.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use super::super::mount_table::{self, Mount};
use super::values::warn_once;

/// Which interface a hierarchy has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    /// One hierarchy per controller (or group of them).
    V1,
    /// One hierarchy for all.
    V2,
}

/// A mounted hierarchy with controllers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hierarchy {
    /// Where it is mounted.
    pub(super) mount_point: PathBuf,
    /// Its interface.
    pub(super) version: Version,
    /// Its controllers.
    pub(super) controllers: BTreeSet<String>,
}

/// Every mounted hierarchy that has a controller, read anew: a controller may be mounted at any time.
pub(super) fn mounted() -> io::Result<Vec<Hierarchy>> {
    let mut hierarchies = from_mounts(&mount_table::read()?);
    for hierarchy in hierarchies.iter_mut().filter(|hierarchy| hierarchy.version == Version::V2) {
        let available = std::fs::read_to_string(hierarchy.mount_point.join("cgroup.controllers"))?;
        hierarchy.controllers = available.split_whitespace().map(str::to_owned).collect();
    }
    hierarchies.retain(|hierarchy| !hierarchy.controllers.is_empty());
    if hierarchies.is_empty() {
        return Err(io::Error::other("no cgroup hierarchy with controllers is mounted"));
    }
    Ok(hierarchies)
}

/// v1 hierarchies tell their controllers in the mount options; v2's are in a file. A hierarchy that is mounted at
/// several places counts once.
fn from_mounts(mounts: &[Mount]) -> Vec<Hierarchy> {
    /// Mount options of cgroup v1 that are no controllers.
    const NO_CONTROLLER: [&str; 6] = ["rw", "ro", "xattr", "clone_children", "noprefix", "none"];
    let mut hierarchies: Vec<Hierarchy> = Vec::new();
    for mount in mounts {
        let version = match mount.fs_type.as_str() {
            "cgroup" => Version::V1,
            "cgroup2" => Version::V2,
            _ => continue,
        };
        let controllers: BTreeSet<String> = match version {
            Version::V1 => mount
                .super_options
                .split(',')
                .filter(|option| !NO_CONTROLLER.contains(option) && !option.starts_with("release_agent="))
                .map(str::to_owned)
                .collect(),
            Version::V2 => BTreeSet::new(),
        };
        let known =
            hierarchies.iter().any(|known| known.version == version && known.controllers == controllers);
        if !known && mount.root == Path::new("/") {
            hierarchies.push(Hierarchy { mount_point: mount.point.clone(), version, controllers });
        }
    }
    hierarchies
}

impl Hierarchy {
    /// Directory of a cgroup path.
    pub(super) fn dir(&self, path: &str) -> PathBuf {
        self.mount_point.join(path.trim_start_matches('/'))
    }

    /// Whether it has a controller.
    pub(super) fn has(&self, controller: &str) -> bool {
        self.controllers.contains(controller)
    }

    /// Makes a cgroup and those above it, usable for what will be below: on v2 all controllers are passed down, on
    /// v1 the cpuset, which starts empty, is copied down.
    pub(super) fn create(&self, path: &str) -> io::Result<()> {
        let mut dir = self.mount_point.clone();
        for part in path.split('/').filter(|part| !part.is_empty()) {
            if self.version == Version::V2 {
                pass_controllers_down(&dir)?;
            }
            dir.push(part);
            match std::fs::create_dir(&dir) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
            if self.version == Version::V1 && self.has("cpuset") {
                inherit_cpuset(&dir)?;
            }
        }
        // The runtime makes the containers' cgroups below and needs the controllers there.
        if self.version == Version::V2 { pass_controllers_down(&dir) } else { Ok(()) }
    }
}

fn pass_controllers_down(dir: &Path) -> io::Result<()> {
    let file = dir.join("cgroup.subtree_control");
    let enabled = std::fs::read_to_string(&file)?;
    let available = std::fs::read_to_string(dir.join("cgroup.controllers"))?;
    let is_missing = |controller: &&str| !enabled.split_whitespace().any(|enabled| enabled == *controller);
    for controller in available.split_whitespace().filter(is_missing) {
        // One by one: a controller that cannot be passed down (cpu with real-time processes) spoils no other.
        if let Err(error) = std::fs::write(&file, format!("+{controller}")) {
            warn_once("cgroup.subtree_control", &error);
        }
    }
    Ok(())
}

fn inherit_cpuset(dir: &Path) -> io::Result<()> {
    let Some(parent) = dir.parent() else { return Ok(()) };
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let own = std::fs::read_to_string(dir.join(file))?;
        if own.trim().is_empty() {
            std::fs::write(dir.join(file), std::fs::read_to_string(parent.join(file))?.trim())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hybrid_mounts_give_v1_controllers_once() {
        let text = "30 25 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                    31 25 0:27 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n\
                    32 25 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                    33 25 0:26 / /elsewhere/cpu rw - cgroup cgroup rw,cpu\n\
                    34 25 0:26 /docker /in/a/container rw - cgroup cgroup rw,memory\n";
        let hierarchies = from_mounts(&mount_table::parse(text));
        let shown: Vec<(String, Version)> = hierarchies
            .iter()
            .map(|hierarchy| (hierarchy.mount_point.display().to_string(), hierarchy.version))
            .collect();
        assert_eq!(
            shown,
            [
                ("/sys/fs/cgroup/cpu".to_owned(), Version::V1),
                ("/sys/fs/cgroup/systemd".to_owned(), Version::V1),
                ("/sys/fs/cgroup/unified".to_owned(), Version::V2),
            ]
        );
        assert!(hierarchies[0].has("cpu"));
    }
}
