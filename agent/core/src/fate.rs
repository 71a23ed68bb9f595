//! From an API pod to what should become of it.

use k8s_openapi::api::core::v1::Pod;

use crate::admission::Rejection;
use crate::model::Fate;

/// Grace when nothing names one.
pub const DEFAULT_GRACE: i64 = 30;

/// The node's word against a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Reason and message.
    pub rejection: Rejection,
    /// Seconds for a pod that runs already to end.
    pub grace: Option<i64>,
}

/// What the API object asks for; `verdict` is the node's refusal to run it.
pub fn fate_of(pod: &Pod, verdict: Option<&Verdict>) -> Fate {
    if pod.metadata.deletion_timestamp.is_some() {
        let grace = pod.metadata.deletion_grace_period_seconds.or(own_grace(pod)).unwrap_or(DEFAULT_GRACE);
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
pub fn fate_of_gone(pod: &Pod) -> Fate {
    let grace = match fate_of(pod, None) {
        // Deleted gracefully before: it has had its time.
        Fate::Terminate { grace, .. } => grace.min(1),
        _ => 1,
    };
    Fate::Terminate { grace, gone: true }
}

/// The manifest of a static pod is gone: it ends as it would have been deleted.
pub fn fate_of_removed(pod: &Pod) -> Fate {
    Fate::Terminate { grace: own_grace(pod).unwrap_or(DEFAULT_GRACE), gone: true }
}

/// Whether the node must still say yes to the pod: not one that ended, is being deleted, or was started before.
pub fn needs_admission(pod: &Pod) -> bool {
    let status = pod.status.as_ref();
    let phase = status.and_then(|status| status.phase.as_deref());
    let begun = status.is_some_and(|status| status.start_time.is_some());
    pod.metadata.deletion_timestamp.is_none() && matches!(phase, None | Some("Pending")) && !begun
}

/// Whether the pod counts against the node's resources.
pub fn holds_resources(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    !matches!(phase, Some("Succeeded" | "Failed"))
}

fn own_grace(pod: &Pod) -> Option<i64> {
    pod.spec.as_ref()?.termination_grace_period_seconds
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(metadata: &Value) -> Pod {
        serde_json::from_value(json!({"metadata": metadata,
            "spec": {"containers": [], "terminationGracePeriodSeconds": 45}}))
        .unwrap()
    }

    #[test]
    fn a_deleted_pod_ends_whatever_the_node_thinks_of_it() {
        let rejection = Rejection { reason: "Evicted".to_owned(), message: "disk".to_owned() };
        let verdict = Verdict { rejection, grace: Some(3) };
        let deleted = |grace: &Value| {
            pod(&json!({"deletionTimestamp": "2026-01-01T00:00:00Z", "deletionGracePeriodSeconds": grace}))
        };
        let end = |grace, gone| Fate::Terminate { grace, gone };
        let failed = Fate::Fail { reason: "Evicted".to_owned(), message: "disk".to_owned(), grace: Some(3) };
        assert_eq!(fate_of(&pod(&json!({})), None), Fate::Run);
        assert_eq!(fate_of(&pod(&json!({})), Some(&verdict)), failed);
        assert_eq!(fate_of(&deleted(&json!(7)), Some(&verdict)), end(7, false));
        assert_eq!(fate_of(&deleted(&Value::Null), None), end(45, false), "the pod's own");
        assert_eq!(fate_of_gone(&deleted(&json!(7))), end(1, true), "it has had its time");
        assert_eq!(fate_of_gone(&deleted(&json!(0))), end(0, true));
        assert_eq!(fate_of_removed(&pod(&json!({}))), end(45, true));
    }
}
