//! Carries out the steps of a plan. Each step is one future; its [`Outcome`] goes back to the pod's loop.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use agent_core::model::find_container;
use agent_core::plan::PodAction;
use agent_core::qos::{ContainerCgroup, PodCgroup, QosClass};
use agent_core::status::sync::Written;
use k8s_openapi::api::core::v1::{Container, Pod, Secret};
use k8s_openapi::api::node::v1::RuntimeClass;
use kube::Api;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::context::PodContext;
use super::status_sync;
use super::{kill, start};
use crate::chain::chain;
use crate::contracts::{HostPath, MountedVolumes, ObjectSource as _, VolumeContext, VolumeError};
use crate::events::EventType;
use crate::runtime::auth::credentials;
use crate::runtime::container_config::resources;
use crate::runtime::cri::CriError;
use crate::runtime::images::{ImageError, PullPolicy, ReadyImage};
use crate::runtime::security::ImageUser;
use crate::users::wants;

/// A step of the loop: the plan's, or a status write.
#[derive(Debug, Clone)]
pub(super) enum Step {
    /// From the plan.
    Action(PodAction),
    /// Patch the pod's status.
    WriteStatus(Value),
}

/// How a step ended.
#[derive(Debug)]
pub(super) enum Outcome {
    /// Done; or failed in a way that only means: later again.
    Plain(Result<(), StepError>),
    /// Volumes are mounted.
    Volumes(Result<MountedVolumes, VolumeError>),
    /// ResourceClaims are ready, or why not.
    Claims(Result<(), StepError>),
    /// A sandbox was made, or why not.
    Sandbox(Result<(), CriError>),
    /// The image is there, or why not.
    Image(Result<ReadyImage, ImageError>),
    /// The container was started, or why not.
    Started(Result<(), start::StartError>),
    /// The status was written, or why not.
    Status(Written),
}

/// A step has to be tried again; the message is for the log and events.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct StepError(pub(super) String);

impl From<CriError> for StepError {
    fn from(error: CriError) -> Self {
        Self(format!("{}: {error}", error.call))
    }
}

/// What a step may read of its loop, as it was when the step began.
#[derive(Clone)]
pub(super) struct StepInput {
    pub(super) context: Arc<PodContext>,
    pub(super) pod: Arc<Pod>,
    /// Mounted volumes by name.
    pub(super) volumes: Arc<HashMap<String, HostPath>>,
    /// Users of the images that are there, by container.
    pub(super) image_users: Arc<HashMap<String, ImageUser>>,
    /// Addresses of the sandbox.
    pub(super) pod_ips: Vec<String>,
    /// Attempt number of the current sandbox.
    pub(super) sandbox_attempt: u32,
    /// Cancelled when the pod is to end: hooks stop waiting.
    pub(super) ending: CancellationToken,
}

