//! Figures of containers and sandboxes: from cgroup files, the sandbox's interfaces and the writable snapshot.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use cri_shim_api::v1::{
    ContainerAttributes, ContainerStats, ContainerStatsFilter, CpuUsage, FilesystemUsage,
    LinuxPodSandboxStats, MemoryUsage, NetworkInterfaceUsage, NetworkUsage, PodSandboxAttributes,
    PodSandboxStats, PodSandboxStatsFilter, ProcessUsage, SwapUsage, UInt64Value,
};
use cri_shim_core::filter;
use cri_shim_core::record::{ContainerPhase, ContainerRecord, SandboxPhase, SandboxRecord};
use cri_shim_core::stats::{CgroupUsage, InterfaceCounters, interfaces, nano_cores};
use futures::future::join_all;

use crate::clock;
use crate::error::RuntimeError;
use crate::host::blocking;
use crate::runtime::Runtime;
use crate::state::{Container, Sandbox};

/// The least time in nanoseconds between two readings that a rate is told from.
const RATE_WINDOW: i64 = 500_000_000;

/// The CPU figure of an earlier request and the rate told then.
#[derive(Debug, Default)]
pub struct LastReading(Mutex<Reading>);

#[derive(Debug, Default)]
struct Reading {
    /// When, and CPU time used until then.
    at: Option<(i64, u64)>,
    rate: Option<u64>,
}

impl LastReading {
    /// The rate since an earlier reading; the last one known when that was only just now.
    fn rate(&self, now: i64, used: u64) -> Option<u64> {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match last.at {
            Some(earlier) if now - earlier.0 < RATE_WINDOW => {}
            Some(earlier) => {
                *last = Reading { at: Some((now, used)), rate: nano_cores(earlier, (now, used)) };
            }
            None => last.at = Some((now, used)),
        }
        last.rate
    }
}

impl Runtime {
    /// The figures of one container.
    pub async fn container_stats(&self, id: &str) -> Result<ContainerStats, RuntimeError> {
        let container = self.container(id)?;
        self.measure_container(&container).await
    }

    /// The figures of every running container that matches.
    pub async fn list_container_stats(&self, wanted: Option<&ContainerStatsFilter>) -> Vec<ContainerStats> {
        let shown = |container: &&Arc<Container>| {
            container.record.with(|record| {
                record.phase() == ContainerPhase::Running && filter::container_stats(wanted, record)
            })
        };
        let containers = self.registry.containers();
        let all = containers.iter().filter(shown).map(|container| self.measure_container(container));
        // One that vanished while being measured is left out.
        join_all(all).await.into_iter().filter_map(Result::ok).collect()
    }

    /// The figures of one sandbox.
    pub async fn sandbox_stats(&self, id: &str) -> Result<PodSandboxStats, RuntimeError> {
        let sandbox = self.sandbox(id)?;
        self.measure_sandbox(&sandbox).await
    }

    /// The figures of every ready sandbox that matches.
    pub async fn list_sandbox_stats(&self, wanted: Option<&PodSandboxStatsFilter>) -> Vec<PodSandboxStats> {
        let shown = |sandbox: &&Arc<Sandbox>| {
            sandbox
                .record
                .with(|record| record.phase() == SandboxPhase::Ready && filter::sandbox_stats(wanted, record))
        };
        let sandboxes = self.registry.sandboxes();
        let all = sandboxes.iter().filter(shown).map(|sandbox| self.measure_sandbox(sandbox));
        join_all(all).await.into_iter().filter_map(Result::ok).collect()
    }

    async fn measure_container(&self, container: &Container) -> Result<ContainerStats, RuntimeError> {
        let record = container.record.get();
        let usage = self.usage_of(record.cgroup.clone()).await?;
        let disk = self.client.snapshot_usage(&record.id).await.ok();
        let now = clock::now();
        Ok(ContainerStats {
            attributes: Some(container_attributes(&record)),
            cpu: Some(cpu(now, &usage, &container.last_cpu)),
            memory: Some(memory(now, &usage)),
            writable_layer: disk.map(|disk| FilesystemUsage {
                timestamp: now,
                // Where the snapshotter keeps it is containerd's business; ImageFsInfo tells.
                fs_id: None,
                used_bytes: value(u64::try_from(disk.size).unwrap_or_default()),
                inodes_used: value(u64::try_from(disk.inodes).unwrap_or_default()),
            }),
            swap: Some(SwapUsage {
                timestamp: now,
                swap_available_bytes: None,
                swap_usage_bytes: value(usage.swap_bytes),
            }),
            io: None,
        })
    }

