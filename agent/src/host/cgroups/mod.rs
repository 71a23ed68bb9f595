//! Pod cgroups below `<cgroupRoot>/kubepods`, on cgroup v1, v2 and the hybrid of both, as directories or as slices of
//! systemd's.
//!
//! Input: paths and values from `agent_core::qos`. Output: directories and their control files in every mounted
//! hierarchy that has controllers. On a hybrid host the v2 hierarchy has none and is left alone. Containers'
//! own cgroups are the runtime's; it makes them below the pod's.

mod hierarchy;
pub(crate) mod others;
mod removal;
mod slices;
pub mod usage;
mod values;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use agent_core::cgroup_tree::{CgroupDriver, CgroupTree};
use agent_core::qos::{PodCgroup, QosClass};
use futures::FutureExt;
use futures::future::BoxFuture;
use tracing::warn;

use self::hierarchy::{Hierarchy, Version, mounted};
use self::slices::Slices;
use self::values::{Setting, apply, memory_setting, pod_settings, shares_setting};
use super::kernel_memory::{has_swap_file, own_unified};
use crate::contracts::{CgroupError, CgroupManager, FoundPodCgroup};

/// cpu.shares of the best-effort class: only what nobody else wants.
const BEST_EFFORT_SHARES: u64 = 2;
/// Longest that systemd may take to make a slice, and how often it is looked at.
const SLICE_LIMIT: Duration = Duration::from_secs(20);
const SLICE_PAUSE: Duration = Duration::from_millis(1);

/// The controllers that are mounted, in any hierarchy.
pub fn controllers() -> io::Result<BTreeSet<String>> {
    Ok(mounted()?.into_iter().flat_map(|hierarchy| hierarchy.controllers).collect())
}

/// Whether all controllers are in the version 2 hierarchy.
pub fn is_unified() -> io::Result<bool> {
    Ok(mounted()?.iter().all(|hierarchy| hierarchy.version == Version::V2))
}

/// Whether the memory controller counts swap.
pub(super) fn counts_swap() -> io::Result<bool> {
    let own = std::fs::read_to_string("/proc/self/cgroup")?;
    let hierarchies = mounted()?;
    let memory = hierarchies.iter().find(|hierarchy| hierarchy.has("memory"));
    Ok(memory.is_some_and(|memory| match memory.version {
        Version::V1 => memory.mount_point.join("memory.memsw.limit_in_bytes").exists(),
        Version::V2 => own_unified(&own).is_some_and(|own| has_swap_file(&memory.mount_point, own)),
    }))
}

/// The manager of one `cgroupRoot`.
#[derive(Debug)]
pub struct Cgroups {
    tree: CgroupTree,
    /// Bytes that all pods together may use.
    pods_memory: Option<u64>,
    /// cpu.shares of each burstable pod; their sum is the class's.
    burstable: Arc<Mutex<BTreeMap<String, u64>>>,
    /// Held while the class's sum is told, so that the last one told is the last one there was.
    weighing: tokio::sync::Mutex<()>,
    slices: Slices,
}

impl Cgroups {
    /// Pods' cgroups are where `tree` says.
    pub fn new(tree: CgroupTree) -> Self {
        let weighing = tokio::sync::Mutex::default();
        Self { tree, pods_memory: None, burstable: Arc::default(), weighing, slices: Slices::default() }
    }

    /// All pods together may use so many bytes of memory.
    #[must_use]
    pub fn with_pods_memory(self, bytes: Option<u64>) -> Self {
        Self { pods_memory: bytes, ..self }
    }

    /// Records a burstable pod's shares and returns the sum for the class, if the pod is of it.
    fn burstable_sum(&self, path: &str, shares: Option<u64>) -> Option<u64> {
        let class = self.tree.class(QosClass::Burstable);
        path.strip_prefix(&class).filter(|below| below.starts_with('/'))?;
        let mut pods = self.burstable.lock().unwrap_or_else(PoisonError::into_inner);
        match shares {
            Some(shares) => pods.insert(path.to_owned(), shares),
            None => pods.remove(path),
        };
        Some(weight_of(&pods))
    }

