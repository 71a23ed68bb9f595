//! The kubelet's pod conditions. Pure.

use k8s_openapi::api::core::v1::{ContainerStatus, PodCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::StatusInput;
use crate::model::{ContainerKind, Fate, RunState};
use crate::resize::RESIZE_PENDING;

/// Condition types that the kubelet owns; all others are left alone.
pub const OWNED: [&str; 8] = [
    "PodReadyToStartContainers",
    "Initialized",
    "Ready",
    "ContainersReady",
    "PodScheduled",
    DISRUPTED,
    RESIZE_PENDING,
    RESIZE_IN_PROGRESS,
];

/// Those of them that go when they hold no longer.
pub const PASSING: [&str; 2] = [RESIZE_PENDING, RESIZE_IN_PROGRESS];

const RESIZE_IN_PROGRESS: &str = "PodResizeInProgress";

/// The node ended the pod to protect itself.
const DISRUPTED: &str = "DisruptionTarget";

/// A condition before it has times.
#[derive(Debug)]
struct Verdict {
    holds: bool,
    reason: &'static str,
    message: String,
}

impl Verdict {
    fn yes() -> Self {
        Self { holds: true, reason: "", message: String::new() }
    }

    fn no(reason: &'static str, message: String) -> Self {
        Self { holds: false, reason, message }
    }
}

/// Derives the owned conditions, in upstream's order.
pub(super) fn derive(
    input: StatusInput<'_>,
    phase: &str,
    statuses: &[(ContainerKind, ContainerStatus)],
) -> Vec<PodCondition> {
    let host_network = input.desired.spec().host_network.unwrap_or(false);
    let sandbox = input.observed.usable_sandbox(host_network).filter(|sandbox| {
        // The CRI may report a sandbox READY a moment longer than it was asked to stop.
        !input.memory.stopped_sandboxes.contains(&sandbox.id)
    });
    let network_up = Verdict { holds: sandbox.is_some(), reason: "", message: String::new() };
    let containers_ready = containers_ready(phase, statuses);
    let ready = ready(input, &containers_ready);
    let mut conditions = vec![
        condition(input, "PodReadyToStartContainers", network_up),
        condition(input, "Initialized", initialized(phase, statuses)),
        condition(input, "Ready", ready),
        condition(input, "ContainersReady", containers_ready),
        condition(input, "PodScheduled", Verdict::yes()),
    ];
    if let Fate::Fail { message, grace: Some(_), .. } = &input.desired.fate
        && phase == "Failed"
    {
        let verdict = Verdict { holds: true, reason: "TerminationByKubelet", message: message.clone() };
        conditions.push(condition(input, DISRUPTED, verdict));
    }
    conditions.extend(resize(input));
    conditions
}

/// Whether containers have other resources than the pod wants, and why.
fn resize(input: StatusInput<'_>) -> Option<PodCondition> {
    let waits = input.desired.entries().any(|entry| {
        let running = input.observed.newest(&entry.container.name, input.memory);
        running.filter(|instance| instance.state == RunState::Running).is_some_and(|instance| {
            !input.memory.container(&entry.container.name).resize(instance, entry.container).is_empty()
        })
    });
    if !waits || input.desired.fate != Fate::Run {
        return None;
    }
    Some(match &input.desired.resize_blocked {
        Some(blocked) => {
            let verdict = Verdict { holds: true, reason: blocked.reason, message: blocked.message.clone() };
            condition(input, RESIZE_PENDING, verdict)
        }
        None => condition(input, RESIZE_IN_PROGRESS, Verdict::yes()),
    })
}

fn initialized(phase: &str, statuses: &[(ContainerKind, ContainerStatus)]) -> Verdict {
    if phase == "Succeeded" {
        return Verdict { holds: true, reason: "PodCompleted", message: String::new() };
    }
    let incomplete: Vec<&str> = statuses
        .iter()
        .filter(|(kind, status)| match kind {
            ContainerKind::Main | ContainerKind::Ephemeral => false,
            ContainerKind::Init => !status.ready,
            ContainerKind::Sidecar => {
                !status.started.unwrap_or(false) && status.last_state.is_none() && !has_ended(status)
            }
        })
        .map(|(_, status)| status.name.as_str())
        .collect();
    if incomplete.is_empty() {
        Verdict::yes()
    } else {
        let message = format!("containers with incomplete status: [{}]", incomplete.join(" "));
        Verdict::no("ContainersNotInitialized", message)
    }
}

fn has_ended(status: &ContainerStatus) -> bool {
    status.state.as_ref().is_some_and(|state| state.terminated.is_some())
}

fn containers_ready(phase: &str, statuses: &[(ContainerKind, ContainerStatus)]) -> Verdict {
    match phase {
        "Succeeded" => return Verdict::no("PodCompleted", String::new()),
        "Failed" => return Verdict::no("PodFailed", String::new()),
        _ => {}
    }
    let unready: Vec<&str> = statuses
        .iter()
        .filter(|(kind, status)| *kind != ContainerKind::Init && !status.ready)
        .map(|(_, status)| status.name.as_str())
        .collect();
    if unready.is_empty() {
        Verdict::yes()
    } else {
        Verdict::no("ContainersNotReady", format!("containers with unready status: [{}]", unready.join(" ")))
    }
}

fn ready(input: StatusInput<'_>, containers_ready: &Verdict) -> Verdict {
    if !containers_ready.holds {
        return Verdict::no(containers_ready.reason, containers_ready.message.clone());
    }
    let api_conditions = input.desired.api_status().and_then(|status| status.conditions.as_ref());
    let unmet: Vec<String> = input
        .desired
        .spec()
        .readiness_gates
        .iter()
        .flatten()
        .filter_map(|gate| {
            let wanted = &gate.condition_type;
            match api_conditions.into_iter().flatten().find(|condition| condition.type_ == *wanted) {
                None => Some(format!(
                    "corresponding condition of pod readiness gate \"{wanted}\" does not exist."
                )),
                Some(condition) if condition.status != "True" => Some(format!(
                    "the status of pod readiness gate \"{wanted}\" is not \"True\", but {}",
                    condition.status
                )),
                Some(_) => None,
            }
        })
        .collect();
    if unmet.is_empty() { Verdict::yes() } else { Verdict::no("ReadinessGatesNotReady", unmet.join(", ")) }
}

/// Adds times: a condition that does not change keeps its transition time.
fn condition(input: StatusInput<'_>, kind: &str, verdict: Verdict) -> PodCondition {
    let status = if verdict.holds { "True" } else { "False" };
    let before = input.previous.conditions.iter().flatten().find(|condition| condition.type_ == kind);
    let since = before
        .filter(|before| before.status == status)
        .and_then(|before| before.last_transition_time.clone())
        .unwrap_or(Time(input.now));
    PodCondition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: (!verdict.reason.is_empty()).then(|| verdict.reason.to_owned()),
        message: (!verdict.message.is_empty()).then_some(verdict.message),
        last_transition_time: Some(since),
        last_probe_time: None,
        observed_generation: input.desired.pod.metadata.generation,
    }
}
