//! EndpointSlices: carries out `control_decide::endpoints::slice` plans.
//!
//! Wakes on Services, their pods, their slices, and nodes that change zones.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use control_decide::{
    endpoints::{
        SERVICE_NAME, is_relevant_change, selected_spec, selects,
        slice::{CONTROLLER, MANAGED_BY, Plan, plan},
        trigger::{Triggers, annotate},
    },
    object::{is_being_deleted, name, uid},
};
use k8s_openapi::api::{
    core::v1::{Node, Pod, Service},
    discovery::v1::EndpointSlice,
};
use kube::api::{DeleteParams, PostParams};

use crate::{
    config::Controller,
    context::Context,
    informer::{Change, Informer, Key},
    queue::Queue,
    write::{WriteError, call, delete},
    written::{CATCH_UP, Written},
};

const WORKERS: usize = 4;
const ZONE: &str = "topology.kubernetes.io/zone";

/// What was done and seen before.
#[derive(Default)]
struct Memory {
    written: Written,
    triggers: Mutex<Triggers<Key>>,
}

impl Memory {
    fn triggers<T>(&self, look: impl FnOnce(&mut Triggers<Key>) -> T) -> T {
        look(&mut self.triggers.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Registers the controller.
pub(crate) fn start(context: &Arc<Context>) {
    let queue = Queue::new();
    {
        let queue = Arc::clone(&queue);
        context.services.on_change(move |change| queue.add(change.key()));
    }
    {
        let (queue, services) = (Arc::clone(&queue), Arc::clone(&context.services));
        context.pods.on_change(move |change| wake_services(&queue, &services, change));
    }
    {
        let queue = Arc::clone(&queue);
        context.endpoint_slices.on_change(move |change| {
            for slice in change.states() {
                if let Some(key) = service_of(slice) {
                    queue.add(key);
                }
            }
        });
    }
    {
        let (queue, services) = (Arc::clone(&queue), Arc::clone(&context.services));
        context.nodes.on_change(move |change| {
            let zones = [&change.old, &change.new].map(|node| node.as_ref().and_then(|node| zone(node)));
            if zones[0] != zones[1] {
                services.all().iter().for_each(|service| queue.add(Key::of(&service.metadata)));
            }
        });
    }
    let ready = {
        let context = Arc::clone(context);
        async move {
            context.services.wait_until_synced().await;
            context.pods.wait_until_synced().await;
            context.nodes.wait_until_synced().await;
            context.endpoint_slices.wait_until_synced().await;
        }
    };
    let (shared, memory) = (Arc::clone(context), Arc::new(Memory::default()));
    context.work(Controller::EndpointSlice, &queue, WORKERS, ready, move |key| {
        let (context, memory) = (Arc::clone(&shared), Arc::clone(&memory));
        async move { reconcile(&context, &memory, &key).await }
    });
}

/// Adds the Services that select the pod as it was or as it is, unless nothing they show has changed.
pub(crate) fn wake_services(queue: &Queue<Key>, services: &Informer<Service>, change: &Change<Pod>) {
    if let (Some(old), Some(new)) = (&change.old, &change.new)
        && !is_relevant_change(old, new)
    {
        return;
    }
    let namespace = change.key().namespace;
    for service in services.in_namespace(&namespace) {
        if change.states().any(|pod| selects(&service, pod)) {
            queue.add(Key::of(&service.metadata));
        }
    }
}

fn zone(node: &Node) -> Option<String> {
    node.metadata.labels.as_ref()?.get(ZONE).cloned()
}

/// The Service of a slice that is ours.
fn service_of(slice: &EndpointSlice) -> Option<Key> {
    let labels = slice.metadata.labels.as_ref()?;
    let ours = labels.get(MANAGED_BY).is_some_and(|by| by == CONTROLLER);
    let namespace = slice.metadata.namespace.as_deref().unwrap_or_default();
    labels.get(SERVICE_NAME).filter(|_| ours).map(|name| Key::new(namespace, name))
}

async fn reconcile(context: &Context, memory: &Memory, key: &Key) -> Result<Option<Duration>, WriteError> {
    let written = &memory.written;
    let Some(service) = context.services.get(key).filter(|service| !is_being_deleted(&service.metadata))
    else {
        // Its slices have the Service as their owner and are garbage now.
        written.forget(key);
        memory.triggers(|triggers| triggers.forget(key));
        return Ok(None);
    };
    if selected_spec(&service).is_none() {
        return Ok(None);
    }
    let version = context.endpoint_slices.version();
    let mut slices = context.endpoint_slices.in_namespace(&key.namespace);
    slices.retain(|slice| service_of(slice).as_ref() == Some(key) && !is_being_deleted(&slice.metadata));
    let exists = |wanted: &str| slices.iter().any(|slice| uid(&slice.metadata) == wanted);
    if !written.is_seen(key, version, exists) {
        return Ok(Some(CATCH_UP));
    }
    let pods = context.pods.in_namespace(&key.namespace);
    let mut plan = plan(&service, &pods, &slices, &zones(context, &pods));
    let selected = pods.iter().map(AsRef::as_ref).filter(|pod| selects(&service, pod));
    let changed_at = memory.triggers(|triggers| triggers.next(key.clone(), &service, selected));
    plan.create.iter_mut().chain(&mut plan.update).for_each(|slice| annotate(slice, changed_at));
    carry_out(context, written, key, plan).await.map(|()| None)
}

/// The zones of the nodes these pods are on.
fn zones(context: &Context, pods: &[Arc<Pod>]) -> BTreeMap<String, String> {
    let mut zones = BTreeMap::new();
    for node in pods.iter().filter_map(|pod| control_decide::object::pod_node(pod)) {
        if zones.contains_key(node) {
            continue;
        }
        if let Some(zone) = context.nodes.get(&Key::new("", node)).and_then(|node| zone(&node)) {
            zones.insert(node.to_owned(), zone);
        }
    }
    zones
}

async fn carry_out(context: &Context, written: &Written, key: &Key, plan: Plan) -> Result<(), WriteError> {
    let api = context.api::<EndpointSlice>(&key.namespace);
    for slice in plan.create {
        let creation = async { api.create(&PostParams::default(), &slice).await };
        match call(|| format!("create an EndpointSlice of Service {key}"), creation).await {
            Ok(created) => written.note(key, &created.metadata),
            Err(error) if error.is_namespace_terminating() => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    for slice in plan.update {
        let name = name(&slice.metadata).to_owned();
        let update = async { api.replace(&name, &PostParams::default(), &slice).await };
        let answer = call(|| format!("update EndpointSlice {}/{name}", key.namespace), update).await?;
        written.note(key, &answer.metadata);
    }
    for slice in plan.delete {
        let (slice_key, uid) = (Key::of(&slice.metadata), uid(&slice.metadata));
        delete(&api, "EndpointSlice", &slice_key, uid, DeleteParams::default()).await?;
        written.note_deletion(key, uid);
    }
    Ok(())
}
