//! Processors for one container each: `cpuManagerPolicy: static`.
//!
//! Inputs: the configuration, sysfs, containers about to start, pods that are over. Output: the cpuset of each container, at its
//! creation and, for those that share what is left, whenever that changes. Who has what is on disk before a container starts.
//! Which processors are given is decided by [`agent_core::cpus`].

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use agent_core::cpus::{Assignments, CpuSet, Policy, Topology};
use agent_core::numa::{Hints, Nodes};
use anyhow::{Context as _, ensure};
use cri_shim_api::v1;
use k8s_openapi::api::core::v1::{Container, Pod};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::machine;
use super::manager::{Inner, Manager, Resource};
use crate::config::AgentConfig;
use crate::runtime::cri::Cri;
use crate::runtime::labels::{CONTAINER_NAME, POD_UID};

/// The CPU manager.
pub(super) type Cpus = Manager<Policy>;

impl Resource for Policy {
    /// As the kernel lists processors.
    type Share = String;

    const FILE: &'static str = "keelson_cpu_state.json";

    fn check(&self, given: &Assignments) -> anyhow::Result<()> {
        let taken = given.taken();
        ensure!(taken.is_subset(&self.all()), "{taken} are given away, and there are only {}", self.all());
        ensure!(
            taken.is_disjoint(&self.reserved),
            "{taken} are given away, and {} are reserved",
            self.reserved
        );
        Ok(())
    }

    fn hints(&self, given: &Assignments, pod: &Pod, container: Option<&Container>) -> Vec<Hints> {
        vec![match container {
            Some(container) => self.hints(given, pod, container),
            None => self.hints_of_pod(given, pod),
        }]
    }

    fn assign(&self, given: &mut Assignments, pod: &Pod) -> Result<(), String> {
        self.assign(given, pod).map_err(|error| error.to_string())
    }

    fn assign_near(
        &self,
        given: &mut Assignments,
        pod: &Pod,
        container: &Container,
        near: Option<Nodes>,
    ) -> Result<(), String> {
        self.assign_container(given, pod, container, near).map_err(|error| error.to_string())
    }

    fn set_of(&self, given: &Assignments, pod_uid: &str, container: &str) -> String {
        cpus_of(self, given, pod_uid, container).to_string()
    }
}

impl Cpus {
    /// By the configuration, with what earlier agents gave away. Blocks.
    pub(super) fn load(config: &AgentConfig) -> anyhow::Result<Self> {
        if config.cpu_manager_policy != "static" {
            return Ok(Self(None));
        }
        let topology = machine::processors(Path::new(machine::SYSFS))?;
        let manager = Self::open(policy(config, topology)?, &config.keelson.root_dir)?;
        if let Some(Inner { rules, book, .. }) = manager.0.as_deref() {
            let shared = rules.shared(&book.promised());
            info!(reserved = %rules.reserved, %shared, "processors are given to containers");
        }
        Ok(manager)
    }

    /// What a container has for itself.
    pub(super) fn of(&self, pod_uid: &str, container: &str) -> CpuSet {
        let own = self.0.as_ref().and_then(|inner| inner.book.promised().of(pod_uid, container));
        own.unwrap_or_default()
    }

    /// What containers could have for themselves.
    pub(super) fn allocatable(&self) -> CpuSet {
        let policy = self.0.as_ref().map(|inner| &inner.rules);
        policy.map(|policy| policy.all().minus(&policy.reserved)).unwrap_or_default()
    }

    /// Keeps running containers on the processors that are theirs until `cancel`: at every change, and every `period`.
    pub(super) async fn run(self, cri: Cri, period: Duration, cancel: CancellationToken) {
        let Some(inner) = self.0 else { return cancel.cancelled().await };
        let mut told = BTreeMap::new();
        loop {
            // Cancel-safe: an update that was sent is complete by itself.
            tokio::select! {
                () = cancel.cancelled() => return,
                () = spread(&inner, &cri, &mut told) => {}
            }
            tokio::select! {
                () = cancel.cancelled() => return,
                () = inner.changed.notified() => {}
                () = tokio::time::sleep(period) => {}
            }
        }
    }
}

/// The processors of a container: its own, or those that all others share.
fn cpus_of(policy: &Policy, given: &Assignments, pod_uid: &str, container: &str) -> CpuSet {
    given.of(pod_uid, container).unwrap_or_else(|| policy.shared(given))
}

/// Tells the runtime of every running container whose processors are others than `told` last.
async fn spread(inner: &Inner<Policy>, cri: &Cri, told: &mut BTreeMap<String, CpuSet>) {
    let containers = match cri.list_containers(None).await {
        Ok(containers) => containers,
        Err(error) => {
            warn!(%error, "containers' processors are not looked after");
            return;
        }
    };
    let assignments = inner.book.written().await;
    told.retain(|id, _| containers.iter().any(|container| container.id == *id));
    for container in containers {
        let label = |name: &str| container.labels.get(name).map(String::as_str);
        let (Some(uid), Some(name)) = (label(POD_UID), label(CONTAINER_NAME)) else { continue };
        let cpus = cpus_of(&inner.rules, &assignments, uid, name);
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

#[cfg(test)]
mod tests {
    use agent_core::cpus::{Options, Place};
    use serde_json::json;

    use super::*;

    fn cpus(root: &Path) -> anyhow::Result<Cpus> {
        let topology: Topology = (0..4).map(|cpu| (cpu, Place { socket: 0, core: cpu, node: 0 })).collect();
        let policy = Policy { topology, reserved: "0".parse()?, options: Options::default() };
        Cpus::open(policy, root)
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
        second.take_back("two");
        second.settle().await;
        assert_eq!(given(&second, &pod("part", "100m")).await.unwrap(), "0-2");
        std::fs::create_dir_all(root.join("pods/x")).unwrap();
        std::fs::write(root.join(Policy::FILE), r#"{"x": {"a": "9"}}"#).unwrap();
        assert!(cpus(root).is_err(), "another machine's file");
    }

    #[tokio::test]
    async fn what_was_promised_is_nobody_elses() {
        let directory = tempfile::tempdir().unwrap();
        let cpus = cpus(directory.path()).unwrap();
        cpus.promise(&pod("first", "2")).unwrap();
        let error = cpus.promise(&pod("second", "2")).unwrap_err();
        assert!(error.contains("requested=2, available=1"), "{error}");
        assert!(!directory.path().join(Policy::FILE).exists(), "a promise is written down when it is kept");
        assert_eq!(given(&cpus, &pod("first", "2")).await.unwrap(), "1-2");
        assert!(directory.path().join(Policy::FILE).exists());
        cpus.take_back("first");
        cpus.promise(&pod("second", "2")).unwrap();
    }

    #[tokio::test]
    async fn without_the_policy_nothing_is_given() {
        let none: Cpus = Manager(None);
        assert_eq!(given(&none, &pod("u", "2")).await.unwrap(), "");
        none.take_back("u");
    }
}
