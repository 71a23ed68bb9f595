//! Node health: when a node counts as lost, which taints tell so, and how fast its pods may be evicted.
//!
//! Input: nodes, the renewals of their leases as they were observed, the time. Output: conditions and taints
//! to write. Staleness is measured from when a change was *seen* here, not from the times inside the
//! objects: clocks of nodes may be off, and after this controller's own start every node gets its full
//! grace period again, so that its absence never turns into evictions.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::{
    api::core::v1::{Node, NodeCondition, Taint},
    apimachinery::pkg::apis::meta::v1::Time,
};

use crate::object;

const NOT_READY: &str = "node.kubernetes.io/not-ready";
const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";
/// Conditions that become Unknown when a node falls silent.
const JUDGED: [&str; 4] = ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"];
/// Condition → taint while the condition is True.
const PRESSURES: [(&str, &str); 4] = [
    ("MemoryPressure", "node.kubernetes.io/memory-pressure"),
    ("DiskPressure", "node.kubernetes.io/disk-pressure"),
    ("PIDPressure", "node.kubernetes.io/pid-pressure"),
    ("NetworkUnavailable", "node.kubernetes.io/network-unavailable"),
];
/// A zone with more than this share of unready nodes (in percent) is disturbed as a whole.
const DISTURBED_PERCENT: usize = 55;
/// Zones up to this size are not evicted from at all while disturbed.
const SMALL_ZONE: usize = 50;

/// How long nodes may be silent.
#[derive(Clone, Copy, Debug)]
pub struct Grace {
    /// Since the last sign of life.
    pub monitor: SignedDuration,
    /// For a node that has never reported its status.
    pub startup: SignedDuration,
}

impl Default for Grace {
    fn default() -> Self {
        Grace { monitor: SignedDuration::from_secs(40), startup: SignedDuration::from_secs(60) }
    }
}

/// The last sign of life of each node. Bounded by the number of nodes.
#[derive(Clone, Debug, Default)]
pub struct Monitor {
    seen: BTreeMap<String, Seen>,
}

#[derive(Clone, Debug, PartialEq)]
struct Seen {
    renewed: Option<Timestamp>,
    heartbeat: Option<Timestamp>,
    at: Timestamp,
}

impl Monitor {
    /// Takes note of the node's signs of life and, when it has been silent for too long, returns the
    /// conditions that say so. `renewed`: the renew time of its lease.
    pub fn check(
        &mut self,
        node: &Node,
        renewed: Option<Timestamp>,
        grace: Grace,
        now: Timestamp,
    ) -> Option<Vec<NodeCondition>> {
        let conditions = node.status.as_ref().and_then(|status| status.conditions.as_deref());
        let conditions = conditions.unwrap_or_default();
        let ready = conditions.iter().find(|condition| condition.type_ == "Ready");
        // Our own "Unknown" must not count as a sign of life.
        let heartbeat = ready.and_then(|ready| ready.last_heartbeat_time.as_ref()).map(|time| time.0);
        let name = object::name(&node.metadata);
        let seen = self.seen.entry(name.to_owned()).or_insert(Seen { renewed, heartbeat, at: now });
        if seen.renewed != renewed || seen.heartbeat != heartbeat {
            *seen = Seen { renewed, heartbeat, at: now };
        }
        let patience = if ready.is_some() { grace.monitor } else { grace.startup };
        if now.duration_since(seen.at) <= patience {
            return None;
        }
        let silent = unknown_conditions(node, conditions, now);
        (silent != conditions).then_some(silent)
    }

    /// Forgets nodes that are gone.
    pub fn retain(&mut self, exists: impl Fn(&str) -> bool) {
        self.seen.retain(|name, _| exists(name));
    }
}

fn unknown_conditions(node: &Node, conditions: &[NodeCondition], now: Timestamp) -> Vec<NodeCondition> {
    let now = Timestamp::from_second(now.as_second()).unwrap_or(now);
    let mut silent = conditions.to_vec();
    for kind in JUDGED {
        match silent.iter_mut().find(|condition| condition.type_ == kind) {
            Some(condition) if condition.status == "Unknown" => {}
            Some(condition) => {
                condition.status = "Unknown".into();
                condition.reason = Some("NodeStatusUnknown".into());
                condition.message = Some("Kubelet stopped posting node status.".into());
                condition.last_transition_time = Some(Time(now));
            }
            None => silent.push(NodeCondition {
                type_: kind.into(),
                status: "Unknown".into(),
                reason: Some("NodeStatusNeverUpdated".into()),
                message: Some("Kubelet never posted node status.".into()),
                last_heartbeat_time: node.metadata.creation_timestamp.clone(),
                last_transition_time: Some(Time(now)),
            }),
        }
    }
    silent
}

