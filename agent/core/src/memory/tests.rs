//! What containers get from machines with several nodes.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::numa::Hint;

const GI: u64 = 1 << 30;

/// Nodes with so many gibibytes each, and one of huge pages.
fn bank(gibibytes: &[u64]) -> Bank {
    let amounts =
        |size: &u64| Amounts::from([(MEMORY.to_owned(), size * GI), ("hugepages-2Mi".to_owned(), GI)]);
    Bank((0_u32..).zip(gibibytes.iter().map(amounts)).collect())
}

fn container(name: &str, memory: &str) -> Value {
    let amounts = json!({"cpu": "1", "memory": memory});
    json!({"name": name, "resources": {"requests": amounts, "limits": amounts}})
}

fn pod(uid: &str, memory: &str) -> Pod {
    let containers = json!([container("a", memory)]);
    serde_json::from_value(json!({"metadata": {"uid": uid}, "spec": {"containers": containers}})).unwrap()
}

fn given(assignments: &Assignments, uid: &str, name: &str) -> String {
    assignments.of(uid, name).map(|share| share.of().to_string()).unwrap_or_default()
}

#[test]
fn memory_comes_from_as_few_nodes_as_can_give_it() {
    let (bank, mut assignments) = (bank(&[4, 4, 4]), Assignments::default());
    let mut give = |uid: &str, memory: &str| {
        bank.assign(&mut assignments, &pod(uid, memory)).map(|()| given(&assignments, uid, "a"))
    };
    assert_eq!(give("one", "3Gi").unwrap(), "0");
    assert_eq!(give("small", "1Gi").unwrap(), "0", "it fits beside");
    assert_eq!(give("next", "1Gi").unwrap(), "1");
    assert_eq!(give("wide", "5Gi").unwrap_err(), MemoryError::NotEnough, "only one node is in no group");
    assert_eq!(give("other", "4Gi").unwrap(), "2");
    assert!(assignments.release("next") && !assignments.release("next"));
    assert!(assignments.release("other"));
    bank.assign(&mut assignments, &pod("wide", "5Gi")).unwrap();
    assert_eq!(given(&assignments, "wide", "a"), "1-2");
    assert_eq!((assignments.taken(1, MEMORY), assignments.taken(2, MEMORY)), (4 * GI, GI));
    let error = bank.assign(&mut assignments, &pod("late", "1Gi")).map(|()| given(&assignments, "late", "a"));
    assert_eq!(error.unwrap(), "1-2", "a group gives together only");
    let smaller = Bank(bank.0.clone().into_iter().take(1).collect());
    assert!(bank.covers(&assignments) && !smaller.covers(&assignments));
}

#[test]
fn others_share_and_huge_pages_count() {
    let (bank, mut assignments) = (bank(&[4, 4]), Assignments::default());
    let spec = json!({"containers": [{"name": "a", "resources": {"requests": {"memory": "1Gi"}}}]});
    let burstable: Pod = serde_json::from_value(json!({"metadata": {"uid": "b"}, "spec": spec})).unwrap();
    bank.assign(&mut assignments, &burstable).unwrap();
    assert!(!assignments.has("b") && bank.hints_of_pod(&assignments, &burstable).is_empty());
    let amounts = json!({"cpu": "1", "memory": "1Gi", "hugepages-2Mi": "2Gi"});
    let spec = json!({"containers": [{"name": "a", "resources": {"requests": amounts, "limits": amounts}}]});
    let huge: Pod = serde_json::from_value(json!({"metadata": {"uid": "h"}, "spec": spec})).unwrap();
    bank.assign(&mut assignments, &huge).unwrap();
    assert_eq!(given(&assignments, "h", "a"), "0-1", "no node has as many huge pages");
}

#[test]
fn what_ends_first_uses_the_others_memory() {
    let (bank, mut assignments) = (bank(&[4, 4]), Assignments::default());
    let spec = json!({"initContainers": [container("init", "3Gi")], "containers": [container("a", "2Gi")]});
    let pod: Pod = serde_json::from_value(json!({"metadata": {"uid": "p"}, "spec": spec})).unwrap();
    bank.assign(&mut assignments, &pod).unwrap();
    assert_eq!(given(&assignments, "p", "init"), "0");
    assert_eq!(assignments.taken(0, MEMORY), 3 * GI, "not five");
}

#[test]
fn the_topology_managers_nodes_are_taken() {
    let (bank, mut assignments) = (bank(&[4, 4]), Assignments::default());
    let first = pod("p", "3Gi");
    let container = &first.spec.as_ref().unwrap().containers[0];
    let near = |nodes: &[u32]| Some(nodes.iter().copied().collect());
    bank.assign_container(&mut assignments, &first, container, near(&[1])).unwrap();
    assert_eq!(given(&assignments, "p", "a"), "1");
    let kept = bank.hints(&assignments, &first, container);
    assert_eq!(kept, [Some(vec![Hint { nodes: near(&[1]), preferred: true }])], "what it has");
    let second = pod("q", "2Gi");
    let container = &second.spec.as_ref().unwrap().containers[0];
    let hints = bank.hints(&assignments, &second, container);
    assert_eq!(hints, [Some(vec![Hint { nodes: near(&[0]), preferred: true }])], "the other one is too full");
    let refused = bank.assign_container(&mut assignments, &second, container, near(&[1]));
    assert_eq!(refused, Err(MemoryError::NotHere));
    assert!(!assignments.has("q"));
}

proptest! {
    /// Nothing is given twice, and a node gives in one group only.
    #[test]
    fn memory_is_given_once(steps in proptest::collection::vec((0_u8..8, 1_u64..9, any::<bool>()), 0..40)) {
        let bank = bank(&[4, 2, 4]);
        let mut assignments = Assignments::default();
        for (uid, gibibytes, release) in steps {
            let uid = format!("p{uid}");
            if release {
                assignments.release(&uid);
            } else {
                let had = assignments.has(&uid);
                let done = bank.assign(&mut assignments, &pod(&uid, &format!("{gibibytes}Gi")));
                prop_assert!(done.is_ok() || !had && !assignments.has(&uid));
            }
            prop_assert!(bank.covers(&assignments));
            for share in assignments.0.values().flat_map(BTreeMap::values) {
                for node in &share.nodes {
                    prop_assert_eq!(assignments.group(*node), Some(share.of()));
                }
            }
        }
    }
}
