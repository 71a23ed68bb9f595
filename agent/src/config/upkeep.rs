//! Settings of what keeps the node tidy, checked and in numbers: log rotation, image garbage, eviction. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use agent_core::eviction::{Threshold, ThresholdSettings, parse_thresholds};
use agent_core::images::ImagePolicy;
use control_api::quantity::Quantity;

use super::AgentConfig;

/// Log rotation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogRotationConfig {
    /// A log that is not smaller is rotated.
    pub max_size: u64,
    /// Files of one log.
    pub max_files: usize,
    /// Logs rotated at the same time.
    pub workers: usize,
    /// Pause between looks.
    pub interval: Duration,
}

/// Image garbage collection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageGcConfig {
    /// Percentages and ages.
    pub policy: ImagePolicy,
}

/// Eviction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EvictionConfig {
    /// Hard and soft ones.
    pub thresholds: Vec<Threshold>,
    /// How long a pressure is reported after it was last seen.
    pub transition: Duration,
    /// Longest grace for soft signals, in seconds.
    pub max_pod_grace: i64,
}

/// A log is looked at no more often.
const SHORTEST_LOG_INTERVAL: Duration = Duration::from_secs(3);

impl LogRotationConfig {
    /// Reads the settings; one sentence for each that cannot work.
    pub fn of(config: &AgentConfig) -> Result<Self, Vec<String>> {
        let mut problems = Vec::new();
        let size = Quantity::parse(&config.container_log_max_size).ok().map(Quantity::value);
        if size.is_none_or(|size| size <= 0) {
            let given = &config.container_log_max_size;
            problems.push(format!("containerLogMaxSize {given:?} is not a size above 0, as 10Mi"));
        }
        if config.container_log_max_files < 2 {
            let given = config.container_log_max_files;
            problems.push(format!("containerLogMaxFiles {given} must be 2 or more"));
        }
        if config.container_log_max_workers < 1 {
            let given = config.container_log_max_workers;
            problems.push(format!("containerLogMaxWorkers {given} must be 1 or more"));
        }
        let interval = config.container_log_monitor_interval.0;
        if interval < SHORTEST_LOG_INTERVAL {
            problems.push(format!("containerLogMonitorInterval {interval:?} must be 3s or longer"));
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let number = |value: i64| usize::try_from(value).unwrap_or(usize::MAX);
        Ok(Self {
            max_size: size.and_then(|size| u64::try_from(size).ok()).unwrap_or(u64::MAX),
            max_files: number(config.container_log_max_files),
            workers: number(config.container_log_max_workers),
            interval,
        })
    }
}

impl ImageGcConfig {
    /// Reads the settings; one sentence for each that cannot work.
    pub fn of(config: &AgentConfig) -> Result<Self, Vec<String>> {
        let mut problems = Vec::new();
        let mut percent = |field: &str, value: i64| {
            let found = u64::try_from(value).ok().filter(|value| *value <= 100);
            if found.is_none() {
                problems.push(format!("{field} {value} must be between 0 and 100"));
            }
            found.unwrap_or(100)
        };
        let high = percent("imageGCHighThresholdPercent", config.image_gc_high_threshold_percent);
        let low = percent("imageGCLowThresholdPercent", config.image_gc_low_threshold_percent);
        let (min_age, max_age) = (config.image_minimum_gc_age.0, config.image_maximum_gc_age.0);
        if problems.is_empty() && low >= high {
            problems.push(format!(
                "imageGCLowThresholdPercent {low} must be below imageGCHighThresholdPercent {high}"
            ));
        }
        if !max_age.is_zero() && max_age <= min_age {
            problems.push("imageMaximumGCAge must be longer than imageMinimumGCAge, or 0".to_owned());
        }
        let policy =
            ImagePolicy { high, low, min_age, max_age: Some(max_age).filter(|max_age| !max_age.is_zero()) };
        if problems.is_empty() { Ok(Self { policy }) } else { Err(problems) }
    }
}

impl EvictionConfig {
    /// Reads the settings; one sentence for each that cannot work.
    pub fn of(config: &AgentConfig) -> Result<Self, Vec<String>> {
        let grace: BTreeMap<String, Duration> = config
            .eviction_soft_grace_period
            .iter()
            .map(|(signal, grace)| (signal.clone(), grace.0))
            .collect();
        let thresholds = parse_thresholds(ThresholdSettings {
            hard: config.eviction_hard.as_ref(),
            soft: &config.eviction_soft,
            soft_grace: &grace,
            minimum_reclaim: &config.eviction_minimum_reclaim,
            merge_defaults: config.merge_default_eviction_settings,
            pods_enforced: config.enforces_pods(),
        })?;
        if config.eviction_max_pod_grace_period < 0 {
            let given = config.eviction_max_pod_grace_period;
            return Err(vec![format!("evictionMaxPodGracePeriod {given} must be 0 or more")]);
        }
        Ok(Self {
            thresholds,
            transition: config.eviction_pressure_transition_period.0,
            max_pod_grace: config.eviction_max_pod_grace_period,
        })
    }
}