/// True when the node reports to be ready.
pub fn is_ready(node: &Node) -> bool {
    object::node_condition(node, "Ready") == Some("True")
}

/// The node's taints after ours are brought in line with its conditions; `None` when they are already.
/// `evict`: whether an unready node may get the taint that makes its pods leave.
pub fn taints(node: &Node, evict: bool, now: Timestamp) -> Option<Vec<Taint>> {
    let current = object::node_taints(node);
    let wanted = wanted_taints(node);
    let is_ours = |taint: &Taint| match taint.effect.as_str() {
        "NoExecute" => matches!(taint.key.as_str(), NOT_READY | UNREACHABLE),
        "NoSchedule" => {
            matches!(taint.key.as_str(), NOT_READY | UNREACHABLE | UNSCHEDULABLE)
                || PRESSURES.iter().any(|(_, key)| *key == taint.key)
        }
        _ => false,
    };
    let holds =
        |taint: &Taint| wanted.iter().any(|(key, effect)| *key == taint.key && *effect == taint.effect);
    let mut next: Vec<Taint> =
        current.iter().filter(|taint| !is_ours(taint) || holds(taint)).cloned().collect();
    for (key, effect) in wanted {
        let present = next.iter().any(|taint| taint.key == key && taint.effect == effect);
        if !present && (evict || effect != "NoExecute") {
            next.push(Taint {
                key: key.into(),
                effect: effect.into(),
                time_added: Timestamp::from_second(now.as_second()).ok().map(Time),
                value: None,
            });
        }
    }
    (next != current).then_some(next)
}

/// The node's taints without those that make pods leave, for when no node at all is ready: then it is more
/// likely that we are cut off than that every node is.
pub fn taints_without_eviction(node: &Node) -> Option<Vec<Taint>> {
    let current = object::node_taints(node);
    let next: Vec<Taint> = current
        .iter()
        .filter(|taint| taint.effect != "NoExecute" || !matches!(taint.key.as_str(), NOT_READY | UNREACHABLE))
        .cloned()
        .collect();
    (next.len() != current.len()).then_some(next)
}

fn wanted_taints(node: &Node) -> Vec<(&'static str, &'static str)> {
    let mut wanted = Vec::new();
    let lost = match object::node_condition(node, "Ready") {
        Some("True") => None,
        Some("Unknown") => Some(UNREACHABLE),
        _ => Some(NOT_READY),
    };
    if let Some(key) = lost {
        wanted.push((key, "NoSchedule"));
        wanted.push((key, "NoExecute"));
    }
    for (condition, key) in PRESSURES {
        if object::node_condition(node, condition) == Some("True") {
            wanted.push((key, "NoSchedule"));
        }
    }
    if node.spec.as_ref().and_then(|spec| spec.unschedulable) == Some(true) {
        wanted.push((UNSCHEDULABLE, "NoSchedule"));
    }
    wanted
}

/// How many nodes may lose their pods, and when one last did.
#[derive(Clone, Debug, Default)]
pub struct EvictionLimits {
    zones: BTreeMap<String, Zone>,
    last: BTreeMap<String, Timestamp>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Zone {
    nodes: usize,
    unready: usize,
}

impl EvictionLimits {
    /// Counts the nodes of each zone anew.
    pub fn survey<'a>(&mut self, nodes: impl IntoIterator<Item = &'a Node>) {
        self.zones.clear();
        for node in nodes {
            let zone = self.zones.entry(zone_of(node)).or_default();
            zone.nodes += 1;
            zone.unready += usize::from(!is_ready(node));
        }
        let zones = &self.zones;
        self.last.retain(|zone, _| zones.contains_key(zone));
    }

    /// True when no node of the cluster is ready.
    pub fn all_are_lost(&self) -> bool {
        !self.zones.is_empty() && self.zones.values().all(|zone| zone.unready == zone.nodes)
    }

