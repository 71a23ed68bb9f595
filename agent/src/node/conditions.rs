//! The node's conditions. Pure.
//!
//! Reasons and messages are upstream's. What the node runs short of is decided by `agent_core::eviction`.

use std::collections::BTreeSet;

use agent_core::eviction::Pressure;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::NodeCondition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::contracts::RuntimeHealth;

/// The types this node reports; others on the object belong to others.
pub(super) const TYPES: [&str; 4] = ["MemoryPressure", "DiskPressure", "PIDPressure", "Ready"];

/// All conditions. A transition time is kept from `before` while the status is the same.
pub(super) fn conditions(
    pressures: &BTreeSet<Pressure>,
    (health, going_down): (&RuntimeHealth, bool),
    before: &[NodeCondition],
    now: Timestamp,
) -> Vec<NodeCondition> {
    let [memory, disk, pids] = [(Pressure::Memory, MEMORY), (Pressure::Disk, DISK), (Pressure::Pid, PIDS)]
        .map(|(kind, texts)| pressure(pressures.contains(&kind), texts));
    let conditions = [memory, disk, pids, ready(health, going_down)];
    TYPES.into_iter().zip(conditions).map(|(kind, state)| condition(kind, state, before, now)).collect()
}

/// Status, reason, message.
type State = (&'static str, &'static str, String);
/// Reason and message when on, reason and message when off.
type Texts = [(&'static str, &'static str); 2];

const MEMORY: Texts = [
    ("KubeletHasInsufficientMemory", "kubelet has insufficient memory available"),
    ("KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
];
const DISK: Texts = [
    ("KubeletHasDiskPressure", "kubelet has disk pressure"),
    ("KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
];
const PIDS: Texts = [
    ("KubeletHasInsufficientPID", "kubelet has insufficient PID available"),
    ("KubeletHasSufficientPID", "kubelet has sufficient PID available"),
];

fn pressure(is_on: bool, [on, off]: Texts) -> State {
    let (status, (reason, message)) = if is_on { ("True", on) } else { ("False", off) };
    (status, reason, message.to_owned())
}

fn ready(health: &RuntimeHealth, going_down: bool) -> State {
    let unknown = || "container runtime status check may not have completed yet".to_owned();
    let mut problems: Vec<String> = match (&health.runtime, &health.network) {
        (None, _) => vec![unknown()],
        (Some(runtime), network) => {
            let network = network.as_ref().and_then(|network| network.as_ref().err());
            runtime.as_ref().err().into_iter().chain(network).cloned().collect()
        }
    };
    if going_down {
        problems.push("node is shutting down".to_owned());
    }
    match problems.as_slice() {
        [] => ("True", "KubeletReady", "kubelet is posting ready status".to_owned()),
        [one] => ("False", "KubeletNotReady", one.clone()),
        several => ("False", "KubeletNotReady", format!("[{}]", several.join(", "))),
    }
}

fn condition(
    kind: &str,
    (status, reason, message): State,
    before: &[NodeCondition],
    now: Timestamp,
) -> NodeCondition {
    let same = before.iter().find(|condition| condition.type_ == kind && condition.status == status);
    let since = same.and_then(|condition| condition.last_transition_time.clone());
    NodeCondition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message),
        last_heartbeat_time: Some(whole_seconds(now)),
        last_transition_time: since.or_else(|| Some(whole_seconds(now))),
    }
}

/// The API keeps seconds only.
fn whole_seconds(time: Timestamp) -> Time {
    Time(Timestamp::from_second(time.as_second()).unwrap_or(time))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn healthy() -> RuntimeHealth {
        RuntimeHealth { runtime: Some(Ok(())), network: Some(Ok(())), ..RuntimeHealth::default() }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn shown(conditions: &[NodeCondition]) -> Vec<String> {
        conditions.iter().map(|condition| format!("{}={}", condition.type_, condition.status)).collect()
    }

    #[test]
    fn a_healthy_node_is_ready_without_pressure() {
        let conditions = conditions(&BTreeSet::new(), (&healthy(), false), &[], at(0));
        assert_eq!(
            shown(&conditions),
            ["MemoryPressure=False", "DiskPressure=False", "PIDPressure=False", "Ready=True"]
        );
        assert_eq!(conditions[3].message.as_deref(), Some("kubelet is posting ready status"));
    }

    #[test]
    fn pressures_are_told_in_upstreams_words() {
        let all = BTreeSet::from([Pressure::Memory, Pressure::Disk, Pressure::Pid]);
        let low = conditions(&all, (&healthy(), false), &[], at(0));
        assert_eq!(
            shown(&low),
            ["MemoryPressure=True", "DiskPressure=True", "PIDPressure=True", "Ready=True"]
        );
        assert_eq!(low[0].reason.as_deref(), Some("KubeletHasInsufficientMemory"));
        assert_eq!(low[1].message.as_deref(), Some("kubelet has disk pressure"));
        let still = conditions(&BTreeSet::from([Pressure::Disk]), (&healthy(), false), &low, at(10));
        assert_eq!(still[1].last_transition_time, low[1].last_transition_time);
        assert_eq!(still[0].last_transition_time, Some(Time(at(10))));
    }

    #[test]
    fn the_runtimes_words_are_passed_on() {
        let mut health = healthy();
        health.network = Some(Err("network is not there".to_owned()));
        let first = conditions(&BTreeSet::new(), (&health, false), &[], at(0));
        assert_eq!(first[3].message.as_deref(), Some("network is not there"));
        health.runtime = Some(Err("runtime is down".to_owned()));
        let second = conditions(&BTreeSet::new(), (&health, false), &[], at(0));
        assert_eq!(second[3].message.as_deref(), Some("[runtime is down, network is not there]"));
        let third = conditions(&BTreeSet::new(), (&RuntimeHealth::default(), false), &[], at(0));
        assert_eq!(third[3].status, "False");
        let last = conditions(&BTreeSet::new(), (&healthy(), true), &[], at(0));
        assert_eq!(
            (last[3].status.as_str(), last[3].message.as_deref()),
            ("False", Some("node is shutting down"))
        );
    }
}
