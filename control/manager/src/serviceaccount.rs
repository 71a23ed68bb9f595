//! Keeps a service account named `default` in every active namespace.

use std::{sync::Arc, time::Duration};

use control_decide::namespace::is_active;
use k8s_openapi::{api::core::v1::ServiceAccount, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::api::PostParams;

use crate::{
    config::Controller,
    context::Context,
    informer::Key,
    queue::Queue,
    write::{WriteError, call},
};

const DEFAULT: &str = "default";

/// Registers the controller.
pub(crate) fn start(context: &Arc<Context>) {
    let queue: Arc<Queue<String>> = Queue::new();
    {
        let queue = Arc::clone(&queue);
        context.namespaces.on_change(move |change| queue.add(change.key().name));
    }
    {
        let queue = Arc::clone(&queue);
        context.service_accounts.on_change(move |change| {
            if change.new.is_none() && change.key().name == DEFAULT {
                queue.add(change.key().namespace);
            }
        });
    }
    let ready = {
        let context = Arc::clone(context);
        async move {
            context.namespaces.wait_until_synced().await;
            context.service_accounts.wait_until_synced().await;
        }
    };
    let shared = Arc::clone(context);
    context.work(Controller::ServiceAccount, &queue, 1, ready, move |namespace| {
        let context = Arc::clone(&shared);
        async move { reconcile(&context, &namespace).await }
    });
}

async fn reconcile(context: &Context, namespace: &str) -> Result<Option<Duration>, WriteError> {
    let active = context.namespaces.get(&Key::new("", namespace)).is_some_and(|found| is_active(&found));
    if !active || context.service_accounts.get(&Key::new(namespace, DEFAULT)).is_some() {
        return Ok(None);
    }
    let account = ServiceAccount {
        metadata: ObjectMeta {
            name: Some(DEFAULT.into()),
            namespace: Some(namespace.to_owned()),
            ..ObjectMeta::default()
        },
        ..ServiceAccount::default()
    };
    let api = context.api::<ServiceAccount>(namespace);
    let creation = async { api.create(&PostParams::default(), &account).await };
    match call(|| format!("create ServiceAccount {namespace}/{DEFAULT}"), creation).await {
        Ok(_) => Ok(None),
        Err(error) if error.is_already_exists() || error.is_namespace_terminating() => Ok(None),
        Err(error) => Err(error),
    }
}
