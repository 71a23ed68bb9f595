//! Other resources for a container that runs: what differs, whether it takes a restart, whether the node can. Pure.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Container, Node, Pod, PodSpec, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use serde::{Deserialize, Serialize};

use crate::model::ContainerSpec;
use crate::resources::{Side, amount, milli, pod_request, whole};

/// What can be changed while a container runs.
const NAMES: [&str; 2] = ["cpu", "memory"];

/// The resources that a container instance has, as its last start or resize gave them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Applied {
    /// The instance, by its restart count.
    pub attempt: u32,
    /// Requests and limits.
    pub resources: ResourceRequirements,
}

/// Why a pod keeps the resources it has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocked {
    /// `Deferred` or `Infeasible`.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

impl Applied {
    /// What `container` says now.
    pub fn of(container: &Container, attempt: u32) -> Self {
        Self { attempt, resources: container.resources.clone().unwrap_or_default() }
    }

    /// Resources that `container` wants otherwise.
    pub fn differences(&self, container: &Container) -> Vec<&'static str> {
        let wanted = container.resources.as_ref();
        let differs = |name: &&str| {
            [Side::Requests, Side::Limits]
                .into_iter()
                .any(|side| amount(wanted, side, name) != amount(Some(&self.resources), side, name))
        };
        NAMES.into_iter().filter(differs).collect()
    }
}

/// Whether a change of these resources restarts the container, as its resize policy says.
pub fn takes_restart(entry: ContainerSpec<'_>, changed: &[&str]) -> bool {
    entry.container.resize_policy.iter().flatten().any(|policy| {
        policy.restart_policy == "RestartContainer" && changed.contains(&policy.resource_name.as_str())
    })
}

/// Whether the node has what the pod wants now, beside `others`.
pub fn check(pod: &Pod, node: &Node, others: &[Arc<Pod>]) -> Option<Blocked> {
    let spec = pod.spec.as_ref()?;
    let allocatable = node.status.as_ref()?.allocatable.as_ref()?;
    for name in NAMES {
        let scale = |quantity: &Quantity| if name == "cpu" { milli(quantity) } else { whole(quantity) };
        let Some(capacity) = allocatable.get(name).and_then(scale) else { continue };
        let wanted = pod_request(spec, name);
        if wanted > capacity {
            let message = format!(
                "Node didn't have enough capacity: {name}, requested: {wanted}, capacity: {capacity}"
            );
            return Some(Blocked { reason: "Infeasible", message });
        }
        let used: i64 =
            others.iter().filter_map(|other| other.spec.as_ref()).map(|spec| pod_request(spec, name)).sum();
        if used.saturating_add(wanted) > capacity {
            let message = format!(
                "Node didn't have enough resource: {name}, requested: {wanted}, used: {used}, capacity: {capacity}"
            );
            return Some(Blocked { reason: "Deferred", message });
        }
    }
    None
}

/// Whether `new` wants more of anything than `old`: only then the node has to be asked.
pub fn grows(new: &PodSpec, old: &PodSpec) -> bool {
    NAMES.into_iter().any(|name| pod_request(new, name) > pod_request(old, name))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::ContainerKind;

    fn container(resources: &serde_json::Value) -> Container {
        serde_json::from_value(json!({"name": "a", "resources": resources,
            "resizePolicy": [{"resourceName": "memory", "restartPolicy": "RestartContainer"}]}))
        .expect("a container")
    }

    #[test]
    fn equal_amounts_are_no_difference_however_they_are_written() {
        let applied = Applied::of(&container(&json!({"requests": {"cpu": "1", "memory": "1Gi"}})), 0);
        assert_eq!(
            applied.differences(&container(&json!({"requests": {"cpu": "1000m", "memory": "1024Mi"}}))),
            [""; 0]
        );
        let more = container(&json!({"requests": {"cpu": "2", "memory": "1Gi"}}));
        assert_eq!(applied.differences(&more), ["cpu"]);
        let entry = ContainerSpec { container: &more, kind: ContainerKind::Main };
        assert!(!takes_restart(entry, &["cpu"]) && takes_restart(entry, &["cpu", "memory"]));
    }

    #[test]
    fn the_node_says_never_or_not_now() {
        let pod = |cpu: &str| -> Pod {
            serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": {"containers": [
                {"name": "a", "resources": {"requests": {"cpu": cpu}}}]}}))
            .expect("a pod")
        };
        let node: Node =
            serde_json::from_value(json!({"status": {"allocatable": {"cpu": "2"}}})).expect("a node");
        let others = [Arc::new(pod("1"))];
        assert_eq!(check(&pod("1"), &node, &others), None);
        assert_eq!(check(&pod("1500m"), &node, &others).map(|blocked| blocked.reason), Some("Deferred"));
        assert_eq!(check(&pod("3"), &node, &others).map(|blocked| blocked.reason), Some("Infeasible"));
    }
}
