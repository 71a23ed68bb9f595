//! Revisions: which ReplicaSet is current, how revisions are numbered, which old ones may go.
//!
//! `kubectl rollout history` and `undo` read the annotations written here. An undo is a change of the
//! template: the old ReplicaSet is found again by its template and gets the next revision number.

use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, DeploymentStatus, ReplicaSet};

use super::{
    Context, Sizes,
    replica_set::{actual_replicas, new_replica_set, replicas, same_template},
};
use crate::object::{self, StringMap};

/// Annotation with the number of a rollout's revision, on Deployments and ReplicaSets.
pub const REVISION: &str = "deployment.kubernetes.io/revision";
/// Annotation with the Deployment's `replicas` when the ReplicaSet was last sized.
pub const DESIRED_REPLICAS: &str = "deployment.kubernetes.io/desired-replicas";
/// Annotation with the upper bound of pods when the ReplicaSet was last sized.
pub const MAX_REPLICAS: &str = "deployment.kubernetes.io/max-replicas";
const REVISION_HISTORY: &str = "deployment.kubernetes.io/revision-history";
/// Upstream's bound on the text of past revisions, in characters.
const REVISION_HISTORY_BOUND: usize = 2000;

/// Annotations that describe the Deployment itself and are not copied to its ReplicaSets.
const NOT_COPIED: [&str; 6] = [
    "kubectl.kubernetes.io/last-applied-configuration",
    "deprecated.deployment.rollback.to",
    REVISION,
    REVISION_HISTORY,
    DESIRED_REPLICAS,
    MAX_REPLICAS,
];

/// What a taken ReplicaSet name means.
#[derive(Clone, Debug, PartialEq)]
pub enum Collision {
    /// It is the one we wanted to create; the cache was only late.
    Ours,
    /// Another template has the same hash: write this status, whose count changes the next hash.
    Retry(Box<DeploymentStatus>),
}

/// Judges the ReplicaSet that stands where a new one was to be created.
pub fn resolve_collision(deployment: &Deployment, existing: &ReplicaSet) -> Collision {
    let wanted = deployment.spec.as_ref().map(|spec| &spec.template);
    let found = existing.spec.as_ref().and_then(|spec| spec.template.as_ref());
    let owned = object::is_controlled_by(&existing.metadata, object::uid(&deployment.metadata));
    if owned && matches!((wanted, found), (Some(wanted), Some(found)) if same_template(wanted, found)) {
        return Collision::Ours;
    }
    let mut status = deployment.status.clone().unwrap_or_default();
    status.collision_count = Some(status.collision_count.unwrap_or(0).saturating_add(1));
    Collision::Retry(Box::new(status))
}

/// The oldest ReplicaSet with the Deployment's template. `sorted`: oldest first.
pub(super) fn find_new<'a>(spec: &DeploymentSpec, sorted: &[&'a ReplicaSet]) -> Option<&'a ReplicaSet> {
    sorted.iter().copied().find(|set| {
        let template = set.spec.as_ref().and_then(|spec| spec.template.as_ref());
        template.is_some_and(|template| same_template(template, &spec.template))
    })
}

/// The size annotations that every resize writes.
pub(super) fn replica_annotations(sizes: Sizes) -> StringMap {
    StringMap::from([
        (DESIRED_REPLICAS.into(), sizes.desired.to_string()),
        (MAX_REPLICAS.into(), sizes.most().to_string()),
    ])
}

/// Those of `wanted` that `current` lacks or has with another value.
pub(super) fn differing(current: Option<&StringMap>, wanted: StringMap) -> StringMap {
    wanted
        .into_iter()
        .filter(|(key, value)| current.and_then(|current| current.get(key)) != Some(value))
        .collect()
}

/// The number of an annotation, if it is there and is one.
pub(super) fn number_annotation(set: &ReplicaSet, key: &str) -> Option<i32> {
    object::annotation(&set.metadata, key)?.parse().ok()
}

