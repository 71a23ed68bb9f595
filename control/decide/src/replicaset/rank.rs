//! The order in which surplus pods are deleted.
//!
//! <https://kubernetes.io/docs/concepts/workloads/controllers/replicaset/#scaling-a-replicaset>: pods
//! without a node, then pending before running, unready before ready, low deletion cost before high,
//! doubled-up before spread, recently ready, often restarted and young before the others. Ages are compared
//! by their logarithm, so that among pods of a similar age the choice does not always hit the newest.

use std::{cmp::Reverse, collections::BTreeMap, sync::Arc};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;

use crate::object;

const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";

/// Sorts the pods, those to delete first.
pub fn sort_for_deletion(pods: &mut [Arc<Pod>], related_on_node: &BTreeMap<String, usize>, now: Timestamp) {
    pods.sort_by_cached_key(|pod| key(pod, related_on_node, now));
}

/// A sort key; smaller is deleted earlier.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    assigned: bool,
    phase: u8,
    ready: bool,
    deletion_cost: i32,
    related_on_node: Reverse<usize>,
    ready_for: Age,
    restarts: Reverse<i32>,
    age: Age,
    uid: String,
}

/// How long something has lasted, by order of magnitude; the shorter sorts first.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Age(u32);

fn age(since: Timestamp, now: Timestamp) -> Age {
    let nanoseconds = now.duration_since(since).as_nanos();
    Age(u128::try_from(nanoseconds).unwrap_or(0).checked_ilog2().unwrap_or(0))
}

fn key(pod: &Pod, related_on_node: &BTreeMap<String, usize>, now: Timestamp) -> Key {
    let node = object::pod_node(pod);
    let ready_since = object::ready_since(pod);
    Key {
        assigned: node.is_some(),
        phase: match object::pod_phase(pod) {
            "Pending" => 0,
            "Unknown" => 1,
            _ => 2,
        },
        ready: ready_since.is_some(),
        deletion_cost: object::annotation(&pod.metadata, DELETION_COST)
            .and_then(|cost| cost.parse().ok())
            .unwrap_or(0),
        related_on_node: Reverse(node.and_then(|node| related_on_node.get(node)).copied().unwrap_or(0)),
        ready_for: ready_since.map_or(Age(0), |since| age(since, now)),
        restarts: Reverse(most_restarts(pod)),
        age: age(object::created(&pod.metadata), now),
        uid: object::uid(&pod.metadata).to_owned(),
    }
}

fn most_restarts(pod: &Pod) -> i32 {
    let statuses = pod.status.iter().filter_map(|status| status.container_statuses.as_ref()).flatten();
    statuses.map(|status| status.restart_count).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::{
        api::core::v1::{ContainerStatus, PodCondition, PodSpec, PodStatus},
        apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
    };

    use super::*;

    /// (name, node, ready since, deletion cost, restarts, created)
    type Row = (&'static str, &'static str, Option<i64>, &'static str, i32, i64);

    fn pod((name, node, ready_since, cost, restarts, created): Row) -> Arc<Pod> {
        let time = |second| Timestamp::from_second(second).ok().map(Time);
        Arc::new(Pod {
            metadata: ObjectMeta {
                name: Some(name.into()),
                uid: Some(name.into()),
                creation_timestamp: time(created),
                annotations: Some([(DELETION_COST.into(), cost.into())].into()),
                ..ObjectMeta::default()
            },
            spec: Some(PodSpec { node_name: Some(node.into()), ..PodSpec::default() }),
            status: Some(PodStatus {
                phase: Some("Running".into()),
                conditions: ready_since.map(|second| {
                    vec![PodCondition {
                        type_: "Ready".into(),
                        status: "True".into(),
                        last_transition_time: time(second),
                        ..PodCondition::default()
                    }]
                }),
                container_statuses: Some(vec![ContainerStatus {
                    restart_count: restarts,
                    ..ContainerStatus::default()
                }]),
                ..PodStatus::default()
            }),
        })
    }

    #[test]
    fn pods_rank_by_each_criterion_in_turn() {
        let related = BTreeMap::from([("crowded".to_owned(), 3), ("lonely".to_owned(), 1)]);
        let expected = [
            ("no-node", "", Some(10), "0", 0, 0),
            ("unready", "lonely", None, "0", 0, 0),
            ("cheap", "lonely", Some(10), "-5", 0, 0),
            ("doubled-up", "crowded", Some(10), "0", 0, 0),
            ("just-ready", "lonely", Some(9_990), "0", 0, 0),
            ("restarted", "lonely", Some(10), "0", 7, 0),
            ("young", "lonely", Some(10), "0", 0, 9_900),
            ("old", "lonely", Some(10), "0", 0, 0),
        ];
        let mut pods: Vec<_> = expected.into_iter().rev().map(pod).collect();
        sort_for_deletion(&mut pods, &related, Timestamp::from_second(10_000).expect("in range"));
        let names: Vec<_> = pods.iter().map(|pod| object::name(&pod.metadata).to_owned()).collect();
        assert_eq!(names, expected.map(|row| row.0));
    }
}
