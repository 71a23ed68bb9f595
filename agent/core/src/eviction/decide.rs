//! Which thresholds are met, which of them to act on, and which pressures the node reports.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;

use super::{Observation, Pressure, Signal, Threshold};

/// What is remembered between looks: since when thresholds are met, and when pressures were last seen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    /// By place in the list of thresholds.
    met_since: BTreeMap<usize, Timestamp>,
    last_seen: BTreeMap<Pressure, Timestamp>,
}

/// What to do now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Decision {
    /// What the node reports.
    pub pressures: BTreeSet<Pressure>,
    /// Thresholds to act on, the most urgent first.
    pub due: Vec<Threshold>,
    /// Look again then at the latest.
    pub wake_at: Option<Timestamp>,
}

impl State {
    /// Takes in what is left of each resource.
    pub fn decide(
        &mut self,
        thresholds: &[Threshold],
        observations: &BTreeMap<Signal, Observation>,
        transition: Duration,
        now: Timestamp,
    ) -> Decision {
        let mut decision = Decision::default();
        for (place, threshold) in thresholds.iter().enumerate() {
            let observed = observations.get(&threshold.signal);
            let was_met = self.met_since.contains_key(&place);
            if !observed.is_some_and(|observed| is_met(threshold, *observed, was_met)) {
                self.met_since.remove(&place);
                continue;
            }
            let since = *self.met_since.entry(place).or_insert(now);
            self.last_seen.insert(threshold.signal.pressure(), now);
            let due_at = since + to_signed(threshold.grace.unwrap_or_default());
            if due_at <= now {
                decision.due.push(threshold.clone());
            } else {
                decision.wake_at = Some(decision.wake_at.map_or(due_at, |known| known.min(due_at)));
            }
        }
        self.last_seen.retain(|_, seen| now.duration_since(*seen) < to_signed(transition) || *seen == now);
        decision.pressures = self.last_seen.keys().copied().collect();
        // Memory first: it runs out fastest. Then hard before soft.
        decision.due.sort_by_key(|threshold| (threshold.signal, threshold.grace.is_some()));
        decision
    }
}

/// A threshold that was met stays so until the minimum reclaim is free as well.
fn is_met(threshold: &Threshold, observed: Observation, was_met: bool) -> bool {
    let value = threshold.value.of(observed.capacity);
    let reclaim = threshold.reclaim.filter(|_| was_met).map_or(0, |reclaim| reclaim.of(observed.capacity));
    observed.available < value.saturating_add(reclaim)
}

fn to_signed(duration: Duration) -> jiff::SignedDuration {
    jiff::SignedDuration::try_from(duration).unwrap_or(jiff::SignedDuration::MAX)
}
