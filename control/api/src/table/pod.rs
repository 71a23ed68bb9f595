//! Pods: READY, STATUS and RESTARTS from the containers' states, as upstream's printer decides them.

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{AGE, Column, NAME, age, name, or_none, since, text_column, wide};
use crate::value::{flag, int, list, text};

/// kubectl's columns.
pub(super) const COLUMNS: &[Column] = &[
    NAME,
    text_column("Ready", "Containers that are ready, of all."),
    text_column("Status", "The pod's phase, or why it is not running."),
    text_column("Restarts", "How often containers were restarted, and when last."),
    AGE,
    wide("IP", "Address of the pod."),
    wide("Node", "Node the pod is bound to."),
    wide("Nominated Node", "Node the pod may be bound to once others have left it."),
    wide("Readiness Gates", "Conditions that are true, of those the pod's readiness waits for."),
];

/// A pod's cells.
pub(super) fn cells(pod: &Value, now: Timestamp) -> Vec<Value> {
    let summary = Summary::of(pod);
    let restarts = match summary.last_restart {
        Some(at) if summary.restarts != 0 => format!("{} ({} ago)", summary.restarts, since(at, now)),
        _ => summary.restarts.to_string(),
    };
    let address = match text(pod, "/status/podIPs/0/ip") {
        "" => text(pod, "/status/podIP"),
        address => address,
    };
    vec![
        name(pod),
        format!("{}/{}", summary.ready, summary.total).into(),
        summary.reason.into(),
        restarts.into(),
        age(pod, now),
        or_none(address),
        or_none(text(pod, "/spec/nodeName")),
        or_none(text(pod, "/status/nominatedNodeName")),
        readiness_gates(pod).into(),
    ]
}

/// Says that a finished pod's row may be dimmed.
pub(super) fn row_condition(pod: &Value) -> Option<Value> {
    let (reason, message) = match text(pod, "/status/phase") {
        "Succeeded" => ("Succeeded", "The pod has completed successfully."),
        "Failed" => ("Failed", "The pod failed."),
        _ => return None,
    };
    Some(json!({ "type": "Completed", "status": "True", "reason": reason, "message": message }))
}

struct Summary<'a> {
    ready: usize,
    total: usize,
    reason: String,
    restarts: i64,
    /// When a container ended that was started again, the latest.
    last_restart: Option<&'a str>,
}

impl<'a> Summary<'a> {
    fn of(pod: &'a Value) -> Self {
        let phase = text(pod, "/status/phase");
        let reason = match text(pod, "/status/reason") {
            "" => phase,
            reason => reason,
        };
        let sidecars: BTreeSet<&str> = list(pod, "/spec/initContainers")
            .iter()
            .filter(|c| text(c, "/restartPolicy") == "Always")
            .map(|c| text(c, "/name"))
            .collect();
        let mut summary = Self {
            ready: 0,
            total: list(pod, "/spec/containers").len() + sidecars.len(),
            reason: reason.to_owned(),
            restarts: 0,
            last_restart: None,
        };
        if list(pod, "/status/conditions")
            .iter()
            .any(|c| c["type"] == "PodScheduled" && c["reason"] == "SchedulingGated")
        {
            "SchedulingGated".clone_into(&mut summary.reason);
        }
        let initializing = summary.init_containers(pod, &sidecars);
        if !initializing || has_condition(pod, "Initialized") {
            summary.main_containers(pod, &sidecars);
        }
        summary.deletion(pod, phase);
        summary
    }

    /// Counts init containers, up to the first that has not done its part; true when there is one.
    fn init_containers(&mut self, pod: &'a Value, sidecars: &BTreeSet<&str>) -> bool {
        for (index, status) in list(pod, "/status/initContainerStatuses").iter().enumerate() {
            self.count_restarts(status);
            let terminated = status.pointer("/state/terminated").filter(|t| !t.is_null());
            if terminated.is_some_and(|t| int(t, "/exitCode").unwrap_or(0) == 0) {
                continue;
            }
            if sidecars.contains(text(status, "/name")) && flag(status, "/started") {
                self.ready += usize::from(flag(status, "/ready"));
                continue;
            }
            let waiting = text(status, "/state/waiting/reason");
            self.reason = if let Some(terminated) = terminated {
                format!("Init:{}", ending(terminated))
            } else if !waiting.is_empty() && waiting != "PodInitializing" {
                format!("Init:{waiting}")
            } else {
                format!("Init:{index}/{}", list(pod, "/spec/initContainers").len())
            };
            return true;
        }
        false
    }

    fn main_containers(&mut self, pod: &'a Value, sidecars: &BTreeSet<&str>) {
        // Once the pod is initialized only restarts of sidecars and of the containers themselves count.
        (self.restarts, self.last_restart) = (0, None);
        for status in list(pod, "/status/initContainerStatuses") {
            if sidecars.contains(text(status, "/name")) {
                self.count_restarts(status);
            }
        }
        let mut any_running = false;
        for status in list(pod, "/status/containerStatuses").iter().rev() {
            self.count_restarts(status);
            let waiting = text(status, "/state/waiting/reason");
            let running = status.pointer("/state/running").is_some_and(|r| !r.is_null());
            if !waiting.is_empty() {
                waiting.clone_into(&mut self.reason);
            } else if let Some(terminated) = status.pointer("/state/terminated").filter(|t| !t.is_null()) {
                self.reason = ending(terminated);
            } else if flag(status, "/ready") && running {
                any_running = true;
                self.ready += 1;
            }
        }
        if self.reason == "Completed" && any_running {
            let shown = if has_condition(pod, "Ready") { "Running" } else { "NotReady" };
            shown.clone_into(&mut self.reason);
        }
    }

    fn deletion(&mut self, pod: &Value, phase: &str) {
        if text(pod, "/metadata/deletionTimestamp").is_empty() {
            return;
        }
        if text(pod, "/status/reason") == "NodeLost" {
            "Unknown".clone_into(&mut self.reason);
        } else if !matches!(phase, "Succeeded" | "Failed") {
            "Terminating".clone_into(&mut self.reason);
        }
    }

    fn count_restarts(&mut self, status: &'a Value) {
        self.restarts += int(status, "/restartCount").unwrap_or(0);
        let ended = text(status, "/lastState/terminated/finishedAt");
        if !ended.is_empty() && self.last_restart.is_none_or(|latest| latest < ended) {
            self.last_restart = Some(ended);
        }
    }
}

/// Why a container ended.
fn ending(terminated: &Value) -> String {
    match (text(terminated, "/reason"), int(terminated, "/signal").unwrap_or(0)) {
        ("", 0) => format!("ExitCode:{}", int(terminated, "/exitCode").unwrap_or(0)),
        ("", signal) => format!("Signal:{signal}"),
        (reason, _) => reason.to_owned(),
    }
}

fn has_condition(pod: &Value, kind: &str) -> bool {
    list(pod, "/status/conditions").iter().any(|c| c["type"] == kind && c["status"] == "True")
}

fn readiness_gates(pod: &Value) -> String {
    let gates = list(pod, "/spec/readinessGates");
    if gates.is_empty() {
        return "<none>".to_owned();
    }
    let open = gates.iter().filter(|g| has_condition(pod, text(g, "/conditionType"))).count();
    format!("{open}/{}", gates.len())
}
