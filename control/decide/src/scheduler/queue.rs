//! Pods that wait for a node: active, backing off after a failure, or known not to fit for now.
//!
//! Highest priority first, then first come. A pod that fits nowhere sleeps until something changes in the
//! cluster that could help, at the latest for five minutes; failures back off from 1 s to 10 s.
//! Bounded by the number of pods without a node.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;

use crate::object;

const FIRST_BACKOFF: SignedDuration = SignedDuration::from_secs(1);
const LONGEST_BACKOFF: SignedDuration = SignedDuration::from_secs(10);
const LONGEST_SLEEP: SignedDuration = SignedDuration::from_mins(5);

/// Where a pod is on its way to a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Waits for its turn. Next: in flight.
    Active,
    /// Failed; becomes active at the given time.
    Backoff(Timestamp),
    /// Fits nowhere; becomes active when the cluster changes, or at the given time.
    Unschedulable(Timestamp),
    /// Being scheduled or bound. Next: gone, backing off or unschedulable.
    InFlight {
        /// The number of cluster changes when its attempt began.
        changes: u64,
    },
}

#[derive(Clone, Debug)]
struct Entry {
    pod: Arc<Pod>,
    place: Place,
    attempts: u32,
    last_attempt: Timestamp,
    serial: u64,
}

impl Entry {
    fn backoff_until(&self) -> Timestamp {
        let doublings = self.attempts.saturating_sub(1).min(8);
        let wait = FIRST_BACKOFF * 2_i32.pow(doublings);
        self.last_attempt + wait.min(LONGEST_BACKOFF)
    }

    fn order(&self) -> (Reverse<i32>, u64) {
        (Reverse(self.pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0)), self.serial)
    }
}

/// The waiting pods, by uid.
#[derive(Clone, Debug, Default)]
pub struct SchedulingQueue {
    entries: BTreeMap<String, Entry>,
    active: BTreeSet<(Reverse<i32>, u64, String)>,
    /// Times at which sleeping pods become active.
    timers: BTreeSet<(Timestamp, String)>,
    serial: u64,
    changes: u64,
}

impl SchedulingQueue {
    /// Adds a pod or takes over its new version; a changed spec or label may make it fit, so it need not
    /// sleep on.
    pub fn observe(&mut self, pod: Arc<Pod>) {
        let uid = object::uid(&pod.metadata).to_owned();
        let Some(entry) = self.entries.get_mut(&uid) else {
            self.serial += 1;
            let entry = Entry {
                pod,
                place: Place::Active,
                attempts: 0,
                last_attempt: Timestamp::UNIX_EPOCH,
                serial: self.serial,
            };
            self.entries.insert(uid.clone(), entry);
            self.set_place(&uid, Place::Active);
            return;
        };
        let changed = entry.pod.spec != pod.spec || entry.pod.metadata.labels != pod.metadata.labels;
        let place = entry.place;
        let order = entry.order();
        entry.pod = pod;
        if place == Place::Active && entry.order() != order {
            self.active.remove(&(order.0, order.1, uid.clone()));
            self.set_place(&uid, Place::Active);
        } else if changed && matches!(place, Place::Unschedulable(_)) {
            self.set_place(&uid, Place::Active);
        }
    }

    /// Forgets a pod: it is bound, gone, or no longer ours.
    pub fn remove(&mut self, uid: &str) {
        self.leave_place(uid);
        self.entries.remove(uid);
    }

    /// The next pod to schedule; it is in flight until [`Self::failed`], [`Self::unschedulable`] or
    /// [`Self::remove`] is called for it.
    pub fn pop(&mut self, now: Timestamp) -> Option<Arc<Pod>> {
        self.wake(now);
        let (_, _, uid) = self.active.first()?.clone();
        self.set_place(&uid, Place::InFlight { changes: self.changes });
        let entry = self.entries.get_mut(&uid)?;
        entry.attempts = entry.attempts.saturating_add(1);
        entry.last_attempt = now;
        Some(Arc::clone(&entry.pod))
    }

    /// The attempt failed for a reason outside the cluster's state (an API error): try again after a while.
    pub fn failed(&mut self, uid: &str) {
        if let Some(entry) = self.entries.get(uid) {
            self.set_place(uid, Place::Backoff(entry.backoff_until()));
        }
    }

    /// No node fits. The pod sleeps, unless the cluster changed during the attempt.
    pub fn unschedulable(&mut self, uid: &str, now: Timestamp) {
        let Some(entry) = self.entries.get(uid) else { return };
        let missed_change = match entry.place {
            Place::InFlight { changes } => changes != self.changes,
            _ => true,
        };
        let place = if missed_change {
            Place::Backoff(entry.backoff_until())
        } else {
            Place::Unschedulable(now + LONGEST_SLEEP)
        };
        self.set_place(uid, place);
    }

