//! Scheduling: which node a pod goes to, or why none will have it.
//!
//! Input: a pod and the cluster as the scheduler believes it to be ([`state::ClusterState`], which includes
//! pods that are bound but not yet seen as such). Output: a node's name, or a [`Unschedulable`] whose
//! message uses upstream's words. Which pod is next is the business of [`queue::SchedulingQueue`].
//!
//! Filters run in upstream's order and stop at the first that refuses; scores are upstream's formulas and
//! weights; ties go to the node with fewer pods, then by name.

pub mod filter;
pub mod queue;
pub mod resources;
pub mod score;
pub mod state;

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;
use thiserror::Error;

use self::{
    filter::Demand,
    state::{ClusterState, NodeInfo},
};

/// Why no node can take a pod, as events and conditions show it.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct Unschedulable {
    /// Upstream's wording: `0/3 nodes are available: 1 Insufficient cpu, 2 node(s) were unschedulable.`
    pub message: String,
}

/// The best node for the pod.
pub fn schedule(pod: &Pod, cluster: &ClusterState) -> Result<String, Unschedulable> {
    let demand = Demand::of(pod);
    let mut feasible: Vec<&NodeInfo> = Vec::new();
    let mut refusals = BTreeMap::<String, usize>::new();
    let mut total = 0_usize;
    for info in cluster.nodes() {
        total += 1;
        match filter::refusals(&demand, info) {
            reasons if reasons.is_empty() => feasible.push(info),
            reasons => {
                for reason in reasons {
                    *refusals.entry(reason).or_default() += 1;
                }
            }
        }
    }
    score::best(&demand, &feasible).ok_or_else(|| Unschedulable { message: explain(total, &refusals) })
}

fn explain(total: usize, refusals: &BTreeMap<String, usize>) -> String {
    if total == 0 {
        return "no nodes available to schedule pods".to_owned();
    }
    let mut reasons: Vec<_> = refusals.iter().map(|(reason, nodes)| format!("{nodes} {reason}")).collect();
    reasons.sort();
    format!("0/{total} nodes are available: {}.", reasons.join(", "))
}

/// True when the pod waits for its scheduling gates to be removed.
pub fn is_gated(pod: &Pod) -> bool {
    let gates = pod.spec.as_ref().and_then(|spec| spec.scheduling_gates.as_ref());
    gates.is_some_and(|gates| !gates.is_empty())
}

#[cfg(test)]
mod tests;
