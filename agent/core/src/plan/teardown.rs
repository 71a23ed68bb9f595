//! The plan of a pod that ends: stop containers in order, stop sandboxes, give back what the pod holds.

use k8s_openapi::api::core::v1::PodSpec;

use super::{PlanInput, PodAction, PodPlan};
use crate::model::{ContainerKind, Fate, ObservedContainer, Step, StepKey, containers};

/// Grace when a pod failed by decision of the agent and its spec names none.
const DEFAULT_GRACE: i64 = 30;

/// A deleted pod: stop, report, give back, let the API object go.
pub(super) fn terminate(input: PlanInput<'_>, plan: &mut PodPlan) {
    let Fate::Terminate { grace, gone } = input.desired.fate else { return };
    if !stopped(input, plan, grace.max(1)) {
        return;
    }
    plan.finished = true;
    // The last status is read from the containers: they stay until the API has it.
    if !gone && !input.memory.status_written {
        return;
    }
    if !gave_back(input, plan) {
        return;
    }
    if let Some(sandbox) = input.observed.sandboxes.first() {
        plan.step(input.memory, PodAction::RemoveSandbox { id: sandbox.id.clone() });
        return;
    }
    if let Some(stray) = input.observed.containers.first() {
        let action = PodAction::RemoveContainer { id: stray.id.clone(), log_path: stray.log_path.clone() };
        plan.step(input.memory, action);
        return;
    }
    if gone || input.memory.released.api {
        plan.done = true;
    } else {
        plan.step(input.memory, PodAction::DeleteFromApi);
    }
}

/// A pod that failed or completed: stop and give back; containers and logs stay until it is deleted.
pub(super) fn finish(input: PlanInput<'_>, plan: &mut PodPlan) {
    let own = match input.desired.fate {
        Fate::Fail { grace, .. } => grace,
        _ => None,
    };
    let grace = own.or(input.desired.spec().termination_grace_period_seconds).unwrap_or(DEFAULT_GRACE);
    if stopped(input, plan, grace) {
        plan.finished = true;
        gave_back(input, plan);
    }
}

/// Stops what runs: main and init containers at once, then sidecars in reverse order, then the sandboxes.
fn stopped(input: PlanInput<'_>, plan: &mut PodPlan, grace: i64) -> bool {
    let memory = input.memory;
    if !memory.starting.is_empty() {
        // A start step leaves a container behind that nobody would stop; it ends soon, by its deadline.
        return false;
    }
    let spec = input.desired.spec();
    let sidecars = sidecar_names(spec);
    let alive: Vec<&ObservedContainer> = input.observed.alive().collect();
    let (last, first): (Vec<_>, Vec<_>) =
        alive.into_iter().partition(|instance| sidecars.contains(&instance.name.as_str()));
    for instance in &first {
        kill(input, plan, instance, grace);
    }
    if !first.is_empty() {
        return false;
    }
    let next = sidecars.iter().rev().find_map(|name| last.iter().find(|instance| instance.name == *name));
    if let Some(instance) = next {
        kill(input, plan, instance, grace);
        return false;
    }
    // Before the phase is told: who reads it may give the devices to the next pod.
    if memory.claims_held || memory.busy.contains(&StepKey::Claims) {
        plan.step(memory, PodAction::ReleaseClaims);
        return false;
    }
    plan.ended = true;
    let to_stop =
        input.observed.sandboxes.iter().find(|sandbox| !memory.stopped_sandboxes.contains(&sandbox.id));
    if let Some(sandbox) = to_stop {
        plan.step(memory, PodAction::StopSandbox { id: sandbox.id.clone() });
        return false;
    }
    !memory.busy.contains(&StepKey::Sandbox)
}

fn kill(input: PlanInput<'_>, plan: &mut PodPlan, instance: &ObservedContainer, grace: i64) {
    plan.step(
        input.memory,
        PodAction::KillContainer {
            id: instance.id.clone(),
            container: instance.name.clone(),
            grace,
            message: format!("Stopping container {}", instance.name),
        },
    );
}

fn sidecar_names(spec: &PodSpec) -> Vec<&str> {
    containers(spec)
        .filter(|entry| entry.kind == ContainerKind::Sidecar)
        .map(|entry| entry.container.name.as_str())
        .collect()
}

/// Volumes, then the cgroup (its processes may hold the mounts, never the other way round).
fn gave_back(input: PlanInput<'_>, plan: &mut PodPlan) -> bool {
    let released = input.memory.released;
    if !released.volumes {
        due(input, plan, &input.memory.volumes, PodAction::TearDownVolumes);
    }
    if !released.cgroup {
        due(input, plan, &input.memory.cgroup, PodAction::RemoveCgroup);
    }
    released.volumes && released.cgroup
}

/// Tries the step now, unless it failed a moment ago.
fn due(input: PlanInput<'_>, plan: &mut PodPlan, step: &Step, action: PodAction) {
    match step {
        Step::Failed { retry_at } if *retry_at > input.now => plan.wake(*retry_at),
        _ => plan.step(input.memory, action),
    }
}
