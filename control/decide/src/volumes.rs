//! Claims and the volumes they get: static binding, phases, and what may not be deleted yet.
//!
//! Input: one claim or volume with the caches' view of the others. Output: the one next write that brings it nearer to where
//! it belongs; the caller writes, sees the change and asks again. Each write is complete in itself and in an order that a
//! restart in between does no harm: the volume is reserved before the claim points to it. Makes no volumes: that is the
//! business of the class' provisioner.
//!
//! Upstream's rules: <https://kubernetes.io/docs/concepts/storage/persistent-volumes/#binding>

use std::collections::BTreeSet;

use k8s_openapi::{
    api::{
        core::v1::{Node, PersistentVolume, PersistentVolumeClaim, PersistentVolumeClaimTemplate, Pod},
        storage::v1::StorageClass,
    },
    apimachinery::pkg::{
        api::resource::Quantity,
        apis::meta::v1::{ObjectMeta, OwnerReference},
    },
};

use crate::{object, quantity, selector};

/// Keeps a claim while a pod uses it.
pub const CLAIM_PROTECTION: &str = "kubernetes.io/pvc-protection";
/// Keeps a volume while a claim has it.
pub const VOLUME_PROTECTION: &str = "kubernetes.io/pv-protection";
/// The claim has been bound: should its volume go, it is lost.
pub const BIND_COMPLETED: &str = "pv.kubernetes.io/bind-completed";
/// The binding is the controller's, not the user's.
pub const BOUND_BY_CONTROLLER: &str = "pv.kubernetes.io/bound-by-controller";
/// Tells a provisioner that the claim is its business.
pub const PROVISIONER: &str = "volume.kubernetes.io/storage-provisioner";
const OLD_CLASS: &str = "volume.beta.kubernetes.io/storage-class";
/// Classes with this provisioner have no one who makes volumes.
const NO_PROVISIONER: &str = "kubernetes.io/no-provisioner";

/// What to do next about a claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClaimStep {
    /// It is where it belongs, or waits for somebody else.
    Rest,
    /// Say what it waits for.
    Tell {
        /// Reason of the event.
        reason: &'static str,
        /// Its message.
        message: String,
    },
    /// Set the phase (and forget size and access modes).
    Phase(&'static str),
    /// Hand it to the provisioner of its class.
    Provision(String),
    /// Reserve the volume of this name.
    Reserve(String),
    /// Point to the reserved volume of this name.
    Point(String),
    /// The volume is the claim's: say so in the status, with the volume's size and modes.
    Bound(String),
    /// Nobody uses it: it may go.
    LetGo,
}

/// What to do next about a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VolumeStep {
    /// It is where it belongs.
    Rest,
    /// Set the phase.
    Phase(&'static str),
    /// No claim has it: it may go.
    LetGo,
}

/// What the caches know beside the claim.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// All volumes.
    pub volumes: &'a [std::sync::Arc<PersistentVolume>],
    /// The claim's class.
    pub class: Option<&'a StorageClass>,
    /// The pods of the claim's namespace.
    pub pods: &'a [std::sync::Arc<Pod>],
    /// All nodes.
    pub nodes: &'a [std::sync::Arc<Node>],
}

/// The class that a claim names.
pub fn class_of(claim: &PersistentVolumeClaim) -> &str {
    let named = claim.spec.as_ref().and_then(|spec| spec.storage_class_name.as_deref());
    object::annotation(&claim.metadata, OLD_CLASS).or(named).unwrap_or_default()
}

fn class_of_volume(volume: &PersistentVolume) -> &str {
    let named = volume.spec.as_ref().and_then(|spec| spec.storage_class_name.as_deref());
    object::annotation(&volume.metadata, OLD_CLASS).or(named).unwrap_or_default()
}

/// The volume that a claim points to.
pub fn volume_of(claim: &PersistentVolumeClaim) -> Option<&str> {
    claim.spec.as_ref()?.volume_name.as_deref().filter(|name| !name.is_empty())
}

