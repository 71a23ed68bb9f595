//! Figures in CRI's messages.

use std::path::Path;

use containerd_client::services::v1::snapshots::UsageResponse;
use cri_shim_api::v1::{
    ContainerAttributes, ContainerStats, CpuUsage, FilesystemIdentifier, FilesystemUsage, IoUsage,
    MemoryUsage, NetworkInterfaceUsage, NetworkUsage, PodSandboxAttributes, PsiData, PsiStats, SwapUsage,
    UInt64Value,
};
use cri_shim_core::record::{ContainerRecord, SandboxRecord};
use cri_shim_core::stats::{CgroupUsage, InterfaceCounters, Pressure, Stall};

use super::Reading;

#[allow(clippy::unnecessary_wraps, reason = "the messages hold optional wrappers")]
pub(super) fn value(value: u64) -> Option<UInt64Value> {
    Some(UInt64Value { value })
}

/// A container's figures; without a reading it does not run.
pub(super) fn container(
    record: &ContainerRecord,
    reading: Option<&Reading>,
    layer: Option<FilesystemUsage>,
) -> ContainerStats {
    ContainerStats {
        attributes: Some(container_attributes(record)),
        cpu: reading.map(cpu),
        memory: reading.map(memory),
        writable_layer: layer,
        swap: reading.map(swap),
        io: reading.map(io),
    }
}

pub(super) fn cpu(reading: &Reading) -> CpuUsage {
    CpuUsage {
        timestamp: reading.at,
        usage_core_nano_seconds: value(reading.usage.cpu_nanoseconds),
        usage_nano_cores: reading.nano_cores.and_then(value),
        psi: reading.usage.cpu_pressure.map(psi),
    }
}

pub(super) fn memory(reading: &Reading) -> MemoryUsage {
    let usage = &reading.usage;
    let available = usage.memory_limit.map(|limit| limit.saturating_sub(usage.working_set_bytes));
    MemoryUsage {
        timestamp: reading.at,
        working_set_bytes: value(usage.working_set_bytes),
        available_bytes: available.and_then(value),
        usage_bytes: value(usage.memory_bytes),
        rss_bytes: value(usage.rss_bytes),
        page_faults: value(usage.page_faults),
        major_page_faults: value(usage.major_page_faults),
        psi: usage.memory_pressure.map(psi),
    }
}

fn swap(reading: &Reading) -> SwapUsage {
    let usage = &reading.usage;
    SwapUsage {
        timestamp: reading.at,
        swap_available_bytes: usage
            .swap_limit
            .and_then(|limit| value(limit.saturating_sub(usage.swap_bytes))),
        swap_usage_bytes: value(usage.swap_bytes),
    }
}

pub(super) fn io(reading: &Reading) -> IoUsage {
    IoUsage { timestamp: reading.at, psi: reading.usage.io_pressure.map(psi) }
}

fn psi(pressure: Pressure) -> PsiStats {
    let data = |stall: Stall| PsiData {
        total: stall.total_nanoseconds,
        avg10: stall.avg10,
        avg60: stall.avg60,
        avg300: stall.avg300,
    };
    PsiStats { full: Some(data(pressure.full)), some: Some(data(pressure.some)) }
}

pub(super) fn network(now: i64, counters: &[InterfaceCounters]) -> NetworkUsage {
    let mut all: Vec<NetworkInterfaceUsage> = counters
        .iter()
        .map(|counters| NetworkInterfaceUsage {
            name: counters.name.clone(),
            rx_bytes: value(counters.rx_bytes),
            rx_errors: value(counters.rx_errors),
            tx_bytes: value(counters.tx_bytes),
            tx_errors: value(counters.tx_errors),
        })
        .collect();
    let default = all.iter().position(|usage| usage.name == "eth0").map(|index| all.remove(index));
    NetworkUsage { timestamp: now, default_interface: default, interfaces: all }
}

