//! Processors for one container each: `cpuManagerPolicy: static`.
//!
//! Inputs: the configuration, sysfs, containers about to start, pods that are over. Output: the cpuset of each container, at its
//! creation and, for those that share what is left, whenever that changes. Who has what is on disk before a container starts.
//! Which processors are given is decided by [`agent_core::cpus`].

mod topology;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use agent_core::cpus::{Assignments, CpuSet, Policy, Topology};
use anyhow::{Context as _, ensure};
use cri_shim_api::v1;
use k8s_openapi::api::core::v1::{Container, Pod};
use tokio::sync::{Mutex, Notify};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::config::AgentConfig;
use crate::runtime::cri::Cri;
use crate::runtime::labels::{CONTAINER_NAME, POD_UID};

/// Who has which processors.
const FILE: &str = "keelson_cpu_state.json";

/// The CPU manager. Clones share it; without the policy it gives nothing.
#[derive(Clone)]
pub struct Cpus(Option<Arc<Inner>>);

struct Inner {
    policy: Policy,
    path: PathBuf,
    /// Who has, or was promised, what.
    promised: std::sync::Mutex<Assignments>,
    /// What of it is on disk.
    written: Mutex<Assignments>,
    /// What containers share has changed.
    changed: Notify,
}

impl Cpus {
    /// By the configuration, with what earlier agents gave away. Blocks.
    pub fn load(config: &AgentConfig) -> anyhow::Result<Self> {
        if config.cpu_manager_policy != "static" {
            return Ok(Self(None));
        }
        let topology = topology::read(Path::new(topology::SYSFS))?;
        let policy = policy(config, topology)?;
        let path = config.keelson.root_dir.join(FILE);
        let assignments = read(&path, &config.keelson.root_dir, &policy).with_context(|| {
            format!("{} does not fit this machine: drain the node and remove it", path.display())
        })?;
        info!(reserved = %policy.reserved, shared = %policy.shared(&assignments), "processors are given to containers");
        Ok(Self(Some(Arc::new(Inner::new(policy, path, assignments)))))
    }

    /// Promises the processors that the pod's containers need for themselves, or says why it cannot have them.
    pub fn admit(&self, pod: &Pod) -> Result<(), String> {
        self.0.as_ref().map_or(Ok(()), |inner| inner.promise(pod))
    }

    /// The cpuset of a container about to start; empty where the policy is off.
    pub async fn allocate(&self, pod: &Pod, container: &Container) -> Result<String, String> {
        let Some(inner) = &self.0 else { return Ok(String::new()) };
        inner.promise(pod)?;
        inner.write().await?;
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let assignments = inner.promised().clone();
        Ok(inner.cpus_of(&assignments, uid, &container.name).to_string())
    }

    /// The pod is over: its processors are everybody's.
    pub async fn release(&self, pod_uid: &str) {
        let Some(inner) = &self.0 else { return };
        if !inner.promised().release(pod_uid) {
            return;
        }
        if let Err(problem) = inner.write().await {
            warn!("{problem}");
        }
    }

    /// Keeps running containers on the processors that are theirs until `cancel`: at every change, and every `period`.
    pub async fn run(self, cri: Cri, period: Duration, cancel: CancellationToken) {
        let Some(inner) = self.0 else { return cancel.cancelled().await };
        let mut told = BTreeMap::new();
        loop {
            // Cancel-safe: an update that was sent is complete by itself.
            tokio::select! {
                () = cancel.cancelled() => return,
                () = inner.spread(&cri, &mut told) => {}
            }
            tokio::select! {
                () = cancel.cancelled() => return,
                () = inner.changed.notified() => {}
                () = tokio::time::sleep(period) => {}
            }
        }
    }
}

impl Inner {
    fn new(policy: Policy, path: PathBuf, assignments: Assignments) -> Self {
        let promised = std::sync::Mutex::new(assignments.clone());
        Self { policy, path, promised, written: Mutex::new(assignments), changed: Notify::new() }
    }