/// Runs one step to its end.
pub(super) async fn run(input: StepInput, step: Step) -> Outcome {
    let context = Arc::clone(&input.context);
    let action = match step {
        Step::WriteStatus(patch) => {
            return Outcome::Status(
                status_sync::write(context.client.clone(), &context.status_slots, &input.pod, patch).await,
            );
        }
        Step::Action(action) => action,
    };
    match action {
        PodAction::EnsureCgroup => {
            let cgroup = PodCgroup::of(&input.pod, &context.cgroup_settings());
            let done = context.host.cgroups.ensure_pod(&cgroup).await;
            Outcome::Plain(done.map_err(|error| StepError(chain(&error))))
        }
        PodAction::MountVolumes => Outcome::Volumes(mount_volumes(&input).await),
        PodAction::PrepareClaims => Outcome::Claims(Box::pin(prepare_claims(&input)).await),
        PodAction::ReleaseClaims => {
            let uid = input.pod.metadata.uid.as_deref().unwrap_or_default();
            Outcome::Plain(Box::pin(context.claims.release(uid)).await.map_err(StepError))
        }
        PodAction::CreateSandbox { attempt } => {
            Outcome::Sandbox(Box::pin(create_sandbox(&input, attempt)).await)
        }
        PodAction::StopSandbox { id } => {
            Outcome::Plain(context.cri.stop_sandbox(&id).await.map_err(Into::into))
        }
        PodAction::RemoveSandbox { id } => {
            Outcome::Plain(context.cri.remove_sandbox(&id).await.map_err(Into::into))
        }
        PodAction::EnsureImage { container } => {
            Outcome::Image(Box::pin(ensure_image(&input, &container)).await)
        }
        PodAction::StartContainer { container, attempt, sandbox_id, image_ref, target_id, .. } => {
            let request = start::StartRequest { container, attempt, sandbox_id, image_ref, target_id };
            Outcome::Started(Box::pin(start::start(&input, request)).await)
        }
        PodAction::KillContainer { id, container, grace, message } => {
            Outcome::Plain(kill::kill(&input, &id, &container, grace, &message).await)
        }
        PodAction::ResizeContainer { id, container, .. } => {
            Outcome::Plain(resize(&input, &id, &container).await)
        }
        PodAction::RemoveContainer { id, log_path } => {
            Outcome::Plain(remove_container(&input, &id, &log_path).await)
        }
        PodAction::TearDownVolumes => {
            let uid = input.pod.metadata.uid.clone().unwrap_or_default();
            let done = context.host.volumes.teardown(&uid).await;
            Outcome::Plain(done.map_err(|error| StepError(error.to_string())))
        }
        PodAction::RemoveCgroup => {
            // No container is left that could use them.
            let uid = input.pod.metadata.uid.as_deref().unwrap_or_default();
            context.numa.release(uid).await;
            context.users.release(uid);
            Outcome::Plain(remove_cgroup(&input).await)
        }
        PodAction::DeleteFromApi => {
            let deleted = status_sync::delete(context.client.clone(), &input.pod).await;
            Outcome::Plain(deleted.map_err(StepError))
        }
    }
}

/// The pod's cgroup gives room first and takes it back last, so that no container is ever above its pod.
async fn resize(input: &StepInput, id: &str, name: &str) -> Result<(), StepError> {
    let context = &input.context;
    let Some(container) = find(&input.pod, name) else { return Ok(()) };
    let settings = context.cgroup_settings();
    let pod = PodCgroup::of(&input.pod, &settings);
    let wide = PodCgroup { memory_max: None, cpu_quota: None, ..pod.clone() };
    let fail = |error: crate::contracts::CgroupError| StepError(chain(&error));
    let values = ContainerCgroup::of(&input.pod, &container, &settings);
    if let Some(limit) = values.memory_max {
        room_for(context, id, limit).await?;
    }
    context.host.cgroups.ensure_pod(&wide).await.map_err(fail)?;
    let updated = context.cri.update_resources(id, resources(values)).await;
    // Also after a failure: the pod must not go on without its limits.
    context.host.cgroups.ensure_pod(&pod).await.map_err(fail)?;
    updated?;
    let text = format!("Container {name} resized");
    context.events.pod(&input.pod, Some(name), EventType::Normal, "ResizeCompleted", text);
    Ok(())
}

/// Fails where the container uses more memory than `limit` allows: the kernel would end it.
async fn room_for(context: &PodContext, id: &str, limit: u64) -> Result<(), StepError> {
    // A runtime that does not tell is no reason to refuse.
    let stats = context.cri.container_stats(id).await.unwrap_or_default();
    let memory = stats.and_then(|stats| stats.memory);
    let used =
        memory.and_then(|memory| memory.working_set_bytes.or(memory.usage_bytes)).map(|used| used.value);
    match used.filter(|used| *used >= limit) {
        Some(used) => Err(StepError(format!(
            "attempting to set container memory limit ({limit}) below current usage ({used})"
        ))),
        None => Ok(()),
    }
}

async fn mount_volumes(input: &StepInput) -> Result<MountedVolumes, VolumeError> {
    let context = &input.context;
    let volume_context = VolumeContext {
        node_name: context.config.keelson.node_name.clone(),
        allocatable: context.allocatable().into_iter().map(|(name, quantity)| (name, quantity.0)).collect(),
    };
    context.host.volumes.mount_all(&input.pod, &volume_context).await
}

async fn prepare_claims(input: &StepInput) -> Result<(), StepError> {
    let context = &input.context;
    context.claims.prepare(&input.pod).await.map_err(|problem| {
        let message = format!("Failed to prepare dynamic resources: {problem}");
        context.events.pod(&input.pod, None, EventType::Warning, "FailedPrepareDynamicResources", message);
        StepError(problem)
    })
}

