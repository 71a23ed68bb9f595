//! What the API is told about a pod: phase, conditions, container statuses. Pure.
//!
//! Inputs: the same as [`crate::plan::plan`] and its result, plus node facts. Output: a complete [`PodStatus`] owned by
//! the kubelet; [`crate::patch`] turns the difference from what the API has into a patch that leaves everybody
//! else's conditions alone.

pub mod conditions;
mod containers;
pub mod sync;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStatus, HostIP, PodIP, PodSpec, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::model::{ContainerKind, DesiredPod, Fate, ObservedPod, PodMemory, containers as parts, restarts};
use crate::plan::PodPlan;
use crate::qos::QosClass;

/// Node facts in a pod's status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeIdentity {
    /// `status.hostIP`.
    pub host_ip: String,
    /// Scheme of container ids: the CRI's runtime name.
    pub runtime_name: String,
}

/// Everything the status depends on.
#[derive(Debug, Clone, Copy)]
pub struct StatusInput<'a> {
    /// What should be.
    pub desired: &'a DesiredPod,
    /// What is.
    pub observed: &'a ObservedPod,
    /// What the agent remembers.
    pub memory: &'a PodMemory,
    /// What was just planned.
    pub plan: &'a PodPlan,
    /// The last status derived or, at first, the API's: keeps times and what the CRI has forgotten.
    pub previous: &'a PodStatus,
    /// Node facts.
    pub node: &'a NodeIdentity,
    /// The time.
    pub now: Timestamp,
}

/// The pod's status now.
pub fn derive(input: StatusInput<'_>) -> PodStatus {
    let spec = input.desired.spec();
    // Containers of a pod that was refused do not wait for anything: kubectl shows the pod's own reason.
    let refused = matches!(input.desired.fate, Fate::Fail { .. })
        && input.observed.sandboxes.is_empty()
        && !containers::any_ran(input.previous);
    let statuses: Vec<(ContainerKind, ContainerStatus)> = parts(spec)
        .filter(|_| !refused)
        .map(|entry| (entry.kind, containers::status_of(input, entry)))
        .collect();
    let ephemeral: Vec<ContainerStatus> = input
        .desired
        .ephemeral
        .iter()
        .filter(|_| !refused)
        .map(|ephemeral| containers::status_of(input, ephemeral.entry()))
        .collect();
    let phase = phase(input, &statuses);
    let host_network = spec.host_network.unwrap_or(false);
    let ips = pod_ips(input, host_network);
    let mut status = PodStatus {
        conditions: None,
        host_ip: Some(input.node.host_ip.clone()),
        host_ips: Some(vec![HostIP { ip: input.node.host_ip.clone() }]),
        pod_ip: ips.first().cloned(),
        pod_ips: (!ips.is_empty()).then(|| ips.into_iter().map(|ip| PodIP { ip }).collect()),
        start_time: input.previous.start_time.clone().or(Some(Time(input.now))),
        qos_class: Some(
            input.previous.qos_class.clone().unwrap_or_else(|| QosClass::of(spec).as_str().to_owned()),
        ),
        observed_generation: input.desired.pod.metadata.generation,
        phase: Some(phase.to_owned()),
        ..PodStatus::default()
    };
    match &input.desired.fate {
        Fate::Fail { reason, message, .. } if phase == "Failed" => {
            status.reason = Some(reason.clone());
            status.message = Some(message.clone());
        }
        _ if phase == "Failed" => {
            status.reason.clone_from(&input.previous.reason);
            status.message.clone_from(&input.previous.message);
        }
        _ => {}
    }
    status.conditions = Some(conditions::derive(input, phase, &statuses));
    let (init, main): (Vec<_>, Vec<_>) =
        statuses.into_iter().partition(|(kind, _)| *kind != ContainerKind::Main);
    let list = |part: Vec<(ContainerKind, ContainerStatus)>| {
        (!part.is_empty()).then(|| part.into_iter().map(|(_, status)| status).collect::<Vec<_>>())
    };
    status.init_container_statuses = list(init);
    status.container_statuses = list(main);
    status.ephemeral_container_statuses = (!ephemeral.is_empty()).then_some(ephemeral);
    status
}

