//! Memory of NUMA nodes for one container each: `memoryManagerPolicy: Static`.
//!
//! Inputs: the configuration, sysfs, containers about to start, pods that are over. Output: the nodes whose memory a container
//! may use. Who has what is on disk before a container starts. Which nodes these are is decided by [`agent_core::memory`].

use std::collections::BTreeMap;
use std::path::Path;

use agent_core::memory::{Assignments, Bank, Share};
use agent_core::numa::{Hints, Nodes};
use anyhow::ensure;
use k8s_openapi::api::core::v1::{Container, Pod};
use tracing::info;

use super::machine;
use super::manager::{Manager, Resource};
use crate::config::AgentConfig;

/// The memory manager, with what there is for pods.
pub(super) type Memory = Manager<Bank>;

impl Resource for Bank {
    type Share = Share;

    const FILE: &'static str = "keelson_memory_state.json";

    fn check(&self, given: &Assignments) -> anyhow::Result<()> {
        ensure!(self.covers(given), "more memory is given away than NUMA nodes {} have", self.nodes());
        Ok(())
    }

    fn hints(&self, given: &Assignments, pod: &Pod, container: Option<&Container>) -> Vec<Hints> {
        match container {
            Some(container) => self.hints(given, pod, container),
            None => self.hints_of_pod(given, pod),
        }
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
        let nodes = given.of(pod_uid, container).map(Share::of);
        nodes.map(|nodes| nodes.to_string()).unwrap_or_default()
    }
}

impl Memory {
    /// By the configuration, with what earlier agents gave away. `total`: the machine's memory in bytes. Blocks.
    pub(super) fn load(config: &AgentConfig, total: u64) -> anyhow::Result<Self> {
        if config.memory_manager_policy != "Static" {
            return Ok(Self(None));
        }
        let mut bank = machine::memory(Path::new(machine::SYSFS))?;
        check_reserved(config, &bank, total)?;
        for (node, resource, amount) in config.memory_reserved() {
            if let Some(has) = bank.0.get_mut(&node).and_then(|amounts| amounts.get_mut(&resource)) {
                *has = has.saturating_sub(amount);
            }
        }
        info!(nodes = %bank.nodes(), "memory of NUMA nodes is given to containers");
        Self::open(bank, &config.keelson.root_dir)
    }

    /// What a container has.
    pub(super) fn of(&self, pod_uid: &str, container: &str) -> Option<Share> {
        self.0.as_ref()?.book.promised().of(pod_uid, container).cloned()
    }

    /// What each node has for pods.
    pub(super) fn allocatable(&self) -> Bank {
        self.0.as_ref().map(|inner| inner.rules.clone()).unwrap_or_default()
    }
}

/// What is reserved on the nodes must be what pods cannot have of the machine, as upstream asks.
fn check_reserved(config: &AgentConfig, bank: &Bank, total: u64) -> anyhow::Result<()> {
    let mut sums: BTreeMap<String, u64> = BTreeMap::new();
    for (node, resource, amount) in config.memory_reserved() {
        ensure!(
            bank.nodes().contains(node),
            "reservedMemory: there is no NUMA node {node}, only {}",
            bank.nodes()
        );
        ensure!(
            amount <= bank.of(node, &resource),
            "reservedMemory: {resource} {amount} is more than NUMA node {node} has ({})",
            bank.of(node, &resource)
        );
        *sums.entry(resource).or_default() += amount;
    }
    let kept = config.kept_memory(total);
    let given = sums.get("memory").copied().unwrap_or(0);
    ensure!(
        given == kept,
        "reservedMemory: the sum of memory over all NUMA nodes is {given} bytes; it must be {kept}, as kubeReserved, \
         systemReserved and evictionHard memory.available together keep"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use agent_core::memory::Amounts;
    use serde_json::json;

    use super::*;

    fn memory(root: &Path) -> anyhow::Result<Memory> {
        let amounts = || Amounts::from([("memory".to_owned(), 4 << 30)]);
        let bank = Bank([(0, amounts()), (1, amounts())].into());
        Memory::open(bank, root)
    }

    fn pod(uid: &str, memory: &str) -> Pod {
        let amounts = json!({"cpu": "1", "memory": memory});
        let container = json!({"name": "a", "resources": {"requests": amounts, "limits": amounts}});
        serde_json::from_value(json!({"metadata": {"uid": uid}, "spec": {"containers": [container]}}))
            .unwrap()
    }

    async fn given(memory: &Memory, pod: &Pod) -> Result<String, String> {
        memory.allocate(pod, &pod.spec.as_ref().unwrap().containers[0]).await
    }

    #[tokio::test]
    async fn what_was_given_outlives_the_agent_and_not_the_pod() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        for uid in ["one", "gone"] {
            std::fs::create_dir_all(root.join("pods").join(uid)).unwrap();
        }
        let first = memory(root).unwrap();
        assert_eq!(given(&first, &pod("one", "3Gi")).await.unwrap(), "0");
        assert_eq!(given(&first, &pod("gone", "3Gi")).await.unwrap(), "1");
        let error = given(&first, &pod("late", "3Gi")).await.unwrap_err();
        assert!(error.contains("no NUMA nodes with enough memory"), "{error}");
        std::fs::remove_dir(root.join("pods/gone")).unwrap();
        let second = memory(root).unwrap();
        assert_eq!(given(&second, &pod("one", "3Gi")).await.unwrap(), "0", "after a restart it is the same");
        assert_eq!(given(&second, &pod("late", "3Gi")).await.unwrap(), "1");
        second.take_back("one");
        second.settle().await;
        assert_eq!(given(&memory(root).unwrap(), &pod("more", "4Gi")).await.unwrap(), "0");
    }

    #[test]
    fn what_is_reserved_must_be_what_pods_cannot_have() {
        let amounts = |gib: u64| Amounts::from([("memory".to_owned(), gib << 30)]);
        let bank = Bank([(0, amounts(4)), (1, amounts(4))].into());
        let config = |reserved: &str| {
            let text = format!(
                "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\ntlsCertFile: /c\n\
                 tlsPrivateKeyFile: /k\nmemoryManagerPolicy: Static\nsystemReserved: {{memory: 412Mi}}\n\
                 reservedMemory: {reserved}\nkeelson: {{nodeName: n1, nodeIP: 192.0.2.1, kubeconfig: /kc}}\n"
            );
            AgentConfig::parse(Path::new("test"), &text).unwrap()
        };
        let outcome = |reserved: &str| {
            check_reserved(&config(reserved), &bank, 8 << 30).map_err(|error| error.to_string())
        };
        let halves = "[{numaNode: 0, limits: {memory: 256Mi}}, {numaNode: 1, limits: {memory: 256Mi}}]";
        assert_eq!(outcome(halves), Ok(()), "with the 100Mi of evictionHard");
        let error = outcome("[{numaNode: 0, limits: {memory: 1Gi}}]").unwrap_err();
        assert!(error.contains("is 1073741824 bytes; it must be 536870912"), "{error}");
        let error = outcome("[{numaNode: 7, limits: {memory: 512Mi}}]").unwrap_err();
        assert!(error.contains("there is no NUMA node 7, only 0-1"), "{error}");
    }
}
