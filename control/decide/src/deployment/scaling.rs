//! Changes of `spec.replicas` in the middle of a rollout or while paused: every ReplicaSet that has pods
//! gets its share, so that the risk stays spread as it was.

use std::cmp::Reverse;

use k8s_openapi::api::apps::v1::ReplicaSet;

use super::{
    Context,
    history::{DESIRED_REPLICAS, MAX_REPLICAS, number_annotation},
    replica_set::{available_replicas, replicas},
};
use crate::object;

impl<'a> Context<'a> {
    /// True when a ReplicaSet was last sized for another number of desired pods.
    pub(super) fn is_scaling_event(&self) -> bool {
        self.all()
            .filter(|set| replicas(set) > 0)
            .filter_map(|set| number_annotation(set, DESIRED_REPLICAS))
            .any(|desired| desired != self.sizes.desired)
    }

    /// Sizes the ReplicaSets for the present `spec.replicas` without moving the rollout on.
    pub(super) fn scale(&mut self) {
        let active: Vec<&'a ReplicaSet> = self.all().filter(|set| replicas(set) > 0).collect();
        let only = match active.as_slice() {
            [] => self.new.or_else(|| self.old.last().copied()),
            [only] => Some(*only),
            _ => None,
        };
        if let Some(only) = only {
            self.resize(only, self.sizes.desired);
        } else if self.new.is_some_and(|new| self.is_saturated(new)) {
            for set in self.old.clone() {
                if replicas(set) > 0 {
                    self.resize(set, 0);
                }
            }
        } else if !active.is_empty() && !self.recreates() {
            self.scale_proportionally(active);
        }
    }

    /// True when the new ReplicaSet alone satisfies the Deployment.
    fn is_saturated(&self, new: &ReplicaSet) -> bool {
        number_annotation(new, DESIRED_REPLICAS) == Some(self.sizes.desired)
            && replicas(new) == self.sizes.desired
            && available_replicas(new) == self.sizes.desired
    }

    fn scale_proportionally(&mut self, mut active: Vec<&'a ReplicaSet>) {
        let total: i32 = active.iter().map(|set| replicas(set)).sum();
        let allowed = if self.sizes.desired > 0 { self.sizes.most() } else { 0 };
        let change = allowed - total;
        // The biggest take the remainder; among equals the newest grows and the oldest shrinks.
        active.sort_by_key(|set| object::created(&set.metadata));
        if change > 0 {
            active.reverse();
        }
        active.sort_by_key(|set| Reverse(replicas(set)));
        let mut spent = 0;
        let mut shares: Vec<i32> = Vec::with_capacity(active.len());
        for set in &active {
            let share = self.share(set, change, spent);
            spent += share;
            shares.push(share);
        }
        if let Some(first) = shares.first_mut() {
            *first += change - spent;
        }
        for (set, share) in active.into_iter().zip(shares) {
            self.resize(set, (replicas(set) + share).max(0));
        }
    }

    /// The part of `change` that falls to one ReplicaSet, by its weight before the change.
    fn share(&self, set: &ReplicaSet, change: i32, spent: i32) -> i32 {
        let left = change - spent;
        if change == 0 || left == 0 {
            return 0;
        }
        let fraction = self.fraction(set);
        if change > 0 { fraction.min(left) } else { fraction.max(left) }
    }

    fn fraction(&self, set: &ReplicaSet) -> i32 {
        let size = i64::from(replicas(set));
        if self.sizes.desired == 0 {
            return -replicas(set);
        }
        let reported = self.deployment.status.as_ref().and_then(|status| status.replicas).unwrap_or(0);
        let before = number_annotation(set, MAX_REPLICAS).filter(|most| *most > 0).unwrap_or(reported);
        if before <= 0 {
            return 0;
        }
        // Rounded to the nearest, halves up: (2ab + c) / 2c.
        let before = i64::from(before);
        let scaled = (2 * size * i64::from(self.sizes.most()) + before) / (2 * before);
        i32::try_from(scaled - size).unwrap_or(0)
    }
}
