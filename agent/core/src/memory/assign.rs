//! Which nodes give a container its memory.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod};

use super::{Amounts, Assignments, Bank, MemoryError, Share, asked};
use crate::cpus::in_turn;
use crate::model::is_sidecar;
use crate::numa::{Hint, Hints, Nodes, hints};

impl Bank {
    /// The nodes that could give one container its memory, for each resource; empty where it shares.
    pub fn hints(&self, assignments: &Assignments, pod: &Pod, container: &Container) -> Vec<Hints> {
        let wanted = asked(pod, container);
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        if let Some(share) = assignments.of(uid, &container.name) {
            let has = Hint { nodes: Some(share.of()), preferred: true };
            return wanted.keys().map(|_| Some(vec![has])).collect();
        }
        self.hints_for(assignments, &wanted, reused(pod, container))
    }

    /// The same for all of a pod's containers together.
    pub fn hints_of_pod(&self, assignments: &Assignments, pod: &Pod) -> Vec<Hints> {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let containers = || pod.spec.iter().flat_map(in_turn);
        if assignments.has(uid) {
            let shares = assignments.0.get(uid).into_iter().flat_map(BTreeMap::values);
            let nodes = shares.fold(Nodes::default(), |all, share| all.or(share.of()));
            return vec![Some(vec![Hint { nodes: Some(nodes), preferred: true }])];
        }
        let (mut beside, mut peak) = (Amounts::new(), Amounts::new());
        for container in containers() {
            let ends_first = reused(pod, container).is_some();
            for (resource, amount) in asked(pod, container) {
                if ends_first {
                    let peak = peak.entry(resource).or_default();
                    *peak = amount.max(*peak);
                } else {
                    *beside.entry(resource).or_default() += amount;
                }
            }
        }
        for (resource, amount) in peak {
            let wanted = beside.entry(resource).or_default();
            *wanted = amount.max(*wanted);
        }
        self.hints_for(assignments, &beside, None)
    }

    /// Gives one of the pod's containers what it asks for: from the nodes `near`, with more where these cannot, or else from as
    /// few as can.
    pub fn assign_container(
        &self,
        assignments: &mut Assignments,
        pod: &Pod,
        container: &Container,
        near: Option<Nodes>,
    ) -> Result<(), MemoryError> {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let wanted = asked(pod, container);
        if wanted.is_empty() || assignments.of(uid, &container.name).is_some() {
            return Ok(());
        }
        let own = reused(pod, container);
        let sets = self.sets(assignments, &wanted, own);
        let near = near.filter(|near| !near.is_empty());
        let nodes = match near {
            Some(near) => narrowest(sets.into_iter().filter(|set| near.is_subset(*set))),
            None => narrowest(sets.into_iter()),
        };
        let missing = if near.is_some() { MemoryError::NotHere } else { MemoryError::NotEnough };
        let nodes = nodes.ok_or(missing)?;
        let mut taken: BTreeMap<u32, Amounts> = BTreeMap::new();
        for (resource, amount) in &wanted {
            let mut left = *amount;
            for node in nodes.iter() {
                let reused = own.map_or(0, |uid| assignments.of_pod(uid, node, resource));
                left = left.saturating_sub(reused);
            }
            for node in nodes.iter() {
                let part = left.min(self.free(assignments, node, resource));
                if part > 0 {
                    taken.entry(node).or_default().insert(resource.clone(), part);
                    left -= part;
                }
            }
        }
        let share = Share { nodes: nodes.iter().collect(), taken };
        assignments.0.entry(uid.to_owned()).or_default().insert(container.name.clone(), share);
        Ok(())
    }

    /// The same for all of the pod's containers, all or nothing. What the pod has already stays.
    pub fn assign(&self, assignments: &mut Assignments, pod: &Pod) -> Result<(), MemoryError> {
        assignments.assign_all(pod, |next, container| self.assign_container(next, pod, container, None))
    }

    fn hints_for(&self, assignments: &Assignments, wanted: &Amounts, own: Option<&str>) -> Vec<Hints> {
        if wanted.is_empty() {
            return Vec::new();
        }
        let has = |set: &Nodes| {
            wanted.iter().all(|(resource, amount)| {
                set.iter().map(|node| self.of(node, resource)).sum::<u64>() >= *amount
            })
        };
        let fewest = self.nodes().subsets().filter(has).map(Nodes::len).min().unwrap_or(0);
        let sets = hints(self.sets(assignments, wanted, own), fewest);
        wanted.keys().map(|_| Some(sets.clone())).collect()
    }

    /// The sets of nodes that can give all of it now. `own`: the pod whose other containers' memory may be used as well.
    fn sets(&self, assignments: &Assignments, wanted: &Amounts, own: Option<&str>) -> Vec<Nodes> {
        let gives = |set: &Nodes| {
            let enough = wanted.iter().all(|(resource, amount)| {
                let of = |node| {
                    let reused = own.map_or(0, |uid| assignments.of_pod(uid, node, resource));
                    self.free(assignments, node, resource) + reused
                };
                set.iter().map(of).sum::<u64>() >= *amount
            });
            enough && set.iter().all(|node| assignments.group(node).is_none_or(|group| group == *set))
        };
        self.nodes().subsets().filter(gives).collect()
    }

    fn free(&self, assignments: &Assignments, node: u32, resource: &str) -> u64 {
        self.of(node, resource).saturating_sub(assignments.taken(node, resource))
    }
}

/// The pod whose containers' memory a container may use: its own, where it has ended before the others start.
fn reused<'p>(pod: &'p Pod, container: &Container) -> Option<&'p str> {
    let mut init = pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten());
    let ends_first = init.any(|init| init.name == container.name && !is_sidecar(init));
    pod.metadata.uid.as_deref().filter(|_| ends_first)
}

fn narrowest(sets: impl Iterator<Item = Nodes>) -> Option<Nodes> {
    sets.reduce(|best, set| if set.is_narrower(best) { set } else { best })
}
