//! ReplicaSets as a Deployment makes and reads them: name, template hash, labels, sizes.
//!
//! Never decides a size; see `rollout` and `scaling` for that.

use k8s_openapi::{
    api::{
        apps::v1::{Deployment, DeploymentSpec, ReplicaSet, ReplicaSetSpec},
        core::v1::PodTemplateSpec,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use crate::{
    adoption::controller_reference,
    object::{self, StringMap},
};

/// The label that tells the pods of one template from those of another.
pub const POD_TEMPLATE_HASH: &str = "pod-template-hash";

/// `spec.replicas`, as defaulted by the API server.
pub(super) fn replicas(set: &ReplicaSet) -> i32 {
    set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1)
}

/// Pods that exist, as the ReplicaSet controller last reported.
pub(super) fn actual_replicas(set: &ReplicaSet) -> i32 {
    set.status.as_ref().map_or(0, |status| status.replicas)
}

/// Available pods, as last reported.
pub(super) fn available_replicas(set: &ReplicaSet) -> i32 {
    set.status.as_ref().and_then(|status| status.available_replicas).unwrap_or(0)
}

/// True when the ReplicaSet controller's report was made after the last change of the size.
///
/// An older report may count pods that were removed since: the set was shrunk, and then grown again by a
/// rollback before the controller spoke.
pub(super) fn report_is_current(set: &ReplicaSet) -> bool {
    let observed = set.status.as_ref().and_then(|status| status.observed_generation);
    observed.unwrap_or(0) >= set.metadata.generation.unwrap_or(0)
}

/// Available pods that a decision may rely on: none while the report is older than the last resize.
pub(super) fn surely_available(set: &ReplicaSet) -> i32 {
    if report_is_current(set) { available_replicas(set) } else { 0 }
}

/// Ready pods, as last reported.
pub(super) fn ready_replicas(set: &ReplicaSet) -> i32 {
    set.status.as_ref().and_then(|status| status.ready_replicas).unwrap_or(0)
}

/// A hash of the pod template and the collision count, made of characters that spell no words.
///
/// Like upstream it names ReplicaSets and nothing else: an existing ReplicaSet is recognised by its
/// template, so two servers need not agree on the hash.
pub fn template_hash(template: &PodTemplateSpec, collision_count: Option<i32>) -> String {
    const ALPHABET: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
    let mut hash: u32 = 0x811c_9dc5;
    let mut feed = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
        }
    };
    // Serialising API types to JSON cannot fail; an empty text would only make a weaker hash.
    feed(&serde_json::to_vec(template).unwrap_or_default());
    if let Some(count) = collision_count {
        feed(&count.to_le_bytes());
    }
    hash.to_string().bytes().map(|byte| char::from(ALPHABET[usize::from(byte) % ALPHABET.len()])).collect()
}

/// True when the two templates differ in nothing but the hash label.
pub(super) fn same_template(left: &PodTemplateSpec, right: &PodTemplateSpec) -> bool {
    fn labels(template: &PodTemplateSpec) -> impl Iterator<Item = (&String, &String)> {
        let labels = template.metadata.as_ref().and_then(|meta| meta.labels.as_ref());
        labels.into_iter().flatten().filter(|(key, _)| *key != POD_TEMPLATE_HASH)
    }
    fn annotations(template: &PodTemplateSpec) -> impl Iterator<Item = (&String, &String)> {
        template.metadata.iter().filter_map(|meta| meta.annotations.as_ref()).flatten()
    }
    labels(left).eq(labels(right)) && annotations(left).eq(annotations(right)) && left.spec == right.spec
}

/// The ReplicaSet of the Deployment's current template, without annotations and with no replicas yet.
pub(super) fn new_replica_set(deployment: &Deployment, spec: &DeploymentSpec) -> ReplicaSet {
    let collision_count = deployment.status.as_ref().and_then(|status| status.collision_count);
    let hash = template_hash(&spec.template, collision_count);
    let mut template = spec.template.clone();
    let labels = {
        let labels = template.metadata.get_or_insert_default().labels.get_or_insert_default();
        labels.insert(POD_TEMPLATE_HASH.into(), hash.clone());
        labels.clone()
    };
    let mut selector = spec.selector.clone();
    selector.match_labels.get_or_insert_with(StringMap::new).insert(POD_TEMPLATE_HASH.into(), hash.clone());
    ReplicaSet {
        metadata: ObjectMeta {
            name: Some(format!("{}-{hash}", object::name(&deployment.metadata))),
            namespace: deployment.metadata.namespace.clone(),
            labels: Some(labels),
            owner_references: Some(vec![controller_reference("apps/v1", "Deployment", &deployment.metadata)]),
            ..ObjectMeta::default()
        },
        spec: Some(ReplicaSetSpec {
            min_ready_seconds: spec.min_ready_seconds,
            replicas: Some(0),
            selector,
            template: Some(template),
        }),
        status: None,
    }
}