/// A sandbox that ended keeps its address in the status until another one has its own.
fn pod_ips(input: StatusInput<'_>, host_network: bool) -> Vec<String> {
    if host_network {
        return vec![input.node.host_ip.clone()];
    }
    let current =
        input.observed.sandboxes.first().filter(|sandbox| sandbox.ready).map(|sandbox| &sandbox.ips);
    match current {
        Some(ips) if !ips.is_empty() => ips.clone(),
        _ => input.previous.pod_ips.iter().flatten().map(|ip| ip.ip.clone()).collect(),
    }
}

/// <https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/#pod-phase>
fn phase(input: StatusInput<'_>, statuses: &[(ContainerKind, ContainerStatus)]) -> &'static str {
    match input.previous.phase.as_deref() {
        Some("Succeeded") => return "Succeeded",
        Some("Failed") => return "Failed",
        _ => {}
    }
    let spec = input.desired.spec();
    // Whoever waits for the end of a pod waits for its processes: before they have ended the phase is not final.
    if matches!(input.desired.fate, Fate::Fail { .. }) && input.plan.ended {
        return "Failed";
    }
    let counts = Counts::of(spec, statuses);
    let ending = matches!(input.desired.fate, Fate::Terminate { .. });
    if input.plan.ended && (ending || counts.running == 0) {
        return final_phase(input, spec, &counts, ending);
    }
    if counts.init_pending > 0 || counts.waiting > 0 {
        "Pending"
    } else if counts.running > 0 || counts.stopped > 0 {
        "Running"
    } else {
        "Pending"
    }
}

fn final_phase(input: StatusInput<'_>, spec: &PodSpec, counts: &Counts, ending: bool) -> &'static str {
    if counts.init_failed > 0 {
        return "Failed";
    }
    if counts.stopped == spec.containers.len() {
        return if counts.succeeded == counts.stopped { "Succeeded" } else { "Failed" };
    }
    // Deleted before it ever ran to an end.
    if ending && input.previous.phase.as_deref() == Some("Running") { "Failed" } else { "Pending" }
}

#[derive(Debug, Default)]
struct Counts {
    init_pending: usize,
    init_failed: usize,
    waiting: usize,
    running: usize,
    stopped: usize,
    succeeded: usize,
}

impl Counts {
    fn of(spec: &PodSpec, statuses: &[(ContainerKind, ContainerStatus)]) -> Self {
        let mut counts = Self::default();
        let failed_for_good = |name: &str, exit_code: i32| {
            let entry = parts(spec).find(|entry| entry.container.name == name);
            entry.is_some_and(|entry| !restarts(spec, entry, exit_code))
        };
        for (kind, status) in statuses {
            let state = status.state.clone().unwrap_or_default();
            let ended = state.terminated.as_ref();
            match kind {
                ContainerKind::Init => match ended.map(|ended| ended.exit_code) {
                    Some(0) => {}
                    Some(code) => {
                        counts.init_pending += 1;
                        counts.init_failed += usize::from(failed_for_good(&status.name, code));
                    }
                    None => counts.init_pending += 1,
                },
                ContainerKind::Sidecar => {
                    if state.waiting.is_some() && status.last_state.is_none() {
                        counts.init_pending += 1;
                    }
                }
                ContainerKind::Ephemeral => {}
                ContainerKind::Main => {
                    let last = status.last_state.as_ref().and_then(|last| last.terminated.as_ref());
                    let ended = ended.or(if state.waiting.is_some() { last } else { None });
                    if state.running.is_some() {
                        counts.running += 1;
                    } else if let Some(ended) = ended {
                        counts.stopped += 1;
                        counts.succeeded += usize::from(ended.exit_code == 0);
                    } else {
                        counts.waiting += 1;
                    }
                }
            }
        }
        counts
    }
}

#[cfg(test)]
mod tests;