    /// Sets the burstable class's shares after one of its pods came or went.
    async fn weigh_burstable(&self, changed: Option<u64>) -> Result<(), CgroupError> {
        if changed.is_none() {
            return Ok(());
        }
        let _alone = self.weighing.lock().await;
        let sum = weight_of(&self.burstable.lock().unwrap_or_else(PoisonError::into_inner));
        let path = self.tree.class(QosClass::Burstable);
        self.tell_systemd(&path, |unified| vec![slices::weight(sum, unified)]).await?;
        run("configure", path.clone(), move |hierarchies| {
            apply_to_all(hierarchies, &path, &[shares_setting(sum)])
        })
        .await
    }

    /// With the systemd driver: has it make the slice, and tells it the limits.
    async fn tell_systemd(
        &self,
        path: &str,
        limits: impl FnOnce(bool) -> Vec<slices::Limit>,
    ) -> Result<(), CgroupError> {
        if self.tree.driver() == CgroupDriver::Cgroupfs {
            return Ok(());
        }
        let unified = run("find", path.to_owned(), |hierarchies| {
            Ok(hierarchies.iter().all(|hierarchy| hierarchy.version == Version::V2))
        });
        let told = self.slices.ensure(path, &limits(unified.await?)).await;
        if told.map_err(|source| failed("start the slice of", path, source))? {
            let begun = path.to_owned();
            run("start", path.to_owned(), move |hierarchies| wait_until_made(hierarchies, &begun)).await?;
        }
        Ok(())
    }

    /// Makes the cgroup of a class, or of all pods.
    async fn ensure_class(&self, class: QosClass, shares: Option<u64>) -> Result<(), CgroupError> {
        let path = self.tree.class(class);
        let limit = move |unified| shares.map(|shares| slices::weight(shares, unified)).into_iter().collect();
        self.tell_systemd(&path, limit).await?;
        run("create", path.clone(), move |hierarchies| {
            create_in_all(hierarchies, &path)?;
            let settings: Vec<Setting> = shares.map(shares_setting).into_iter().collect();
            apply_to_all(hierarchies, &path, &settings)
        })
        .await
    }

    /// Holds all pods together to their share of the memory. Below what is used already a kernel refuses: the next start
    /// tries again, and eviction looks after it.
    async fn hold_pods(&self) {
        let (path, bytes) = (self.tree.pods(), self.pods_memory);
        let held = async {
            self.tell_systemd(&path, |unified| vec![slices::memory(bytes, unified)]).await?;
            let path = path.clone();
            run("configure", path.clone(), move |hierarchies| {
                apply_to_all(hierarchies, &path, &[memory_setting(bytes)])
            })
            .await
        };
        if let Err(error) = held.await {
            warn!(error = %crate::chain::chain(&error), "the pods together are not held to their share of the memory");
        }
    }
}

impl CgroupManager for Cgroups {
    fn ensure_root(&self) -> BoxFuture<'_, Result<(), CgroupError>> {
        let node_shares = std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64) * 1024;
        async move {
            self.ensure_class(QosClass::Guaranteed, Some(node_shares)).await?;
            self.ensure_class(QosClass::Burstable, None).await?;
            self.ensure_class(QosClass::BestEffort, Some(BEST_EFFORT_SHARES)).await?;
            self.hold_pods().await;
            Ok(())
        }
        .boxed()
    }

    fn ensure_pod<'a>(&'a self, cgroup: &'a PodCgroup) -> BoxFuture<'a, Result<(), CgroupError>> {
        async move {
            let sum = self.burstable_sum(&cgroup.path, Some(cgroup.cpu_shares));
            self.tell_systemd(&cgroup.path, |unified| slices::of_pod(cgroup, unified)).await?;
            let values = cgroup.clone();
            run("configure", cgroup.path.clone(), move |hierarchies| {
                create_in_all(hierarchies, &values.path)?;
                apply_to_all(hierarchies, &values.path, &pod_settings(&values))
            })
            .await?;
            self.weigh_burstable(sum).await
        }
        .boxed()
    }

    fn remove_pod<'a>(&'a self, path: &'a str) -> BoxFuture<'a, Result<(), CgroupError>> {
        async move {
            let sum = self.burstable_sum(path, None);
            if self.tree.driver() == CgroupDriver::Systemd && is_there(path).await? {
                // First: what is found at the next start by its directory is ended again.
                self.slices.end(path).await.map_err(|source| failed("end the slice of", path, source))?;
            }
            let removed = path.to_owned();
            run("remove", path.to_owned(), move |hierarchies| {
                for hierarchy in hierarchies {
                    removal::remove(&hierarchy.dir(&removed))
                        .map_err(|source| failed("remove", &removed, source))?;
                }
                Ok(())
            })
            .await?;
            self.weigh_burstable(sum).await
        }
        .boxed()
    }

    fn list_pods(&self) -> BoxFuture<'_, Result<Vec<FoundPodCgroup>, CgroupError>> {
        let tree = self.tree.clone();
        run("list", tree.pods(), move |hierarchies| {
            let mut found = BTreeMap::new();
            for hierarchy in hierarchies {
                for class in [QosClass::Guaranteed, QosClass::Burstable, QosClass::BestEffort] {
                    let class_path = tree.class(class);
                    let names = child_names(&hierarchy.dir(&class_path))
                        .map_err(|source| failed("list", &class_path, source))?;
                    for name in names {
                        if let Some(pod_uid) = tree.uid(class, &name) {
                            let path = format!("{class_path}/{name}");
                            found.insert(path.clone(), FoundPodCgroup { pod_uid, path });
                        }
                    }
                }
            }
            Ok(found.into_values().collect())
        })
    }
}

