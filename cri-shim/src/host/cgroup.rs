//! Where the cgroup hierarchies are mounted, and the files of one cgroup.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cri_shim_core::stats::{self, CgroupUsage, V1Files, V2Files};

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
}
