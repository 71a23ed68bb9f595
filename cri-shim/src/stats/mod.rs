//! Figures of containers and sandboxes: from cgroup files, the sandbox's interfaces and the writable snapshot.
//!
//! Nothing is read while nobody asks. A rate of CPU use is the one between the last two requests; the first request after a
//! pause reads twice, [`SAMPLE`] apart. One request reads everything on one thread, so a full node costs one list one
//! thread. What walks over files (the size of a writable layer) is asked of containerd at most once in [`FRESH`].
//!
//! [`last`] is what is kept between requests, [`metrics`] the same figures under cAdvisor's names.

mod convert;
pub mod last;
mod metrics;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cri_shim_api::v1::{
    ContainerStats, ContainerStatsFilter, FilesystemUsage, LinuxPodSandboxStats, PodSandboxStats,
    PodSandboxStatsFilter, ProcessUsage,
};
use cri_shim_core::filter;
use cri_shim_core::record::{ContainerPhase, SandboxPhase};
use cri_shim_core::stats::{CgroupUsage, InterfaceCounters};
use futures::future::join_all;
use tokio::sync::OnceCell;

pub use self::last::LastFigures;
use crate::clock;
use crate::config::Config;
use crate::error::RuntimeError;
use crate::host::{blocking, figures};
use crate::runtime::Runtime;
use crate::state::{Container, Sandbox};

/// How far apart the two readings of a first request are.
const SAMPLE: Duration = Duration::from_millis(100);
/// How long a size of a writable layer is good.
const FRESH: Duration = Duration::from_secs(10);
/// How long a request waits for such a size before it goes without, or with an older one.
const DISK_PATIENCE: Duration = Duration::from_secs(2);

/// What is found out once, or told by the client.
#[derive(Debug, Default)]
pub struct Collector {
    config: serde_json::Value,
    snapshots: OnceCell<Option<PathBuf>>,
    pod_cidr: Mutex<String>,
}

impl Collector {
    /// Nothing found out yet; keeps the configuration, to be shown.
    pub fn new(config: &Config) -> Self {
        // A configuration that was read can be written; if not, only its display is missing.
        Self { config: serde_json::to_value(config).unwrap_or_default(), ..Self::default() }
    }

    /// The configuration in force, and what the client told.
    pub fn config(&self) -> serde_json::Value {
        let mut config = self.config.clone();
        config["podCIDR"] = self.pod_cidr().into();
        config
    }

    /// Keeps the addresses that pods of this node get, as the client says.
    pub fn set_pod_cidr(&self, ranges: String) -> Result<(), RuntimeError> {
        // One per address family.
        let valid = |range: &str| {
            let (address, bits) = range.trim().split_once('/')?;
            let most = if address.parse::<std::net::IpAddr>().ok()?.is_ipv4() { 32 } else { 128 };
            bits.parse::<u8>().ok().filter(|bits| *bits <= most)
        };
        if let Some(wrong) = ranges.split(',').find(|range| !range.is_empty() && valid(range).is_none()) {
            let problem = format!("{wrong:?} is not a range of addresses");
            return Err(RuntimeError::Invalid { field: "pod_cidr", problem });
        }
        tracing::info!(pod_cidr = ranges, "the client told the pod CIDR; the CNI configuration decides");
        *self.pod_cidr.lock().unwrap_or_else(PoisonError::into_inner) = ranges;
        Ok(())
    }

    /// What [`Self::set_pod_cidr`] kept.
    pub fn pod_cidr(&self) -> String {
        self.pod_cidr.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// One reading of a cgroup.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reading {
    pub(crate) at: i64,
    pub(crate) usage: CgroupUsage,
    pub(crate) nano_cores: Option<u64>,
}

impl Runtime {
    /// The figures of one container. One that does not run has but a writable layer.
    pub async fn container_stats(&self, id: &str) -> Result<ContainerStats, RuntimeError> {
        let container = self.container(id)?;
        let measured = self.measure_containers(&[container]).await?;
        let missing = || RuntimeError::NotFound { kind: "container", id: id.to_owned() };
        measured.into_iter().next().ok_or_else(missing)
    }

    /// The figures of every running container that matches.
    pub async fn list_container_stats(
        &self,
        wanted: Option<&ContainerStatsFilter>,
    ) -> Result<Vec<ContainerStats>, RuntimeError> {
        let shown = |container: &Arc<Container>| {
            container.record.with(|record| {
                record.phase() == ContainerPhase::Running && filter::container_stats(wanted, record)
            })
        };
        let containers: Vec<_> = self.registry.containers().into_iter().filter(shown).collect();
        self.measure_containers(&containers).await
    }

