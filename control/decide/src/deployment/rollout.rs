//! The steps of a rollout: grow the new ReplicaSet, shrink the old ones.
//!
//! Every step is computed from reported availability, so that it is safe whatever the pods do next.

use k8s_openapi::api::apps::v1::ReplicaSet;

use super::{
    Context,
    replica_set::{actual_replicas, available_replicas, replicas, report_is_current, surely_available},
};
use crate::object;

impl<'a> Context<'a> {
    /// One step of a rolling update: either grow or shrink, never both.
    pub(super) fn roll_out_in_place(&mut self) {
        let Some(new) = self.new else {
            let size = self.size_of_new(0);
            return self.create_new(size);
        };
        let wanted = self.wanted_size_of_new(new);
        if wanted != replicas(new) {
            self.resize(new, wanted);
        } else if !self.shrink_old(new) && self.is_complete() {
            self.clean_up_history();
        }
    }

    /// One step of `Recreate`: old pods must be gone before the first new one starts.
    pub(super) fn roll_out_by_recreating(&mut self) {
        let mut shrunk = false;
        for set in self.old.clone() {
            shrunk |= replicas(set) > 0 && self.resize(set, 0);
        }
        if shrunk || self.old_pods_run() {
            return;
        }
        match self.new {
            None => self.create_new(self.sizes.desired),
            Some(new) if replicas(new) != self.sizes.desired => {
                self.resize(new, self.sizes.desired);
            }
            Some(_) if self.is_complete() => self.clean_up_history(),
            Some(_) => {}
        }
    }

    fn wanted_size_of_new(&self, new: &ReplicaSet) -> i32 {
        match replicas(new) {
            current if current >= self.sizes.desired => self.sizes.desired,
            current => self.size_of_new(current),
        }
    }

    /// The size the new ReplicaSet may have now, given its present one and all pods that exist.
    fn size_of_new(&self, current: i32) -> i32 {
        let room = self.sizes.most() - self.planned_total();
        current + room.clamp(0, (self.sizes.desired - current).max(0))
    }

    /// Shrinks the old ReplicaSets as far as availability allows: unhealthy pods first, since their loss
    /// costs nothing, then healthy ones. True when any size changes.
    fn shrink_old(&mut self, new: &ReplicaSet) -> bool {
        let old_total: i32 = self.old.iter().map(|set| replicas(set)).sum();
        if old_total == 0 {
            return false;
        }
        // Pods of the new ReplicaSet that are not available yet must not be counted on.
        let pending = replicas(new) - surely_available(new);
        let surplus = self.planned_total() - self.sizes.fewest_available() - pending;
        if surplus <= 0 {
            return false;
        }
        // What an outdated report calls unhealthy may serve by now.
        let unhealthy = self.shrink(surplus, |set, left| {
            if report_is_current(set) { (left - available_replicas(set)).max(0) } else { 0 }
        });
        // The controller may report before it removes: no more pods than the size are counted as available.
        let available: i32 =
            self.all().map(|set| surely_available(set).min(self.planned_replicas(set))).sum();
        let healthy = self.shrink(available - self.sizes.fewest_available(), |_, left| left);
        unhealthy || healthy
    }

    /// Takes at most `budget` pods from the old ReplicaSets, oldest first, and from each at most what
    /// `removable(set, its planned size)` says.
    fn shrink(&mut self, budget: i32, removable: impl Fn(&'a ReplicaSet, i32) -> i32) -> bool {
        let mut left = budget;
        for set in self.old.clone() {
            let size = self.planned_replicas(set);
            let taken = removable(set, size).min(left).min(size);
            if taken > 0 {
                self.resize(set, size - taken);
                left -= taken;
            }
        }
        left < budget
    }

    /// True while a pod of an old ReplicaSet may still run.
    fn old_pods_run(&self) -> bool {
        let reported: i32 = self.old.iter().map(|set| actual_replicas(set)).sum();
        reported > 0
            || self.pods.iter().any(|pod| {
                let of_new = self
                    .new
                    .is_some_and(|new| object::is_controlled_by(&pod.metadata, object::uid(&new.metadata)));
                !of_new && !object::is_pod_terminal(pod)
            })
    }
}