    /// Something changed that may let sleeping pods fit: they try again, after their back-off.
    pub fn cluster_changed(&mut self, now: Timestamp) {
        self.changes += 1;
        let sleeping =
            self.entries.iter().filter(|(_, entry)| matches!(entry.place, Place::Unschedulable(_)));
        let sleeping: Vec<_> = sleeping.map(|(uid, entry)| (uid.clone(), entry.backoff_until())).collect();
        for (uid, until) in sleeping {
            self.set_place(&uid, if until <= now { Place::Active } else { Place::Backoff(until) });
        }
    }

    /// When the next sleeping pod becomes active by itself.
    pub fn next_wake(&self) -> Option<Timestamp> {
        self.timers.first().map(|(at, _)| *at)
    }

    fn wake(&mut self, now: Timestamp) {
        while let Some((_, uid)) = self.timers.first().filter(|(at, _)| *at <= now).cloned() {
            self.set_place(&uid, Place::Active);
        }
    }

    fn leave_place(&mut self, uid: &str) {
        let Some(entry) = self.entries.get(uid) else { return };
        match entry.place {
            Place::Active => {
                let (priority, serial) = entry.order();
                self.active.remove(&(priority, serial, uid.to_owned()));
            }
            Place::Backoff(at) | Place::Unschedulable(at) => {
                self.timers.remove(&(at, uid.to_owned()));
            }
            Place::InFlight { .. } => {}
        }
    }

    fn set_place(&mut self, uid: &str, place: Place) {
        self.leave_place(uid);
        let Some(entry) = self.entries.get_mut(uid) else { return };
        entry.place = place;
        match place {
            Place::Active => {
                let (priority, serial) = entry.order();
                self.active.insert((priority, serial, uid.to_owned()));
            }
            Place::Backoff(at) | Place::Unschedulable(at) => {
                self.timers.insert((at, uid.to_owned()));
            }
            Place::InFlight { .. } => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::{api::core::v1::PodSpec, apimachinery::pkg::apis::meta::v1::ObjectMeta};

    use super::*;

    fn pod(uid: &str, priority: i32) -> Arc<Pod> {
        Arc::new(Pod {
            metadata: ObjectMeta { uid: Some(uid.into()), ..ObjectMeta::default() },
            spec: Some(PodSpec { priority: Some(priority), ..PodSpec::default() }),
            status: None,
        })
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).expect("in range")
    }

    fn popped(queue: &mut SchedulingQueue, second: i64) -> Option<String> {
        queue.pop(at(second)).map(|pod| object::uid(&pod.metadata).to_owned())
    }

    #[test]
    fn priority_comes_before_arrival() {
        let mut queue = SchedulingQueue::default();
        for (uid, priority) in [("a", 0), ("b", 10), ("c", 0)] {
            queue.observe(pod(uid, priority));
        }
        let order: Vec<_> = std::iter::from_fn(|| popped(&mut queue, 0)).collect();
        assert_eq!(order, ["b", "a", "c"]);
    }

    #[test]
    fn unschedulable_pods_sleep_until_the_cluster_changes() {
        let mut queue = SchedulingQueue::default();
        queue.observe(pod("a", 0));
        assert!(popped(&mut queue, 0).is_some());
        queue.unschedulable("a", at(0));
        assert_eq!(popped(&mut queue, 60), None);
        queue.cluster_changed(at(60));
        assert_eq!(popped(&mut queue, 60).as_deref(), Some("a"));
        queue.unschedulable("a", at(60));
        assert_eq!(popped(&mut queue, 60 + 299), None);
        assert_eq!(popped(&mut queue, 60 + 300).as_deref(), Some("a"), "no sleep is longer than 5 minutes");
    }

    #[test]
    fn a_change_during_the_attempt_is_not_missed() {
        let mut queue = SchedulingQueue::default();
        queue.observe(pod("a", 0));
        assert!(popped(&mut queue, 0).is_some());
        queue.cluster_changed(at(0));
        queue.unschedulable("a", at(0));
        assert_eq!(queue.next_wake(), Some(at(1)));
        assert_eq!(popped(&mut queue, 1).as_deref(), Some("a"));
    }

    #[test]
    fn failures_back_off_up_to_ten_seconds() {
        let mut queue = SchedulingQueue::default();
        queue.observe(pod("a", 0));
        let mut now = 0;
        for expected in [1, 2, 4, 8, 10, 10] {
            assert!(popped(&mut queue, now).is_some());
            queue.failed("a");
            assert_eq!(queue.next_wake(), Some(at(now + expected)));
            now += expected;
        }
        queue.remove("a");
        assert_eq!(queue.next_wake(), None);
    }
}
