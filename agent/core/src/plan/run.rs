//! The plan of a pod that is to run: cgroup, volumes, sandbox, images, then containers in order.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{ContainerStatus, PodSpec};

use super::{PlanInput, PodAction, PodPlan};
use crate::model::{
    ContainerKind, ContainerSpec, ImageState, ObservedContainer, RunState, Step, StepKey, containers,
    restarts,
};
use crate::resize::{Applied, takes_restart};

/// Pause before a container that could not be created is tried again.
pub const CREATE_RETRY: SignedDuration = SignedDuration::from_secs(10);
/// What a container ends with that is killed for a failed probe.
const KILLED: i32 = 137;
/// How long `ErrImagePull` is shown before `ImagePullBackOff`.
const PULL_ERROR_SHOWN: SignedDuration = SignedDuration::from_secs(2);

/// Plans the running of a pod.
pub(super) fn run(input: PlanInput<'_>, plan: &mut PodPlan) {
    let wanted = wanted(input, plan);
    // Also for a pod that runs: after a restart of the agent, and to bring changed contents into its volumes.
    let memory = input.memory;
    due(plan, input.now, &memory.cgroup, |plan| plan.step(memory, PodAction::EnsureCgroup));
    due(plan, input.now, &memory.volumes, |plan| plan.step(memory, PodAction::MountVolumes));
    if !wanted.is_empty() {
        prepare_sandbox(input, plan);
    }
    for entry in &wanted {
        start(input, plan, *entry);
    }
    ephemeral(input, plan);
    collect_garbage(input, plan);
}

/// Ephemeral containers start as soon as there is a sandbox, whatever the others do, and never again.
fn ephemeral(input: PlanInput<'_>, plan: &mut PodPlan) {
    let told = input.desired.api_status().and_then(|status| status.ephemeral_container_statuses.as_ref());
    for wanted in &input.desired.ephemeral {
        let (entry, name) = (wanted.entry(), wanted.container.name.as_str());
        match input.observed.newest(name, input.memory) {
            Some(instance) if instance.state == RunState::Created => {
                // Left behind by a start that the agent did not survive; its name must be freed first.
                if !input.memory.container_busy(name) {
                    remove(input, plan, instance);
                }
            }
            Some(_) => {}
            None => {
                let ran = told
                    .into_iter()
                    .flatten()
                    .any(|status| status.name == name && status.container_id.is_some());
                if !ran && current_sandbox(input).is_some() {
                    start(input, plan, Wanted { entry, newest: None });
                }
            }
        }
    }
}

/// The running container that an ephemeral one looks into; the reason to wait when there is none.
fn target_id(input: PlanInput<'_>, entry: ContainerSpec<'_>) -> Result<Option<String>, String> {
    let name = &entry.container.name;
    let wanted = input.desired.ephemeral.iter().find(|other| other.container.name == *name);
    let Some(target) =
        wanted.filter(|_| entry.kind == ContainerKind::Ephemeral).and_then(|w| w.target.as_ref())
    else {
        return Ok(None);
    };
    let running =
        input.observed.newest(target, input.memory).filter(|found| found.state == RunState::Running);
    running
        .map(|found| Some(found.id.clone()))
        .ok_or_else(|| format!("target container {target:?} is not running"))
}

/// A container that should start, now or after its back-off.
#[derive(Debug, Clone, Copy)]
struct Wanted<'a> {
    entry: ContainerSpec<'a>,
    newest: Option<&'a ObservedContainer>,
}

/// Walks the containers in order: kills those that must not go on as they are, and returns those to start.
fn wanted<'a>(input: PlanInput<'a>, plan: &mut PodPlan) -> Vec<Wanted<'a>> {
    let spec = input.desired.spec();
    let current = current_sandbox(input);
    let initialized = initialized(input, spec, current);
    let mut wanted = Vec::new();
    for entry in containers(spec) {
        let name = &entry.container.name;
        if entry.kind == ContainerKind::Init && initialized {
            continue;
        }
        let newest = input.observed.newest(name, input.memory);
        let here = newest.filter(|instance| Some(instance.sandbox_id.as_str()) == current);
        let proceed = match here.map(|instance| instance.state) {
            Some(RunState::Running) => {
                check_running(input, plan, entry, here);
                entry.kind != ContainerKind::Init
                    && (entry.kind == ContainerKind::Main || initialized || is_started(input, entry, here))
            }
            Some(RunState::Unknown) => {
                kill(input, plan, entry, here, "is in unknown state, try killing it before restart");
                false
            }
            Some(RunState::Exited)
                if entry.kind == ContainerKind::Init && here.is_some_and(|i| i.exit_code == 0) =>
            {
                true
            }
            Some(RunState::Created) => {
                // Left behind by a start that the agent did not survive; its name must be freed first.
                if let Some(instance) = here.filter(|_| !input.memory.container_busy(name)) {
                    remove(input, plan, instance);
                }
                false
            }
            Some(RunState::Exited) | None => {
                if may_start(input, spec, entry, newest) {
                    wanted.push(Wanted { entry, newest });
                }
                entry.kind == ContainerKind::Main || initialized
            }
        };
        if !proceed && entry.kind != ContainerKind::Main {
            break;
        }
    }
    wanted
}

