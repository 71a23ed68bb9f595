//! Where the cgroup hierarchies are mounted, and the files of one cgroup.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use cri_shim_core::stats::{self, CgroupUsage, V1Files, V2Files};

use super::process;
use crate::error::RuntimeError;

/// The mounted hierarchies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hierarchies {
    /// One directory per controller (also when a bare version 2 tree is mounted beside them).
    V1(BTreeMap<String, PathBuf>),
    /// A single tree.
    V2(PathBuf),
}

impl Hierarchies {
    /// Reads them from the text of `/proc/self/mountinfo`, with runc's rule: version 2 is what is mounted at
    /// `/sys/fs/cgroup` itself.
    pub fn from_mountinfo(mountinfo: &str) -> Self {
        let mut controllers = BTreeMap::new();
        for line in mountinfo.lines() {
            let Some((head, tail)) = line.split_once(" - ") else { continue };
            let (Some(point), mut tail) = (head.split(' ').nth(4), tail.split(' ')) else { continue };
            match tail.next() {
                Some("cgroup2") if point == "/sys/fs/cgroup" => return Self::V2(PathBuf::from(point)),
                Some("cgroup") => {
                    for option in tail.nth(1).unwrap_or_default().split(',') {
                        controllers.entry(option.to_owned()).or_insert_with(|| PathBuf::from(point));
                    }
                }
                _ => {}
            }
        }
        Self::V1(controllers)
    }

    /// What the cgroup uses; zeros for files that are gone.
    pub fn usage(&self, cgroup: &str) -> CgroupUsage {
        match self {
            Self::V1(_) => stats::v1(V1Files {
                cpuacct_usage: &self.read("cpuacct", cgroup, "cpuacct.usage"),
                memory_usage: &self.read("memory", cgroup, "memory.usage_in_bytes"),
                memory_limit: &self.read("memory", cgroup, "memory.limit_in_bytes"),
                memory_stat: &self.read("memory", cgroup, "memory.stat"),
                pids_current: &self.read("pids", cgroup, "pids.current"),
            }),
            Self::V2(_) => stats::v2(V2Files {
                cpu_stat: &self.read("", cgroup, "cpu.stat"),
                memory_current: &self.read("", cgroup, "memory.current"),
                memory_max: &self.read("", cgroup, "memory.max"),
                memory_stat: &self.read("", cgroup, "memory.stat"),
                memory_swap_current: &self.read("", cgroup, "memory.swap.current"),
                pids_current: &self.read("", cgroup, "pids.current"),
            }),
        }
    }

    /// How many processes of the cgroup the kernel killed for memory.
    pub fn oom_kills(&self, cgroup: &str) -> u64 {
        match self {
            Self::V1(_) => stats::oom_kills(&self.read("memory", cgroup, "memory.oom_control")),
            Self::V2(_) => stats::oom_kills(&self.read("", cgroup, "memory.events")),
        }
    }

    /// Whether a file exists in the root of a controller.
    pub fn root_has(&self, controller: &str, file: &str) -> bool {
        self.root(controller).is_some_and(|root| root.join(file).exists())
    }

    /// The directory of a controller.
    fn root(&self, controller: &str) -> Option<&Path> {
        match self {
            Self::V1(controllers) => controllers.get(controller).map(PathBuf::as_path),
            Self::V2(root) => Some(root),
        }
    }

    fn read(&self, controller: &str, cgroup: &str, file: &str) -> String {
        let Some(root) = self.root(controller) else { return String::new() };
        std::fs::read_to_string(root.join(cgroup.trim_start_matches('/')).join(file)).unwrap_or_default()
    }
}

/// Where cgroup hierarchies of either version are mounted, all of them: on a hybrid node a process is in a cgroup of each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Roots(Vec<PathBuf>);

/// Between two looks at a cgroup whose processes are ending.
const PAUSE: Duration = Duration::from_millis(2);