    /// The figures of one sandbox.
    pub async fn sandbox_stats(&self, id: &str) -> Result<PodSandboxStats, RuntimeError> {
        let sandbox = self.sandbox(id)?;
        let measured = self.measure_sandboxes(&[sandbox]).await?;
        let missing = || RuntimeError::NotFound { kind: "sandbox", id: id.to_owned() };
        measured.into_iter().next().ok_or_else(missing)
    }

    /// The figures of every ready sandbox that matches.
    pub async fn list_sandbox_stats(
        &self,
        wanted: Option<&PodSandboxStatsFilter>,
    ) -> Result<Vec<PodSandboxStats>, RuntimeError> {
        self.measure_sandboxes(&self.ready_sandboxes(wanted)).await
    }

    fn ready_sandboxes(&self, wanted: Option<&PodSandboxStatsFilter>) -> Vec<Arc<Sandbox>> {
        let shown = |sandbox: &Arc<Sandbox>| {
            sandbox
                .record
                .with(|record| record.phase() == SandboxPhase::Ready && filter::sandbox_stats(wanted, record))
        };
        self.registry.sandboxes().into_iter().filter(shown).collect()
    }

    fn running_containers_of(&self, sandbox: &Sandbox) -> Vec<Arc<Container>> {
        let all = self.registry.containers_of(&sandbox.id);
        all.into_iter().filter(|container| container.phase() == ContainerPhase::Running).collect()
    }

    async fn measure_containers(
        &self,
        containers: &[Arc<Container>],
    ) -> Result<Vec<ContainerStats>, RuntimeError> {
        let readings = self.readings(containers.iter().map(container_subject).collect());
        let (readings, disks) = tokio::join!(readings, self.writable_layers(containers));
        Ok(container_stats(containers, readings?, disks))
    }

    async fn measure_sandboxes(
        &self,
        sandboxes: &[Arc<Sandbox>],
    ) -> Result<Vec<PodSandboxStats>, RuntimeError> {
        let inside: Vec<_> = sandboxes.iter().map(|sandbox| self.running_containers_of(sandbox)).collect();
        let flat: Vec<_> = inside.iter().flatten().cloned().collect();
        // Pods after their containers, in this order: what a pod has used is never less than its parts.
        let mut subjects: Vec<_> = flat.iter().map(container_subject).collect();
        subjects.extend(sandboxes.iter().map(|one| (self.pod_cgroups(one), one.last_figures.clone())));
        let (readings, interfaces, disks) = tokio::join!(
            self.readings(subjects),
            read_interfaces(sandboxes),
            Box::pin(self.writable_layers(&flat))
        );
        let (mut parts, interfaces) = (readings?, interfaces?);
        let readings = parts.split_off(flat.len());
        let mut containers = container_stats(&flat, parts, disks).into_iter();
        let mut all = Vec::with_capacity(sandboxes.len());
        for (((sandbox, reading), interfaces), inside) in
            sandboxes.iter().zip(readings).zip(interfaces).zip(&inside)
        {
            let containers: Vec<_> = containers.by_ref().take(inside.len()).collect();
            let now = reading.as_ref().map_or_else(clock::now, |reading| reading.at);
            let linux = LinuxPodSandboxStats {
                cpu: reading.as_ref().map(convert::cpu),
                memory: reading.as_ref().map(convert::memory),
                network: Some(convert::network(now, &interfaces)),
                process: reading.as_ref().map(|reading| ProcessUsage {
                    timestamp: now,
                    process_count: convert::value(reading.usage.processes),
                }),
                containers,
                io: reading.as_ref().map(convert::io),
            };
            all.push(PodSandboxStats {
                attributes: Some(sandbox.record.with(convert::sandbox_attributes)),
                linux: Some(linux),
                windows: None,
            });
        }
        Ok(all)
    }

    /// The pod's own cgroup holds everything; without one, its parts count together.
    fn pod_cgroups(&self, sandbox: &Sandbox) -> Vec<String> {
        let pod = sandbox.record.with(|record| self.cgroup_driver.pod_directory(record.cgroup_parent()));
        if let Some(directory) = pod {
            return vec![directory];
        }
        let containers = self.registry.containers_of(&sandbox.id);
        let parts = containers.iter().map(|container| container.record.with(|record| record.cgroup.clone()));
        let own = self.cgroup("", &sandbox.id).map(|place| place.directory);
        own.into_iter().chain(parts).collect()
    }

