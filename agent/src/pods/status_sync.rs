//! Carries out what [`agent_core::status::sync`] decides: status patches, and the deletion of the API object. The worker runs
//! both as tasks.

use agent_core::status::sync::Written;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, Client};
use serde_json::Value;
use tokio::sync::Semaphore;

use super::context::PodContext;
use crate::chain::chain;

/// Patches the status. `slots` bounds how many pods write at the same time.
pub(super) async fn write(client: Client, slots: &Semaphore, pod: &Pod, patch: Value) -> Written {
    // The semaphore is never closed.
    let _slot = slots.acquire().await.ok();
    let (api, name) = api(client, pod);
    let params = PatchParams::default();
    let patch = Patch::Strategic(patch);
    let write = api.patch_status(&name, &params, &patch);
    match tokio::time::timeout(PodContext::API_DEADLINE, write).await {
        Ok(Ok(pod)) => Written::Pod(Box::new(pod)),
        Ok(Err(kube::Error::Api(status))) if status.code == 404 => Written::Gone,
        Ok(Err(error)) => Written::Failed(chain(&error)),
        Err(_elapsed) => Written::Failed("no answer within 10 s".to_owned()),
    }
}

/// Deletes the API object for good; only this very pod, not a successor of its name.
pub(super) async fn delete(client: Client, pod: &Pod) -> Result<(), String> {
    let (api, name) = api(client, pod);
    let preconditions = Preconditions { uid: pod.metadata.uid.clone(), resource_version: None };
    let params = DeleteParams::default().grace_period(0).preconditions(preconditions);
    let deletion = async {
        match api.delete(&name, &params).await {
            Ok(_) => Ok(()),
            // The precondition failed, or somebody wrote in between: only looking tells which.
            Err(kube::Error::Api(status)) if status.code == 409 => match api.get_opt(&name).await? {
                Some(found) if found.metadata.uid == pod.metadata.uid => Err(kube::Error::Api(status)),
                _ => Ok(()),
            },
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(error) => Err(error),
        }
    };
    match tokio::time::timeout(PodContext::API_DEADLINE, deletion).await {
        Ok(result) => result.map_err(|error| chain(&error)),
        Err(_elapsed) => Err("no answer within 10 s".to_owned()),
    }
}

fn api(client: Client, pod: &Pod) -> (Api<Pod>, String) {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    (Api::namespaced(client, namespace), pod.metadata.name.clone().unwrap_or_default())
}
