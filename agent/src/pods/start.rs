//! Starts a container: variables, mounts, files, CreateContainer, StartContainer, postStart.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use agent_core::env::fields::Addresses;
use agent_core::env::{self, EnvInput, ProcessEnv};
use agent_core::huge_pages;
use agent_core::identity::hosts_file;
use agent_core::qos::ContainerCgroup;
use cri_shim_api::v1;
use k8s_openapi::api::core::v1::{Container, Pod, VolumeDevice, VolumeMount};

use super::steps::{StepInput, find};
use crate::contracts::{LogLink, ObjectSource as _};
use crate::events::EventType;
use crate::probes::check::{CheckTarget, Checked, run_hook};
use crate::runtime::container_config::{ContainerInput, ResolvedMount, container_config, log_path};
use crate::runtime::images::PullPolicy;
use crate::runtime::observe::message_file;
use crate::runtime::security::container_context;

/// A postStart hook that never ends would hold its pod forever.
const LONGEST_POST_START: Duration = Duration::from_secs(3600);

/// What to start.
#[derive(Debug, Clone)]
pub(super) struct StartRequest {
    pub(super) container: String,
    pub(super) attempt: u32,
    pub(super) sandbox_id: String,
    pub(super) image_ref: String,
    /// The container whose processes this one sees.
    pub(super) target_id: Option<String>,
}

/// Why the container does not run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StartError {
    /// `CreateContainerConfigError`, `CreateContainerError`, `RunContainerError`, `PostStartHookError`, `ErrImagePull`.
    pub(super) reason: &'static str,
    /// For people.
    pub(super) message: String,
    /// The runtime could not be asked: nothing is wrong with the container.
    pub(super) runtime_away: bool,
}

impl StartError {
    fn config(message: impl std::fmt::Display) -> Self {
        Self { reason: "CreateContainerConfigError", message: format!("{message}"), runtime_away: false }
    }
}

/// Starts the container.
pub(super) async fn start(input: &StepInput, request: StartRequest) -> Result<(), StartError> {
    let context = &input.context;
    let name = request.container.clone();
    let Some(container) = find(&input.pod, &name) else {
        return Err(StartError::config(format!("the pod has no container {name}")));
    };
    let result = Box::pin(start_inner(input, &container, &request)).await;
    if let Err(error) = &result
        && !error.runtime_away
        && error.reason != "PostStartHookError"
    {
        let text = format!("Error: {}", error.message);
        context.events.pod(&input.pod, Some(&name), EventType::Warning, "Failed", text);
    }
    result
}

async fn start_inner(
    input: &StepInput,
    container: &Container,
    request: &StartRequest,
) -> Result<(), StartError> {
    let context = &input.context;
    let sandbox_config = context.sandbox_config(&input.pod, input.sandbox_attempt).await;
    let config = configure(input, container, request).await?;
    make_log_directory(&sandbox_config, container).await?;
    let log = Path::new(&sandbox_config.log_directory).join(log_path(&container.name, request.attempt));
    let create = v1::CreateContainerRequest {
        pod_sandbox_id: request.sandbox_id.clone(),
        config: Some(config),
        sandbox_config: Some(sandbox_config),
    };
    let id = context.cri.create_container(create).await.map_err(|error| StartError {
        reason: "CreateContainerError",
        runtime_away: error.is_unavailable(),
        message: error.message,
    })?;
    let events = &context.events;
    let name = Some(container.name.as_str());
    events.pod(
        &input.pod,
        name,
        EventType::Normal,
        "Created",
        format!("Created container: {}", container.name),
    );
    context.cri.start_container(&id).await.map_err(|error| StartError {
        reason: "RunContainerError",
        runtime_away: error.is_unavailable(),
        message: error.message,
    })?;
    events.pod(
        &input.pod,
        name,
        EventType::Normal,
        "Started",
        format!("Started container {}", container.name),
    );
    context.host.log_links.link(link(&input.pod, container, &id, log)).await;
    post_start(input, container, &id).await
}

fn link(pod: &Pod, container: &Container, id: &str, log_path: PathBuf) -> LogLink {
    LogLink {
        namespace: pod.metadata.namespace.clone().unwrap_or_default(),
        pod: pod.metadata.name.clone().unwrap_or_default(),
        container: container.name.clone(),
        container_id: id.to_owned(),
        log_path,
    }
}

async fn make_log_directory(sandbox: &v1::PodSandboxConfig, container: &Container) -> Result<(), StartError> {
    let directory = Path::new(&sandbox.log_directory).join(&container.name);
    tokio::fs::create_dir_all(&directory).await.map_err(|error| StartError {
        reason: "CreateContainerError",
        message: format!("create container log directory {} failed: {error}", directory.display()),
        runtime_away: false,
    })
}

