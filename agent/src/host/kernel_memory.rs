//! What the kernel can do for containers' memory, and the node's swap. Read once: small files, blocking.

use std::io;
use std::path::Path;

use super::cgroups;

/// Facts that limits of containers depend on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KernelMemory {
    /// All controllers are in the version 2 hierarchy.
    pub unified: bool,
    /// Swap is counted per cgroup.
    pub swap_controller: bool,
    /// Swap of the node in bytes.
    pub swap_capacity: u64,
}

impl KernelMemory {
    /// Of this machine; what cannot be read counts as missing.
    pub fn read() -> Self {
        let unified = cgroups::is_unified().unwrap_or(false);
        Self {
            unified,
            swap_controller: cgroups::counts_swap().unwrap_or(false),
            swap_capacity: swap_capacity(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default()),
        }
    }
}

/// Names of the files and devices that the kernel swaps to.
pub fn swaps() -> io::Result<Vec<String>> {
    match std::fs::read_to_string("/proc/swaps") {
        Ok(text) => Ok(names(&text)),
        // A kernel without swap.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// The first column, below the heading.
fn names(swaps: &str) -> Vec<String> {
    let lines = swaps.lines().filter(|line| !line.trim().is_empty()).skip(1);
    lines.filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}

/// `SwapTotal` in bytes.
pub(crate) fn swap_capacity(meminfo: &str) -> u64 {
    let kib = meminfo.lines().find_map(|line| line.strip_prefix("SwapTotal:"));
    kib.and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// The version 2 cgroup of a process, of `/proc/PID/cgroup`.
pub(super) fn own_unified(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("0::"))
}

/// Whether a version 2 hierarchy counts swap: its root never tells, the cgroups below do.
pub(super) fn has_swap_file(mount_point: &Path, own: &str) -> bool {
    mount_point.join(own.trim_start_matches('/')).join("memory.swap.max").exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_tables_are_read() {
        let heading = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n";
        assert_eq!(names(heading), Vec::<String>::new());
        assert_eq!(names(""), Vec::<String>::new());
        let two =
            format!("{heading}/dev/dm-1   partition\t33554428\t0\t\t-2\n/swap\\040file file\t4\t0\t-3\n");
        assert_eq!(names(&two), ["/dev/dm-1", "/swap\\040file"]);
        assert_eq!(swap_capacity("MemTotal: 9 kB\nSwapTotal:       2048 kB\n"), 2 << 20);
        assert_eq!(own_unified("1:name=systemd:/x\n0::/user.slice/a\n"), Some("/user.slice/a"));
    }
}