    async fn measure_sandbox(&self, sandbox: &Sandbox) -> Result<PodSandboxStats, RuntimeError> {
        let record = sandbox.record.get();
        // The pod's own cgroup holds everything; without one the pause process's must do.
        let cgroup = match self.cgroup_driver.pod_directory(record.cgroup_parent()) {
            Some(directory) => directory,
            None => self.cgroup("", &record.id)?.directory,
        };
        let usage = self.usage_of(cgroup).await?;
        let counters = if record.host_network() { Vec::new() } else { read_interfaces(record.pid).await? };
        let wanted =
            ContainerStatsFilter { pod_sandbox_id: record.id.clone(), ..ContainerStatsFilter::default() };
        let containers = self.list_container_stats(Some(&wanted)).await;
        let now = clock::now();
        let linux = LinuxPodSandboxStats {
            cpu: Some(cpu(now, &usage, &sandbox.last_cpu)),
            memory: Some(memory(now, &usage)),
            network: Some(network(now, &counters)),
            process: Some(ProcessUsage { timestamp: now, process_count: value(usage.processes) }),
            containers,
            io: None,
        };
        Ok(PodSandboxStats {
            attributes: Some(sandbox_attributes(&record)),
            linux: Some(linux),
            windows: None,
        })
    }

    async fn usage_of(&self, cgroup: String) -> Result<CgroupUsage, RuntimeError> {
        let hierarchies = self.hierarchies.clone();
        blocking(move || Ok(hierarchies.usage(&cgroup))).await
    }
}

async fn read_interfaces(pid: u32) -> Result<Vec<InterfaceCounters>, RuntimeError> {
    blocking(move || {
        let path = format!("/proc/{pid}/net/dev");
        let text = std::fs::read_to_string(&path).map_err(RuntimeError::host("read", Path::new(&path)))?;
        Ok(interfaces(&text))
    })
    .await
}

#[allow(clippy::unnecessary_wraps, reason = "the messages hold optional wrappers")]
fn value(value: u64) -> Option<UInt64Value> {
    Some(UInt64Value { value })
}

fn cpu(now: i64, usage: &CgroupUsage, last: &LastReading) -> CpuUsage {
    CpuUsage {
        timestamp: now,
        usage_core_nano_seconds: value(usage.cpu_nanoseconds),
        usage_nano_cores: last.rate(now, usage.cpu_nanoseconds).and_then(value),
        psi: None,
    }
}

fn memory(now: i64, usage: &CgroupUsage) -> MemoryUsage {
    let available = usage.memory_limit.map(|limit| limit.saturating_sub(usage.working_set_bytes));
    MemoryUsage {
        timestamp: now,
        working_set_bytes: value(usage.working_set_bytes),
        available_bytes: available.and_then(value),
        usage_bytes: value(usage.memory_bytes),
        rss_bytes: value(usage.rss_bytes),
        page_faults: value(usage.page_faults),
        major_page_faults: value(usage.major_page_faults),
        psi: None,
    }
}

fn network(now: i64, counters: &[InterfaceCounters]) -> NetworkUsage {
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

fn container_attributes(record: &ContainerRecord) -> ContainerAttributes {
    ContainerAttributes {
        id: record.id.clone(),
        metadata: record.config.metadata.clone(),
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
    }
}

fn sandbox_attributes(record: &SandboxRecord) -> PodSandboxAttributes {
    PodSandboxAttributes {
        id: record.id.clone(),
        metadata: record.config.metadata.clone(),
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_needs_two_readings_some_time_apart() {
        let last = LastReading::default();
        assert_eq!(last.rate(0, 0), None);
        assert_eq!(last.rate(1_000_000_000, 250_000_000), Some(250_000_000));
        assert_eq!(last.rate(1_000_000_001, 999_000_000), Some(250_000_000), "too soon for a new one");
    }
}
