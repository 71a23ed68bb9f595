//! Graceful shutdown of the node: which pods end together, and how long they may take. Pure.
//!
//! Pods end in groups of rising priority: those that the others need last.

use std::collections::BTreeMap;

/// Priority from which a pod is critical: that of `system-cluster-critical`.
pub const CRITICAL: i32 = 2_000_000_000;

/// Reason of pods that the shutdown ended.
pub const TERMINATED: &str = "Terminated";
/// What they are told.
pub const TERMINATED_MESSAGE: &str = "Pod was terminated in response to imminent node shutdown.";
/// Reason of pods that come too late.
pub const REJECTED: &str = "NodeShutdown";
/// What they are told.
pub const REJECTED_MESSAGE: &str = "Pod was rejected as the node is shutting down.";

/// Pods from a priority on, and the seconds they have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Group {
    /// The lowest priority.
    pub priority: i32,
    /// Seconds.
    pub seconds: i64,
}

/// Groups of `shutdownGracePeriod` and `shutdownGracePeriodCriticalPods`, in seconds; none where the first is 0.
pub fn groups(total: i64, critical: i64) -> Vec<Group> {
    if total <= 0 {
        return Vec::new();
    }
    vec![Group { priority: 0, seconds: total - critical }, Group { priority: CRITICAL, seconds: critical }]
}

/// Pods (by anything, with their priority) in the order of their groups; groups without pods are left out.
pub fn order<T>(groups: &[Group], pods: Vec<(i32, T)>) -> Vec<(Group, Vec<T>)> {
    let mut sorted = groups.to_vec();
    sorted.sort_unstable();
    let mut members: BTreeMap<usize, Vec<T>> = BTreeMap::new();
    for (priority, pod) in pods {
        // Below the lowest there is no other group.
        let place = sorted.iter().rposition(|group| group.priority <= priority).unwrap_or(0);
        members.entry(place).or_default().push(pod);
    }
    members.into_iter().filter_map(|(place, pods)| Some((*sorted.get(place)?, pods))).collect()
}

/// The seconds that all groups together may take.
pub fn total(groups: &[Group]) -> i64 {
    groups.iter().map(|group| group.seconds.max(0)).sum()
}

/// Seconds that a pod of the group has: its own, unless the group has fewer.
pub fn grace(group: Group, own: Option<i64>) -> i64 {
    own.unwrap_or(30).min(group.seconds).max(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn critical_pods_end_last() {
        let pods = vec![(CRITICAL + 1000, "dns"), (-5, "batch"), (0, "web"), (100, "db")];
        let shown = order(&groups(30, 10), pods);
        let group = |priority, seconds| Group { priority, seconds };
        assert_eq!(shown, [(group(0, 20), vec!["batch", "web", "db"]), (group(CRITICAL, 10), vec!["dns"])]);
        assert!(groups(0, 0).is_empty());
        assert_eq!(order(&groups(30, 10), vec![(1, "a")]).len(), 1, "nobody waits for an empty group");
    }

    #[test]
    fn priorities_of_the_configuration_divide_the_pods() {
        let group = |priority, seconds| Group { priority, seconds };
        let list = [group(1000, 5), group(-10, 60), group(100, 20)];
        let pods = vec![(999, "b"), (1000, "c"), (-11, "lowest"), (50, "a")];
        assert_eq!(
            order(&list, pods),
            [(group(-10, 60), vec!["lowest", "a"]), (group(100, 20), vec!["b"]), (group(1000, 5), vec!["c"])]
        );
        assert_eq!(total(&list), 85);
        assert_eq!((grace(list[2], None), grace(list[2], Some(3)), grace(list[0], Some(60))), (20, 3, 5));
    }
}