    fn promised(&self) -> MutexGuard<'_, Assignments> {
        self.promised.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of the pod's containers or none.
    fn promise(&self, pod: &Pod) -> Result<(), String> {
        let mut promised = self.promised();
        let mut next = promised.clone();
        self.policy.assign(&mut next, pod).map_err(|error| format!("Allocate failed due to {error}"))?;
        *promised = next;
        Ok(())
    }

    /// Writes down what was promised, and tells whoever keeps the shared processors.
    async fn write(&self) -> Result<(), String> {
        let mut written = self.written.lock().await;
        let next = self.promised().clone();
        if next == *written {
            return Ok(());
        }
        self.save(&next).await?;
        *written = next;
        self.changed.notify_one();
        Ok(())
    }

    fn cpus_of(&self, assignments: &Assignments, pod_uid: &str, container: &str) -> CpuSet {
        assignments.of(pod_uid, container).unwrap_or_else(|| self.policy.shared(assignments))
    }

    async fn save(&self, assignments: &Assignments) -> Result<(), String> {
        let text = serde_json::to_string(assignments).map_err(|error| error.to_string())?;
        let path = self.path.clone();
        let saved = tokio::task::spawn_blocking(move || crate::files::write_private(&path, &text)).await;
        saved
            .map_err(std::io::Error::other)
            .and_then(|saved| saved)
            .map_err(|error| format!("cannot write down who has which processor: {error}"))
    }

    /// Tells the runtime of every running container whose processors are others than `told` last.
    async fn spread(&self, cri: &Cri, told: &mut BTreeMap<String, CpuSet>) {
        let containers = match cri.list_containers(None).await {
            Ok(containers) => containers,
            Err(error) => {
                warn!(%error, "containers' processors are not looked after");
                return;
            }
        };
        let assignments = self.written.lock().await.clone();
        told.retain(|id, _| containers.iter().any(|container| container.id == *id));
        for container in containers {
            let label = |name: &str| container.labels.get(name).map(String::as_str);
            let (Some(uid), Some(name)) = (label(POD_UID), label(CONTAINER_NAME)) else { continue };
            let cpus = self.cpus_of(&assignments, uid, name);
            let runs = container.state == v1::ContainerState::ContainerRunning as i32;
            if !runs || cpus.is_empty() || told.get(&container.id) == Some(&cpus) {
                continue;
            }
            let resources = v1::LinuxContainerResources {
                cpuset_cpus: cpus.to_string(),
                ..v1::LinuxContainerResources::default()
            };
            match cri.update_resources(&container.id, resources).await {
                Ok(()) => {
                    told.insert(container.id, cpus);
                }
                // It may just have ended; the next look knows.
                Err(error) => warn!(container = name, %error, "a container stays on other processors"),
            }
        }
    }
}

/// The rules of this node.
fn policy(config: &AgentConfig, topology: Topology) -> anyhow::Result<Policy> {
    let all: CpuSet = topology.keys().copied().collect();
    let reserved: CpuSet = config.reserved_system_cpus.parse().context("reservedSystemCPUs")?;
    let reserved = if reserved.is_empty() {
        let count = usize::try_from(config.reserved("cpu").div_ceil(1000))?;
        Policy::reserve(&topology, count)
            .with_context(|| format!("{count} processors are reserved, and there are {}", all.len()))?
    } else {
        reserved
    };
    ensure!(reserved.is_subset(&all), "reservedSystemCPUs {reserved}: there are only {all}");
    Ok(Policy { topology, reserved, options: config.cpu_options() })
}

