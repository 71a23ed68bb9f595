//! On which NUMA nodes a container's processors, memory and devices are (topology manager). Pure.
//!
//! Inputs: for each resource that a container asks for, the sets of nodes that could give it ([`Hint`]s), and the policy.
//! Output: the nodes that suit all of them best, and whether that is good enough for the container to be admitted. The rules
//! are upstream's: <https://kubernetes.io/docs/tasks/administer-cluster/topology-manager/>.

mod merge;
mod nodes;

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod};
use serde::{Deserialize, Serialize};

pub use self::nodes::Nodes;
use crate::cpus::in_turn;

/// Reason of a pod that the policy keeps away.
pub const REJECTED: &str = "TopologyAffinityError";
/// Its message.
pub const REJECTED_MESSAGE: &str = "Resources cannot be allocated with Topology locality";

/// Who has what of one resource: by pod and container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assignments<T>(pub BTreeMap<String, BTreeMap<String, T>>);

impl<T> Assignments<T> {
    /// Whether one of the pod's containers has any.
    pub fn has(&self, pod_uid: &str) -> bool {
        self.0.contains_key(pod_uid)
    }

    /// Has every container of the pod assigned something, in the order in which they start, or none. What a pod has stays as it
    /// is.
    pub(crate) fn assign_all<E>(
        &mut self,
        pod: &Pod,
        mut assign: impl FnMut(&mut Self, &Container) -> Result<(), E>,
    ) -> Result<(), E> {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        if self.has(uid) {
            return Ok(());
        }
        for container in pod.spec.iter().flat_map(in_turn) {
            if let Err(error) = assign(self, container) {
                self.release(uid);
                return Err(error);
            }
        }
        Ok(())
    }

    /// The pod is over; whether it had any.
    pub fn release(&mut self, pod_uid: &str) -> bool {
        self.0.remove(pod_uid).is_some()
    }
}

/// Nodes that could give what is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hint {
    /// `None`: any.
    pub nodes: Option<Nodes>,
    /// No smaller set of nodes, of those that the machine has, could give as much.
    pub preferred: bool,
}

/// What could give one resource; `None` where it does not matter, empty where nothing can.
pub type Hints = Option<Vec<Hint>>;

/// `topologyManagerPolicy`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Policy {
    /// Nobody asks.
    #[default]
    None,
    /// As near as possible.
    BestEffort,
    /// As near as possible, and not farther than needed.
    Restricted,
    /// From one node.
    SingleNode,
}

/// `topologyManagerScope`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Scope {
    /// Each container by itself.
    #[default]
    Container,
    /// All containers of a pod together.
    Pod,
}

/// The rules of one machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rules {
    /// Policy.
    pub policy: Policy,
    /// Scope.
    pub scope: Scope,
    /// Of as many nodes, those that are nearer to each other (`prefer-closest-numa-nodes`).
    pub closest: bool,
    /// The machine's nodes, each with its distance to each, as the firmware tells.
    pub distances: BTreeMap<u32, BTreeMap<u32, u64>>,
}

/// What the policy makes of all hints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// Where everything is to come from; `None`: anywhere.
    pub nodes: Option<Nodes>,
    /// The container may run.
    pub admitted: bool,
}

impl Rules {
    /// All nodes of the machine.
    pub fn all(&self) -> Nodes {
        self.distances.keys().copied().collect()
    }
}

/// Marks those of the sets that are as small as `fewest` as preferred.
pub fn hints(sets: impl IntoIterator<Item = Nodes>, fewest: usize) -> Vec<Hint> {
    sets.into_iter().map(|nodes| Hint { nodes: Some(nodes), preferred: nodes.len() == fewest }).collect()
}

#[cfg(test)]
mod tests;
