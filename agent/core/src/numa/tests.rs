//! Upstream's rules of merging, and sets of nodes.

use proptest::prelude::*;

use super::*;

fn nodes(numbers: &[u32]) -> Nodes {
    numbers.iter().copied().collect()
}

fn hint(numbers: &[u32], preferred: bool) -> Hint {
    Hint { nodes: Some(nodes(numbers)), preferred }
}

/// A machine of so many nodes in a row: neighbours are nearer.
fn rules(policy: Policy, count: u32) -> Rules {
    let distance = |from: u32, to: u32| 10 + 10 * u64::from(from.abs_diff(to));
    let row = |from| (0..count).map(|to| (to, distance(from, to))).collect();
    let distances = (0..count).map(|from| (from, row(from))).collect();
    Rules { policy, distances, ..Rules::default() }
}

#[test]
fn sets_are_written_as_the_kernel_writes_them() {
    assert_eq!(nodes(&[0, 1, 3]).to_string(), "0-1,3");
    let sets: Vec<String> = nodes(&[0, 2, 3]).subsets().map(|set| set.to_string()).collect();
    assert_eq!(sets, ["0", "2", "0,2", "3", "0,3", "2-3", "0,2-3"]);
    assert!(nodes(&[1]).is_narrower(nodes(&[0, 1])) && nodes(&[0]).is_narrower(nodes(&[1])));
    assert_eq!(nodes(&[99]), Nodes::default());
}

/// Policy, hints of each resource, the nodes that are chosen and whether the container is admitted.
type Case = (Policy, Vec<Hints>, Option<&'static [u32]>, bool);

#[test]
fn hints_are_merged_as_upstream_merges_them() {
    use Policy::{BestEffort, Restricted, SingleNode};
    let (one, other) = (Some(vec![hint(&[0], true), hint(&[0, 1], false)]), Some(vec![hint(&[1], true)]));
    let both = Some(vec![hint(&[0, 1], true)]);
    let cases: Vec<Case> = vec![
        (Policy::None, vec![Some(vec![])], None, true),
        // Nobody minds.
        (BestEffort, vec![], Some(&[0, 1]), true),
        (Restricted, vec![None], Some(&[0, 1]), true),
        (SingleNode, vec![None], None, true),
        // All agree.
        (Restricted, vec![one.clone(), None], Some(&[0]), true),
        (SingleNode, vec![one.clone(), one.clone()], Some(&[0]), true),
        (Restricted, vec![Some(vec![hint(&[0], true), hint(&[1], true)]), other.clone()], Some(&[1]), true),
        // They do not.
        (BestEffort, vec![one.clone(), other.clone()], Some(&[1]), true),
        (Restricted, vec![one.clone(), other.clone()], Some(&[1]), false),
        (SingleNode, vec![one.clone(), other.clone()], None, false),
        // Two nodes are needed, which is as few as possible.
        (Restricted, vec![both.clone()], Some(&[0, 1]), true),
        (SingleNode, vec![both.clone()], None, false),
        // Nothing can give it.
        (BestEffort, vec![Some(vec![]), one.clone()], Some(&[0]), true),
        (Restricted, vec![Some(vec![]), one.clone()], Some(&[0]), false),
        (SingleNode, vec![Some(vec![])], None, false),
    ];
    for (policy, given, chosen, admitted) in cases {
        let wanted = Verdict { nodes: chosen.map(nodes), admitted };
        assert_eq!(rules(policy, 2).merge(&given), wanted, "{policy:?} {given:?}");
    }
}

#[test]
fn of_as_many_nodes_the_nearer_ones_are_taken_where_that_is_wanted() {
    let given = [Some(vec![hint(&[0, 3], true), hint(&[1, 2], true)])];
    let mut rules = rules(Policy::BestEffort, 4);
    assert_eq!(rules.merge(&given).nodes, Some(nodes(&[1, 2])), "lower as a number");
    let given = [Some(vec![hint(&[0, 2], true), hint(&[2, 3], true)])];
    assert_eq!(rules.merge(&given).nodes, Some(nodes(&[0, 2])));
    rules.closest = true;
    assert_eq!(rules.merge(&given).nodes, Some(nodes(&[2, 3])));
}

#[test]
fn without_a_preferred_way_not_fewer_nodes_than_needed() {
    // One resource needs two nodes: two are better than one although they are more.
    let wide = Some(vec![hint(&[0, 1], false), hint(&[0, 1, 2], false)]);
    let narrow = Some(vec![hint(&[1], false), hint(&[0, 1], false), hint(&[0, 1, 2], false)]);
    let verdict = rules(Policy::BestEffort, 3).merge(&[wide, narrow]);
    assert_eq!(verdict, Verdict { nodes: Some(nodes(&[0, 1])), admitted: true });
}

fn any_hints() -> impl Strategy<Value = Hints> {
    let hint = (1_u32..16, any::<bool>()).prop_map(|(bits, preferred)| {
        let nodes = Some((0..4).filter(|node| bits & (1 << node) != 0).collect());
        Hint { nodes, preferred }
    });
    proptest::option::of(proptest::collection::vec(hint, 0..5))
}

proptest! {
    /// What is admitted strictly is near for everybody; what one policy chooses is of the machine.
    #[test]
    fn strict_policies_admit_only_what_is_near(given in proptest::collection::vec(any_hints(), 0..4)) {
        for policy in [Policy::BestEffort, Policy::Restricted, Policy::SingleNode] {
            let rules = rules(policy, 4);
            let verdict = rules.merge(&given);
            prop_assert!(verdict.nodes.is_none_or(|nodes| !nodes.is_empty() && nodes.is_subset(rules.all())));
            prop_assert!(policy != Policy::BestEffort || verdict.admitted);
            if policy == Policy::BestEffort || !verdict.admitted {
                continue;
            }
            for hints in given.iter().flatten() {
                let suits = |hint: &Hint| hint.preferred && hint.nodes == verdict.nodes;
                prop_assert!(hints.iter().any(suits), "{policy:?}: {hints:?} for {verdict:?}");
            }
            if policy == Policy::SingleNode {
                prop_assert!(verdict.nodes.is_none_or(|nodes| nodes.len() == 1));
            }
        }
    }
}