    /// Whether this unready node's turn to be evicted from has come; takes the turn if so. One node per
    /// 10 s and zone, one per 100 s in a large disturbed zone, none in a small one.
    pub fn take_turn(&mut self, node: &Node, now: Timestamp) -> bool {
        if self.all_are_lost() {
            return false;
        }
        let name = zone_of(node);
        let zone = self.zones.get(&name).copied().unwrap_or_default();
        let disturbed = zone.unready > 2
            && zone.unready < zone.nodes
            && zone.unready * 100 >= zone.nodes * DISTURBED_PERCENT;
        let interval = match (disturbed, zone.nodes <= SMALL_ZONE) {
            (false, _) => SignedDuration::from_secs(10),
            (true, false) => SignedDuration::from_secs(100),
            (true, true) => return false,
        };
        let ready = self.last.get(&name).is_none_or(|last| now.duration_since(*last) >= interval);
        if ready {
            self.last.insert(name, now);
        }
        ready
    }
}

fn zone_of(node: &Node) -> String {
    let label = |key: &str| node.metadata.labels.as_ref().and_then(|labels| labels.get(key)).cloned();
    let region = label("topology.kubernetes.io/region").unwrap_or_default();
    let zone = label("topology.kubernetes.io/zone").unwrap_or_default();
    format!("{region}/{zone}")
}

#[cfg(test)]
mod tests {
    use k8s_openapi::{
        api::core::v1::{NodeSpec, NodeStatus},
        apimachinery::pkg::apis::meta::v1::ObjectMeta,
    };

    use super::*;

    fn node(name: &str, ready: &str) -> Node {
        Node {
            metadata: ObjectMeta { name: Some(name.into()), ..ObjectMeta::default() },
            spec: Some(NodeSpec::default()),
            status: Some(NodeStatus {
                conditions: Some(vec![NodeCondition {
                    type_: "Ready".into(),
                    status: ready.into(),
                    ..NodeCondition::default()
                }]),
                ..NodeStatus::default()
            }),
        }
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).expect("in range")
    }

    #[test]
    fn silence_is_measured_from_when_we_began_to_listen() {
        let mut monitor = Monitor::default();
        let node = node("a", "True");
        let stale = Some(at(0));
        assert_eq!(monitor.check(&node, stale, Grace::default(), at(10_000)), None, "just started");
        assert_eq!(monitor.check(&node, stale, Grace::default(), at(10_040)), None);
        let conditions = monitor.check(&node, stale, Grace::default(), at(10_041)).expect("silent");
        assert!(conditions.iter().all(|condition| condition.status == "Unknown"));
        assert_eq!(conditions.len(), JUDGED.len());
        assert_eq!(monitor.check(&node, Some(at(1)), Grace::default(), at(10_042)), None, "lease renewed");
    }

    #[test]
    fn taints_follow_conditions_and_leave_others_alone() {
        let mut node = node("a", "False");
        let foreign = Taint { key: "dedicated".into(), effect: "NoExecute".into(), ..Taint::default() };
        node.spec.as_mut().expect("spec").taints = Some(vec![foreign.clone()]);
        let tainted = taints(&node, true, at(5)).expect("must change");
        let keys: Vec<_> = tainted.iter().map(|taint| (taint.key.as_str(), taint.effect.as_str())).collect();
        assert_eq!(keys, [("dedicated", "NoExecute"), (NOT_READY, "NoSchedule"), (NOT_READY, "NoExecute")]);
        let without = taints(&node, false, at(5)).expect("must change");
        assert_eq!(without.len(), 2, "no eviction yet");
        node.spec.as_mut().expect("spec").taints = Some(tainted);
        assert_eq!(taints(&node, true, at(6)), None, "settled");
        node.status = self::node("a", "True").status;
        assert_eq!(taints(&node, true, at(7)), Some(vec![foreign]));
    }

    #[test]
    fn evictions_are_slow_and_stop_when_all_is_lost() {
        let mut limits = EvictionLimits::default();
        let nodes = [node("a", "True"), node("b", "Unknown"), node("c", "Unknown")];
        limits.survey(&nodes);
        assert!(limits.take_turn(&nodes[1], at(0)));
        assert!(!limits.take_turn(&nodes[2], at(5)));
        assert!(limits.take_turn(&nodes[2], at(10)));
        let lost = [node("a", "Unknown")];
        limits.survey(&lost);
        assert!(limits.all_are_lost());
        assert!(!limits.take_turn(&lost[0], at(100)));
    }
}
