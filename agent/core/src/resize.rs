//! Other resources for a container that runs: what differs, whether it takes a restart, whether the node can. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Container, Node, Pod, PodSpec, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use serde::{Deserialize, Serialize};

use crate::model::ContainerSpec;
use crate::resources::{Side, amount, milli, pod_request, whole};

/// The condition of a pod whose resize waits.
pub const RESIZE_PENDING: &str = "PodResizePending";
const INFEASIBLE: &str = "Infeasible";
const DEFERRED: &str = "Deferred";

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
            return Some(Blocked { reason: INFEASIBLE, message });
        }
        let used: i64 =
            others.iter().filter_map(|other| other.spec.as_ref()).map(|spec| pod_request(spec, name)).sum();
        if used.saturating_add(wanted) > capacity {
            let message = format!(
                "Node didn't have enough resource: {name}, requested: {wanted}, used: {used}, capacity: {capacity}"
            );
            return Some(Blocked { reason: DEFERRED, message });
        }
    }
    None
}

/// Whether `new` wants more of anything than `old`: only then the node has to be asked.
pub fn grows(new: &PodSpec, old: &PodSpec) -> bool {
    NAMES.into_iter().any(|name| pod_request(new, name) > pod_request(old, name))
}

/// Why the pod keeps its resources, as its status says: what an agent knew that ran before this one.
pub fn pending(pod: &Pod) -> Option<Blocked> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let told = conditions.iter().find(|one| one.type_ == RESIZE_PENDING && one.status == "True")?;
    let reason = if told.reason.as_deref() == Some(INFEASIBLE) { INFEASIBLE } else { DEFERRED };
    Some(Blocked { reason, message: told.message.clone().unwrap_or_default() })
}

/// The pod with the requests that it has: of one whose resize waits, those that its status calls allocated.
pub fn holding(pod: &Arc<Pod>) -> Arc<Pod> {
    if pending(pod).is_none() {
        return Arc::clone(pod);
    }
    let mut held = Pod::clone(pod);
    let statuses = held.status.iter().filter_map(|status| status.container_statuses.as_ref()).flatten();
    let allocated: BTreeMap<_, _> =
        statuses.map(|status| (status.name.clone(), status.allocated_resources.clone())).collect();
    for container in held.spec.iter_mut().flat_map(|spec| &mut spec.containers) {
        if let Some(Some(requests)) = allocated.get(&container.name) {
            container.resources.get_or_insert_default().requests = Some(requests.clone());
        }
    }
    Arc::new(held)
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
    fn a_pod_whose_resize_waits_holds_what_it_was_given() {
        let pod = |status: &str| -> Arc<Pod> {
            let pod = json!({
                "spec": {"containers": [{"name": "a", "resources": {"requests": {"cpu": "100"}}}]},
                "status": {
                    "conditions": [{"type": "PodResizePending", "status": status, "reason": "Infeasible",
                        "message": "no"}],
                    "containerStatuses": [{"name": "a", "image": "i", "imageID": "i", "ready": true,
                        "restartCount": 0, "allocatedResources": {"cpu": "1"}}],
                },
            });
            Arc::new(serde_json::from_value(pod).expect("a pod"))
        };
        let request = |pod: &Arc<Pod>| pod_request(holding(pod).spec.as_ref().expect("a spec"), "cpu");
        assert_eq!((request(&pod("True")), request(&pod("False"))), (1_000, 100_000));
        let told = pending(&pod("True")).expect("it waits");
        assert_eq!((told.reason, told.message.as_str()), ("Infeasible", "no"));
        assert_eq!(pending(&pod("False")), None);
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