/// The revision of a ReplicaSet, 0 when it has none.
fn revision(set: &ReplicaSet) -> i64 {
    object::annotation(&set.metadata, REVISION).and_then(|text| text.parse().ok()).unwrap_or(0)
}

impl Context<'_> {
    fn next_revision(&self) -> i64 {
        self.old.iter().map(|set| revision(set)).max().unwrap_or(0) + 1
    }

    /// The Deployment's own annotations that its ReplicaSets repeat.
    fn copied_annotations(&self) -> StringMap {
        let annotations = self.deployment.metadata.annotations.iter().flatten();
        annotations
            .filter(|(key, _)| !NOT_COPIED.contains(&key.as_str()))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    }

    /// Brings the current ReplicaSet's annotations and `minReadySeconds`, and the Deployment's revision,
    /// up to date. Does nothing while there is no current ReplicaSet.
    pub(super) fn sync_revision(&mut self) {
        let Some(new) = self.new else { return };
        let mut wanted = self.copied_annotations();
        let current = revision(new);
        let next = self.next_revision();
        if current < next {
            wanted.insert(REVISION.into(), next.to_string());
            if current > 0 {
                let past = object::annotation(&new.metadata, REVISION_HISTORY);
                wanted.insert(REVISION_HISTORY.into(), append_revision(past, current));
            }
        }
        let changed = differing(new.metadata.annotations.as_ref(), wanted);
        if !changed.is_empty() {
            self.update(new).annotations.extend(changed);
        }
        let min_ready_seconds = self.spec.min_ready_seconds.unwrap_or(0);
        if new.spec.as_ref().and_then(|spec| spec.min_ready_seconds).unwrap_or(0) != min_ready_seconds {
            self.update(new).min_ready_seconds = Some(min_ready_seconds);
        }
        self.annotate_revision(current.max(next));
    }

    fn annotate_revision(&mut self, revision: i64) {
        let wanted = StringMap::from([(REVISION.into(), revision.to_string())]);
        self.annotations = differing(self.deployment.metadata.annotations.as_ref(), wanted);
    }

    /// Plans the ReplicaSet of the current template with its first size.
    pub(super) fn create_new(&mut self, size: i32) {
        let revision = self.next_revision();
        let mut set = new_replica_set(self.deployment, self.spec);
        let mut annotations = self.copied_annotations();
        annotations.insert(REVISION.into(), revision.to_string());
        annotations.extend(replica_annotations(self.sizes));
        set.metadata.annotations = Some(annotations);
        if let Some(spec) = set.spec.as_mut() {
            spec.replicas = Some(size);
        }
        self.annotate_revision(revision);
        self.created = Some(Box::new(set));
    }

    /// Plans the end of old, empty ReplicaSets beyond `revisionHistoryLimit`, lowest revision first.
    pub(super) fn clean_up_history(&mut self) {
        let limit = self.spec.revision_history_limit.unwrap_or(i32::MAX);
        let mut candidates: Vec<_> =
            self.old.iter().copied().filter(|set| !object::is_being_deleted(&set.metadata)).collect();
        let surplus = object::count(candidates.len()).saturating_sub(limit);
        candidates.sort_by_key(|set| (revision(set), object::created(&set.metadata)));
        let surplus = usize::try_from(surplus).unwrap_or(0);
        self.deleted = candidates.into_iter().take(surplus).filter(|set| is_settled_and_empty(set)).collect();
    }
}

fn is_settled_and_empty(set: &ReplicaSet) -> bool {
    let observed = set.status.as_ref().and_then(|status| status.observed_generation);
    replicas(set) == 0 && actual_replicas(set) == 0 && observed >= set.metadata.generation
}

/// Adds a revision to the comma-separated past, dropping the oldest beyond the bound.
fn append_revision(past: Option<&str>, revision: i64) -> String {
    let mut history = match past {
        Some(past) if !past.is_empty() => format!("{past},{revision}"),
        _ => revision.to_string(),
    };
    while history.len() > REVISION_HISTORY_BOUND {
        match history.split_once(',') {
            Some((_, rest)) => history = rest.to_owned(),
            None => break,
        }
    }
    history
}
