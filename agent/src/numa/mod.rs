//! What containers have for themselves, near together: processors, memory and devices (topology manager).
//!
//! Inputs: pods to be admitted, containers about to start, pods that are over. Outputs: whether a pod is admitted, and the
//! processors and memory nodes of its containers. At admission every resource is promised, from the NUMA nodes that suit all of
//! them where a `topologyManagerPolicy` asks for that; the choice is made by [`agent_core::numa`], what each resource can give is
//! told by the managers of `cpus` and `memory` and by [`crate::devices`].

mod book;
mod cpus;
mod machine;
mod manager;
mod memory;

use std::path::Path;
use std::time::Duration;

use agent_core::admission::Rejection;
use agent_core::cpus::{CpuSet, in_turn};
use agent_core::memory::{Bank, Share};
use agent_core::numa::{Hints, Nodes, Policy, REJECTED, REJECTED_MESSAGE, Rules, Scope};
use anyhow::ensure;
use k8s_openapi::api::core::v1::{Container, Pod};
use tokio_util::sync::CancellationToken;

use self::cpus::Cpus;
use self::memory::Memory;
use crate::config::AgentConfig;
use crate::devices::Devices;
use crate::runtime::cri::Cri;

/// All managers. Clones share them.
#[derive(Clone)]
pub struct Numa {
    rules: Rules,
    cpus: Cpus,
    memory: Memory,
    devices: Devices,
}

/// What a container about to start is held to; empty where to nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sets {
    /// Processors, as the kernel lists them.
    pub cpus: String,
    /// NUMA nodes of its memory.
    pub mems: String,
}

impl Numa {
    /// By the configuration, with what earlier agents gave away. `memory`: the machine's, in bytes. Blocks.
    pub fn load(config: &AgentConfig, memory: u64, devices: Devices) -> anyhow::Result<Self> {
        let mut rules = config.topology_rules();
        rules.distances = machine::distances(Path::new(machine::SYSFS))?;
        let (count, most) = (rules.distances.len(), config.most_numa_nodes());
        ensure!(
            rules.policy == Policy::None || count <= most,
            "topologyManagerPolicy: this machine has {count} NUMA nodes, and at most {most} are looked at; \
             topologyManagerPolicyOptions max-allowable-numa-nodes allows more"
        );
        Ok(Self { rules, cpus: Cpus::load(config)?, memory: Memory::load(config, memory)?, devices })
    }

    /// Promises everything that the pod's containers need for themselves, or says why it is not admitted.
    pub fn admit(&self, pod: &Pod) -> Result<(), Rejection> {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        // What was there before the agent is not asked about again.
        let is_known = self.cpus.has(uid) || self.memory.has(uid) || self.devices.has(uid);
        let outcome = if self.rules.policy == Policy::None || is_known {
            self.cpus
                .promise(pod)
                .and_then(|()| self.memory.promise(pod))
                .map_err(|problem| unexpected(&problem))
        } else {
            self.admit_near(pod)
        };
        if outcome.is_err() && !is_known {
            self.take_back(uid);
        }
        outcome
    }

    fn admit_near(&self, pod: &Pod) -> Result<(), Rejection> {
        let of_pod = match self.rules.scope {
            Scope::Pod => Some(self.choose(&self.hints(pod, None))?),
            Scope::Container => None,
        };
        for container in pod.spec.iter().flat_map(in_turn) {
            let near = match of_pod {
                Some(near) => near,
                None => self.choose(&self.hints(pod, Some(container)))?,
            };
            self.promise(pod, container, near).map_err(|problem| unexpected(&problem))?;
        }
        Ok(())
    }

    fn hints(&self, pod: &Pod, container: Option<&Container>) -> Vec<Hints> {
        let mut hints = self.cpus.hints(pod, container);
        hints.extend(self.memory.hints(pod, container));
        hints.extend(self.devices.hints(pod, container, self.rules.all()));
        hints
    }

    fn choose(&self, hints: &[Hints]) -> Result<Option<Nodes>, Rejection> {
        let verdict = self.rules.merge(hints);
        let refused = || Rejection { reason: REJECTED.to_owned(), message: REJECTED_MESSAGE.to_owned() };
        if verdict.admitted { Ok(verdict.nodes) } else { Err(refused()) }
    }

    fn promise(&self, pod: &Pod, container: &Container, near: Option<Nodes>) -> Result<(), String> {
        self.cpus.promise_near(pod, container, near)?;
        self.memory.promise_near(pod, container, near)?;
        self.devices.promise(pod, container, near)
    }

    fn take_back(&self, pod_uid: &str) {
        self.cpus.take_back(pod_uid);
        self.memory.take_back(pod_uid);
        self.devices.take_back(pod_uid);
    }

    /// What a container about to start is held to, after it was written down.
    pub async fn allocate(&self, pod: &Pod, container: &Container) -> Result<Sets, String> {
        let cpus = self.cpus.allocate(pod, container).await?;
        Ok(Sets { cpus, mems: self.memory.allocate(pod, container).await? })
    }

    /// The pod is over: what it had for itself is everybody's.
    pub async fn release(&self, pod_uid: &str) {
        self.take_back(pod_uid);
        self.cpus.settle().await;
        self.memory.settle().await;
        self.devices.release(pod_uid).await;
    }

    /// Processors that a container has for itself.
    pub fn cpus_of(&self, pod_uid: &str, container: &str) -> CpuSet {
        self.cpus.of(pod_uid, container)
    }

    /// Memory that a container has for itself.
    pub fn memory_of(&self, pod_uid: &str, container: &str) -> Option<Share> {
        self.memory.of(pod_uid, container)
    }

    /// Processors and memory that containers could have for themselves.
    pub fn allocatable(&self) -> (CpuSet, Bank) {
        (self.cpus.allocatable(), self.memory.allocatable())
    }

    /// Keeps running containers on the processors that are theirs until `cancel`.
    pub async fn run(self, cri: Cri, period: Duration, cancel: CancellationToken) {
        self.cpus.run(cri, period, cancel).await;
    }
}

fn unexpected(problem: &str) -> Rejection {
    Rejection {
        reason: "UnexpectedAdmissionError".to_owned(),
        message: format!("Allocate failed due to {problem}, which is unexpected"),
    }
}

#[cfg(test)]
mod tests;
