//! Settings of the topology manager and the memory manager.

use std::collections::BTreeMap;

use agent_core::eviction::Signal;
use agent_core::numa::{Policy, Rules, Scope};
use agent_core::resources::whole;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use serde::{Deserialize, Serialize};

use super::{AgentConfig, EvictionConfig};

/// NUMA nodes that are looked at where nothing is said; more take too long to compare.
const MOST_NODES: usize = 8;

/// One entry of `reservedMemory`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MemoryReservation {
    /// The node.
    pub numa_node: u32,
    /// What pods cannot have of it: `memory` and huge pages.
    #[serde(default)]
    pub limits: BTreeMap<String, String>,
}

impl AgentConfig {
    /// The topology manager's rules, without the machine.
    pub fn topology_rules(&self) -> Rules {
        Rules {
            policy: policy(&self.topology_manager_policy).unwrap_or_default(),
            scope: scope(&self.topology_manager_scope).unwrap_or_default(),
            closest: self.topology_option("prefer-closest-numa-nodes") == Some("true"),
            distances: BTreeMap::new(),
        }
    }

    /// NUMA nodes that the topology manager looks at.
    pub fn most_numa_nodes(&self) -> usize {
        let given = self.topology_option("max-allowable-numa-nodes");
        given.and_then(|text| text.parse().ok()).unwrap_or(MOST_NODES)
    }

    /// Node, resource and bytes of `reservedMemory`.
    pub fn memory_reserved(&self) -> impl Iterator<Item = (u32, String, u64)> {
        let flat = |entry: &MemoryReservation| {
            let node = entry.numa_node;
            let amounts =
                entry.limits.iter().filter_map(move |(name, text)| Some((node, name.clone(), bytes(text)?)));
            amounts.collect::<Vec<_>>()
        };
        self.reserved_memory.iter().flat_map(flat)
    }

    /// Bytes that pods cannot have of a machine with so much memory: what is reserved, and the hard eviction threshold.
    pub fn kept_memory(&self, total: u64) -> u64 {
        let thresholds = EvictionConfig::of(self).map(|config| config.thresholds).unwrap_or_default();
        let hard = thresholds
            .iter()
            .find(|threshold| threshold.signal == Signal::MemoryAvailable && threshold.grace.is_none());
        self.reserved("memory") + hard.map_or(0, |threshold| threshold.value.of(total))
    }

    fn topology_option(&self, name: &str) -> Option<&str> {
        self.topology_manager_policy_options.get(name).map(String::as_str)
    }

    pub(super) fn numa_problems(&self) -> Vec<String> {
        let mut problems = self.topology_problems();
        if !matches!(self.memory_manager_policy.as_str(), "" | "None" | "Static") {
            let given = &self.memory_manager_policy;
            problems.push(format!("memoryManagerPolicy {given:?}: expected None or Static"));
        }
        let mut seen = std::collections::BTreeSet::new();
        for entry in &self.reserved_memory {
            let field = format!("reservedMemory of numaNode {}", entry.numa_node);
            for (name, text) in &entry.limits {
                let is_memory = name == "memory" || name.starts_with("hugepages-");
                if !is_memory {
                    problems.push(format!("{field}: {name:?}: expected memory or hugepages-SIZE"));
                } else if bytes(text).is_none_or(|bytes| bytes == 0) {
                    problems.push(format!("{field}: {name} {text:?} is not an amount above 0, such as 1Gi"));
                } else if !seen.insert((entry.numa_node, name)) {
                    problems.push(format!("{field}: {name} is given twice"));
                }
            }
        }
        if self.memory_manager_policy == "Static" && self.reserved_memory.is_empty() {
            problems.push(
                "memoryManagerPolicy Static needs reservedMemory: for each NUMA node what pods cannot have of it".to_owned(),
            );
        }
        if self.memory_manager_policy != "Static" && !self.reserved_memory.is_empty() {
            problems.push("reservedMemory is given, and memoryManagerPolicy is not Static".to_owned());
        }
        problems
    }

    fn topology_problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if policy(&self.topology_manager_policy).is_none() {
            let given = &self.topology_manager_policy;
            problems.push(format!(
                "topologyManagerPolicy {given:?}: expected none, best-effort, restricted or single-numa-node"
            ));
        }
        if scope(&self.topology_manager_scope).is_none() {
            let given = &self.topology_manager_scope;
            problems.push(format!("topologyManagerScope {given:?}: expected container or pod"));
        }
        for (name, value) in &self.topology_manager_policy_options {
            let field = format!("topologyManagerPolicyOptions {name:?}");
            match name.as_str() {
                "prefer-closest-numa-nodes" if matches!(value.as_str(), "true" | "false") => {}
                "prefer-closest-numa-nodes" => {
                    problems.push(format!("{field}: expected \"true\" or \"false\", found {value:?}"));
                }
                "max-allowable-numa-nodes"
                    if value.parse().is_ok_and(|count: usize| (MOST_NODES..=16).contains(&count)) => {}
                "max-allowable-numa-nodes" => {
                    problems.push(format!("{field}: expected {MOST_NODES} to 16, found {value:?}"));
                }
                _ => problems
                    .push(format!("{field}: expected prefer-closest-numa-nodes or max-allowable-numa-nodes")),
            }
        }
        problems
    }
}

fn policy(text: &str) -> Option<Policy> {
    match text {
        "" | "none" => Some(Policy::None),
        "best-effort" => Some(Policy::BestEffort),
        "restricted" => Some(Policy::Restricted),
        "single-numa-node" => Some(Policy::SingleNode),
        _ => None,
    }
}

fn scope(text: &str) -> Option<Scope> {
    match text {
        "" | "container" => Some(Scope::Container),
        "pod" => Some(Scope::Pod),
        _ => None,
    }
}

fn bytes(text: &str) -> Option<u64> {
    u64::try_from(whole(&Quantity(text.to_owned()))?).ok()
}
