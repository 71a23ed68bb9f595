//! Settings of the node's shutdown. Pure.

use agent_core::shutdown::{Group, groups};
use serde::{Deserialize, Serialize};

use super::{AgentConfig, GoDuration};

/// An entry of `shutdownGracePeriodByPodPriority`.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ShutdownGroup {
    /// The lowest priority of its pods.
    pub priority: i32,
    /// Seconds that they may take.
    pub shutdown_grace_period_seconds: i64,
}

impl AgentConfig {
    /// Which pods end together when the node goes down, and how long they may take; none: they are not waited for.
    pub fn shutdown_groups(&self) -> Vec<Group> {
        let by_priority = self
            .shutdown_grace_period_by_pod_priority
            .iter()
            .map(|group| Group { priority: group.priority, seconds: group.shutdown_grace_period_seconds });
        if !self.shutdown_grace_period_by_pod_priority.is_empty() {
            return by_priority.collect();
        }
        let seconds = |period: GoDuration| i64::try_from(period.0.as_secs()).unwrap_or(i64::MAX);
        groups(seconds(self.shutdown_grace_period), seconds(self.shutdown_grace_period_critical_pods))
    }

    pub(super) fn shutdown_problems(&self) -> Vec<String> {
        let (total, critical) = (self.shutdown_grace_period.0, self.shutdown_grace_period_critical_pods.0);
        let by_priority = &self.shutdown_grace_period_by_pod_priority;
        let mut problems = Vec::new();
        if critical > total {
            problems.push(format!(
                "shutdownGracePeriodCriticalPods {critical:?} must not be longer than shutdownGracePeriod {total:?}"
            ));
        }
        let second = std::time::Duration::from_secs(1);
        for (field, period) in [("shutdownGracePeriod", total), ("shutdownGracePeriodCriticalPods", critical)]
        {
            if !period.is_zero() && period < second {
                problems.push(format!("{field} {period:?} must be 0 or at least 1s"));
            }
        }
        let has_periods = !total.is_zero() || !critical.is_zero();
        if !by_priority.is_empty() && has_periods {
            problems.push(
                "shutdownGracePeriodByPodPriority and shutdownGracePeriod exclude each other".to_owned(),
            );
        }
        for (place, group) in by_priority.iter().enumerate() {
            let field = format!("shutdownGracePeriodByPodPriority[{place}]");
            if group.shutdown_grace_period_seconds < 0 {
                problems.push(format!("{field}.shutdownGracePeriodSeconds must be 0 or more"));
            }
            if by_priority.iter().take(place).any(|other| other.priority == group.priority) {
                problems.push(format!("{field}.priority {} is there twice", group.priority));
            }
        }
        problems
    }
}
