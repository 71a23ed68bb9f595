//! The status of one container: state, last state, readiness. Pure.

use k8s_openapi::api::core::v1::{
    ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting, ContainerStatus,
    ContainerUser, LinuxContainerUser, PodStatus, ResourceStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::StatusInput;
use crate::model::{ContainerKind, ContainerSpec, ObservedContainer, RunState};

/// Derives the status of one container.
pub(super) fn status_of(input: StatusInput<'_>, entry: ContainerSpec<'_>) -> ContainerStatus {
    let name = entry.container.name.as_str();
    let newest =
        input.observed.newest(name, input.memory).filter(|instance| instance.state != RunState::Created);
    let mut status = match newest {
        Some(instance) => from_instance(input, entry, instance),
        None => without_instance(input, entry),
    };
    // What the instance has, which during a resize is not what the spec says.
    let applied = input
        .memory
        .container(name)
        .applied
        .filter(|applied| newest.is_some_and(|n| n.attempt == applied.attempt));
    let resources = applied.map(|applied| applied.resources).or_else(|| entry.container.resources.clone());
    let resources = resources.filter(|r| r.requests.is_some() || r.limits.is_some());
    if let Some(resources) = resources.filter(|_| status.state.as_ref().is_some_and(|s| s.running.is_some()))
    {
        status.allocated_resources.clone_from(&resources.requests);
        status.resources = Some(resources);
    }
    if entry.kind == ContainerKind::Main {
        status.allocated_resources_status = device_health(input, name);
    }
    status
}

/// How the container's devices are; of a pod that has given them back, how they were.
fn device_health(input: StatusInput<'_>, name: &str) -> Option<Vec<ResourceStatus>> {
    let before = || previous(input, name).filter(|_| input.plan.ended)?.allocated_resources_status.clone();
    input.memory.device_health.get(name).cloned().or_else(before)
}

fn from_instance(
    input: StatusInput<'_>,
    entry: ContainerSpec<'_>,
    instance: &ObservedContainer,
) -> ContainerStatus {
    let name = entry.container.name.as_str();
    let before = input
        .observed
        .instances(name)
        .filter(|older| older.attempt < instance.attempt)
        .find(|older| older.state == RunState::Exited)
        .map(|older| terminated(input, older));
    let mut status = ContainerStatus {
        name: name.to_owned(),
        image: if instance.image.is_empty() {
            entry.container.image.clone().unwrap_or_default()
        } else {
            instance.image.clone()
        },
        image_id: instance.image_id.clone(),
        container_id: Some(container_id(input, instance)),
        // The runtime may have lost the newest instance and show an older one.
        restart_count: i32::try_from(instance.attempt)
            .unwrap_or(i32::MAX)
            .max(previous(input, name).map_or(0, |status| status.restart_count)),
        last_state: before.clone(),
        started: Some(false),
        ready: false,
        user: instance.user.as_ref().map(|user| ContainerUser {
            linux: Some(LinuxContainerUser {
                uid: user.uid,
                gid: user.gid,
                supplemental_groups: Some(user.groups.clone()),
            }),
        }),
        ..ContainerStatus::default()
    };
    let current = terminated(input, instance);
    match (instance.state, input.plan.waiting.get(name)) {
        (RunState::Running, _) => {
            status.started = Some(is_started(input, entry, instance));
            status.ready = is_ready(input, entry, instance);
            let started_at = instance.started_at.unwrap_or(instance.created_at);
            status.state = Some(ContainerState {
                running: Some(ContainerStateRunning { started_at: Some(Time(started_at)) }),
                ..ContainerState::default()
            });
        }
        (_, Some(waiting)) => {
            status.state = Some(self::waiting(&waiting.reason, &waiting.message));
            status.last_state = Some(current);
        }
        (_, None) => {
            status.ready = entry.kind == ContainerKind::Init && instance.exit_code == 0;
            status.state = Some(current);
        }
    }
    status
}

/// Nothing in the CRI: not started yet, or removed behind the agent's back.
fn without_instance(input: StatusInput<'_>, entry: ContainerSpec<'_>) -> ContainerStatus {
    let name = entry.container.name.as_str();
    let previous = previous(input, name);
    let known = previous.filter(|status| status.container_id.is_some());
    if let Some(known) = known
        && !input.plan.waiting.contains_key(name)
        && (input.plan.ended || input.memory.starting.contains_key(name) || is_over(known))
    {
        return lost(known.clone());
    }
    let (reason, message) = match input.plan.waiting.get(name) {
        Some(waiting) => (waiting.reason.as_str(), waiting.message.as_str()),
        None => (default_waiting(input), ""),
    };
    ContainerStatus {
        name: name.to_owned(),
        image: entry.container.image.clone().unwrap_or_default(),
        image_id: String::new(),
        started: Some(false),
        ready: false,
        restart_count: previous.map_or(0, |status| status.restart_count),
        state: Some(waiting(reason, message)),
        last_state: previous.and_then(last_end),
        ..ContainerStatus::default()
    }
}

/// What was said of the container last.
fn previous<'a>(input: StatusInput<'a>, name: &str) -> Option<&'a ContainerStatus> {
    let previous = input.previous;
    let ephemeral = &previous.ephemeral_container_statuses;
    let all = previous.container_statuses.iter().chain(&previous.init_container_statuses).chain(ephemeral);
    all.flatten().find(|status| status.name == name)
}