/// The sandbox that containers belong into: the newest while it is READY.
fn current_sandbox(input: PlanInput<'_>) -> Option<&str> {
    let host_network = input.desired.spec().host_network.unwrap_or(false);
    input.observed.usable_sandbox(host_network).map(|sandbox| sandbox.id.as_str())
}

/// Init steps are over once a main container was made in this sandbox, even if the CRI forgot the init containers.
fn initialized(input: PlanInput<'_>, spec: &PodSpec, current: Option<&str>) -> bool {
    current.is_some_and(|sandbox| {
        spec.containers
            .iter()
            .any(|main| input.observed.instances(&main.name).any(|instance| instance.sandbox_id == sandbox))
    })
}

fn may_start(
    input: PlanInput<'_>,
    spec: &PodSpec,
    entry: ContainerSpec<'_>,
    newest: Option<&ObservedContainer>,
) -> bool {
    let Some(instance) = newest else { return true };
    if instance.is_alive() || instance.state == RunState::Created {
        // In an old sandbox that is being stopped.
        return Some(instance.sandbox_id.as_str()) != current_sandbox(input);
    }
    match entry.kind {
        // Init steps run again in a new sandbox.
        ContainerKind::Init if instance.exit_code == 0 => true,
        // A changed definition starts whatever the policy says of the old instance.
        ContainerKind::Main if instance.is_outdated(entry.container) => true,
        _ => restarts(spec, entry, instance.exit_code),
    }
}

fn check_running(
    input: PlanInput<'_>,
    plan: &mut PodPlan,
    entry: ContainerSpec<'_>,
    instance: Option<&ObservedContainer>,
) {
    let Some(running) = instance else { return };
    let probes = input.memory.container(&entry.container.name).probes_of(running);
    if entry.kind != ContainerKind::Init && running.is_outdated(entry.container) {
        kill(input, plan, entry, instance, "definition changed, will be restarted");
    } else if let Some(failure) = probes.failed {
        let again = restarts(input.desired.spec(), entry, KILLED);
        let fate = if again { "probe, will be restarted" } else { "probe" };
        let grace = failure.grace.unwrap_or_else(|| default_grace(input.desired.spec()));
        kill_with(input, plan, entry, running, grace, &format!("failed {} {fate}", failure.probe));
    } else if entry.kind != ContainerKind::Init && input.desired.resize_blocked.is_none() {
        let changed = input.memory.container(&entry.container.name).resize(running, entry.container);
        if changed.is_empty() {
            return;
        }
        if takes_restart(entry, &changed) {
            kill(input, plan, entry, instance, "resize requires restart");
            return;
        }
        let action = PodAction::ResizeContainer {
            id: running.id.clone(),
            container: entry.container.name.clone(),
            applied: Box::new(Applied::of(entry.container, running.attempt)),
        };
        plan.step(input.memory, action);
    }
}

fn kill(
    input: PlanInput<'_>,
    plan: &mut PodPlan,
    entry: ContainerSpec<'_>,
    instance: Option<&ObservedContainer>,
    why: &str,
) {
    if let Some(instance) = instance {
        kill_with(input, plan, entry, instance, default_grace(input.desired.spec()), why);
    }
}

fn kill_with(
    input: PlanInput<'_>,
    plan: &mut PodPlan,
    entry: ContainerSpec<'_>,
    instance: &ObservedContainer,
    grace: i64,
    why: &str,
) {
    let name = entry.container.name.clone();
    let part = if entry.kind == ContainerKind::Main { "Container" } else { "Init container" };
    let message = format!("{part} {name} {why}");
    plan.step(
        input.memory,
        PodAction::KillContainer { id: instance.id.clone(), container: name, grace, message },
    );
}

fn default_grace(spec: &PodSpec) -> i64 {
    spec.termination_grace_period_seconds.unwrap_or(30)
}