/// Everything that CreateContainer needs.
async fn configure(
    input: &StepInput,
    container: &Container,
    request: &StartRequest,
) -> Result<v1::ContainerConfig, StartError> {
    let context = &input.context;
    let mut process = environment(input, container).await?;
    let mut allocation = context.devices.allocate(&input.pod, container).await.map_err(StartError::config)?;
    allocation.devices.extend(block_devices(input, container)?);
    let claimed = Box::pin(context.claims.cdi_ids(&input.pod, container)).await;
    allocation.cdi_devices.extend(claimed.map_err(StartError::config)?);
    // What the pod says itself counts.
    for (name, value) in &allocation.variables {
        if !process.variables.iter().any(|(known, _)| known == name) {
            process.variables.push((name.clone(), value.clone()));
        }
    }
    let sets = context.numa.allocate(&input.pod, container).await.map_err(StartError::config)?;
    let mounts = mounts(input, container, &process).await?;
    let (hosts, message) = write_files(input, container, request.attempt).await?;
    let user = input.image_users.get(&container.name).cloned().unwrap_or_default();
    let seccomp_root = context.seccomp_root();
    let settings = context.security(&input.pod, &seccomp_root);
    let mut security =
        container_context(&input.pod, container, &user, &settings).map_err(StartError::config)?;
    if let (Some(target), Some(namespaces)) = (&request.target_id, &mut security.namespace_options) {
        namespaces.pid = v1::NamespaceMode::Target as i32;
        namespaces.target_id.clone_from(target);
    }
    Ok(container_config(ContainerInput {
        pod: &input.pod,
        container,
        attempt: request.attempt,
        image_ref: &request.image_ref,
        process,
        mount_paths: &mounts,
        allocation: &allocation,
        sets: &sets,
        hosts_file: &hosts,
        message_file: &message,
        cgroup: ContainerCgroup::of(&input.pod, container, &context.cgroup_settings()),
        huge_pages: huge_pages::limits(container, context.allocatable().keys().map(String::as_str)),
        security,
    }))
}

async fn environment(input: &StepInput, container: &Container) -> Result<ProcessEnv, StartError> {
    let context = &input.context;
    let namespace = input.pod.metadata.namespace.as_deref().unwrap_or_default();
    let references = env::references(container);
    let mut config_maps = BTreeMap::new();
    for name in &references.config_maps {
        let found = context.objects.config_map(namespace, name).await.map_err(StartError::config)?;
        config_maps.extend(found.map(|found| (name.clone(), found)));
    }
    let mut secrets = BTreeMap::new();
    for name in &references.secrets {
        let found = context.objects.secret(namespace, name).await.map_err(StartError::config)?;
        secrets.extend(found.map(|found| (name.clone(), found)));
    }
    let addresses =
        Addresses { pod: input.pod_ips.clone(), host: vec![context.config.keelson.node_ip.to_string()] };
    env::build(EnvInput {
        pod: &input.pod,
        container,
        services: &context.services.store.state(),
        config_maps: &config_maps,
        secrets: &secrets,
        addresses: &addresses,
        allocatable: &context.allocatable(),
    })
    .map_err(StartError::config)
}

async fn mounts(
    input: &StepInput,
    container: &Container,
    process: &ProcessEnv,
) -> Result<HashMap<usize, ResolvedMount>, StartError> {
    let mut resolved = HashMap::new();
    for (index, mount) in container.volume_mounts.iter().flatten().enumerate() {
        if let Some(found) = image_mount(input, container, mount, process).await? {
            resolved.insert(index, found);
            continue;
        }
        let Some(volume) = input.volumes.get(&mount.name) else {
            return Err(StartError::config(format!(
                "cannot find volume {:?} to mount into container {:?}",
                mount.name, container.name
            )));
        };
        let path = match sub_path(mount, process) {
            Some(sub_path) => {
                input.context.host.volumes.sub_path(volume, &sub_path).await.map_err(|error| {
                    StartError::config(format!(
                        "failed to prepare subPath for volumeMount {:?} of container {:?}: {}",
                        mount.name, container.name, error.message
                    ))
                })?
            }
            None => volume.path.clone(),
        };
        resolved.insert(index, ResolvedMount::path(path, volume.read_only));
    }
    Ok(resolved)
}

/// Volumes that the container has as devices: path in the container, path on the node, permissions.
fn block_devices(
    input: &StepInput,
    container: &Container,
) -> Result<Vec<(String, String, String)>, StartError> {
    let device = |wanted: &VolumeDevice| {
        let volume = input.volumes.get(&wanted.name).ok_or_else(|| {
            StartError::config(format!(
                "cannot find volume {:?} to pass into container {:?}",
                wanted.name, container.name
            ))
        })?;
        let permissions = if volume.read_only { "r" } else { "mrw" };
        let path = volume.path.to_string_lossy().into_owned();
        Ok((wanted.device_path.clone(), path, permissions.to_owned()))
    };
    container.volume_devices.iter().flatten().map(device).collect()
}

/// The mount's `subPath`, variables put in.
fn sub_path(mount: &VolumeMount, process: &ProcessEnv) -> Option<String> {
    let variable =
        |name: &str| process.variables.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
    match (&mount.sub_path_expr, &mount.sub_path) {
        (Some(expression), _) if !expression.is_empty() => Some(env::expand(expression, variable)),
        (_, Some(path)) if !path.is_empty() => Some(path.clone()),
        _ => None,
    }
}

