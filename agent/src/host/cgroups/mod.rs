//! Pod cgroups below `<cgroupRoot>/kubepods`, on cgroup v1, v2 and the hybrid of both.
//!
//! Input: paths and values from `agent_core::qos`. Output: directories and their control files in every mounted
//! hierarchy that has controllers. On a hybrid host the v2 hierarchy has none and is left alone. Containers'
//! own cgroups are the runtime's; it makes them below the pod's.

mod hierarchy;
pub(crate) mod others;
mod removal;
pub mod usage;
mod values;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use agent_core::qos::PodCgroup;
use futures::FutureExt;
use futures::future::BoxFuture;
use tracing::warn;

use self::hierarchy::{Hierarchy, Version, mounted};
use self::values::{Setting, apply, memory_setting, pod_settings, shares_setting};
use super::kernel_memory::{has_swap_file, own_unified};
use crate::contracts::{CgroupError, CgroupManager, FoundPodCgroup};

/// cpu.shares of the best-effort class: only what nobody else wants.
const BEST_EFFORT_SHARES: u64 = 2;

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
    root: String,
    /// Bytes that all pods together may use.
    pods_memory: Option<u64>,
    /// cpu.shares of each burstable pod; their sum is the class's.
    burstable: Arc<Mutex<BTreeMap<String, u64>>>,
}

impl Cgroups {
    /// Pods go below `<root>/kubepods`; `root` is absolute within the hierarchies.
    pub fn new(root: &str) -> Self {
        Self { root: root.trim_end_matches('/').to_owned(), pods_memory: None, burstable: Arc::default() }
    }

    /// All pods together may use so many bytes of memory.
    #[must_use]
    pub fn with_pods_memory(self, bytes: Option<u64>) -> Self {
        Self { pods_memory: bytes, ..self }
    }

    fn class_path(&self, class: &str) -> String {
        format!("{}/kubepods{class}", self.root)
    }

    /// Records a burstable pod's shares and returns the sum for the class, if the pod is of it.
    fn burstable_sum(&self, path: &str, shares: Option<u64>) -> Option<u64> {
        if !path.starts_with(&self.class_path("/burstable/")) {
            return None;
        }
        let mut pods = self.burstable.lock().unwrap_or_else(PoisonError::into_inner);
        match shares {
            Some(shares) => pods.insert(path.to_owned(), shares),
            None => pods.remove(path),
        };
        Some(pods.values().sum::<u64>().max(BEST_EFFORT_SHARES))
    }

    /// Sets the burstable class's shares after one of its pods came or went.
    fn weigh_burstable(
        &self,
        sum: Option<u64>,
    ) -> impl FnOnce(&[Hierarchy]) -> Result<(), CgroupError> + use<> {
        let path = self.class_path("/burstable");
        move |hierarchies| match sum {
            Some(sum) => apply_to_all(hierarchies, &path, &[shares_setting(sum)]),
            None => Ok(()),
        }
    }
}

impl CgroupManager for Cgroups {
    fn ensure_root(&self) -> BoxFuture<'_, Result<(), CgroupError>> {
        let (kubepods, pods_memory) = (self.class_path(""), self.pods_memory);
        let node_shares = std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64) * 1024;
        run("create", kubepods.clone(), move |hierarchies| {
            let classes =
                [("", Some(node_shares)), ("/burstable", None), ("/besteffort", Some(BEST_EFFORT_SHARES))];
            for (class, shares) in classes {
                let path = format!("{kubepods}{class}");
                create_in_all(hierarchies, &path)?;
                let settings: Vec<Setting> = shares.map(shares_setting).into_iter().collect();
                apply_to_all(hierarchies, &path, &settings)?;
            }
            // Below what is used already a kernel refuses: the next start tries again, and eviction looks after it.
            if let Err(error) = apply_to_all(hierarchies, &kubepods, &[memory_setting(pods_memory)]) {
                warn!(error = %crate::chain::chain(&error), "the pods together are not held to their share of the memory");
            }
            Ok(())
        })
    }

    fn ensure_pod<'a>(&'a self, cgroup: &'a PodCgroup) -> BoxFuture<'a, Result<(), CgroupError>> {
        let weigh = self.weigh_burstable(self.burstable_sum(&cgroup.path, Some(cgroup.cpu_shares)));
        let cgroup = cgroup.clone();
        run("configure", cgroup.path.clone(), move |hierarchies| {
            create_in_all(hierarchies, &cgroup.path)?;
            apply_to_all(hierarchies, &cgroup.path, &pod_settings(&cgroup))?;
            weigh(hierarchies)
        })
    }

    fn remove_pod<'a>(&'a self, path: &'a str) -> BoxFuture<'a, Result<(), CgroupError>> {
        let weigh = self.weigh_burstable(self.burstable_sum(path, None));
        let path = path.to_owned();
        run("remove", path.clone(), move |hierarchies| {
            for hierarchy in hierarchies {
                removal::remove(&hierarchy.dir(&path)).map_err(|source| failed("remove", &path, source))?;
            }
            weigh(hierarchies)
        })
    }

    fn list_pods(&self) -> BoxFuture<'_, Result<Vec<FoundPodCgroup>, CgroupError>> {
        let kubepods = self.class_path("");
        run("list", kubepods.clone(), move |hierarchies| {
            let mut found = BTreeMap::new();
            for hierarchy in hierarchies {
                for class in ["", "/burstable", "/besteffort"] {
                    let class_path = format!("{kubepods}{class}");
                    let names = child_names(&hierarchy.dir(&class_path))
                        .map_err(|source| failed("list", &class_path, source))?;
                    for name in names {
                        if let Some(uid) = name.strip_prefix("pod") {
                            let path = format!("{class_path}/{name}");
                            found.insert(path.clone(), FoundPodCgroup { pod_uid: uid.to_owned(), path });
                        }
                    }
                }
            }
            Ok(found.into_values().collect())
        })
    }
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