/// Whether the volume is reserved for this very claim, or by name for a claim of this name.
fn is_reserved_for(volume: &PersistentVolume, claim: &ObjectMeta) -> bool {
    let reference = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref());
    reference.is_some_and(|reference| {
        reference.name.as_deref() == claim.name.as_deref()
            && reference.namespace.as_deref() == claim.namespace.as_deref()
            && reference.uid.as_deref().is_none_or(|uid| uid.is_empty() || Some(uid) == claim.uid.as_deref())
    })
}

/// Whether the volume names this claim with its uid: the reservation is complete.
fn belongs_to(volume: &PersistentVolume, claim: &ObjectMeta) -> bool {
    let reference = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref());
    is_reserved_for(volume, claim) && reference.is_some_and(|reference| reference.uid == claim.uid)
}

fn is_claimed(volume: &PersistentVolume) -> bool {
    volume.spec.as_ref().is_some_and(|spec| spec.claim_ref.is_some())
}

/// Names of the claims that a pod uses.
pub fn claims_of(pod: &Pod) -> impl Iterator<Item = String> {
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    volumes.filter_map(|volume| {
        let named = volume.persistent_volume_claim.as_ref().map(|source| source.claim_name.clone());
        named.or_else(|| volume.ephemeral.as_ref().map(|_| ephemeral_claim(pod, &volume.name)))
    })
}

/// A pod's volumes whose claims are made for it: name and template.
pub fn ephemeral_volumes(pod: &Pod) -> impl Iterator<Item = (&str, &PersistentVolumeClaimTemplate)> {
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    volumes.filter_map(|volume| {
        Some((volume.name.as_str(), volume.ephemeral.as_ref()?.volume_claim_template.as_ref()?))
    })
}

fn ephemeral_claim(pod: &Pod, volume: &str) -> String {
    format!("{}-{volume}", object::name(&pod.metadata))
}

/// The claim of a pod's ephemeral volume. The pod owns it.
pub fn claim_for(pod: &Pod, volume: &str, template: &PersistentVolumeClaimTemplate) -> PersistentVolumeClaim {
    let of_template = template.metadata.as_ref();
    let owner = OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Pod".to_owned(),
        name: object::name(&pod.metadata).to_owned(),
        uid: pod.metadata.uid.clone().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    };
    PersistentVolumeClaim {
        metadata: ObjectMeta {
            name: Some(ephemeral_claim(pod, volume)),
            namespace: pod.metadata.namespace.clone(),
            labels: of_template.and_then(|meta| meta.labels.clone()),
            annotations: of_template.and_then(|meta| meta.annotations.clone()),
            owner_references: Some(vec![owner]),
            ..ObjectMeta::default()
        },
        spec: Some(template.spec.clone()),
        status: None,
    }
}

fn uses(pod: &Pod, claim: &str) -> bool {
    claims_of(pod).any(|name| name == claim)
}

/// The next step for a claim.
pub fn claim_step(claim: &PersistentVolumeClaim, known: Known<'_>) -> ClaimStep {
    let meta = &claim.metadata;
    let name = object::name(meta);
    if object::is_being_deleted(meta) {
        let used = known
            .pods
            .iter()
            .any(|pod| uses(pod, name) && object::pod_node(pod).is_some() && !object::is_pod_terminal(pod));
        return if object::has_finalizer(meta, CLAIM_PROTECTION) && !used {
            ClaimStep::LetGo
        } else {
            ClaimStep::Rest
        };
    }
    let by_name = |name: &str| known.volumes.iter().find(|volume| object::name(&volume.metadata) == name);
    let bound_once = object::annotation(meta, BIND_COMPLETED).is_some();
    match volume_of(claim) {
        Some(volume) => match by_name(volume) {
            Some(found) if belongs_to(found, meta) => {
                if bound_once {
                    bound(claim, found)
                } else {
                    ClaimStep::Point(volume.to_owned())
                }
            }
            _ if bound_once => phase(claim, "Lost"),
            Some(found) if is_reserved_for(found, meta) || !is_claimed(found) => {
                ClaimStep::Reserve(volume.to_owned())
            }
            // Somebody else has it, or it does not exist yet.
            _ => phase(claim, "Pending"),
        },
        None if bound_once => phase(claim, "Lost"),
        None => unbound(claim, known),
    }
}

