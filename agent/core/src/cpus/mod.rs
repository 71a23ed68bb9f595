//! Processors for one container each (CPU manager policy `static`). Pure.
//!
//! Inputs: the machine's processors, those kept for the system, who has which, and a pod. Output: what its containers get, or why
//! they cannot. Containers of Guaranteed pods that ask for whole processors get them for themselves; all others share the rest.
//! Whole sockets are taken before whole cores, these before single threads, and as few sockets and cores as possible are broken
//! up, as upstream.

mod near;
mod set;

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

pub use self::set::{CpuSet, ParseCpuSetError};
use crate::model::is_sidecar;
use crate::numa::{self, Nodes};
use crate::qos::QosClass;
use crate::resources::milli;

/// Where a processor sits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Its socket.
    pub socket: u32,
    /// Its core, a number of its own on the whole machine.
    pub core: u32,
    /// Its NUMA node.
    pub node: u32,
}

/// The machine's processors that are on.
pub type Topology = BTreeMap<u32, Place>;

/// Options of the policy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    /// Only whole cores are given away (`full-pcpus-only`).
    pub full_cores_only: bool,
    /// Those kept for the system are not shared by pods (`strict-cpu-reservation`).
    pub strict_reservation: bool,
}

/// The rules of one node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// The processors.
    pub topology: Topology,
    /// Those kept for the system: nobody gets them for itself.
    pub reserved: CpuSet,
    /// Options.
    pub options: Options,
}

/// Who has which processors: by pod and container.
pub type Assignments = numa::Assignments<String>;

/// Why a pod gets no processors.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpuError {
    /// There are too few left.
    #[error("not enough cpus available to satisfy request: requested={requested}, available={available}")]
    NotEnough {
        /// By the container.
        requested: usize,
        /// On the node.
        available: usize,
    },
    /// Not whole cores.
    #[error("SMT Alignment Error: requested {requested} cpus not multiple cpus per core = {per_core}")]
    Alignment {
        /// By the container.
        requested: usize,
        /// Threads of a core.
        per_core: usize,
    },
}

impl Assignments {
    /// What a container has.
    pub fn of(&self, pod_uid: &str, container: &str) -> Option<CpuSet> {
        self.0.get(pod_uid)?.get(container)?.parse().ok()
    }

    /// All that is given away.
    pub fn taken(&self) -> CpuSet {
        self.0.keys().fold(CpuSet::default(), |all, uid| all.union(&self.of_pod(uid)))
    }

    /// What the pod's containers have together.
    pub fn of_pod(&self, pod_uid: &str) -> CpuSet {
        let sets = self.0.get(pod_uid).into_iter().flat_map(BTreeMap::values);
        let sets = sets.filter_map(|set| set.parse::<CpuSet>().ok());
        sets.fold(CpuSet::default(), |all, set| all.union(&set))
    }
}

/// Whole processors that a container of a Guaranteed pod asks for; `None` where it shares.
fn exclusive(container: &Container) -> Option<usize> {
    let requests = container.resources.as_ref()?.requests.as_ref()?;
    let asked = milli(requests.get("cpu")?)?;
    let whole = usize::try_from(asked / 1000).ok()?;
    (asked > 0 && asked % 1000 == 0).then_some(whole)
}

impl Policy {
    /// All processors.
    pub fn all(&self) -> CpuSet {
        self.topology.keys().copied().collect()
    }

    /// What containers without processors of their own run on.
    pub fn shared(&self, assignments: &Assignments) -> CpuSet {
        let rest = self.all().minus(&assignments.taken());
        if self.options.strict_reservation { rest.minus(&self.reserved) } else { rest }
    }

    /// The processors that a number of them would be kept for the system.
    pub fn reserve(topology: &Topology, count: usize) -> Option<CpuSet> {
        let policy =
            Self { topology: topology.clone(), reserved: CpuSet::default(), options: Options::default() };
        policy.take(&policy.all(), count)
    }

    /// Gives the pod's containers what they ask for, all or nothing. What the pod has already stays.
    pub fn assign(&self, assignments: &mut Assignments, pod: &Pod) -> Result<(), CpuError> {
        assignments.assign_all(pod, |next, container| self.assign_container(next, pod, container, None))
    }

    /// Gives one of the pod's containers what it asks for, of the processors `near` before others.
    ///
    /// Init containers that end before the others start run on the same processors as these.
    pub fn assign_container(
        &self,
        assignments: &mut Assignments,
        pod: &Pod,
        container: &Container,
        near: Option<Nodes>,
    ) -> Result<(), CpuError> {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let Some(count) = asked(pod, container).filter(|_| assignments.of(uid, &container.name).is_none())
        else {
            return Ok(());
        };
        let free = self.free(assignments);
        let own = if ends_first(pod, container) { assignments.of_pod(uid) } else { CpuSet::default() };
        let set = if own.len() >= count {
            own.first(count)
        } else {
            own.union(&self.checked(&free, count - own.len(), near)?)
        };
        let given = assignments.0.entry(uid.to_owned()).or_default();
        given.insert(container.name.clone(), set.to_string());
        Ok(())
    }