/// What was given away to pods that still have a directory.
fn read(path: &Path, root_dir: &Path, policy: &Policy) -> anyhow::Result<Assignments> {
    let mut assignments: Assignments = match std::fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Assignments::default()),
        bytes => serde_json::from_slice(&bytes?)?,
    };
    assignments.0.retain(|uid, _| root_dir.join("pods").join(uid).exists());
    let taken = assignments.taken();
    ensure!(taken.is_subset(&policy.all()), "{taken} are given away, and there are only {}", policy.all());
    ensure!(
        taken.is_disjoint(&policy.reserved),
        "{taken} are given away, and {} are reserved",
        policy.reserved
    );
    Ok(assignments)
}

#[cfg(test)]
mod tests {
    use agent_core::cpus::{Options, Place};
    use serde_json::json;

    use super::*;

    fn cpus(root: &Path) -> anyhow::Result<Cpus> {
        let topology: Topology = (0..4).map(|cpu| (cpu, Place { socket: 0, core: cpu })).collect();
        let policy = Policy { topology, reserved: "0".parse()?, options: Options::default() };
        let path = root.join(FILE);
        let assignments = read(&path, root, &policy)?;
        Ok(Cpus(Some(Arc::new(Inner::new(policy, path, assignments)))))
    }

    fn pod(uid: &str, cpu: &str) -> Pod {
        let amounts = json!({"cpu": cpu, "memory": "1Gi"});
        let container = json!({"name": "a", "resources": {"requests": amounts, "limits": amounts}});
        serde_json::from_value(json!({"metadata": {"uid": uid}, "spec": {"containers": [container]}}))
            .unwrap()
    }

    async fn given(cpus: &Cpus, pod: &Pod) -> Result<String, String> {
        cpus.allocate(pod, &pod.spec.as_ref().unwrap().containers[0]).await
    }

    #[tokio::test]
    async fn what_was_given_outlives_the_agent_and_not_the_pod() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        for uid in ["two", "gone"] {
            std::fs::create_dir_all(root.join("pods").join(uid)).unwrap();
        }
        let first = cpus(root).unwrap();
        assert_eq!(given(&first, &pod("two", "2")).await.unwrap(), "1-2");
        assert_eq!(given(&first, &pod("gone", "1")).await.unwrap(), "3");
        assert_eq!(given(&first, &pod("part", "100m")).await.unwrap(), "0", "what is left is shared");
        let error = given(&first, &pod("late", "1")).await.unwrap_err();
        assert!(error.contains("requested=1, available=0"), "{error}");
        std::fs::remove_dir(root.join("pods/gone")).unwrap();
        let second = cpus(root).unwrap();
        assert_eq!(given(&second, &pod("two", "2")).await.unwrap(), "1-2", "after a restart it is the same");
        assert_eq!(given(&second, &pod("late", "1")).await.unwrap(), "3");
        second.release("two").await;
        assert_eq!(given(&second, &pod("part", "100m")).await.unwrap(), "0-2");
        std::fs::create_dir_all(root.join("pods/x")).unwrap();
        std::fs::write(root.join(FILE), r#"{"x": {"a": "9"}}"#).unwrap();
        assert!(cpus(root).is_err(), "another machine's file");
    }

    #[tokio::test]
    async fn what_was_promised_is_nobody_elses() {
        let directory = tempfile::tempdir().unwrap();
        let cpus = cpus(directory.path()).unwrap();
        cpus.admit(&pod("first", "2")).unwrap();
        let error = cpus.admit(&pod("second", "2")).unwrap_err();
        assert!(error.contains("requested=2, available=1"), "{error}");
        assert!(!directory.path().join(FILE).exists(), "a promise is written down when it is kept");
        assert_eq!(given(&cpus, &pod("first", "2")).await.unwrap(), "1-2");
        assert!(directory.path().join(FILE).exists());
        cpus.release("first").await;
        cpus.admit(&pod("second", "2")).unwrap();
    }

    #[tokio::test]
    async fn without_the_policy_nothing_is_given() {
        let none = Cpus(None);
        assert_eq!(given(&none, &pod("u", "2")).await.unwrap(), "");
        none.release("u").await;
    }
}