/// A claim that points to no volume: one that is reserved for it, one that fits, or whoever makes volumes.
fn unbound(claim: &PersistentVolumeClaim, known: Known<'_>) -> ClaimStep {
    let meta = &claim.metadata;
    if let Some(mine) = known.volumes.iter().find(|volume| belongs_to(volume, meta)) {
        return ClaimStep::Point(object::name(&mine.metadata).to_owned());
    }
    let waits_for_pod =
        known.class.is_some_and(|class| class.volume_binding_mode.as_deref() == Some("WaitForFirstConsumer"));
    let node = consumer(object::name(meta), known);
    let reserved = known.volumes.iter().find(|volume| is_reserved_for(volume, meta));
    if waits_for_pod && node.is_none() && reserved.is_none() {
        return tell(
            claim,
            "WaitForFirstConsumer",
            "waiting for first consumer to be created before binding".to_owned(),
        );
    }
    let fitting = known.volumes.iter().filter(|volume| !is_claimed(volume) && fits(claim, volume, node));
    let smallest =
        fitting.min_by_key(|volume| (size_of_volume(volume), object::name(&volume.metadata).to_owned()));
    if let Some(volume) = reserved.or(smallest) {
        return ClaimStep::Reserve(object::name(&volume.metadata).to_owned());
    }
    match known.class {
        None if class_of(claim).is_empty() => tell(
            claim,
            "FailedBinding",
            "no persistent volumes available for this claim and no storage class is set".to_owned(),
        ),
        None => {
            let message = format!("storageclass.storage.k8s.io \"{}\" not found", class_of(claim));
            tell(claim, "ProvisioningFailed", message)
        }
        Some(class) if class.provisioner == NO_PROVISIONER => {
            tell(claim, "FailedBinding", "no persistent volumes available for this claim".to_owned())
        }
        Some(class) => {
            if object::annotation(meta, PROVISIONER) == Some(class.provisioner.as_str()) {
                let message = format!(
                    "Waiting for a volume to be created either by the external provisioner '{}' or manually by the system \
                     administrator. If volume creation is delayed, please verify that the provisioner is running and \
                     correctly registered.",
                    class.provisioner
                );
                tell(claim, "ExternalProvisioning", message)
            } else {
                ClaimStep::Provision(class.provisioner.clone())
            }
        }
    }
}

/// The node of a pod that uses the claim.
fn consumer<'a>(claim: &str, known: Known<'a>) -> Option<&'a Node> {
    let mut pods = known.pods.iter().filter(|pod| uses(pod, claim) && !object::is_pod_terminal(pod));
    let name = pods.find_map(|pod| object::pod_node(pod))?;
    known.nodes.iter().find(|node| object::name(&node.metadata) == name).map(AsRef::as_ref)
}

/// Say what it waits for, and be Pending meanwhile.
fn tell(claim: &PersistentVolumeClaim, reason: &'static str, message: String) -> ClaimStep {
    match phase(claim, "Pending") {
        ClaimStep::Rest => ClaimStep::Tell { reason, message },
        step => step,
    }
}

fn phase(claim: &PersistentVolumeClaim, wanted: &'static str) -> ClaimStep {
    let status = claim.status.as_ref();
    let found = status.and_then(|status| status.phase.as_deref());
    if found == Some(wanted) { ClaimStep::Rest } else { ClaimStep::Phase(wanted) }
}

