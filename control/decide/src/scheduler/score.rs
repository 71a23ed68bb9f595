//! Which of several possible nodes is best: upstream's formulas and weights, in whole numbers.
//!
//! TaintToleration × 3, NodeAffinity × 2, NodeResourcesFit (least allocated) × 1, BalancedAllocation × 1.

use super::{filter::Demand, state::NodeInfo};
use crate::{object, selector};

const FULL: i64 = 100;

/// The best node's name; `None` when there is none to choose from.
pub fn best(demand: &Demand<'_>, nodes: &[&NodeInfo]) -> Option<String> {
    let disliked: Vec<i64> = nodes.iter().map(|info| disliked_taints(demand, info)).collect();
    let preferred: Vec<i64> = nodes.iter().map(|info| preference(demand, info)).collect();
    let most_disliked = disliked.iter().copied().max().unwrap_or(0);
    let most_preferred = preferred.iter().copied().max().unwrap_or(0);
    let total = |index: usize, info: &NodeInfo| {
        let taints = FULL - share(disliked[index], most_disliked);
        let affinity = share(preferred[index], most_preferred);
        3 * taints + 2 * affinity + least_allocated(demand, info) + balanced(demand, info)
    };
    let scored = nodes.iter().enumerate().map(|(index, info)| (total(index, info), info));
    let best = scored.max_by(|(left_score, left), (right_score, right)| {
        left_score
            .cmp(right_score)
            .then_with(|| right.pod_count().cmp(&left.pod_count()))
            .then_with(|| right.name().cmp(left.name()))
    });
    best.map(|(_, info)| info.name().to_owned())
}

/// `value` as a part of `most`, on a scale to 100.
fn share(value: i64, most: i64) -> i64 {
    if most <= 0 { 0 } else { value * FULL / most }
}

/// Taints that say "rather not" and are not tolerated.
fn disliked_taints(demand: &Demand<'_>, info: &NodeInfo) -> i64 {
    let tolerations = object::pod_tolerations(demand.pod);
    let disliked = object::node_taints(info.node())
        .iter()
        .filter(|taint| taint.effect == "PreferNoSchedule")
        .filter(|taint| !tolerations.iter().any(|toleration| object::tolerates(toleration, taint)));
    i64::from(object::count(disliked.count()))
}

/// The sum of the weights of matching preferred node-affinity terms.
fn preference(demand: &Demand<'_>, info: &NodeInfo) -> i64 {
    let terms = demand
        .node_affinity()
        .and_then(|affinity| affinity.preferred_during_scheduling_ignored_during_execution.as_ref());
    terms
        .into_iter()
        .flatten()
        .filter(|term| selector::node_term_matches(&term.preference, info.node()))
        .map(|term| i64::from(term.weight))
        .sum()
}

/// The free part of CPU and memory after placing the pod.
fn least_allocated(demand: &Demand<'_>, info: &NodeInfo) -> i64 {
    let free = |offered: i64, taken: i64| share((offered - taken).max(0), offered);
    let offered = info.allocatable();
    let cpu = free(offered.milli_cpu, info.scored().milli_cpu.saturating_add(demand.scored.milli_cpu));
    let memory = free(offered.memory, info.scored().memory.saturating_add(demand.scored.memory));
    i64::midpoint(cpu, memory)
}

/// How evenly CPU and memory would be used: 100 minus the deviation of their shares.
fn balanced(demand: &Demand<'_>, info: &NodeInfo) -> i64 {
    let used = |offered: i64, taken: i64| share(taken.min(offered), offered);
    let offered = info.allocatable();
    let taken = info.requested();
    let cpu = used(offered.milli_cpu, taken.milli_cpu.saturating_add(demand.requested.milli_cpu));
    let memory = used(offered.memory, taken.memory.saturating_add(demand.requested.memory));
    FULL - (cpu - memory).abs() / 2
}
