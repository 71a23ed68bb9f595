//! Namespaces that are being deleted: empties them, then removes the `kubernetes` finalizer.
//!
//! Wakes on namespaces, and on pods that go in namespaces that are going. Deletes everything of every served
//! namespaced kind, and reports through conditions what holds it up.

use std::{sync::Arc, time::Duration};

use control_decide::{
    namespace::{Plan, Remains, is_to_be_emptied, plan},
    object::is_being_deleted,
};
use k8s_openapi::api::core::v1::{Namespace, NamespaceSpec};
use kube::{
    Api,
    api::{DeleteParams, DynamicObject, ListParams, PartialObjectMeta, PostParams},
    discovery::verbs,
};
use serde_json::json;

use crate::{
    config::Controller,
    context::{Context, now, wait},
    informer::Key,
    queue::Queue,
    resources::Served,
    write::{WriteError, call, delete, merge_patch_status},
};

const WORKERS: usize = 2;
const PAGE: u32 = 500;

/// Registers the controller.
pub(crate) fn start(context: &Arc<Context>) {
    let queue = Queue::new();
    {
        let queue = Arc::clone(&queue);
        context.namespaces.on_change(move |change| {
            if change.new.as_ref().is_some_and(|namespace| is_to_be_emptied(namespace)) {
                queue.add(change.key());
            }
        });
    }
    {
        let (queue, namespaces) = (Arc::clone(&queue), Arc::clone(&context.namespaces));
        context.pods.on_change(move |change| {
            let key = Key::new("", &change.key().namespace);
            if change.new.is_none() && namespaces.get(&key).is_some_and(|found| is_to_be_emptied(&found)) {
                queue.add(key);
            }
        });
    }
    let ready = {
        let context = Arc::clone(context);
        async move { context.namespaces.wait_until_synced().await }
    };
    let shared = Arc::clone(context);
    context.work(Controller::Namespace, &queue, WORKERS, ready, move |key| {
        let context = Arc::clone(&shared);
        async move { reconcile(&context, &key).await }
    });
}

async fn reconcile(context: &Context, key: &Key) -> Result<Option<Duration>, WriteError> {
    let api: Api<Namespace> = Api::all(context.client.clone());
    let live = call(|| format!("get Namespace {key}"), api.get_opt(&key.name)).await?;
    let Some(namespace) = live.filter(is_to_be_emptied) else { return Ok(None) };
    let remains = empty(context, &key.name).await?;
    match plan(&namespace, &remains, now()) {
        Plan::Finalize { finalizers } => {
            let mut done = namespace;
            done.metadata.managed_fields = None;
            done.spec = Some(NamespaceSpec { finalizers: Some(finalizers) });
            let params = PostParams::default();
            let request = async { api.replace_subresource("finalize", &key.name, &params, &done).await };
            match call(|| format!("finalize Namespace {key}"), request).await {
                Ok(_) => Ok(None),
                Err(error) if error.is_not_found() => Ok(None),
                Err(error) => Err(error),
            }
        }
        Plan::Wait { conditions, retry_after } => {
            if let Some(conditions) = conditions {
                let patch = json!({"status": {"conditions": conditions}});
                merge_patch_status(&api, "Namespace", key, &patch).await?;
            }
            Ok(Some(wait(retry_after)))
        }
    }
}

/// Deletes everything in the namespace and tells what is left.
async fn empty(context: &Context, namespace: &str) -> Result<Remains, WriteError> {
    let mut remains = Remains::default();
    for served in context.resources.refresh().await?.iter() {
        if !served.namespaced || !served.supports(&[verbs::DELETE, verbs::LIST]) {
            continue;
        }
        let api = served.api(&context.client, namespace);
        if let Err(error) = empty_kind(&api, served, namespace, &mut remains).await {
            // One kind that does not answer must not keep the others.
            remains.failures.push(format!("{}: {}", served.display_name(), error.message()));
        }
    }
    Ok(remains)
}

async fn empty_kind(
    api: &Api<DynamicObject>,
    served: &Served,
    namespace: &str,
    remains: &mut Remains,
) -> Result<(), WriteError> {
    let kind = served.resource.kind.as_str();
    let before = list(api, served, namespace).await?;
    if before.is_empty() {
        return Ok(());
    }
    if served.supports(&["deletecollection"]) {
        let (params, everything) = (DeleteParams::background(), ListParams::default());
        let request = api.delete_collection(&params, &everything);
        call(|| format!("delete all {} in {namespace}", served.display_name()), request).await?;
    } else {
        for object in before.iter().filter(|object| !is_being_deleted(&object.metadata)) {
            let (key, uid) = (Key::of(&object.metadata), object.metadata.uid.as_deref().unwrap_or_default());
            delete(api, kind, &key, uid, DeleteParams::background()).await?;
        }
    }
    for object in list(api, served, namespace).await? {
        *remains.objects.entry(served.display_name()).or_default() += 1;
        for finalizer in object.metadata.finalizers.into_iter().flatten() {
            *remains.finalizers.entry(finalizer).or_default() += 1;
        }
        let grace = object.metadata.deletion_grace_period_seconds.unwrap_or(0);
        remains.grace_seconds = remains.grace_seconds.max(grace);
    }
    Ok(())
}

async fn list(
    api: &Api<DynamicObject>,
    served: &Served,
    namespace: &str,
) -> Result<Vec<PartialObjectMeta<DynamicObject>>, WriteError> {
    // One page is enough to know that something is left; the next pass sees the rest.
    let params = ListParams::default().limit(PAGE);
    let request = api.list_metadata(&params);
    let listed = call(|| format!("list {} in {namespace}", served.display_name()), request).await?;
    Ok(listed.items)
}