fn bound(claim: &PersistentVolumeClaim, volume: &PersistentVolume) -> ClaimStep {
    let (Some(spec), status) = (volume.spec.as_ref(), claim.status.as_ref()) else { return ClaimStep::Rest };
    let said = status.is_some_and(|status| {
        // What a driver has said of the size (after growing) stands.
        status.phase.as_deref() == Some("Bound")
            && status.capacity.is_some()
            && status.access_modes == spec.access_modes
    });
    if said { ClaimStep::Rest } else { ClaimStep::Bound(object::name(&volume.metadata).to_owned()) }
}

/// Whether a free volume is what the claim asks for.
fn fits(claim: &PersistentVolumeClaim, volume: &PersistentVolume, node: Option<&Node>) -> bool {
    let (Some(wanted), Some(offered)) = (claim.spec.as_ref(), volume.spec.as_ref()) else { return false };
    let modes: BTreeSet<&String> = offered.access_modes.iter().flatten().collect();
    let mode = |mode: &Option<String>| mode.clone().unwrap_or_else(|| "Filesystem".to_owned());
    let reachable =
        match (offered.node_affinity.as_ref().and_then(|affinity| affinity.required.as_ref()), node) {
            (Some(required), Some(node)) => selector::node_matches(required, node),
            _ => true,
        };
    !object::is_being_deleted(&volume.metadata)
        && class_of(claim) == class_of_volume(volume)
        && mode(&wanted.volume_mode) == mode(&offered.volume_mode)
        && wanted.volume_attributes_class_name.as_deref().unwrap_or_default()
            == offered.volume_attributes_class_name.as_deref().unwrap_or_default()
        && wanted.access_modes.iter().flatten().all(|mode| modes.contains(mode))
        && wanted
            .selector
            .as_ref()
            .is_none_or(|labels| selector::matches(labels, volume.metadata.labels.as_ref()))
        && size_of_volume(volume) >= size_of_claim(claim)
        && reachable
}

fn storage(amounts: Option<&std::collections::BTreeMap<String, Quantity>>) -> i64 {
    amounts.and_then(|amounts| amounts.get("storage")).map_or(0, quantity::value)
}

fn size_of_volume(volume: &PersistentVolume) -> i64 {
    storage(volume.spec.as_ref().and_then(|spec| spec.capacity.as_ref()))
}

fn size_of_claim(claim: &PersistentVolumeClaim) -> i64 {
    let resources = claim.spec.as_ref().and_then(|spec| spec.resources.as_ref());
    storage(resources.and_then(|resources| resources.requests.as_ref()))
}