    /// What nobody has.
    fn free(&self, assignments: &Assignments) -> CpuSet {
        self.all().minus(&assignments.taken()).minus(&self.reserved)
    }

    fn checked(&self, free: &CpuSet, count: usize, near: Option<Nodes>) -> Result<CpuSet, CpuError> {
        let per_core = self.members(|place| place.core).values().map(CpuSet::len).max().unwrap_or(1).max(1);
        if self.options.full_cores_only && !count.is_multiple_of(per_core) {
            return Err(CpuError::Alignment { requested: count, per_core });
        }
        let not_enough = || CpuError::NotEnough { requested: count, available: free.len() };
        let set = self.take_near(free, count, near).ok_or_else(not_enough)?;
        if self.options.full_cores_only && !self.is_whole_cores(&set) {
            return Err(not_enough());
        }
        Ok(set)
    }

    /// Of the free ones those of some nodes first.
    fn take_near(&self, free: &CpuSet, count: usize, near: Option<Nodes>) -> Option<CpuSet> {
        let Some(near) = near else { return self.take(free, count) };
        let aligned = free.minus(&free.minus(&self.of_nodes(near)));
        let first = self.take(&aligned, count.min(aligned.len()))?;
        let rest = self.take(&free.minus(&first), count - first.len())?;
        Some(first.union(&rest))
    }

    fn is_whole_cores(&self, set: &CpuSet) -> bool {
        self.members(|place| place.core).values().all(|core| core.is_subset(set) || core.is_disjoint(set))
    }

    /// Processors by something of their place.
    fn members(&self, of: impl Fn(&Place) -> u32) -> BTreeMap<u32, CpuSet> {
        let mut groups: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
        for (cpu, place) in &self.topology {
            groups.entry(of(place)).or_default().insert(*cpu);
        }
        groups.into_iter().map(|(key, cpus)| (key, cpus.into_iter().collect())).collect()
    }

    /// So many of the free ones; `None` where there are not so many.
    fn take(&self, free: &CpuSet, count: usize) -> Option<CpuSet> {
        if free.len() < count {
            return None;
        }
        let (sockets, cores) = (self.members(|place| place.socket), self.members(|place| place.core));
        let mut taken = CpuSet::default();
        let left_in = |group: &CpuSet, taken: &CpuSet| {
            group.iter().filter(|cpu| free.contains(*cpu) && !taken.contains(*cpu)).count()
        };
        for socket in sockets.values() {
            if count - taken.len() >= socket.len() && left_in(socket, &taken) == socket.len() {
                taken = taken.union(socket);
            }
        }
        // Cores of the sockets with the least left first: full sockets stay whole.
        let socket_of = |group: &CpuSet| {
            let first = group.iter().next().and_then(|cpu| self.topology.get(&cpu));
            first.and_then(|place| sockets.get(&place.socket)).cloned().unwrap_or_default()
        };
        let rank = |group: &CpuSet, taken: &CpuSet| {
            let socket = socket_of(group);
            (socket.is_disjoint(taken), left_in(&socket, taken), left_in(group, taken))
        };
        loop {
            let missing = count - taken.len();
            let whole = cores.values().filter(|core| {
                !core.is_empty() && core.len() <= missing && left_in(core, &taken) == core.len()
            });
            let Some(core) = whole.min_by_key(|core| rank(core, &taken)) else { break };
            taken = taken.union(core);
        }
        while taken.len() < count {
            let broken = cores.values().filter(|core| left_in(core, &taken) > 0);
            let core = broken.min_by_key(|core| rank(core, &taken))?;
            let missing = count - taken.len();
            let free_in: CpuSet =
                core.iter().filter(|cpu| free.contains(*cpu) && !taken.contains(*cpu)).collect();
            taken = taken.union(&free_in.first(missing));
        }
        Some(taken)
    }
}

/// What a container of the pod gets for itself.
fn asked(pod: &Pod, container: &Container) -> Option<usize> {
    let spec = pod.spec.as_ref().filter(|spec| QosClass::of(spec) == QosClass::Guaranteed);
    spec.and_then(|_| exclusive(container))
}

/// Whether a container of the pod has ended before most others start.
fn ends_first(pod: &Pod, container: &Container) -> bool {
    let init = pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten());
    init.into_iter().any(|init| init.name == container.name && !is_sidecar(init))
}

/// A pod's containers in the order in which they are given something: those that run side by side for the pod's life, then those
/// that have ended before and may have the same.
pub fn in_turn(spec: &PodSpec) -> impl Iterator<Item = &Container> {
    let init = || spec.init_containers.iter().flatten();
    let (sidecars, first) = (init().filter(|c| is_sidecar(c)), init().filter(|c| !is_sidecar(c)));
    sidecars.chain(&spec.containers).chain(first)
}

#[cfg(test)]
mod tests;