    /// Reads every subject (the sum of its cgroups) with its rate of CPU use; nothing for one that is not there.
    async fn readings(
        &self,
        subjects: Vec<(Vec<String>, LastFigures)>,
    ) -> Result<Vec<Option<Reading>>, RuntimeError> {
        let hierarchies = self.hierarchies.clone();
        let (subjects, mut readings) = blocking(move || {
            let read = |(cgroups, last): &(Vec<String>, LastFigures)| {
                let mut there = cgroups.iter().filter(|cgroup| hierarchies.exists(cgroup)).peekable();
                there.peek()?;
                let usage = there
                    .map(|cgroup| hierarchies.usage(cgroup, last.files()))
                    .reduce(|one, other| convert::sum(&one, &other))?;
                Some(Reading { at: clock::now(), usage, nano_cores: None })
            };
            let readings: Vec<Option<Reading>> = subjects.iter().map(read).collect();
            Ok((subjects, readings))
        })
        .await?;
        let mut first = Vec::new();
        for (index, ((_, last), reading)) in subjects.iter().zip(&mut readings).enumerate() {
            let Some(reading) = reading else { continue };
            reading.nano_cores = last.rate(reading.at, reading.usage.cpu_nanoseconds);
            if reading.nano_cores.is_none() {
                first.push(index);
            }
        }
        if !first.is_empty() {
            self.sample(&subjects, &first, &mut readings).await?;
        }
        Ok(readings)
    }

    /// Reads those without an earlier reading once more, for their rate.
    async fn sample(
        &self,
        subjects: &[(Vec<String>, LastFigures)],
        first: &[usize],
        readings: &mut [Option<Reading>],
    ) -> Result<(), RuntimeError> {
        tokio::time::sleep(SAMPLE).await;
        let again: Vec<_> = first.iter().map(|index| subjects[*index].clone()).collect();
        let hierarchies = self.hierarchies.clone();
        let used = blocking(move || {
            let used = |(cgroups, last): &(Vec<String>, LastFigures)| {
                let used = |cgroup: &String| hierarchies.usage(cgroup, last.files()).cpu_nanoseconds;
                (clock::now(), cgroups.iter().map(used).sum())
            };
            Ok(again.iter().map(used).collect::<Vec<(i64, u64)>>())
        })
        .await?;
        for (index, (at, used)) in first.iter().zip(used) {
            if let Some(reading) = &mut readings[*index] {
                reading.nano_cores = subjects[*index].1.rate(at, used);
            }
        }
        Ok(())
    }

    async fn writable_layers(&self, containers: &[Arc<Container>]) -> Vec<Option<FilesystemUsage>> {
        join_all(containers.iter().map(|container| self.writable_layer(container))).await
    }

    /// The size of a container's writable layer, at most [`FRESH`] old where that can be had in time.
    async fn writable_layer(&self, container: &Container) -> Option<FilesystemUsage> {
        let last = &container.last_figures;
        if let Some(known) = last.layer(FRESH) {
            return Some(known);
        }
        let directory = self.snapshot_directory().await;
        let (client, id, keep) = (self.client.clone(), container.id.clone(), last.clone());
        // One at a time; it goes on when nobody waits any more, so that the next request finds it.
        let measuring = last.measure_layer(async move {
            let disk = client.snapshot_usage(&id).await.ok()?;
            Some(convert::layer(clock::now(), &disk, directory.as_deref()))
        })?;
        drop(tokio::time::timeout(DISK_PATIENCE, measuring).await);
        keep.layer(Duration::MAX)
    }

    /// Where containerd keeps snapshots.
    async fn snapshot_directory(&self) -> Option<PathBuf> {
        let found = self.collector.snapshots.get_or_try_init(|| self.client.snapshot_directory()).await;
        found.ok().cloned().flatten()
    }
}

async fn read_interfaces(sandboxes: &[Arc<Sandbox>]) -> Result<Vec<Vec<InterfaceCounters>>, RuntimeError> {
    let wanted: Vec<_> = sandboxes
        .iter()
        .map(|sandbox| sandbox.record.with(|record| (record.pid, record.netns.clone())))
        .collect();
    blocking(move || Ok(wanted.iter().map(|(pid, netns)| figures::interfaces_of(*pid, netns)).collect()))
        .await
}

/// What is read for a container: its cgroup, none once it has ended.
///
/// The cgroup of one that ended stays until its task is deleted, with figures that mean nothing any more.
fn container_subject(container: &Arc<Container>) -> (Vec<String>, LastFigures) {
    let running = container
        .record
        .with(|record| (record.phase() == ContainerPhase::Running).then(|| record.cgroup.clone()));
    (running.into_iter().collect(), container.last_figures.clone())
}

fn container_stats(
    containers: &[Arc<Container>],
    readings: Vec<Option<Reading>>,
    disks: Vec<Option<FilesystemUsage>>,
) -> Vec<ContainerStats> {
    let all = containers.iter().zip(readings).zip(disks);
    all.map(|((container, reading), disk)| {
        container.record.with(|record| convert::container(record, reading.as_ref(), disk))
    })
    .collect()
}
