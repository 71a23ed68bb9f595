//! The end of a namespace: what remains, what to report, when it may go.
//!
//! Input: the namespace and what was found in it after everything was asked to be deleted. Output: status
//! conditions, the finalizers to keep, or when to look again.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::{
    api::core::v1::{Namespace, NamespaceCondition},
    apimachinery::pkg::apis::meta::v1::Time,
};

use crate::object;

/// The finalizer whose removal ends the namespace.
pub const FINALIZER: &str = "kubernetes";

/// True while the namespace is to be emptied by us.
pub fn is_to_be_emptied(namespace: &Namespace) -> bool {
    object::is_being_deleted(&namespace.metadata)
        && namespace
            .spec
            .as_ref()
            .and_then(|spec| spec.finalizers.as_ref())
            .is_some_and(|finalizers| finalizers.iter().any(|finalizer| finalizer == FINALIZER))
}

/// True for a namespace in which things may still be created.
pub fn is_active(namespace: &Namespace) -> bool {
    let phase = namespace.status.as_ref().and_then(|status| status.phase.as_deref());
    !object::is_being_deleted(&namespace.metadata) && phase != Some("Terminating")
}

/// What one pass over the namespace's content found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Remains {
    /// Objects left, by resource (`pods`, `deployments.apps`).
    pub objects: BTreeMap<String, usize>,
    /// Finalizers these objects wait for, with the number of objects.
    pub finalizers: BTreeMap<String, usize>,
    /// The longest grace period among pods left, in seconds.
    pub grace_seconds: i64,
    /// Why kinds could not be discovered, listed or deleted.
    pub failures: Vec<String>,
}

impl Remains {
    /// True when the namespace is empty for certain.
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty() && self.failures.is_empty()
    }
}

/// How to go on.
#[derive(Clone, Debug, PartialEq)]
pub enum Plan {
    /// Nothing is left: write these finalizers through the `finalize` subresource.
    Finalize {
        /// The finalizers of others, which stay.
        finalizers: Vec<String>,
    },
    /// Report the conditions and look again.
    Wait {
        /// The conditions to write; `None` when they are unchanged.
        conditions: Option<Vec<NamespaceCondition>>,
        /// When to look again if no event comes first.
        retry_after: SignedDuration,
    },
}

/// Decides after one pass.
pub fn plan(namespace: &Namespace, remains: &Remains, now: Timestamp) -> Plan {
    if remains.is_empty() {
        let held = namespace.spec.as_ref().and_then(|spec| spec.finalizers.as_ref());
        let others = held.into_iter().flatten().filter(|finalizer| *finalizer != FINALIZER);
        return Plan::Finalize { finalizers: others.cloned().collect() };
    }
    let current = namespace.status.as_ref().and_then(|status| status.conditions.as_deref());
    let conditions = conditions(current.unwrap_or_default(), remains, now);
    let changed = Some(conditions.as_slice()) != current;
    let seconds = (remains.grace_seconds / 2).clamp(1, 30);
    Plan::Wait { conditions: changed.then_some(conditions), retry_after: SignedDuration::from_secs(seconds) }
}

fn conditions(current: &[NamespaceCondition], remains: &Remains, now: Timestamp) -> Vec<NamespaceCondition> {
    let counted = |counts: &BTreeMap<String, usize>, verb: &str| {
        let parts = counts.iter().map(|(name, number)| format!("{name} {verb} {number} resource instances"));
        parts.collect::<Vec<_>>().join(", ")
    };
    let content = (!remains.objects.is_empty())
        .then(|| format!("Some resources are remaining: {}", counted(&remains.objects, "has")));
    let finalizers = (!remains.finalizers.is_empty()).then(|| {
        let counts = counted(&remains.finalizers, "in");
        format!("Some content in the namespace has finalizers remaining: {counts}")
    });
    let failures = (!remains.failures.is_empty())
        .then(|| format!("Failed to delete all resource types: {}", remains.failures.join("; ")));
    [
        ("NamespaceDeletionContentFailure", "ContentDeletionFailed", "ContentDeleted", failures),
        ("NamespaceContentRemaining", "SomeResourcesRemain", "ContentRemoved", content),
        ("NamespaceFinalizersRemaining", "SomeFinalizersRemain", "ContentHasNoFinalizers", finalizers),
    ]
    .into_iter()
    .map(|(kind, reason_true, reason_false, message)| {
        let status = if message.is_some() { "True" } else { "False" };
        let before = current.iter().find(|condition| condition.type_ == kind && condition.status == status);
        NamespaceCondition {
            type_: kind.into(),
            status: status.into(),
            reason: Some(if message.is_some() { reason_true } else { reason_false }.into()),
            message: Some(message.unwrap_or_else(|| "All content successfully removed".into())),
            last_transition_time: before.map_or_else(
                || Timestamp::from_second(now.as_second()).ok().map(Time),
                |before| before.last_transition_time.clone(),
            ),
        }
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{NamespaceSpec, NamespaceStatus};

    use super::*;

    fn namespace() -> Namespace {
        let mut namespace = Namespace::default();
        namespace.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
        namespace.spec =
            Some(NamespaceSpec { finalizers: Some(vec![FINALIZER.into(), "example.com/hold".into()]) });
        namespace
    }

    #[test]
    fn an_empty_namespace_loses_our_finalizer_only() {
        assert!(is_to_be_emptied(&namespace()));
        assert_eq!(
            plan(&namespace(), &Remains::default(), Timestamp::UNIX_EPOCH),
            Plan::Finalize { finalizers: vec!["example.com/hold".into()] }
        );
    }

    #[test]
    fn remaining_content_is_reported_once() {
        let remains =
            Remains { objects: [("pods".to_owned(), 2)].into(), grace_seconds: 30, ..Remains::default() };
        let mut namespace = namespace();
        let Plan::Wait { conditions: Some(conditions), retry_after } =
            plan(&namespace, &remains, Timestamp::UNIX_EPOCH)
        else {
            panic!("must wait")
        };
        assert_eq!(retry_after, SignedDuration::from_secs(15));
        let content = conditions.iter().find(|condition| condition.type_ == "NamespaceContentRemaining");
        assert_eq!(
            content.and_then(|condition| condition.message.as_deref()),
            Some("Some resources are remaining: pods has 2 resource instances")
        );
        namespace.status = Some(NamespaceStatus { conditions: Some(conditions), phase: None });
        let later = Timestamp::UNIX_EPOCH + SignedDuration::from_secs(9);
        assert!(matches!(plan(&namespace, &remains, later), Plan::Wait { conditions: None, .. }));
    }
}