/// Whether any container ever ran, as far as was said.
pub(super) fn any_ran(previous: &PodStatus) -> bool {
    let all = previous.container_statuses.iter().chain(&previous.init_container_statuses).flatten();
    all.into_iter().any(|status| status.container_id.is_some() || status.last_state.is_some())
}

/// How a container ended last that the CRI no longer knows.
fn last_end(status: &ContainerStatus) -> Option<ContainerState> {
    let lost = lost(status.clone());
    lost.state.filter(|state| state.terminated.is_some()).or(lost.last_state)
}

fn is_over(status: &ContainerStatus) -> bool {
    status.state.as_ref().is_some_and(|state| state.terminated.is_some())
}

/// A container that ran when last seen and that the CRI no longer knows.
fn lost(mut status: ContainerStatus) -> ContainerStatus {
    status.ready = status.ready && is_over(&status);
    let running = status.state.as_ref().and_then(|state| state.running.clone());
    if let Some(running) = running {
        status.started = Some(false);
        status.state = Some(ContainerState {
            terminated: Some(ContainerStateTerminated {
                exit_code: 137,
                reason: Some("ContainerStatusUnknown".to_owned()),
                message: Some("The container could not be located when the pod was checked".to_owned()),
                started_at: running.started_at,
                ..ContainerStateTerminated::default()
            }),
            ..ContainerState::default()
        });
    }
    status
}

fn default_waiting(input: StatusInput<'_>) -> &'static str {
    let has_init = input.desired.spec().init_containers.iter().flatten().next().is_some();
    if has_init { "PodInitializing" } else { "ContainerCreating" }
}

/// `started`: the startup probe succeeded, or there is none.
pub(super) fn is_started(
    input: StatusInput<'_>,
    entry: ContainerSpec<'_>,
    instance: &ObservedContainer,
) -> bool {
    entry.container.startup_probe.is_none()
        || input.memory.container(&entry.container.name).probes_of(instance).started
}

fn is_ready(input: StatusInput<'_>, entry: ContainerSpec<'_>, instance: &ObservedContainer) -> bool {
    let is_never_ready = matches!(entry.kind, ContainerKind::Init | ContainerKind::Ephemeral);
    if is_never_ready || !is_started(input, entry, instance) {
        return false;
    }
    entry.container.readiness_probe.is_none()
        || input.memory.container(&entry.container.name).probes_of(instance).ready
}

fn waiting(reason: &str, message: &str) -> ContainerState {
    ContainerState {
        waiting: Some(ContainerStateWaiting {
            reason: Some(reason.to_owned()),
            message: (!message.is_empty()).then(|| message.to_owned()),
        }),
        ..ContainerState::default()
    }
}

fn terminated(input: StatusInput<'_>, instance: &ObservedContainer) -> ContainerState {
    let unknown = instance.state == RunState::Unknown;
    let reason = match (unknown, instance.reason.is_empty(), instance.exit_code) {
        (true, _, _) => "ContainerStatusUnknown",
        (false, false, _) => instance.reason.as_str(),
        (false, true, 0) => "Completed",
        (false, true, _) => "Error",
    };
    ContainerState {
        terminated: Some(ContainerStateTerminated {
            container_id: Some(container_id(input, instance)),
            exit_code: if unknown { 137 } else { instance.exit_code },
            reason: Some(reason.to_owned()),
            message: (!instance.message.is_empty()).then(|| instance.message.clone()),
            started_at: Some(Time(instance.started_at.unwrap_or(instance.created_at))),
            finished_at: instance.finished_at.map(Time),
            signal: None,
        }),
        ..ContainerState::default()
    }
}

fn container_id(input: StatusInput<'_>, instance: &ObservedContainer) -> String {
    format!("{}://{}", input.node.runtime_name, instance.id)
}
