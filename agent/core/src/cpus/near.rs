//! Which NUMA nodes could give a container its processors.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod};

use super::{Assignments, CpuSet, Policy, asked, ends_first, in_turn};
use crate::numa::{Hints, Nodes, hints};

impl Policy {
    /// For one container; `None` where it shares processors with others.
    pub fn hints(&self, assignments: &Assignments, pod: &Pod, container: &Container) -> Hints {
        let count = asked(pod, container)?;
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let own = if ends_first(pod, container) { assignments.of_pod(uid) } else { CpuSet::default() };
        let available = match assignments.of(uid, &container.name) {
            // What it has it keeps; if it asks for another amount now, nothing suits.
            Some(has) if has.len() == count => has,
            Some(_) => return Some(Vec::new()),
            None => self.free(assignments).union(&own),
        };
        Some(self.sets(&available, count))
    }

    /// For all of a pod's containers together.
    pub fn hints_of_pod(&self, assignments: &Assignments, pod: &Pod) -> Hints {
        let containers = || pod.spec.iter().flat_map(in_turn);
        let counts = containers().filter_map(|container| Some((container, asked(pod, container)?)));
        let (first, beside): (Vec<_>, Vec<_>) = counts.partition(|(container, _)| ends_first(pod, container));
        let beside: usize = beside.iter().map(|(_, count)| count).sum();
        let count = first.iter().map(|(_, count)| *count).chain([beside]).max().filter(|count| *count > 0)?;
        let has = assignments.of_pod(pod.metadata.uid.as_deref().unwrap_or_default());
        let available = if has.is_empty() { self.free(assignments) } else { has };
        Some(self.sets(&available, count))
    }

    /// The processors of some nodes.
    pub(super) fn of_nodes(&self, nodes: Nodes) -> CpuSet {
        let near = self.topology.iter().filter(|(_, place)| nodes.contains(place.node));
        near.map(|(cpu, _)| *cpu).collect()
    }

    fn sets(&self, available: &CpuSet, count: usize) -> Vec<crate::numa::Hint> {
        let mut nodes: BTreeMap<u32, CpuSet> = self.members(|place| place.node);
        nodes.retain(|node, _| Nodes::from_iter([*node]).len() == 1);
        let all: Nodes = nodes.keys().copied().collect();
        let of = |set: Nodes, which: &dyn Fn(u32) -> bool| -> usize {
            let members = set.iter().filter_map(|node| nodes.get(&node)).flat_map(CpuSet::iter);
            members.filter(|cpu| which(*cpu)).count()
        };
        let fewest = all.subsets().filter(|set| of(*set, &|_| true) >= count).map(Nodes::len).min();
        let enough = all.subsets().filter(|set| of(*set, &|cpu| available.contains(cpu)) >= count);
        hints(enough, fewest.unwrap_or(nodes.len()))
    }
}