/// A sidecar lets the next init container start once it is `started`.
fn is_started(input: PlanInput<'_>, entry: ContainerSpec<'_>, instance: Option<&ObservedContainer>) -> bool {
    instance.is_some_and(|running| {
        entry.container.startup_probe.is_none()
            || input.memory.container(&entry.container.name).probes_of(running).started
    })
}

/// A sandbox, side by side with volumes and images; only the cgroup must be there.
fn prepare_sandbox(input: PlanInput<'_>, plan: &mut PodPlan) {
    let memory = input.memory;
    if current_sandbox(input).is_some() || memory.cgroup != Step::Done {
        return;
    }
    if let Some(old) = next_sandbox_to_stop(input) {
        plan.step(memory, PodAction::StopSandbox { id: old });
        return;
    }
    // Drivers may act on the sandbox as well.
    if memory.claims != Step::Done && crate::claims::has_any(&input.desired.pod) {
        due(plan, input.now, &memory.claims, |plan| plan.step(memory, PodAction::PrepareClaims));
        return;
    }
    let attempt = input.observed.sandboxes.first().map_or(0, |newest| newest.attempt + 1);
    let sandbox_due = match memory.sandbox {
        // A sandbox made earlier has died or lost its address: the next attempt needs no pause.
        Step::Done => Ok(()),
        ref step => step.due(input.now),
    };
    match sandbox_due {
        Ok(()) => plan.step(memory, PodAction::CreateSandbox { attempt }),
        Err(Some(at)) => plan.wake(at),
        Err(None) => {}
    }
}

fn due(plan: &mut PodPlan, now: Timestamp, step: &Step, act: impl FnOnce(&mut PodPlan)) {
    match step.due(now) {
        Ok(()) => act(plan),
        Err(Some(at)) => plan.wake(at),
        Err(None) => {}
    }
}

/// A sandbox that is not the current one must be stopped (network given back, processes gone) before the next.
fn next_sandbox_to_stop(input: PlanInput<'_>) -> Option<String> {
    input
        .observed
        .sandboxes
        .iter()
        .map(|sandbox| &sandbox.id)
        .find(|id| !input.memory.stopped_sandboxes.contains(*id))
        .cloned()
}

/// The image, then the container, when nothing holds it back; else says why it waits.
fn start(input: PlanInput<'_>, plan: &mut PodPlan, wanted: Wanted<'_>) {
    let container = wanted.entry.container;
    let name = container.name.as_str();
    if let Some(failed) = wanted.newest.filter(|instance| instance.state == RunState::Exited)
        && let Some(held) = restart_held(input, wanted.entry, failed)
    {
        plan.wake(held);
        let delay = input.memory.container(name).restart_backoff.delay();
        let message = format!(
            "back-off {} restarting failed container={name} pod={}",
            go_duration(delay),
            input.desired.described()
        );
        plan.wait(name, "CrashLoopBackOff", message);
        return;
    }
    let memory = input.memory.container(name);
    if let Some(failure) = &memory.start_failure {
        plan.wait(name, &failure.reason, failure.message.clone());
        let retry_at = failure.at + CREATE_RETRY;
        // Of the others a container is left, whose restart has its own pause.
        let left_nothing = failure.reason.starts_with("CreateContainer") || failure.reason.contains("Image");
        if left_nothing && retry_at > input.now {
            plan.wake(retry_at);
            return;
        }
    }
    match &memory.image {
        ImageState::Unknown => plan.step(input.memory, PodAction::EnsureImage { container: name.to_owned() }),
        ImageState::Failed { reason, message, at } => {
            wait_for_image(input, plan, name, container.image.as_deref(), (reason, message, *at));
        }
        ImageState::Present { image_ref } => start_with(input, plan, wanted, image_ref),
    }
}

/// Until when a restart waits. A container whose definition changed does not wait for its old version's sins.
fn restart_held(
    input: PlanInput<'_>,
    entry: ContainerSpec<'_>,
    failed: &ObservedContainer,
) -> Option<Timestamp> {
    if failed.is_outdated(entry.container) {
        return None;
    }
    let ended = failed.finished_at.unwrap_or(failed.created_at);
    let backoff = input.memory.container(&entry.container.name).restart_backoff;
    backoff.retry_at(ended, input.now, input.settings.max_restart_delay)
}