/// The size of a writable layer, which the snapshotter keeps in `directory`.
pub(super) fn layer(now: i64, disk: &UsageResponse, directory: Option<&Path>) -> FilesystemUsage {
    let mountpoint = |directory: &Path| directory.to_string_lossy().into_owned();
    FilesystemUsage {
        timestamp: now,
        // The same as ImageFsInfo's, by which clients tell which file system it is.
        fs_id: directory.map(|directory| FilesystemIdentifier { mountpoint: mountpoint(directory) }),
        used_bytes: value(u64::try_from(disk.size).unwrap_or_default()),
        inodes_used: value(u64::try_from(disk.inodes).unwrap_or_default()),
    }
}

fn container_attributes(record: &ContainerRecord) -> ContainerAttributes {
    ContainerAttributes {
        id: record.id.clone(),
        metadata: record.config.metadata.clone(),
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
    }
}

pub(super) fn sandbox_attributes(record: &SandboxRecord) -> PodSandboxAttributes {
    PodSandboxAttributes {
        id: record.id.clone(),
        metadata: record.config.metadata.clone(),
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
    }
}

/// The usage of two cgroups together. Limits and pressure have no sum.
pub(super) fn sum(one: &CgroupUsage, other: &CgroupUsage) -> CgroupUsage {
    CgroupUsage {
        cpu_nanoseconds: one.cpu_nanoseconds + other.cpu_nanoseconds,
        memory_bytes: one.memory_bytes + other.memory_bytes,
        working_set_bytes: one.working_set_bytes + other.working_set_bytes,
        rss_bytes: one.rss_bytes + other.rss_bytes,
        memory_limit: None,
        cache_bytes: one.cache_bytes + other.cache_bytes,
        mapped_file_bytes: one.mapped_file_bytes + other.mapped_file_bytes,
        page_faults: one.page_faults + other.page_faults,
        major_page_faults: one.major_page_faults + other.major_page_faults,
        processes: one.processes + other.processes,
        swap_bytes: one.swap_bytes + other.swap_bytes,
        swap_limit: None,
        cpu_pressure: None,
        memory_pressure: None,
        io_pressure: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading() -> Reading {
        let usage = CgroupUsage {
            cpu_nanoseconds: 7,
            memory_bytes: 100,
            working_set_bytes: 60,
            memory_limit: Some(50),
            swap_bytes: 5,
            swap_limit: Some(9),
            io_pressure: Some(Pressure {
                some: Stall { total_nanoseconds: 3, ..Stall::default() },
                full: Stall::default(),
            }),
            ..CgroupUsage::default()
        };
        Reading { at: 11, usage, nano_cores: Some(2) }
    }

    #[test]
    fn available_memory_is_never_negative_and_swap_is_what_the_limit_leaves() {
        let stats = container(&ContainerRecord::default(), Some(&reading()), None);
        assert_eq!(stats.memory.and_then(|memory| memory.available_bytes).map(|one| one.value), Some(0));
        assert_eq!(stats.swap.and_then(|swap| swap.swap_available_bytes).map(|one| one.value), Some(4));
        assert_eq!(stats.cpu.and_then(|cpu| cpu.usage_nano_cores).map(|one| one.value), Some(2));
        let io = stats.io.and_then(|io| io.psi).and_then(|psi| psi.some);
        assert_eq!(io.map(|some| some.total), Some(3));
    }

    #[test]
    fn a_container_that_does_not_run_has_no_figures_of_processes() {
        let stats = container(&ContainerRecord::default(), None, Some(FilesystemUsage::default()));
        assert!(stats.cpu.is_none() && stats.memory.is_none() && stats.writable_layer.is_some());
    }

    #[test]
    fn parts_of_a_pod_add_up() {
        let both = sum(&reading().usage, &reading().usage);
        assert_eq!((both.cpu_nanoseconds, both.memory_bytes, both.memory_limit), (14, 200, None));
    }

    #[test]
    fn the_pods_own_interface_is_the_default_one() {
        let named = |name: &str| InterfaceCounters { name: name.to_owned(), ..InterfaceCounters::default() };
        let usage = network(1, &[named("net1"), named("eth0")]);
        assert_eq!(usage.default_interface.map(|one| one.name).as_deref(), Some("eth0"));
        assert_eq!(usage.interfaces.len(), 1);
    }
}
