//! Pods that nobody else will remove: ended ones beyond the threshold, those of vanished nodes, and
//! deleted ones that never had a node.
//!
//! Input: all pods, the names of existing nodes, the time. Output: pods to remove by force, and nodes that
//! must be confirmed as gone first.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;

use crate::object;

/// For how long a node must be missing before its pods go: caches may be late, nodes may be re-registered.
pub const QUARANTINE: SignedDuration = SignedDuration::from_secs(40);

/// Which pods to remove.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Ended pods beyond the threshold, oldest first.
    pub ended: Vec<Arc<Pod>>,
    /// Pods that were deleted before they had a node.
    pub unscheduled: Vec<Arc<Pod>>,
    /// Pods bound to nodes missing for longer than [`QUARANTINE`], by node; confirm with a live read first.
    pub orphaned: BTreeMap<String, Vec<Arc<Pod>>>,
}

/// Since when nodes are missing that pods are bound to. Bounded by the number of such nodes.
#[derive(Clone, Debug, Default)]
pub struct Missing {
    since: BTreeMap<String, Timestamp>,
}

impl Missing {
    /// Decides for this moment and remembers the missing nodes for the next.
    pub fn plan(
        &mut self,
        pods: &[Arc<Pod>],
        nodes: &BTreeSet<String>,
        threshold: usize,
        now: Timestamp,
    ) -> Plan {
        let mut plan = Plan { ended: ended_beyond(pods, threshold), ..Plan::default() };
        let mut missing = BTreeMap::<String, Vec<Arc<Pod>>>::new();
        for pod in pods {
            match object::pod_node(pod) {
                None if object::is_being_deleted(&pod.metadata) => plan.unscheduled.push(Arc::clone(pod)),
                Some(node) if !nodes.contains(node) => {
                    missing.entry(node.to_owned()).or_default().push(Arc::clone(pod));
                }
                _ => {}
            }
        }
        self.since.retain(|node, _| missing.contains_key(node));
        for (node, pods) in missing {
            let since = *self.since.entry(node.clone()).or_insert(now);
            if now.duration_since(since) >= QUARANTINE {
                plan.orphaned.insert(node, pods);
            }
        }
        plan
    }
}

fn ended_beyond(pods: &[Arc<Pod>], threshold: usize) -> Vec<Arc<Pod>> {
    let mut ended: Vec<_> = pods.iter().filter(|pod| object::is_pod_terminal(pod)).cloned().collect();
    let surplus = ended.len().saturating_sub(threshold);
    let evicted =
        |pod: &Pod| pod.status.as_ref().and_then(|status| status.reason.as_deref()) == Some("Evicted");
    ended.sort_by(|left, right| {
        let key = |pod: &Pod| (!evicted(pod), object::created(&pod.metadata));
        key(left).cmp(&key(right)).then_with(|| left.metadata.name.cmp(&right.metadata.name))
    });
    ended.truncate(surplus);
    ended
}

#[cfg(test)]
mod tests {
    use k8s_openapi::{
        api::core::v1::{PodSpec, PodStatus},
        apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
    };

    use super::*;

    fn pod(name: &str, phase: &str, node: Option<&str>, created: i64) -> Arc<Pod> {
        Arc::new(Pod {
            metadata: ObjectMeta {
                name: Some(name.into()),
                creation_timestamp: Timestamp::from_second(created).ok().map(Time),
                ..ObjectMeta::default()
            },
            spec: Some(PodSpec { node_name: node.map(str::to_owned), ..PodSpec::default() }),
            status: Some(PodStatus { phase: Some(phase.into()), ..PodStatus::default() }),
        })
    }

    #[test]
    fn pods_of_a_missing_node_wait_out_the_quarantine() {
        let pods = [pod("here", "Running", Some("a"), 0), pod("lost", "Running", Some("b"), 0)];
        let nodes = BTreeSet::from(["a".to_owned()]);
        let mut missing = Missing::default();
        let start = Timestamp::UNIX_EPOCH;
        assert!(missing.plan(&pods, &nodes, 10, start).orphaned.is_empty());
        let later = missing.plan(&pods, &nodes, 10, start + QUARANTINE).orphaned;
        assert_eq!(later.keys().collect::<Vec<_>>(), ["b"]);
        let back = BTreeSet::from(["a".to_owned(), "b".to_owned()]);
        missing.plan(&pods, &back, 10, start + QUARANTINE);
        assert!(missing.plan(&pods, &nodes, 10, start + QUARANTINE).orphaned.is_empty(), "starts anew");
    }

    #[test]
    fn the_oldest_ended_pods_go_beyond_the_threshold() {
        let pods = [
            pod("new", "Failed", Some("a"), 30),
            pod("old", "Succeeded", Some("a"), 10),
            pod("running", "Running", Some("a"), 0),
        ];
        let plan =
            Missing::default().plan(&pods, &BTreeSet::from(["a".to_owned()]), 1, Timestamp::UNIX_EPOCH);
        let names: Vec<_> = plan.ended.iter().map(|pod| object::name(&pod.metadata)).collect();
        assert_eq!(names, ["old"]);
    }
}