fn wait_for_image(
    input: PlanInput<'_>,
    plan: &mut PodPlan,
    name: &str,
    image: Option<&str>,
    (reason, message, at): (&str, &str, Timestamp),
) {
    let backoff = input.memory.container(name).pull_backoff;
    let Some(retry_at) = backoff.retry_at(at, input.now, crate::backoff::MAX) else {
        plan.step(input.memory, PodAction::EnsureImage { container: name.to_owned() });
        plan.wait(name, reason, message);
        return;
    };
    plan.wake(retry_at);
    let shown_until = at + PULL_ERROR_SHOWN;
    if reason == "ErrImagePull" && shown_until <= input.now {
        let image = image.unwrap_or_default();
        plan.wait(
            name,
            "ImagePullBackOff",
            format!("Back-off pulling image \"{image}\": {reason}: {message}"),
        );
    } else {
        if reason == "ErrImagePull" {
            plan.wake(shown_until);
        }
        plan.wait(name, reason, message);
    }
}

fn start_with(input: PlanInput<'_>, plan: &mut PodPlan, wanted: Wanted<'_>, image_ref: &str) {
    let memory = input.memory;
    let (Some(sandbox_id), Step::Done) = (current_sandbox(input), &memory.volumes) else { return };
    // Containers start one after another in the order of the spec, so that a postStart hook holds back the next.
    let another_starts = !memory.starting.is_empty()
        || plan.actions.iter().any(|action| matches!(action, PodAction::StartContainer { .. }));
    if another_starts || !memory.services_synced || memory.busy.contains(&StepKey::Sandbox) {
        return;
    }
    let name = wanted.entry.container.name.clone();
    let target_id = match target_id(input, wanted.entry) {
        Ok(target_id) => target_id,
        Err(why) => {
            plan.wait(&name, "ContainerCreating", why);
            return;
        }
    };
    let after_newest = wanted.newest.map_or(0, |instance| instance.attempt + 1);
    let attempt = after_newest.max(after_told(input, &name));
    let replaces_failed_at = wanted
        .newest
        .filter(|instance| !instance.is_outdated(wanted.entry.container))
        .and_then(|instance| instance.finished_at);
    plan.step(
        memory,
        PodAction::StartContainer {
            container: name,
            kind: wanted.entry.kind,
            attempt,
            sandbox_id: sandbox_id.to_owned(),
            image_ref: image_ref.to_owned(),
            replaces_failed_at,
            target_id,
        },
    );
}

/// The restart count after the one that the API was told: the CRI may have lost the instance that it was told of.
fn after_told(input: PlanInput<'_>, name: &str) -> u32 {
    let ran = |status: &&ContainerStatus| {
        status.container_id.is_some() || status.last_state.is_some() || status.restart_count > 0
    };
    let told = input.desired.api_status().and_then(|status| {
        let statuses = status.container_statuses.iter().chain(&status.init_container_statuses).flatten();
        statuses.into_iter().find(|status| status.name == name).filter(ran)
    });
    told.map_or(0, |status| u32::try_from(status.restart_count).unwrap_or(0) + 1)
}

/// Old instances and old sandboxes that nothing shows any more.
fn collect_garbage(input: PlanInput<'_>, plan: &mut PodPlan) {
    let Some(current) = current_sandbox(input) else { return };
    for entry in containers(input.desired.spec()) {
        let name = &entry.container.name;
        if input.memory.container_busy(name) {
            continue;
        }
        let ended = input.observed.instances(name).skip(1).filter(|instance| !instance.is_alive());
        for instance in ended.skip(input.settings.kept_instances) {
            remove(input, plan, instance);
        }
    }
    let unused = input.observed.sandboxes.iter().skip(1).find(|sandbox| {
        sandbox.id != current && input.observed.containers.iter().all(|c| c.sandbox_id != sandbox.id)
    });
    if let Some(sandbox) = unused {
        let id = sandbox.id.clone();
        let action = if input.memory.stopped_sandboxes.contains(&id) {
            PodAction::RemoveSandbox { id }
        } else {
            PodAction::StopSandbox { id }
        };
        plan.step(input.memory, action);
    }
}

fn remove(input: PlanInput<'_>, plan: &mut PodPlan, instance: &ObservedContainer) {
    let action = PodAction::RemoveContainer { id: instance.id.clone(), log_path: instance.log_path.clone() };
    plan.step(input.memory, action);
}

/// `10s`, `1m20s`, `5m0s`, as Go prints durations.
fn go_duration(duration: SignedDuration) -> String {
    let seconds = duration.as_secs();
    if seconds < 60 { format!("{seconds}s") } else { format!("{}m{}s", seconds / 60, seconds % 60) }
}
