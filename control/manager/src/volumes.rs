//! Binds claims to volumes, keeps their phases, and lets go of what nobody uses: carries out `control_decide::volumes`,
//! one write at a time.
//!
//! One worker, so that two claims never race for a volume; a write on an old view of the volume is refused by its
//! resourceVersion and decided anew.

use std::{sync::Arc, time::Duration};

use control_decide::{
    object::{has_finalizer, is_being_deleted},
    volumes::{
        BIND_COMPLETED, BOUND_BY_CONTROLLER, CLAIM_PROTECTION, ClaimStep, Known, PROVISIONER,
        VOLUME_PROTECTION, VolumeStep, claim_step, claims_of, class_of, volume_of, volume_step,
    },
};
use k8s_openapi::{
    api::core::v1::{PersistentVolume, PersistentVolumeClaim},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::Api;
use serde_json::{Map, Value, json};

use crate::{
    config::Controller,
    context::Context,
    events::{Severity, reference},
    informer::Key,
    queue::Queue,
    write::{WriteError, guarded, merge_patch, merge_patch_status},
};

/// What is to be looked at.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Work {
    Claim(Key),
    Volume(Key),
}

/// Registers the controller.
pub(crate) fn start(context: &Arc<Context>) {
    let queue = Queue::new();
    watch_claims(context, &queue);
    watch_volumes(context, &queue);
    watch_the_rest(context, &queue);
    let ready = {
        let context = Arc::clone(context);
        async move {
            context.claims.wait_until_synced().await;
            context.volumes.wait_until_synced().await;
            context.storage_classes.wait_until_synced().await;
            context.pods.wait_until_synced().await;
            context.nodes.wait_until_synced().await;
        }
    };
    let shared = Arc::clone(context);
    context.work(Controller::Volumes, &queue, 1, ready, move |work| {
        let context = Arc::clone(&shared);
        async move {
            match work {
                Work::Claim(key) => reconcile_claim(&context, &key).await,
                Work::Volume(key) => reconcile_volume(&context, &key).await,
            }
        }
    });
}

fn watch_claims(context: &Context, queue: &Arc<Queue<Work>>) {
    let (queue, volumes) = (Arc::clone(queue), Arc::clone(&context.volumes));
    context.claims.on_change(move |change| {
        let key = change.key();
        let mine = volumes.all().into_iter().filter(|volume| claim_key(volume).as_ref() == Some(&key));
        queue.add_all(mine.map(|volume| Work::Volume(Key::of(&volume.metadata))));
        queue.add(Work::Claim(key));
    });
}

fn watch_volumes(context: &Context, queue: &Arc<Queue<Work>>) {
    let (queue, claims) = (Arc::clone(queue), Arc::clone(&context.claims));
    context.volumes.on_change(move |change| {
        queue.add(Work::Volume(change.key()));
        let claimed = change.states().filter_map(|volume| claim_key(volume));
        queue.add_all(claimed.map(Work::Claim));
        // What is free may be what somebody waits for; what is gone was perhaps somebody's.
        let name = change.key().name;
        let waiting = claims.all().into_iter().filter(|claim| match volume_of(claim) {
            None => true,
            Some(volume) => volume == name,
        });
        queue.add_all(waiting.map(|claim| Work::Claim(Key::of(&claim.metadata))));
    });
}

fn watch_the_rest(context: &Context, queue: &Arc<Queue<Work>>) {
    {
        let (queue, claims) = (Arc::clone(queue), Arc::clone(&context.claims));
        context.storage_classes.on_change(move |change| {
            let class = change.key().name;
            let waiting = claims
                .all()
                .into_iter()
                .filter(|claim| volume_of(claim).is_none() && class_of(claim) == class);
            queue.add_all(waiting.map(|claim| Work::Claim(Key::of(&claim.metadata))));
        });
    }
    let (queue, claims) = (Arc::clone(queue), Arc::clone(&context.claims));
    context.pods.on_change(move |change| {
        let namespace = change.key().namespace;
        for name in change.states().flat_map(|pod| claims_of(pod)) {
            let key = Key::new(&namespace, &name);
            let concerns = |claim: &PersistentVolumeClaim| {
                is_being_deleted(&claim.metadata) || volume_of(claim).is_none()
            };
            if claims.get(&key).is_some_and(|claim| concerns(&claim)) {
                queue.add(Work::Claim(key));
            }
        }
    });
}

/// The claim that a volume is reserved for.
fn claim_key(volume: &PersistentVolume) -> Option<Key> {
    let reference = volume.spec.as_ref()?.claim_ref.as_ref()?;
    Some(Key::new(reference.namespace.as_deref()?, reference.name.as_deref()?))
}