async fn create_sandbox(input: &StepInput, attempt: u32) -> Result<(), CriError> {
    let context = &input.context;
    let promised = context.users.promise(&input.pod).await;
    let config = context.sandbox_config(&input.pod, attempt).await;
    let logs = config.log_directory.clone();
    // The runtime makes the directory too; made here it has the right mode whatever the runtime does.
    let made = tokio::fs::create_dir_all(&logs).await;
    if let Err(error) = made {
        tracing::warn!(%logs, %error, "cannot make the pod's log directory");
    }
    if let Some(message) = missing_dns(&input.pod, &context.config.cluster_dns) {
        context.events.pod(&input.pod, None, EventType::Warning, "MissingClusterDNS", message);
    }
    let created = match promised
        .map_err(refused)
        .and(handler(input).await)
        .and_then(|handler| own_users(input, handler))
    {
        Ok(handler) => context.cri.run_sandbox(config, &handler).await,
        Err(error) => Err(error),
    };
    if let Err(error) = &created {
        let message = format!("Failed to create pod sandbox: {error}");
        context.events.pod(&input.pod, None, EventType::Warning, "FailedCreatePodSandBox", message);
    }
    created.map(|_id| ())
}

/// What is told of a pod that wants the cluster's name servers where there are none; it gets the node's.
fn missing_dns<S>(pod: &Pod, servers: &[S]) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let wants = match spec.dns_policy.as_deref() {
        Some("ClusterFirstWithHostNet") => true,
        None | Some("ClusterFirst") => !spec.host_network.unwrap_or(false),
        Some(_) => false,
    };
    let metadata = &pod.metadata;
    (wants && servers.is_empty()).then(|| {
        format!(
            "pod: \"{}_{}({})\". kubelet does not have ClusterDNS IP configured and cannot create Pod using \
             \"ClusterFirst\" policy. Falling back to \"Default\" policy.",
            metadata.name.as_deref().unwrap_or_default(),
            metadata.namespace.as_deref().unwrap_or_default(),
            metadata.uid.as_deref().unwrap_or_default()
        )
    })
}

fn refused(message: String) -> CriError {
    CriError { call: "RunPodSandbox", code: tonic::Code::FailedPrecondition, message }
}

/// A runtime that knows no user namespaces would run the pod with the node's users, silently.
fn own_users(input: &StepInput, handler: String) -> Result<String, CriError> {
    let health = input.context.health.borrow();
    let found = health.handlers.iter().find(|known| known.name.as_deref() == Some(handler.as_str()));
    let features = found.and_then(|known| known.features.as_ref());
    if !wants(&input.pod) || features.is_some_and(|features| features.user_namespaces == Some(true)) {
        return Ok(handler);
    }
    Err(refused(format!("the container runtime's handler {handler:?} does not support user namespaces")))
}

/// The runtime's handler that the pod's class names; empty for the default one.
async fn handler(input: &StepInput) -> Result<String, CriError> {
    let spec = input.pod.spec.as_ref();
    let Some(name) = spec.and_then(|spec| spec.runtime_class_name.as_deref()).filter(|name| !name.is_empty())
    else {
        return Ok(String::new());
    };
    let failed = |why: String| refused(format!("failed to get sandbox runtime: {why}"));
    let classes: Api<RuntimeClass> = Api::all(input.context.client.clone());
    match tokio::time::timeout(super::context::PodContext::API_DEADLINE, classes.get_opt(name)).await {
        Ok(Ok(Some(class))) => Ok(class.handler),
        Ok(Ok(None)) => Err(failed(format!("RuntimeClass \"{name}\" not found"))),
        Ok(Err(error)) => Err(failed(format!("RuntimeClass \"{name}\": {error}"))),
        Err(_elapsed) => Err(failed(format!("RuntimeClass \"{name}\": the API server does not answer"))),
    }
}

/// The container of that name in the pod's spec.
pub(super) fn find(pod: &Pod, name: &str) -> Option<Container> {
    find_container(pod.spec.as_ref()?, name)
}