/// The next step for a volume; `claim` is the one of the name that it is reserved for.
pub fn volume_step(volume: &PersistentVolume, claim: Option<&PersistentVolumeClaim>) -> VolumeStep {
    let reference = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref());
    let wanted = match reference {
        None => "Available",
        Some(reference) if reference.uid.as_deref().unwrap_or_default().is_empty() => "Available",
        Some(reference) => match claim {
            Some(claim) if claim.metadata.uid == reference.uid => "Bound",
            _ => "Released",
        },
    };
    if object::is_being_deleted(&volume.metadata)
        && wanted != "Bound"
        && object::has_finalizer(&volume.metadata, VOLUME_PROTECTION)
    {
        return VolumeStep::LetGo;
    }
    let found = volume.status.as_ref().and_then(|status| status.phase.as_deref());
    // Who deletes a released volume says Failed where it cannot.
    if found == Some(wanted) || (wanted == "Released" && found == Some("Failed")) {
        VolumeStep::Rest
    } else {
        VolumeStep::Phase(wanted)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::{Value, json};

    use super::*;

    fn volume(name: &str, size: &str, more: Value) -> PersistentVolume {
        let mut object = json!({
            "metadata": {"name": name},
            "spec": {"capacity": {"storage": size}, "accessModes": ["ReadWriteOnce"], "hostPath": {"path": "/x"}},
        });
        merge(&mut object, more);
        serde_json::from_value(object).unwrap()
    }

    fn claim(more: Value) -> PersistentVolumeClaim {
        let mut object = json!({
            "metadata": {"name": "data", "namespace": "d", "uid": "u1"},
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
            "status": {"phase": "Pending"},
        });
        merge(&mut object, more);
        serde_json::from_value(object).unwrap()
    }

    fn merge(object: &mut Value, more: Value) {
        match (object, more) {
            (Value::Object(object), Value::Object(more)) => {
                more.into_iter()
                    .for_each(|(key, value)| merge(object.entry(key).or_insert(Value::Null), value));
            }
            (object, more) => *object = more,
        }
    }

    fn step(
        claim: &PersistentVolumeClaim,
        volumes: &[PersistentVolume],
        class: Option<Value>,
        pods: &[Value],
    ) -> ClaimStep {
        let volumes: Vec<_> = volumes.iter().cloned().map(Arc::new).collect();
        let class: Option<StorageClass> = class.map(|class| serde_json::from_value(class).unwrap());
        let pods: Vec<Arc<Pod>> =
            pods.iter().map(|pod| Arc::new(serde_json::from_value(pod.clone()).unwrap())).collect();
        let node: Node = serde_json::from_value(
            json!({"metadata": {"name": "n", "labels": {"kubernetes.io/hostname": "n"}}}),
        )
        .unwrap();
        let nodes = [Arc::new(node)];
        claim_step(claim, Known { volumes: &volumes, class: class.as_ref(), pods: &pods, nodes: &nodes })
    }

    fn reason(step: &ClaimStep) -> &str {
        match step {
            ClaimStep::Tell { reason, .. } => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_smallest_volume_that_fits_is_reserved_then_pointed_to_then_told() {
        let volumes = vec![
            volume("small", "500Mi", json!({})),
            volume("big", "5Gi", json!({})),
            volume("right", "2Gi", json!({})),
            volume(
                "taken",
                "1Gi",
                json!({"spec": {"claimRef": {"namespace": "d", "name": "other", "uid": "u2"}}}),
            ),
            volume("other-class", "1Gi", json!({"spec": {"storageClassName": "fast"}})),
            volume("block", "1Gi", json!({"spec": {"volumeMode": "Block"}})),
        ];
        assert_eq!(step(&claim(json!({})), &volumes, None, &[]), ClaimStep::Reserve("right".to_owned()));
        let mine = json!({"spec": {"claimRef": {"namespace": "d", "name": "data", "uid": "u1"}}});
        let reserved = [volume("right", "2Gi", mine)];
        assert_eq!(step(&claim(json!({})), &reserved, None, &[]), ClaimStep::Point("right".to_owned()));
        let pointing =
            json!({"metadata": {"annotations": {BIND_COMPLETED: "yes"}}, "spec": {"volumeName": "right"}});
        assert_eq!(
            step(&claim(pointing.clone()), &reserved, None, &[]),
            ClaimStep::Bound("right".to_owned())
        );
        let mut told = pointing.clone();
        merge(
            &mut told,
            json!({"status": {"phase": "Bound", "capacity": {"storage": "2Gi"}, "accessModes": ["ReadWriteOnce"]}}),
        );
        assert_eq!(step(&claim(told), &reserved, None, &[]), ClaimStep::Rest);
        assert_eq!(step(&claim(pointing), &[], None, &[]), ClaimStep::Phase("Lost"), "the volume went");
    }

    #[test]
    fn a_claim_that_cannot_be_served_says_why() {
        assert_eq!(reason(&step(&claim(json!({})), &[], None, &[])), "FailedBinding");
        let fast = claim(json!({"spec": {"storageClassName": "fast"}}));
        assert_eq!(reason(&step(&fast, &[], None, &[])), "ProvisioningFailed");
        let class = |mode: &str| json!({"metadata": {"name": "fast"}, "provisioner": "csi.example", "volumeBindingMode": mode});
        assert_eq!(
            step(&fast, &[], Some(class("Immediate")), &[]),
            ClaimStep::Provision("csi.example".to_owned())
        );
        let handed = claim(json!({
            "metadata": {"annotations": {PROVISIONER: "csi.example"}}, "spec": {"storageClassName": "fast"},
        }));
        assert_eq!(reason(&step(&handed, &[], Some(class("Immediate")), &[])), "ExternalProvisioning");
        assert_eq!(
            reason(&step(&fast, &[], Some(class("WaitForFirstConsumer")), &[])),
            "WaitForFirstConsumer"
        );
        let fresh = claim(json!({"status": null}));
        assert_eq!(step(&fresh, &[], None, &[]), ClaimStep::Phase("Pending"));
    }

    #[test]
    fn local_volumes_wait_for_the_pods_node() {
        let class = json!({"metadata": {"name": "local"}, "provisioner": NO_PROVISIONER, "volumeBindingMode": "WaitForFirstConsumer"});
        let on = |node: &str| {
            let term = json!({"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}]});
            json!({"spec": {"storageClassName": "local", "nodeAffinity": {"required": {"nodeSelectorTerms": [term]}}}})
        };
        let volumes = [volume("there", "1Gi", on("m")), volume("here", "2Gi", on("n"))];
        let wanted = claim(json!({"spec": {"storageClassName": "local"}}));
        let pod = json!({"metadata": {"name": "p"}, "spec": {"nodeName": "n", "containers": [],
            "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "data"}}]}});
        assert_eq!(reason(&step(&wanted, &volumes, Some(class.clone()), &[])), "WaitForFirstConsumer");
        assert_eq!(step(&wanted, &volumes, Some(class), &[pod]), ClaimStep::Reserve("here".to_owned()));
    }

    #[test]
    fn what_is_in_use_is_not_let_go() {
        let deleted = json!({"metadata": {"deletionTimestamp": "2026-01-02T03:04:05Z", "finalizers": [CLAIM_PROTECTION]}});
        let pod = |phase: &str| {
            json!({"metadata": {"name": "p"}, "status": {"phase": phase}, "spec": {"nodeName": "n", "containers": [],
                "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "data"}}]}})
        };
        assert_eq!(step(&claim(deleted.clone()), &[], None, &[pod("Running")]), ClaimStep::Rest);
        assert_eq!(step(&claim(deleted), &[], None, &[pod("Succeeded")]), ClaimStep::LetGo);
    }

    #[test]
    fn phases_of_a_volume() {
        let mine = json!({"spec": {"claimRef": {"namespace": "d", "name": "data", "uid": "u1"}}});
        let taken = volume("v", "1Gi", mine.clone());
        let owner = claim(json!({}));
        let heir = claim(json!({"metadata": {"uid": "u9"}}));
        assert_eq!(volume_step(&volume("v", "1Gi", json!({})), None), VolumeStep::Phase("Available"));
        assert_eq!(volume_step(&taken, Some(&owner)), VolumeStep::Phase("Bound"));
        assert_eq!(
            volume_step(&taken, Some(&heir)),
            VolumeStep::Phase("Released"),
            "another claim of that name"
        );
        assert_eq!(volume_step(&taken, None), VolumeStep::Phase("Released"));
        let mut going = mine;
        merge(
            &mut going,
            json!({"metadata": {"deletionTimestamp": "2026-01-02T03:04:05Z", "finalizers": [VOLUME_PROTECTION]}}),
        );
        assert_eq!(volume_step(&volume("v", "1Gi", going.clone()), None), VolumeStep::LetGo);
        assert_eq!(volume_step(&volume("v", "1Gi", going), Some(&owner)), VolumeStep::Phase("Bound"));
    }
}