/// What a class weighs whose pods have these shares.
fn weight_of(pods: &BTreeMap<String, u64>) -> u64 {
    pods.values().sum::<u64>().max(BEST_EFFORT_SHARES)
}

/// Whether any hierarchy has the cgroup.
async fn is_there(path: &str) -> Result<bool, CgroupError> {
    let sought = path.to_owned();
    run("find", path.to_owned(), move |hierarchies| {
        Ok(hierarchies.iter().any(|hierarchy| hierarchy.dir(&sought).exists()))
    })
    .await
}

/// systemd answers before the slice has begun; what it makes afterwards it would write its own values to.
fn wait_until_made(hierarchies: &[Hierarchy], path: &str) -> Result<(), CgroupError> {
    let of_systemd = |hierarchy: &&Hierarchy| hierarchy.has("memory");
    let Some(hierarchy) = hierarchies.iter().find(of_systemd) else { return Ok(()) };
    let (dir, end) = (hierarchy.dir(path), Instant::now() + SLICE_LIMIT);
    while !dir.exists() {
        if Instant::now() > end {
            let late = io::Error::new(io::ErrorKind::TimedOut, "systemd has not made it");
            return Err(failed("start the slice of", path, late));
        }
        std::thread::sleep(SLICE_PAUSE);
    }
    Ok(())
}

/// Runs `work` with the mounted hierarchies on a thread that may block.
fn run<'a, T: Send + 'static>(
    operation: &'static str,
    path: String,
    work: impl FnOnce(&[Hierarchy]) -> Result<T, CgroupError> + Send + 'static,
) -> BoxFuture<'a, Result<T, CgroupError>> {
    let shown = path.clone();
    tokio::task::spawn_blocking(move || {
        let hierarchies = mounted().map_err(|source| failed(operation, &path, source))?;
        work(&hierarchies)
    })
    .map(move |outcome| {
        outcome.unwrap_or_else(|error| Err(failed(operation, &shown, io::Error::other(error))))
    })
    .boxed()
}

fn create_in_all(hierarchies: &[Hierarchy], path: &str) -> Result<(), CgroupError> {
    hierarchies
        .iter()
        .try_for_each(|hierarchy| hierarchy.create(path))
        .map_err(|source| failed("create", path, source))
}

fn apply_to_all(hierarchies: &[Hierarchy], path: &str, settings: &[Setting]) -> Result<(), CgroupError> {
    hierarchies
        .iter()
        .try_for_each(|hierarchy| apply(hierarchy, path, settings))
        .map_err(|source| failed("configure", path, source))
}

fn failed(operation: &'static str, path: &str, source: io::Error) -> CgroupError {
    CgroupError { operation, path: path.to_owned(), source }
}

/// Names of the directories in `dir`; none when it does not exist.
fn child_names(dir: &Path) -> io::Result<Vec<String>> {
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests;