async fn ensure_image(input: &StepInput, name: &str) -> Result<ReadyImage, ImageError> {
    let Some(container) = find(&input.pod, name) else {
        let message = format!("the pod has no container {name}");
        return Err(ImageError { reason: "ErrImageInspect", message, runtime_away: true });
    };
    let image = container.image.as_deref().unwrap_or_default();
    pull(input, name, image, PullPolicy::of(&container)).await
}

/// Brings an image here for the container `name`, with the events that belong to it.
pub(super) async fn pull(
    input: &StepInput,
    name: &str,
    image: &str,
    policy: PullPolicy,
) -> Result<ReadyImage, ImageError> {
    let context = &input.context;
    let events = &context.events;
    let auth = credentials(image, &pull_secrets(input).await);
    let sandbox = context.sandbox_config(&input.pod, input.sandbox_attempt).await;
    let tell = |kind, reason: &str, text: String| events.pod(&input.pod, Some(name), kind, reason, text);
    let on_pull = || tell(EventType::Normal, "Pulling", format!("Pulling image \"{image}\""));
    let ensured = context.images.ensure(image, policy, auth, Some(sandbox), on_pull).await;
    match &ensured {
        Ok(ready) => tell(EventType::Normal, "Pulled", ready.event.clone()),
        Err(error) if error.runtime_away => {}
        Err(error) => {
            let text = match error.reason {
                "ErrImagePull" => format!("Failed to pull image \"{image}\": {}", error.message),
                _ => error.message.clone(),
            };
            let reason = match error.reason {
                "ErrImageNeverPull" => "ErrImageNeverPull",
                "InvalidImageName" | "ErrImageInspect" => "InspectFailed",
                _ => "Failed",
            };
            tell(EventType::Warning, reason, text);
            tell(EventType::Warning, "Failed", format!("Error: {}", error.reason));
        }
    }
    ensured
}

async fn pull_secrets(input: &StepInput) -> Vec<Arc<Secret>> {
    let namespace = input.pod.metadata.namespace.as_deref().unwrap_or_default();
    let names: BTreeSet<&str> = input
        .pod
        .spec
        .iter()
        .flat_map(|spec| spec.image_pull_secrets.iter().flatten())
        .map(|reference| reference.name.as_str())
        .collect();
    let mut secrets = Vec::new();
    for name in names {
        if let Ok(Some(secret)) = input.context.objects.secret(namespace, name).await {
            secrets.push(secret);
            continue;
        }
        let message = format!(
            "Unable to retrieve some image pull secrets ({name}); attempting to pull the image may not succeed."
        );
        let events = &input.context.events;
        events.pod(&input.pod, None, EventType::Warning, "FailedToRetrieveImagePullSecret", message);
    }
    secrets
}

async fn remove_container(input: &StepInput, id: &str, log_path: &str) -> Result<(), StepError> {
    input.context.cri.remove_container(id).await?;
    if !log_path.is_empty() {
        let path = PathBuf::from(log_path);
        let removed = tokio::task::spawn_blocking(move || remove_log(&path)).await;
        match removed.map_err(std::io::Error::other).and_then(|removed| removed) {
            Err(error) => tracing::warn!(log_path, %error, "cannot remove the log of a removed container"),
            Ok(()) => input.context.host.log_links.remove_dangling().await,
        }
    }
    Ok(())
}

/// Removes a log with the files that it was rotated to.
fn remove_log(path: &Path) -> std::io::Result<()> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Ok(());
    };
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let other = entry.file_name();
        let other = other.to_string_lossy();
        if other == name || agent_core::logs::belongs_to(name, &other) {
            match std::fs::remove_file(entry.path()) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}

/// A pod known to the node only may have been of any class: its cgroup is wherever it is.
async fn remove_cgroup(input: &StepInput) -> Result<(), StepError> {
    let tree = input.context.config.cgroup_tree();
    let uid = input.pod.metadata.uid.as_deref().unwrap_or_default();
    for class in [QosClass::Guaranteed, QosClass::Burstable, QosClass::BestEffort] {
        let path = tree.pod(class, uid);
        input.context.host.cgroups.remove_pod(&path).await.map_err(|error| StepError(chain(&error)))?;
    }
    Ok(())
}
