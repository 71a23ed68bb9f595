//! From an API pod to what should become of it. Pure.

use agent_core::admission::Rejection;
use agent_core::model::Fate;
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::runtime::events::FoundPod;

/// Grace when nothing names one.
const DEFAULT_GRACE: i64 = 30;

/// The node's word against a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Verdict {
    /// Reason and message.
    pub(super) rejection: Rejection,
    /// Seconds for a pod that runs already to end.
    pub(super) grace: Option<i64>,
}

/// What the API object asks for; `verdict` is the node's refusal to run it.
pub(super) fn fate_of(pod: &Pod, verdict: Option<&Verdict>) -> Fate {
    if pod.metadata.deletion_timestamp.is_some() {
        let spec_grace = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds);
        let grace = pod.metadata.deletion_grace_period_seconds.or(spec_grace).unwrap_or(DEFAULT_GRACE);
        return Fate::Terminate { grace, gone: false };
    }
    match verdict {
        Some(Verdict { rejection, grace }) => {
            Fate::Fail { reason: rejection.reason.clone(), message: rejection.message.clone(), grace: *grace }
        }
        None => Fate::Run,
    }
}

/// The API object is gone: what is left ends soon.
pub(super) fn fate_of_gone(pod: &Pod) -> Fate {
    let grace = match fate_of(pod, None) {
        // Deleted gracefully before: it has had its time.
        Fate::Terminate { grace, .. } => grace.min(1),
        _ => 1,
    };
    Fate::Terminate { grace, gone: true }
}

/// The manifest of a static pod is gone: it ends as it would have been deleted.
pub(super) fn fate_of_removed(pod: &Pod) -> Fate {
    let grace = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds);
    Fate::Terminate { grace: grace.unwrap_or(DEFAULT_GRACE), gone: true }
}

/// Whether the node must still say yes to the pod: not one that ended, is being deleted, or was started before.
pub(super) fn needs_admission(pod: &Pod) -> bool {
    let status = pod.status.as_ref();
    let phase = status.and_then(|status| status.phase.as_deref());
    let begun = status.is_some_and(|status| status.start_time.is_some());
    pod.metadata.deletion_timestamp.is_none() && matches!(phase, None | Some("Pending")) && !begun
}

/// Whether the pod counts against the node's resources.
pub(super) fn holds_resources(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    !matches!(phase, Some("Succeeded" | "Failed"))
}

/// A pod that only the node knows, as far as its labels tell: enough to end it.
pub(super) fn orphan(found: &FoundPod) -> (Pod, Fate) {
    let container = |name: &String| Container { name: name.clone(), ..Container::default() };
    let pod = Pod {
        metadata: ObjectMeta {
            name: Some(found.name.clone()),
            namespace: Some(found.namespace.clone()),
            uid: Some(found.uid.clone()),
            ..ObjectMeta::default()
        },
        spec: Some(PodSpec {
            containers: found.containers.iter().map(container).collect(),
            ..PodSpec::default()
        }),
        status: None,
    };
    (pod, Fate::Terminate { grace: found.grace.unwrap_or(DEFAULT_GRACE), gone: true })
}
