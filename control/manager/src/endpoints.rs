//! Endpoints: carries out `control_decide::endpoints::legacy` plans.
//!
//! Wakes on Services, their pods, and Endpoints that change or go.

use std::{sync::Arc, time::Duration};

use control_decide::{
    endpoints::legacy::{Plan, plan},
    object::{is_being_deleted, uid},
};
use k8s_openapi::api::core::v1::Endpoints;
use kube::api::{DeleteParams, PostParams};

use crate::{
    config::Controller,
    context::Context,
    endpointslice::wake_services,
    informer::Key,
    queue::Queue,
    write::{WriteError, call, delete},
};

const WORKERS: usize = 2;

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
        context.endpoints.on_change(move |change| queue.add(change.key()));
    }
    let ready = {
        let context = Arc::clone(context);
        async move {
            context.services.wait_until_synced().await;
            context.pods.wait_until_synced().await;
            context.endpoints.wait_until_synced().await;
        }
    };
    let shared = Arc::clone(context);
    context.work(Controller::Endpoints, &queue, WORKERS, ready, move |key| {
        let context = Arc::clone(&shared);
        async move { reconcile(&context, &key).await }
    });
}

async fn reconcile(context: &Context, key: &Key) -> Result<Option<Duration>, WriteError> {
    let service = context.services.get(key).filter(|service| !is_being_deleted(&service.metadata));
    let current = context.endpoints.get(key);
    let pods = context.pods.in_namespace(&key.namespace);
    let api = context.api::<Endpoints>(&key.namespace);
    match plan(service.as_deref(), &pods, current.as_deref()) {
        Plan::Nothing => {}
        Plan::Create(wanted) => {
            let creation = async { api.create(&PostParams::default(), &wanted).await };
            match call(|| format!("create Endpoints {key}"), creation).await {
                Ok(_) => {}
                // The cache is late; its event brings the key back.
                Err(error) if error.is_already_exists() || error.is_namespace_terminating() => {}
                Err(error) => return Err(error),
            }
        }
        Plan::Update(wanted) => {
            let update = async { api.replace(&key.name, &PostParams::default(), &wanted).await };
            call(|| format!("update Endpoints {key}"), update).await?;
        }
        Plan::Delete => {
            let gone = current.as_ref().map(|current| uid(&current.metadata)).unwrap_or_default();
            delete(&api, "Endpoints", key, gone, DeleteParams::default()).await?;
        }
    }
    Ok(None)
}
