//! Scenario tables: a pod, some nodes, the decision.

use std::sync::Arc;

use k8s_openapi::{
    api::core::v1::{
        Affinity, Container, ContainerPort, Node, NodeAffinity, NodeSelectorRequirement, NodeSelectorTerm,
        NodeSpec, NodeStatus, PodSpec, PreferredSchedulingTerm, ResourceRequirements, Taint, Toleration,
    },
    apimachinery::pkg::{api::resource::Quantity, apis::meta::v1::ObjectMeta},
};

use super::*;
use crate::object::StringMap;

fn amounts(cpu: &str, memory: &str, pods: &str) -> BTreeMap<String, Quantity> {
    [("cpu", cpu), ("memory", memory), ("pods", pods)]
        .into_iter()
        .map(|(name, amount)| (name.to_owned(), Quantity(amount.into())))
        .collect()
}

fn node(name: &str) -> Node {
    Node {
        metadata: ObjectMeta {
            name: Some(name.into()),
            labels: Some(StringMap::from([("host".into(), name.into())])),
            ..ObjectMeta::default()
        },
        spec: Some(NodeSpec::default()),
        status: Some(NodeStatus { allocatable: Some(amounts("2", "4Gi", "10")), ..NodeStatus::default() }),
    }
}

fn pod(name: &str, cpu: &str) -> Pod {
    let mut requests = amounts(cpu, "64Mi", "0");
    requests.remove("pods");
    Pod {
        metadata: ObjectMeta { name: Some(name.into()), uid: Some(name.into()), ..ObjectMeta::default() },
        spec: Some(PodSpec {
            containers: vec![Container {
                resources: Some(ResourceRequirements {
                    requests: Some(requests),
                    ..ResourceRequirements::default()
                }),
                ..Container::default()
            }],
            ..PodSpec::default()
        }),
        status: None,
    }
}

fn spec(pod: &mut Pod) -> &mut PodSpec {
    pod.spec.as_mut().expect("fixture has a spec")
}

fn taint(node: &mut Node, key: &str, effect: &str) {
    let taint = Taint { key: key.into(), effect: effect.into(), ..Taint::default() };
    node.spec.as_mut().expect("fixture has a spec").taints.get_or_insert_default().push(taint);
}

fn cluster(nodes: impl IntoIterator<Item = Node>) -> ClusterState {
    let mut cluster = ClusterState::default();
    for node in nodes {
        cluster.set_node(Arc::new(node));
    }
    cluster
}

#[track_caller]
fn check(pod: &Pod, cluster: &ClusterState, expected: &str) {
    let decision = schedule(pod, cluster).unwrap_or_else(|refusal| refusal.message);
    assert_eq!(decision, expected);
}

#[test]
fn refusals_use_upstreams_words() {
    check(&pod("p", "1"), &cluster([]), "no nodes available to schedule pods");
    check(&pod("p", "3"), &cluster([node("a")]), "0/1 nodes are available: 1 Insufficient cpu.");
    let mut cordoned = node("b");
    cordoned.spec.as_mut().expect("spec").unschedulable = Some(true);
    let mut tainted = node("c");
    taint(&mut tainted, "dedicated", "NoSchedule");
    check(
        &pod("p", "3"),
        &cluster([node("a"), cordoned, tainted]),
        "0/3 nodes are available: 1 Insufficient cpu, 1 node(s) had untolerated taint {dedicated: }, \
         1 node(s) were unschedulable.",
    );
    let mut picky = pod("p", "1");
    spec(&mut picky).node_selector = Some(StringMap::from([("disk".into(), "ssd".into())]));
    check(
        &picky,
        &cluster([node("a"), node("b")]),
        "0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector.",
    );
}

#[test]
fn tolerated_taints_do_not_refuse() {
    let mut tainted = node("a");
    taint(&mut tainted, "dedicated", "NoSchedule");
    let mut tolerant = pod("p", "1");
    spec(&mut tolerant).tolerations =
        Some(vec![Toleration { operator: Some("Exists".into()), ..Toleration::default() }]);
    check(&tolerant, &cluster([tainted]), "a");
}

#[test]
fn pods_placed_back_to_back_never_overcommit() {
    let mut cluster = cluster([node("a"), node("b")]);
    let mut placed = Vec::new();
    for index in 0..5 {
        let pod = pod(&format!("p{index}"), "1");
        match schedule(&pod, &cluster) {
            Ok(node) => {
                cluster.place(&pod, &node);
                placed.push(node);
            }
            Err(refusal) => placed.push(refusal.message),
        }
    }
    let full = "0/2 nodes are available: 2 Insufficient cpu.";
    assert_eq!(placed, ["a", "b", "a", "b", full]);
    assert!(cluster.remove_pod("p0"));
    check(&pod("p9", "1"), &cluster, "a");
}

#[test]
fn the_number_of_pods_is_a_resource() {
    let mut cluster = cluster([node("a")]);
    for index in 0..10 {
        cluster.place(&pod(&format!("p{index}"), "0"), "a");
    }
    check(&pod("p", "0"), &cluster, "0/1 nodes are available: 1 Too many pods.");
}

#[test]
fn host_ports_collide_per_protocol_and_address() {
    let with_port = |name: &str, address: &str| {
        let mut pod = pod(name, "0");
        spec(&mut pod).containers[0].ports = Some(vec![ContainerPort {
            container_port: 80,
            host_port: Some(8080),
            host_ip: Some(address.into()),
            ..ContainerPort::default()
        }]);
        pod
    };
    let mut cluster = cluster([node("a")]);
    cluster.place(&with_port("first", "10.0.0.1"), "a");
    check(&with_port("second", "10.0.0.2"), &cluster, "a");
    check(
        &with_port("third", ""),
        &cluster,
        "0/1 nodes are available: 1 node(s) didn't have free ports for the requested pod ports.",
    );
}

#[test]
fn preferences_decide_between_equal_nodes() {
    let mut disliked = node("a");
    taint(&mut disliked, "old", "PreferNoSchedule");
    check(&pod("p", "1"), &cluster([disliked, node("b")]), "b");

    let mut attracted = pod("p", "1");
    spec(&mut attracted).affinity = Some(Affinity {
        node_affinity: Some(NodeAffinity {
            preferred_during_scheduling_ignored_during_execution: Some(vec![PreferredSchedulingTerm {
                weight: 10,
                preference: NodeSelectorTerm {
                    match_expressions: Some(vec![NodeSelectorRequirement {
                        key: "host".into(),
                        operator: "In".into(),
                        values: Some(vec!["c".into()]),
                    }]),
                    match_fields: None,
                },
            }]),
            ..NodeAffinity::default()
        }),
        ..Affinity::default()
    });
    check(&attracted, &cluster([node("a"), node("b"), node("c")]), "c");
}

#[test]
fn events_about_unbound_pods_do_not_undo_a_placement() {
    let mut cluster = cluster([node("a")]);
    let pod = pod("p", "2");
    cluster.place(&pod, "a");
    assert!(!cluster.observe_pod(&pod), "the event is older than the binding");
    check(&self::pod("q", "1"), &cluster, "0/1 nodes are available: 1 Insufficient cpu.");
}
