//! From the hints of all resources to the nodes that suit them best.

use std::collections::BTreeSet;

use super::{Hint, Hints, Nodes, Policy, Rules, Verdict};

/// One hint of each resource, laid over each other.
type Merged = (Option<Nodes>, bool);

impl Rules {
    /// What the policy makes of the hints, one entry for each resource of each kind that the container asks for.
    pub fn merge(&self, hints: &[Hints]) -> Verdict {
        if self.policy == Policy::None {
            return Verdict { nodes: None, admitted: true };
        }
        let given: Vec<Vec<Hint>> = hints.iter().flatten().map(|hints| self.usable(hints)).collect();
        let (nodes, preferred) = self.best(&given);
        let admitted = preferred || self.policy == Policy::BestEffort;
        // From all nodes of a machine is from anywhere.
        let anywhere = self.policy == Policy::SingleNode && nodes == self.all();
        Verdict { nodes: (!anywhere).then_some(nodes), admitted }
    }

    /// The hints that the policy looks at. A resource that nothing can give is given from anywhere, which is not preferred.
    fn usable(&self, hints: &[Hint]) -> Vec<Hint> {
        let all = if hints.is_empty() { &[Hint { nodes: None, preferred: false }] } else { hints };
        let is_single = |hint: &&Hint| hint.preferred && hint.nodes.is_none_or(|nodes| nodes.len() == 1);
        let usable = all.iter().filter(|hint| self.policy != Policy::SingleNode || is_single(hint));
        usable.copied().collect()
    }

    /// The best of all ways to take one hint of each resource; the whole machine, not preferred, where there is none.
    fn best(&self, given: &[Vec<Hint>]) -> (Nodes, bool) {
        // Ways that have come to the same are one: there are as many as sets of nodes, not as combinations of hints.
        let mut ways: BTreeSet<Merged> = BTreeSet::from([(None, true)]);
        for hints in given {
            let next = ways.iter().flat_map(|way| hints.iter().map(move |hint| lay(*way, *hint)));
            ways = next.collect();
        }
        let enough = fewest_for_all(given);
        let candidates = ways.into_iter().map(|(nodes, preferred)| (nodes.unwrap_or(self.all()), preferred));
        let mut best: Option<(Nodes, bool)> = None;
        for candidate in candidates.filter(|(nodes, _)| !nodes.is_empty()) {
            if best.is_none_or(|best| self.is_better(candidate, best, enough)) {
                best = Some(candidate);
            }
        }
        best.unwrap_or((self.all(), false))
    }

    fn is_better(&self, candidate: (Nodes, bool), best: (Nodes, bool), enough: usize) -> bool {
        let (new, old) = (candidate.0.len(), best.0.len());
        match (candidate.1, best.1) {
            (true, false) => true,
            (false, true) => false,
            (true, true) => self.is_nearer(candidate.0, best.0),
            // Where nothing is preferred, as many nodes as the resource needs that needs most; else rather too many.
            (false, false) if old > enough || new == old => self.is_nearer(candidate.0, best.0),
            (false, false) if old == enough => false,
            (false, false) => new <= enough && new > old,
        }
    }

    fn is_nearer(&self, candidate: Nodes, best: Nodes) -> bool {
        if self.closest && candidate.len() == best.len() {
            let (new, old) = (self.spread(candidate), self.spread(best));
            if new != old {
                return new < old;
            }
        }
        candidate.is_narrower(best)
    }

    /// The sum of the distances between nodes; only compared between as many.
    fn spread(&self, nodes: Nodes) -> u64 {
        let from = nodes.iter().filter_map(|node| self.distances.get(&node));
        from.flat_map(|to| nodes.iter().filter_map(|node| to.get(&node))).sum()
    }
}

/// Lays another hint over what was laid before. Only where all are the same nodes is the result preferred.
fn lay((nodes, preferred): Merged, hint: Hint) -> Merged {
    let preferred = preferred && hint.preferred;
    match (nodes, hint.nodes) {
        (Some(one), Some(other)) => (Some(one.and(other)), preferred && one == other),
        (one, other) => (one.or(other), preferred),
    }
}

/// The nodes of the resource that needs most, each from as few as it can come from.
fn fewest_for_all(given: &[Vec<Hint>]) -> usize {
    let fewest = |hints: &Vec<Hint>| hints.iter().filter_map(|hint| hint.nodes).map(Nodes::len).min();
    given.iter().filter_map(fewest).max().unwrap_or(0)
}
