//! The machine's processors, from sysfs. Blocks.

use std::path::Path;

use agent_core::cpus::{CpuSet, Place, Topology};
use anyhow::Context as _;

/// Where the kernel tells of them.
pub(super) const SYSFS: &str = "/sys/devices/system/cpu";

/// The processors that are on, with sockets and cores. Where the kernel does not tell of these (some virtual machines), each
/// processor counts as a core of one socket.
pub(super) fn read(sysfs: &Path) -> anyhow::Result<Topology> {
    let path = sysfs.join("online");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let online: CpuSet = text.parse().with_context(|| format!("cannot read {}", path.display()))?;
    Ok(online.iter().map(|cpu| (cpu, place(sysfs, cpu))).collect())
}

fn place(sysfs: &Path, cpu: u32) -> Place {
    let directory = sysfs.join(format!("cpu{cpu}/topology"));
    let read = |file: &str| std::fs::read_to_string(directory.join(file)).ok();
    let siblings: Option<CpuSet> = ["core_cpus_list", "thread_siblings_list"]
        .into_iter()
        .find_map(read)
        .and_then(|text| text.parse().ok());
    // Numbers of cores start again on each socket; the first thread's number does not.
    let core = siblings.and_then(|siblings| siblings.iter().next()).unwrap_or(cpu);
    let socket = read("physical_package_id").and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    Place { socket, core }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_and_cores_are_as_the_kernel_says() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        std::fs::write(root.join("online"), "0-3\n").unwrap();
        for (cpu, siblings, socket) in [(0, "0,2", "0"), (1, "1,3", "1"), (2, "0,2", "0"), (3, "1,3", "1")] {
            let topology = root.join(format!("cpu{cpu}/topology"));
            std::fs::create_dir_all(&topology).unwrap();
            std::fs::write(topology.join("core_cpus_list"), format!("{siblings}\n")).unwrap();
            std::fs::write(topology.join("physical_package_id"), format!("{socket}\n")).unwrap();
        }
        let found = read(root).unwrap();
        let at = |cpu: u32| found.get(&cpu).map(|place| (place.socket, place.core));
        assert_eq!((at(0), at(1), at(2), at(3)), (Some((0, 0)), Some((1, 1)), Some((0, 0)), Some((1, 1))));
        std::fs::remove_dir_all(root.join("cpu3")).unwrap();
        assert_eq!(read(root).unwrap().get(&3), Some(&Place { socket: 0, core: 3 }));
        assert!(!read(Path::new(SYSFS)).unwrap().is_empty(), "this machine has some");
    }
}