/// The mount of an image volume, its image pulled as the volume says; nothing for other volumes.
async fn image_mount(
    input: &StepInput,
    container: &Container,
    mount: &VolumeMount,
    process: &ProcessEnv,
) -> Result<Option<ResolvedMount>, StartError> {
    let mut volumes = input.pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    let source = volumes.find(|volume| volume.name == mount.name).and_then(|volume| volume.image.as_ref());
    let Some(source) = source else { return Ok(None) };
    let reference = source.reference.as_deref().unwrap_or_default();
    let policy = match source.pull_policy.as_deref() {
        None | Some("") if has_latest_tag(reference) => PullPolicy::Always,
        policy => PullPolicy::named(policy),
    };
    let ensured = super::steps::pull(input, &container.name, reference, policy).await;
    let ready = ensured.map_err(|error| StartError {
        reason: error.reason,
        message: format!("image volume {:?}: {}", mount.name, error.message),
        runtime_away: error.runtime_away,
    })?;
    let image = v1::ImageSpec {
        image: ready.image_ref,
        user_specified_image: reference.to_owned(),
        ..v1::ImageSpec::default()
    };
    Ok(Some(ResolvedMount::image(image, sub_path(mount, process).unwrap_or_default())))
}

/// What a tag may hide behind: the next image of that name.
fn has_latest_tag(reference: &str) -> bool {
    let last = reference.rsplit('/').next().unwrap_or(reference);
    !reference.contains('@') && last.split_once(':').is_none_or(|(_, tag)| tag == "latest")
}

/// Writes /etc/hosts and the empty termination message file; their paths.
async fn write_files(
    input: &StepInput,
    container: &Container,
    attempt: u32,
) -> Result<(PathBuf, PathBuf), StartError> {
    let context = &input.context;
    let pod_dir = context.pod_dir(input.pod.metadata.uid.as_deref().unwrap_or_default());
    let hosts = pod_dir.join("etc-hosts");
    let message = message_file(&pod_dir, &container.name, attempt);
    let host_network = input.pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false);
    let (ips, domain) = (input.pod_ips.clone(), context.config.cluster_domain.clone());
    let (pod, hosts_path, message_path) = (Arc::clone(&input.pod), hosts.clone(), message.clone());
    let write = tokio::task::spawn_blocking(move || -> std::io::Result<()> {
        use std::os::unix::fs::PermissionsExt as _;
        if let Some(parent) = message_path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        let node_hosts = if host_network { Some(std::fs::read_to_string("/etc/hosts")?) } else { None };
        std::fs::write(&hosts_path, hosts_file(&pod, &ips, &domain, node_hosts.as_deref()))?;
        std::fs::write(&message_path, b"")?;
        // Any user of the container may write its last words.
        std::fs::set_permissions(&message_path, std::fs::Permissions::from_mode(0o666))
    });
    match write.await {
        Ok(Ok(())) => Ok((hosts, message)),
        Ok(Err(error)) => Err(StartError::config(format!(
            "cannot write the files of pod directory {}: {error}",
            pod_dir.display()
        ))),
        Err(error) => Err(StartError::config(error)),
    }
}

async fn post_start(input: &StepInput, container: &Container, id: &str) -> Result<(), StartError> {
    let hook = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.post_start.as_ref());
    let (Some(hook), Some(target)) = (hook, check_target(input, &container.name, id)) else { return Ok(()) };
    // Cancel-safe: an interrupted hook's process is ended with its container.
    let checked = tokio::select! {
        checked = run_hook(&input.context.cri, hook, &target, LONGEST_POST_START) => checked,
        () = input.ending.cancelled() => return Ok(()),
    };
    let (Checked::Failure(problem) | Checked::Unknown(problem)) = checked else { return Ok(()) };
    let events = &input.context.events;
    let name = Some(container.name.as_str());
    events.pod(&input.pod, name, EventType::Warning, "FailedPostStartHook", "PostStartHook failed");
    let grace = input.pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds).unwrap_or(30);
    let message = format!("Container {} failed postStartHook", container.name);
    let killed = super::kill::kill(input, id, &container.name, grace, &message).await;
    if let Err(error) = killed {
        tracing::warn!(container = %container.name, %error, "cannot kill a container whose postStart hook failed");
    }
    Err(StartError { reason: "PostStartHookError", message: problem, runtime_away: false })
}

/// What hooks and probes of the container check.
pub(super) fn check_target(input: &StepInput, container: &str, id: &str) -> Option<CheckTarget> {
    Some(CheckTarget {
        container: find(&input.pod, container)?,
        container_id: id.to_owned(),
        address: address(&input.pod, &input.pod_ips, input.context.config.keelson.node_ip),
    })
}

/// The pod's first address; the node's in the host network.
pub(super) fn address(pod: &Pod, pod_ips: &[String], node_ip: std::net::IpAddr) -> Option<std::net::IpAddr> {
    let host_network = pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false);
    if host_network { Some(node_ip) } else { pod_ips.first()?.parse().ok() }
}
