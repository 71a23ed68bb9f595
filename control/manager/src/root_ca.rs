//! Publishes the CA that pods verify the API server with: ConfigMap `kube-root-ca.crt` in every active
//! namespace, restored when it is changed or deleted.

use std::{sync::Arc, time::Duration};

use control_decide::{namespace::is_active, object::StringMap};
use k8s_openapi::{api::core::v1::ConfigMap, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::api::PostParams;
use serde_json::json;

use crate::{
    config::Controller,
    context::Context,
    informer::Key,
    queue::Queue,
    write::{WriteError, call, merge_patch},
};

const NAME: &str = "kube-root-ca.crt";
const FILE: &str = "ca.crt";
const DESCRIPTION: (&str, &str) = (
    "kubernetes.io/description",
    "Contains a CA bundle that can be used to verify the kube-apiserver when using internal endpoints such \
     as the internal service IP or kubernetes.default.svc. No other usage is guaranteed across \
     distributions of Kubernetes clusters.",
);

/// Registers the controller.
pub(crate) fn start(context: &Arc<Context>) {
    let queue: Arc<Queue<String>> = Queue::new();
    {
        let queue = Arc::clone(&queue);
        context.namespaces.on_change(move |change| queue.add(change.key().name));
    }
    {
        let queue = Arc::clone(&queue);
        context.root_ca_maps.on_change(move |change| queue.add(change.key().namespace));
    }
    let ready = {
        let context = Arc::clone(context);
        async move {
            context.namespaces.wait_until_synced().await;
            context.root_ca_maps.wait_until_synced().await;
        }
    };
    let shared = Arc::clone(context);
    context.work(Controller::RootCa, &queue, 1, ready, move |namespace| {
        let context = Arc::clone(&shared);
        async move { reconcile(&context, &namespace).await }
    });
}

async fn reconcile(context: &Context, namespace: &str) -> Result<Option<Duration>, WriteError> {
    let Some(pem) = context.config.root_ca_pem.as_ref() else { return Ok(None) };
    if !context.namespaces.get(&Key::new("", namespace)).is_some_and(|found| is_active(&found)) {
        return Ok(None);
    }
    let key = Key::new(namespace, NAME);
    let api = context.api::<ConfigMap>(namespace);
    let wanted = StringMap::from([(FILE.to_owned(), pem.clone())]);
    if let Some(current) = context.root_ca_maps.get(&key) {
        if current.data.as_ref() != Some(&wanted) {
            let extra = current.data.iter().flatten().map(|(file, _)| file).filter(|file| *file != FILE);
            let mut data: serde_json::Map<_, _> =
                extra.map(|file| (file.clone(), serde_json::Value::Null)).collect();
            data.insert(FILE.into(), pem.clone().into());
            merge_patch(&api, "ConfigMap", &key, &json!({"data": data})).await?;
        }
        return Ok(None);
    }
    let map = ConfigMap {
        metadata: ObjectMeta {
            name: Some(NAME.into()),
            namespace: Some(namespace.to_owned()),
            annotations: Some(StringMap::from([(DESCRIPTION.0.to_owned(), DESCRIPTION.1.to_owned())])),
            ..ObjectMeta::default()
        },
        data: Some(wanted),
        ..ConfigMap::default()
    };
    let creation = async { api.create(&PostParams::default(), &map).await };
    match call(|| format!("create ConfigMap {key}"), creation).await {
        Ok(_) => Ok(None),
        Err(error) if error.is_already_exists() || error.is_namespace_terminating() => Ok(None),
        Err(error) => Err(error),
    }
}
