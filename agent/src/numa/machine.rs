//! The machine's processors and memory by NUMA node, from sysfs. Blocks.

use std::collections::BTreeMap;
use std::path::Path;

use agent_core::cpus::{CpuSet, Place, Topology};
use agent_core::memory::{Amounts, Bank};
use anyhow::Context as _;

use crate::node::huge_pages;

/// Where the kernel tells of devices.
pub(super) const SYSFS: &str = "/sys/devices/system";

/// The processors that are on, with sockets, cores and nodes. Where the kernel does not tell of these (some virtual machines),
/// each processor counts as a core of one socket, on one node.
pub(super) fn processors(sysfs: &Path) -> anyhow::Result<Topology> {
    let online = set(&sysfs.join("cpu/online"))?;
    let nodes = nodes(sysfs)?;
    let node_of = |cpu| {
        let has = |node: &u32| {
            set(&sysfs.join(format!("node/node{node}/cpulist"))).is_ok_and(|set| set.contains(cpu))
        };
        nodes.iter().copied().find(has).unwrap_or(0)
    };
    Ok(online.iter().map(|cpu| (cpu, place(sysfs, cpu, node_of(cpu)))).collect())
}

/// The distances between the nodes, as the firmware tells them.
pub(super) fn distances(sysfs: &Path) -> anyhow::Result<BTreeMap<u32, BTreeMap<u32, u64>>> {
    let nodes = nodes(sysfs)?;
    let of = |node: u32| {
        let text = std::fs::read_to_string(sysfs.join(format!("node/node{node}/distance")));
        let text = text.unwrap_or_default();
        let told = text.split_whitespace().filter_map(|number| number.parse().ok());
        nodes.iter().copied().zip(told).collect()
    };
    Ok(nodes.iter().map(|node| (*node, of(*node))).collect())
}

/// What each node has, huge pages apart from the rest.
pub(super) fn memory(sysfs: &Path) -> anyhow::Result<Bank> {
    let of = |node: u32| {
        let directory = sysfs.join(format!("node/node{node}"));
        let (path, prefix) = if directory.exists() {
            (directory.join("meminfo"), format!("Node {node} "))
        } else {
            (Path::new("/proc/meminfo").to_owned(), String::new())
        };
        let text =
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let lines = text.lines().map(|line| line.trim_start().strip_prefix(&prefix).unwrap_or(line));
        let total = lines
            .filter_map(|line| line.trim_start().strip_prefix("MemTotal:"))
            .find_map(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
        let total = total.with_context(|| format!("{} tells no MemTotal", path.display()))? * 1024;
        let mut amounts: Amounts = huge_pages(&directory.join("hugepages"));
        amounts.retain(|_, bytes| *bytes > 0);
        let pages: u64 = amounts.values().sum();
        amounts.insert("memory".to_owned(), total.saturating_sub(pages));
        anyhow::Ok((node, amounts))
    };
    // Nodes of processors alone have no memory to give.
    let all = nodes(sysfs)?.iter().map(|node| of(*node)).collect::<anyhow::Result<BTreeMap<_, _>>>()?;
    Ok(Bank(all))
}

/// The numbers of the nodes; 0 alone where the kernel knows of none.
fn nodes(sysfs: &Path) -> anyhow::Result<Vec<u32>> {
    let path = sysfs.join("node/online");
    if !path.exists() {
        return Ok(vec![0]);
    }
    Ok(set(&path)?.iter().collect())
}

fn set(path: &Path) -> anyhow::Result<CpuSet> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    text.parse().with_context(|| format!("cannot read {}", path.display()))
}

fn place(sysfs: &Path, cpu: u32, node: u32) -> Place {
    let directory = sysfs.join(format!("cpu/cpu{cpu}/topology"));
    let read = |file: &str| std::fs::read_to_string(directory.join(file)).ok();
    let siblings: Option<CpuSet> = ["core_cpus_list", "thread_siblings_list"]
        .into_iter()
        .find_map(read)
        .and_then(|text| text.parse().ok());
    // Numbers of cores start again on each socket; the first thread's number does not.
    let core = siblings.and_then(|siblings| siblings.iter().next()).unwrap_or(cpu);
    let socket = read("physical_package_id").and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    Place { socket, core, node }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, text: &str) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    #[test]
    fn processors_are_where_the_kernel_says() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        write(&root.join("cpu/online"), "0-3\n");
        for (cpu, siblings, socket) in [(0, "0,2", "0"), (1, "1,3", "1"), (2, "0,2", "0"), (3, "1,3", "1")] {
            let topology = root.join(format!("cpu/cpu{cpu}/topology"));
            write(&topology.join("core_cpus_list"), &format!("{siblings}\n"));
            write(&topology.join("physical_package_id"), &format!("{socket}\n"));
        }
        let at = |cpu: u32| {
            let found = processors(root).unwrap();
            found.get(&cpu).map(|place| (place.socket, place.core, place.node)).unwrap()
        };
        assert_eq!((at(0), at(1), at(2), at(3)), ((0, 0, 0), (1, 1, 0), (0, 0, 0), (1, 1, 0)));
        write(&root.join("node/online"), "0-1\n");
        write(&root.join("node/node0/cpulist"), "0,2\n");
        write(&root.join("node/node1/cpulist"), "1,3\n");
        assert_eq!((at(0), at(1)), ((0, 0, 0), (1, 1, 1)));
        std::fs::remove_dir_all(root.join("cpu/cpu3")).unwrap();
        assert_eq!(at(3), (0, 3, 1));
        assert!(!processors(Path::new(SYSFS)).unwrap().is_empty(), "this machine has some");
    }

    #[test]
    fn memory_is_told_by_node_and_huge_pages_apart() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        write(&root.join("node/online"), "0-1\n");
        for node in 0..2 {
            let at = root.join(format!("node/node{node}"));
            write(
                &at.join("meminfo"),
                &format!("Node {node} MemTotal:       8192 kB\nNode {node} MemFree: 1 kB\n"),
            );
            write(&at.join("hugepages/hugepages-2048kB/nr_hugepages"), &format!("{node}\n"));
            write(&at.join("distance"), "10 21\n");
        }
        let bank = memory(root).unwrap();
        assert_eq!((bank.of(0, "memory"), bank.of(0, "hugepages-2Mi")), (8 << 20, 0));
        assert_eq!((bank.of(1, "memory"), bank.of(1, "hugepages-2Mi")), (6 << 20, 2 << 20));
        assert_eq!(distances(root).unwrap()[&1][&1], 21);
        assert!(memory(Path::new(SYSFS)).unwrap().0.values().any(|amounts| amounts["memory"] > 0));
        assert!(!distances(Path::new(SYSFS)).unwrap().is_empty());
    }
}
