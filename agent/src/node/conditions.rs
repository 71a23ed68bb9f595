//! The node's conditions. Pure.
//!
//! Thresholds are upstream's hard eviction defaults; reasons and messages are upstream's. A pressure that has passed
//! stays reported for [`TRANSITION`], so that it does not flap.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::NodeCondition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::contracts::RuntimeHealth;
use crate::host::stats::{FsFigures, NodeFigures};

/// `memory.available` below this is pressure.
pub(super) const MIN_MEMORY: u64 = 100 << 20;
/// How long a pressure is reported after it was last seen.
const TRANSITION: SignedDuration = SignedDuration::from_mins(5);

/// The types this node reports; others on the object belong to others.
pub(super) const TYPES: [&str; 4] = ["MemoryPressure", "DiskPressure", "PIDPressure", "Ready"];

/// Remembers when each pressure was last seen.
#[derive(Debug, Default)]
pub(super) struct Pressures {
    last_seen: BTreeMap<&'static str, Timestamp>,
}

impl Pressures {
    fn held(&mut self, kind: &'static str, is_now: bool, now: Timestamp) -> bool {
        if is_now {
            self.last_seen.insert(kind, now);
        }
        self.last_seen.get(kind).is_some_and(|seen| now.duration_since(*seen) < TRANSITION)
    }

    /// All conditions. A transition time is kept from `before` while the status is the same.
    pub(super) fn conditions(
        &mut self,
        figures: &NodeFigures,
        health: &RuntimeHealth,
        before: &[NodeCondition],
        now: Timestamp,
    ) -> Vec<NodeCondition> {
        let memory = self.held("MemoryPressure", figures.memory.available() < MIN_MEMORY, now);
        let disk = self.held("DiskPressure", is_full(&figures.node_fs), now);
        let [memory, disk] = [(memory, MEMORY), (disk, DISK)].map(|(is_on, texts)| pressure(is_on, texts));
        // Upstream has no default threshold for process ids.
        let pids = pressure(false, PIDS);
        let conditions = [memory, disk, pids, ready(health)];
        TYPES.into_iter().zip(conditions).map(|(kind, state)| condition(kind, state, before, now)).collect()
    }
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

/// `nodefs.available` below 10 % or `nodefs.inodesFree` below 5 %.
fn is_full(fs: &FsFigures) -> bool {
    let few_bytes = fs.capacity > 0 && u128::from(fs.available) * 10 < u128::from(fs.capacity);
    let few_inodes = fs.inodes > 0 && u128::from(fs.inodes_free) * 20 < u128::from(fs.inodes);
    few_bytes || few_inodes
}

fn ready(health: &RuntimeHealth) -> State {
    let unknown = || "container runtime status check may not have completed yet".to_owned();
    let problems: Vec<String> = match (&health.runtime, &health.network) {
        (None, _) => vec![unknown()],
        (Some(runtime), network) => {
            let network = network.as_ref().and_then(|network| network.as_ref().err());
            runtime.as_ref().err().into_iter().chain(network).cloned().collect()
        }
    };
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
    use crate::host::stats::MemoryFigures;

    fn healthy() -> RuntimeHealth {
        RuntimeHealth { runtime: Some(Ok(())), network: Some(Ok(())), ..RuntimeHealth::default() }
    }

    fn figures(available_mib: u64, disk_percent: u64) -> NodeFigures {
        let memory = MemoryFigures { total: available_mib << 20, ..MemoryFigures::default() };
        let node_fs = FsFigures { capacity: 100, available: disk_percent, ..FsFigures::default() };
        NodeFigures { memory, node_fs, ..NodeFigures::default() }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn shown(conditions: &[NodeCondition]) -> Vec<String> {
        conditions.iter().map(|condition| format!("{}={}", condition.type_, condition.status)).collect()
    }

    #[test]
    fn a_healthy_node_is_ready_without_pressure() {
        let conditions = Pressures::default().conditions(&figures(500, 50), &healthy(), &[], at(0));
        assert_eq!(
            shown(&conditions),
            ["MemoryPressure=False", "DiskPressure=False", "PIDPressure=False", "Ready=True"]
        );
        assert_eq!(conditions[3].message.as_deref(), Some("kubelet is posting ready status"));
    }

    #[test]
    fn pressure_stays_for_the_transition_period() {
        let mut pressures = Pressures::default();
        let low = pressures.conditions(&figures(50, 5), &healthy(), &[], at(0));
        assert_eq!(shown(&low)[..2], ["MemoryPressure=True", "DiskPressure=True"]);
        let held = pressures.conditions(&figures(500, 50), &healthy(), &low, at(299));
        assert_eq!(shown(&held)[..2], ["MemoryPressure=True", "DiskPressure=True"]);
        assert_eq!(held[0].last_transition_time, low[0].last_transition_time);
        let over = pressures.conditions(&figures(500, 50), &healthy(), &held, at(300));
        assert_eq!(shown(&over)[..2], ["MemoryPressure=False", "DiskPressure=False"]);
        assert_eq!(over[0].last_transition_time, Some(Time(at(300))));
    }

    #[test]
    fn the_runtimes_words_are_passed_on() {
        let mut health = healthy();
        health.network = Some(Err("network is not there".to_owned()));
        let conditions = Pressures::default().conditions(&figures(500, 50), &health, &[], at(0));
        assert_eq!(conditions[3].message.as_deref(), Some("network is not there"));
        health.runtime = Some(Err("runtime is down".to_owned()));
        let conditions = Pressures::default().conditions(&figures(500, 50), &health, &[], at(0));
        assert_eq!(conditions[3].message.as_deref(), Some("[runtime is down, network is not there]"));
        let conditions =
            Pressures::default().conditions(&figures(500, 50), &RuntimeHealth::default(), &[], at(0));
        assert_eq!(conditions[3].status, "False");
    }
}
