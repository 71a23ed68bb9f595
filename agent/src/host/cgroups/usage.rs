//! What a cgroup with all below it uses, from the files of its hierarchies. Blocks, but briefly.

use std::path::Path;
use std::time::Duration;

use super::hierarchy::{Hierarchy, Version, mounted};

/// A larger limit is none: v1 shows the largest number of pages.
const NO_LIMIT: u64 = 1 << 60;

/// Figures of a cgroup; what no hierarchy tells is absent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CgroupUse {
    /// CPU time.
    pub cpu: Option<Duration>,
    /// Memory, caches included.
    pub memory: Option<u64>,
    /// Memory without what the kernel can drop at once.
    pub working_set: Option<u64>,
    /// Anonymous memory.
    pub rss: Option<u64>,
    /// What it may use.
    pub memory_limit: Option<u64>,
}

/// Reads the figures of `path`, relative to the hierarchies' roots.
pub fn read(path: &str) -> CgroupUse {
    let mut used = CgroupUse::default();
    for hierarchy in mounted().unwrap_or_default() {
        let directory = hierarchy.dir(path);
        if hierarchy.has("memory") {
            add_memory(&mut used, &directory, hierarchy.version);
        }
        add_cpu(&mut used, &directory, &hierarchy);
    }
    used
}

fn add_memory(used: &mut CgroupUse, directory: &Path, version: Version) {
    let (usage, limit, inactive, rss) = match version {
        Version::V1 => ("memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file", "total_rss"),
        Version::V2 => ("memory.current", "memory.max", "inactive_file", "anon"),
    };
    let Some(usage) = number(directory, usage) else { return };
    let inactive = field(directory, "memory.stat", inactive).unwrap_or(0);
    used.memory = Some(usage);
    used.working_set = Some(usage.saturating_sub(inactive));
    used.rss = field(directory, "memory.stat", rss);
    used.memory_limit = number(directory, limit).filter(|limit| *limit < NO_LIMIT);
}

fn add_cpu(used: &mut CgroupUse, directory: &Path, hierarchy: &Hierarchy) {
    let cpu = match hierarchy.version {
        Version::V1 if hierarchy.has("cpuacct") => {
            number(directory, "cpuacct.usage").map(Duration::from_nanos)
        }
        Version::V2 => field(directory, "cpu.stat", "usage_usec").map(Duration::from_micros),
        Version::V1 => None,
    };
    // On hybrid hosts the unified hierarchy counts too, and nothing is in it.
    if cpu > used.cpu {
        used.cpu = cpu;
    }
}

fn number(directory: &Path, file: &str) -> Option<u64> {
    std::fs::read_to_string(directory.join(file)).ok()?.trim().parse().ok()
}

fn field(directory: &Path, file: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(directory.join(file)).ok()?;
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    lines.find(|(key, _)| *key == name)?.1.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_interfaces_are_read() {
        let directory = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| std::fs::write(directory.path().join(file), text).unwrap();
        write("memory.current", "5000\n");
        write("memory.max", "max\n");
        write("memory.stat", "anon 100\ninactive_file 2000\n");
        let mut used = CgroupUse::default();
        add_memory(&mut used, directory.path(), Version::V2);
        assert_eq!((used.memory, used.working_set, used.rss), (Some(5000), Some(3000), Some(100)));
        assert_eq!(used.memory_limit, None);
        write("memory.usage_in_bytes", "900");
        write("memory.limit_in_bytes", "1000");
        write("memory.stat", "total_rss 7\ntotal_inactive_file 300\n");
        add_memory(&mut used, directory.path(), Version::V1);
        assert_eq!((used.working_set, used.rss, used.memory_limit), (Some(600), Some(7), Some(1000)));
    }

    #[test]
    fn a_cgroup_that_is_not_there_uses_nothing() {
        assert_eq!(read("/no/such/cgroup"), CgroupUse::default());
    }
}
