//! Which nodes can take a pod at all, and in upstream's words why not.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{NodeAffinity, Pod, Taint};

use super::{
    resources::Resources,
    state::{HostPort, NodeInfo, host_ports},
};
use crate::{object, selector};

/// What a pod asks of a node, computed once per scheduling attempt.
#[derive(Clone, Debug)]
pub struct Demand<'a> {
    /// The pod itself.
    pub pod: &'a Pod,
    /// What it occupies.
    pub requested: Resources,
    /// What it counts as in scores.
    pub scored: Resources,
    host_ports: BTreeSet<HostPort>,
}

impl<'a> Demand<'a> {
    /// Reads the pod's demands.
    pub fn of(pod: &'a Pod) -> Self {
        Demand {
            pod,
            requested: Resources::requested_by(pod),
            scored: Resources::scored_for(pod),
            host_ports: host_ports(pod),
        }
    }

    /// The pod's node affinity.
    pub fn node_affinity(&self) -> Option<&'a NodeAffinity> {
        self.pod.spec.as_ref()?.affinity.as_ref()?.node_affinity.as_ref()
    }
}

/// Why the node refuses the pod; empty when it does not. Only the first filter that refuses speaks, but it
/// names all its reasons.
pub fn refusals(demand: &Demand<'_>, info: &NodeInfo) -> Vec<String> {
    if is_unschedulable(demand, info) {
        vec!["node(s) were unschedulable".into()]
    } else if let Some(taint) = untolerated_taint(demand, info) {
        let value = taint.value.as_deref().unwrap_or_default();
        vec![format!("node(s) had untolerated taint {{{}: {value}}}", taint.key)]
    } else if !matches_affinity(demand, info) {
        vec!["node(s) didn't match Pod's node affinity/selector".into()]
    } else if demand.host_ports.iter().any(|port| info.occupies(port)) {
        vec!["node(s) didn't have free ports for the requested pod ports".into()]
    } else {
        missing_resources(demand, info)
    }
}

fn is_unschedulable(demand: &Demand<'_>, info: &NodeInfo) -> bool {
    let cordoned = info.node().spec.as_ref().and_then(|spec| spec.unschedulable) == Some(true);
    let taint = Taint {
        key: "node.kubernetes.io/unschedulable".into(),
        effect: "NoSchedule".into(),
        ..Taint::default()
    };
    cordoned && !is_tolerated(demand, &taint)
}

fn is_tolerated(demand: &Demand<'_>, taint: &Taint) -> bool {
    object::pod_tolerations(demand.pod).iter().any(|toleration| object::tolerates(toleration, taint))
}

fn untolerated_taint<'a>(demand: &Demand<'_>, info: &'a NodeInfo) -> Option<&'a Taint> {
    object::node_taints(info.node())
        .iter()
        .filter(|taint| matches!(taint.effect.as_str(), "NoSchedule" | "NoExecute"))
        .find(|taint| !is_tolerated(demand, taint))
}

fn matches_affinity(demand: &Demand<'_>, info: &NodeInfo) -> bool {
    let Some(spec) = demand.pod.spec.as_ref() else { return true };
    let node = info.node();
    let no_labels = object::StringMap::new();
    let labels = node.metadata.labels.as_ref().unwrap_or(&no_labels);
    let selected = spec.node_selector.as_ref().is_none_or(|wanted| selector::contains(labels, wanted));
    let required = demand
        .node_affinity()
        .and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref());
    selected && required.is_none_or(|required| selector::node_matches(required, node))
}

fn missing_resources(demand: &Demand<'_>, info: &NodeInfo) -> Vec<String> {
    let mut missing = Vec::new();
    if info.pod_count() >= info.most_pods() {
        missing.push("Too many pods".to_owned());
    }
    let (wanted, offered, taken) = (&demand.requested, info.allocatable(), info.requested());
    let mut check = |name: &str, wanted: i64, offered: i64, taken: i64| {
        if wanted > 0 && wanted > offered.saturating_sub(taken) {
            missing.push(format!("Insufficient {name}"));
        }
    };
    check("cpu", wanted.milli_cpu, offered.milli_cpu, taken.milli_cpu);
    check("memory", wanted.memory, offered.memory, taken.memory);
    check("ephemeral-storage", wanted.ephemeral_storage, offered.ephemeral_storage, taken.ephemeral_storage);
    for (name, amount) in &wanted.extended {
        let of = |resources: &Resources| resources.extended.get(name).copied().unwrap_or(0);
        check(name, *amount, of(offered), of(taken));
    }
    missing
}
