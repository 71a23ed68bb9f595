//! Pods on a machine with two nodes, each with two processors and 4 GiB, less one processor for the system.

use agent_core::cpus::{Options, Place};
use agent_core::memory::Amounts;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::*;

fn numa(root: &Path, policy: Policy, scope: Scope) -> Numa {
    let topology = (0..4).map(|cpu| (cpu, Place { socket: cpu / 2, core: cpu, node: cpu / 2 })).collect();
    let reserved = "0".parse().unwrap();
    let cpus = agent_core::cpus::Policy { topology, reserved, options: Options::default() };
    let amounts = || Amounts::from([("memory".to_owned(), 4 << 30)]);
    let distances = [(0, [(0, 10), (1, 20)].into()), (1, [(0, 20), (1, 10)].into())].into();
    Numa {
        rules: Rules { policy, scope, closest: false, distances },
        cpus: Cpus::open(cpus, root).unwrap(),
        memory: Memory::open(Bank([(0, amounts()), (1, amounts())].into()), root).unwrap(),
        devices: Devices::load(root, CancellationToken::new()),
    }
}

/// A pod whose containers have so many processors and so much memory each.
fn pod(uid: &str, containers: &[(&str, &str)]) -> Pod {
    let containers: Vec<_> = containers
        .iter()
        .enumerate()
        .map(|(number, (cpu, memory))| {
            let amounts = json!({"cpu": cpu, "memory": memory});
            json!({"name": format!("c{number}"), "resources": {"requests": amounts, "limits": amounts}})
        })
        .collect();
    serde_json::from_value(json!({"metadata": {"uid": uid}, "spec": {"containers": containers}})).unwrap()
}

async fn sets(numa: &Numa, pod: &Pod, container: usize) -> (String, String) {
    let sets = numa.allocate(pod, &pod.spec.as_ref().unwrap().containers[container]).await.unwrap();
    (sets.cpus, sets.mems)
}

fn own(cpus: &str, mems: &str) -> (String, String) {
    (cpus.to_owned(), mems.to_owned())
}

#[tokio::test]
async fn processors_and_memory_come_from_one_node() {
    let directory = tempfile::tempdir().unwrap();
    let numa = numa(directory.path(), Policy::SingleNode, Scope::Container);
    // Node 0 would do for the memory, and has one processor only.
    let first = pod("first", &[("2", "1Gi")]);
    numa.admit(&first).unwrap();
    assert_eq!(sets(&numa, &first, 0).await, own("2-3", "1"));
    let error = numa.admit(&pod("second", &[("2", "1Gi")])).unwrap_err();
    assert_eq!((error.reason.as_str(), error.message.as_str()), (REJECTED, REJECTED_MESSAGE));
    let small = pod("small", &[("1", "1Gi")]);
    numa.admit(&small).unwrap();
    assert_eq!(sets(&numa, &small, 0).await, own("1", "0"));
    // What shares processors goes anywhere.
    numa.admit(&pod("shared", &[("500m", "1Gi")])).unwrap();
    numa.release("first").await;
    numa.admit(&pod("second", &[("2", "1Gi")])).unwrap();
    numa.admit(&small).unwrap();
    assert_eq!(sets(&numa, &small, 0).await, own("1", "0"), "a second look changes nothing");
}

#[tokio::test]
async fn a_pod_that_is_kept_away_has_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let numa = numa(directory.path(), Policy::Restricted, Scope::Container);
    // Nothing is left for the third container.
    let error = numa.admit(&pod("wide", &[("1", "1Gi"), ("2", "1Gi"), ("1", "1Gi")])).unwrap_err();
    assert_eq!(error.reason, REJECTED);
    assert!(numa.cpus_of("wide", "c0").is_empty() && numa.memory_of("wide", "c0").is_none());
    numa.admit(&pod("whole", &[("2", "4Gi")])).unwrap();
    let two = pod("two", &[("2", "1Gi")]);
    assert_eq!(numa.admit(&two).unwrap_err().reason, REJECTED, "one processor is left");
}

#[tokio::test]
async fn containers_of_a_pod_are_near_together_where_that_is_wanted() {
    for (scope, nodes) in [(Scope::Container, ["0", "1"]), (Scope::Pod, ["1", "1"])] {
        let directory = tempfile::tempdir().unwrap();
        let numa = numa(directory.path(), Policy::BestEffort, scope);
        let pair = pod("pair", &[("1", "1Gi"), ("1", "1Gi")]);
        numa.admit(&pair).unwrap();
        let found = [sets(&numa, &pair, 0).await.1, sets(&numa, &pair, 1).await.1];
        assert_eq!(found, nodes, "{scope:?}");
    }
}

#[tokio::test]
async fn without_a_policy_each_resource_comes_from_anywhere() {
    let directory = tempfile::tempdir().unwrap();
    let numa = numa(directory.path(), Policy::None, Scope::Container);
    let pod = pod("p", &[("2", "1Gi")]);
    numa.admit(&pod).unwrap();
    let (cpus, mems) = sets(&numa, &pod, 0).await;
    assert_eq!((cpus.parse::<CpuSet>().unwrap().len(), mems.as_str()), (2, "0"));
}
