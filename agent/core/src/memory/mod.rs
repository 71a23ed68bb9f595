//! Memory of NUMA nodes for one container each (memory manager policy `Static`). Pure.
//!
//! Inputs: what each node has for pods, who has what, and a container. Output: the nodes whose memory its processes are held to,
//! or why it cannot have any. Containers of Guaranteed pods get theirs, huge pages included, from as few nodes as can give it;
//! nodes that give to one container together are a group, and give to others only together, as upstream:
//! <https://kubernetes.io/docs/tasks/administer-cluster/memory-manager/>.

mod assign;

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Container, Pod};
use serde::{Deserialize, Serialize};

use crate::numa::{self, Nodes};
use crate::qos::QosClass;
use crate::resources::request;

/// Name of the resource, and prefix of the others that nodes have.
const MEMORY: &str = "memory";
const HUGE_PAGES: &str = "hugepages-";

/// Bytes of each resource.
pub type Amounts = BTreeMap<String, u64>;

/// What each NUMA node has for pods: `memory` without its huge pages, `hugepages-2Mi` and the like.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bank(pub BTreeMap<u32, Amounts>);

/// What one container has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Its nodes.
    pub nodes: BTreeSet<u32>,
    /// Bytes of each resource, by node. Containers that have ended when others start use what these have; what they need beyond
    /// it stands here.
    pub taken: BTreeMap<u32, Amounts>,
}

/// Who has what: by pod and container.
pub type Assignments = numa::Assignments<Share>;

/// Why a container gets no memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// There is too little, or what there is belongs to other groups of nodes.
    #[error(
        "[memorymanager] failed to get the default NUMA affinity, no NUMA nodes with enough memory is available"
    )]
    NotEnough,
    /// The nodes that the topology manager has chosen cannot give it, nor can any with them.
    #[error("[memorymanager] failed to find NUMA nodes to extend the current topology hint")]
    NotHere,
}

impl Share {
    /// Its nodes.
    pub fn of(&self) -> Nodes {
        self.nodes.iter().copied().collect()
    }
}

impl Assignments {
    /// What a container has.
    pub fn of(&self, pod_uid: &str, container: &str) -> Option<&Share> {
        self.0.get(pod_uid)?.get(container)
    }

    /// What all have of one node.
    pub fn taken(&self, node: u32, resource: &str) -> u64 {
        self.0.keys().map(|uid| self.of_pod(uid, node, resource)).sum()
    }

    fn of_pod(&self, pod_uid: &str, node: u32, resource: &str) -> u64 {
        let shares = self.0.get(pod_uid).into_iter().flat_map(BTreeMap::values);
        shares.filter_map(|share| share.taken.get(&node)?.get(resource)).sum()
    }

    /// The group that a node gives in; `None` where it has given nothing.
    fn group(&self, node: u32) -> Option<Nodes> {
        let mut shares = self.0.values().flat_map(BTreeMap::values);
        shares.find(|share| share.nodes.contains(&node)).map(Share::of)
    }
}

impl Bank {
    /// The nodes that there are.
    pub fn nodes(&self) -> Nodes {
        self.0.keys().copied().collect()
    }

    /// What one node has for pods.
    pub fn of(&self, node: u32, resource: &str) -> u64 {
        self.0.get(&node).and_then(|amounts| amounts.get(resource)).copied().unwrap_or(0)
    }

    /// Whether what was given away fits into this machine.
    pub fn covers(&self, assignments: &Assignments) -> bool {
        let mut shares = assignments.0.values().flat_map(BTreeMap::values);
        let known = shares.all(|share| share.of().is_subset(self.nodes()));
        let fits = |(node, amounts): (&u32, &Amounts)| {
            amounts.iter().all(|(resource, amount)| assignments.taken(*node, resource) <= *amount)
        };
        known && self.0.iter().all(fits)
    }
}

/// What a container of the pod gets for itself; empty where it shares.
fn asked(pod: &Pod, container: &Container) -> Amounts {
    let guaranteed = pod.spec.as_ref().is_some_and(|spec| QosClass::of(spec) == QosClass::Guaranteed);
    let lists = container.resources.iter().flat_map(|all| all.requests.iter().chain(&all.limits));
    let names = lists.flat_map(BTreeMap::keys);
    let own = names.filter(|name| guaranteed && (*name == MEMORY || name.starts_with(HUGE_PAGES)));
    own.filter_map(|name| {
        let amount = u64::try_from(request(container, name)).ok().filter(|amount| *amount > 0)?;
        Some((name.clone(), amount))
    })
    .collect()
}

#[cfg(test)]
mod tests;