impl Roots {
    /// Reads them from the text of `/proc/self/mountinfo`.
    pub fn from_mountinfo(mountinfo: &str) -> Self {
        let points = mountinfo.lines().filter_map(|line| {
            let (head, tail) = line.split_once(" - ")?;
            matches!(tail.split(' ').next()?, "cgroup" | "cgroup2").then(|| head.split(' ').nth(4))?
        });
        Self(points.map(PathBuf::from).collect())
    }

    /// Kills whatever is in a cgroup and below it, and removes it from every hierarchy. None is fine. Blocks.
    pub fn clear(&self, cgroup: &str, patience: Duration) -> Result<(), RuntimeError> {
        let below = cgroup.trim_start_matches('/');
        // A path that could mean a hierarchy's root, or lead out of it, names no cgroup of ours.
        if below.is_empty() || Path::new(below).components().any(|part| !matches!(part, Component::Normal(_)))
        {
            let problem = format!("{cgroup:?} names no cgroup of a container");
            return Err(RuntimeError::Invalid { field: "linux.cgroup_parent", problem });
        }
        let begun = Instant::now();
        let mut left: Vec<PathBuf> = self.0.iter().map(|root| root.join(below)).collect();
        loop {
            // Removed first: nearly always nothing is in it any more.
            left.retain(|directory| !removed(directory));
            let Some(first) = left.first() else { return Ok(()) };
            if begun.elapsed() > patience {
                let what = format!("removing cgroup {}", first.display());
                return Err(RuntimeError::Deadline { what, seconds: patience.as_secs() });
            }
            for directory in &left {
                kill_in(directory, below);
            }
            std::thread::sleep(PAUSE);
        }
    }
}

/// Removes a cgroup with those below it; says whether it is gone.
fn removed(directory: &Path) -> bool {
    match std::fs::remove_dir(directory) {
        Ok(()) => return true,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return true,
        Err(_) => {}
    }
    for below in children(directory) {
        removed(&below);
    }
    std::fs::remove_dir(directory).is_ok()
}

fn kill_in(directory: &Path, cgroup: &str) {
    for below in children(directory) {
        kill_in(&below, cgroup);
    }
    let list = std::fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
    for pid in list.lines().filter_map(|line| line.parse::<u32>().ok()) {
        let Some(process) =
            process::start_time(pid).and_then(|began| process::open(pid, began).ok()).flatten()
        else {
            continue;
        };
        // Looked at once more now that the descriptor is held: the id may have changed hands since the list was read.
        let place = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        if place.contains(cgroup) && process::kill(&process).is_err() {
            tracing::warn!(pid, cgroup, "a process cannot be killed");
        }
    }
}

fn children(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hybrid_node_counts_as_version_1() {
        let text = "30 1 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
            31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
            32 30 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let Hierarchies::V1(found) = Hierarchies::from_mountinfo(text) else { panic!("version 1") };
        assert_eq!(found["cpuacct"], Path::new("/sys/fs/cgroup/cpu,cpuacct"));
        let text = "31 30 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(Hierarchies::from_mountinfo(text), Hierarchies::V2("/sys/fs/cgroup".into()));
    }

    #[test]
    fn every_hierarchy_of_a_hybrid_node_is_cleared_and_no_path_leads_out() {
        let text = "31 30 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
            32 30 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
            33 30 0:29 / /dev/shm rw - tmpfs tmpfs rw\n";
        let roots = Roots::from_mountinfo(text);
        assert_eq!(roots.0, [Path::new("/sys/fs/cgroup/cpu"), Path::new("/sys/fs/cgroup/unified")]);
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(directory.path().join("pod/c1/init")).unwrap();
        let roots = Roots(vec![directory.path().to_owned(), "/nowhere".into()]);
        roots.clear("/pod/c1", Duration::ZERO).unwrap();
        roots.clear("/pod/c1", Duration::ZERO).unwrap();
        assert!(directory.path().join("pod").is_dir());
        for path in ["/", "", "/pod/../.."] {
            assert!(roots.clear(path, Duration::ZERO).is_err(), "{path:?}");
        }
    }
}