async fn reconcile_claim(context: &Context, key: &Key) -> Result<Option<Duration>, WriteError> {
    let Some(claim) = context.claims.get(key) else { return Ok(None) };
    let class = match class_of(&claim) {
        "" => None,
        name => context.storage_classes.get(&Key::new("", name)),
    };
    let (volumes, pods, nodes) =
        (context.volumes.all(), context.pods.in_namespace(&key.namespace), context.nodes.all());
    let known = Known { volumes: &volumes, class: class.as_deref(), pods: &pods, nodes: &nodes };
    let api = context.api::<PersistentVolumeClaim>(&key.namespace);
    let version = claim.metadata.resource_version.as_deref();
    let kind = "PersistentVolumeClaim";
    match claim_step(&claim, known) {
        ClaimStep::Rest => {}
        ClaimStep::Tell { reason, message } => {
            let severity = if reason == "ProvisioningFailed" { Severity::Warning } else { Severity::Normal };
            let involved = reference("v1", kind, &claim.metadata);
            context.events.publish(involved, severity, reason, message, Controller::Volumes);
        }
        ClaimStep::Phase(phase) => {
            let status = json!({"phase": phase, "capacity": null, "accessModes": null});
            merge_patch_status(&api, kind, key, &with(version, "status", status)).await?;
        }
        ClaimStep::Provision(provisioner) => {
            let annotations = json!({"annotations": {PROVISIONER: provisioner}});
            merge_patch(&api, kind, key, &with(version, "metadata", annotations)).await?;
        }
        ClaimStep::Reserve(name) => reserve(context, &claim, &name).await?,
        ClaimStep::Point(name) => {
            let mut annotations = json!({BIND_COMPLETED: "yes"});
            if volume_of(&claim).is_none() {
                annotations[BOUND_BY_CONTROLLER] = json!("yes");
            }
            let patch = Map::from_iter([
                ("metadata".to_owned(), json!({"annotations": annotations})),
                ("spec".to_owned(), json!({"volumeName": name})),
            ]);
            merge_patch(&api, kind, key, &guarded(version, patch)).await?;
        }
        ClaimStep::Bound(name) => {
            let Some(volume) = context.volumes.get(&Key::new("", &name)) else { return Ok(None) };
            let spec = volume.spec.as_ref();
            let status = json!({
                "phase": "Bound",
                "accessModes": spec.and_then(|spec| spec.access_modes.clone()),
                "capacity": spec.and_then(|spec| spec.capacity.clone()),
            });
            merge_patch_status(&api, kind, key, &with(version, "status", status)).await?;
            tracing::info!(claim = %key, volume = %name, "claim bound");
        }
        ClaimStep::LetGo => {
            let patch = without_finalizer(&claim.metadata, CLAIM_PROTECTION);
            merge_patch(&api, kind, key, &patch).await?;
        }
    }
    Ok(None)
}

/// Writes the claim into the volume.
async fn reserve(context: &Context, claim: &PersistentVolumeClaim, name: &str) -> Result<(), WriteError> {
    let key = Key::new("", name);
    let Some(volume) = context.volumes.get(&key) else { return Ok(()) };
    let meta = &claim.metadata;
    let claim_ref = json!({
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "namespace": meta.namespace,
        "name": meta.name,
        "uid": meta.uid,
        "resourceVersion": meta.resource_version,
    });
    let mut patch = Map::from_iter([("spec".to_owned(), json!({"claimRef": claim_ref}))]);
    // One that a user reserved by name stays the user's choice.
    if claim_key(&volume).is_none() {
        patch.insert("metadata".to_owned(), json!({"annotations": {BOUND_BY_CONTROLLER: "yes"}}));
    }
    let patch = guarded(volume.metadata.resource_version.as_deref(), patch);
    let api: Api<PersistentVolume> = Api::all(context.client.clone());
    merge_patch(&api, "PersistentVolume", &key, &patch).await.map(|_| ())
}

async fn reconcile_volume(context: &Context, key: &Key) -> Result<Option<Duration>, WriteError> {
    let Some(volume) = context.volumes.get(key) else { return Ok(None) };
    let claim = claim_key(&volume).and_then(|claim| context.claims.get(&claim));
    let api: Api<PersistentVolume> = Api::all(context.client.clone());
    let kind = "PersistentVolume";
    match volume_step(&volume, claim.as_deref()) {
        VolumeStep::Rest => {}
        VolumeStep::Phase(phase) => {
            let version = volume.metadata.resource_version.as_deref();
            let now = crate::context::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
            let status =
                json!({"phase": phase, "lastPhaseTransitionTime": now, "message": null, "reason": null});
            merge_patch_status(&api, kind, key, &with(version, "status", status)).await?;
            tracing::info!(volume = %key, phase, "volume changed phase");
        }
        VolumeStep::LetGo => {
            let patch = without_finalizer(&volume.metadata, VOLUME_PROTECTION);
            merge_patch(&api, kind, key, &patch).await?;
        }
    }
    Ok(None)
}

fn with(version: Option<&str>, field: &str, value: Value) -> Value {
    guarded(version, Map::from_iter([(field.to_owned(), value)]))
}

fn without_finalizer(meta: &ObjectMeta, finalizer: &str) -> Value {
    debug_assert!(has_finalizer(meta, finalizer), "is there to be removed");
    let left: Vec<&String> = meta.finalizers.iter().flatten().filter(|held| *held != finalizer).collect();
    with(meta.resource_version.as_deref(), "metadata", json!({"finalizers": left}))
}
