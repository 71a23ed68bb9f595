//! `featureGates`: which names there are, and which of them are on. Pure.

use std::collections::BTreeMap;

use super::AgentConfig;
use super::gate_names::{ALPHA, BETA_OFF, BETA_ON, LOCKED_OFF, LOCKED_ON, SETTLED_OFF, SETTLED_ON};

/// Gates that the agent obeys; of all others it is only known that they are right.
const OBEYED: &[&str] = &[
    "AllAlpha",
    "AllBeta",
    "GracefulNodeShutdown",
    "GracefulNodeShutdownBasedOnPodPriority",
    "KubeletEnsureSecretPulledImages",
    "KubeletInUserNamespace",
    "LoggingAlphaOptions",
    "MemoryQoS",
    "NodeLogQuery",
    "ResourceHealthStatus",
    "RotateKubeletServerCertificate",
];

/// What a gate is without anybody's asking, and whether it may be another; `None`: there is no such gate.
fn default_of(name: &str) -> Option<(bool, bool)> {
    let groups = [
        (ALPHA, false, false),
        (BETA_ON, true, false),
        (BETA_OFF, false, false),
        (LOCKED_ON, true, true),
        (LOCKED_OFF, false, true),
        (SETTLED_ON, true, false),
        (SETTLED_OFF, false, false),
    ];
    let (_, is_on, is_locked) = groups.into_iter().find(|(names, ..)| names.contains(&name))?;
    Some((is_on, is_locked))
}

impl AgentConfig {
    /// Whether the feature of this gate is on.
    pub fn is_enabled(&self, name: &str) -> bool {
        let group = |all: &str| self.feature_gates.get(all).copied();
        let by_group = if ALPHA.contains(&name) {
            group("AllAlpha")
        } else if BETA_ON.contains(&name) || BETA_OFF.contains(&name) {
            group("AllBeta")
        } else {
            None
        };
        let default = default_of(name).is_some_and(|(is_on, _)| is_on);
        self.feature_gates.get(name).copied().or(by_group).unwrap_or(default)
    }

    /// Gates that are set to something else than usual, and change nothing here.
    pub(super) fn idle_gates(&self) -> Vec<String> {
        let is_idle = |(name, is_on): &(&String, &bool)| {
            let usual = default_of(name).is_some_and(|(usual, _)| usual == **is_on);
            !usual && !OBEYED.contains(&name.as_str())
        };
        self.feature_gates.iter().filter(is_idle).map(|(name, is_on)| format!("{name}={is_on}")).collect()
    }

    pub(super) fn gate_problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for (name, wanted) in &self.feature_gates {
            match default_of(name) {
                _ if matches!(name.as_str(), "AllAlpha" | "AllBeta") => {}
                None => problems.push(format!("featureGates: unrecognized feature gate: {name}")),
                Some((usual, true)) if usual != *wanted => problems.push(format!(
                    "featureGates: cannot set feature gate {name} to {wanted}, feature is locked to {usual}"
                )),
                Some(_) => {}
            }
        }
        if self.server_tls_bootstrap && !self.is_enabled("RotateKubeletServerCertificate") {
            problems.push(
                "serverTLSBootstrap true requires feature gate RotateKubeletServerCertificate".to_owned(),
            );
        }
        let periods = [self.shutdown_grace_period, self.shutdown_grace_period_critical_pods];
        if periods.iter().any(|period| !period.0.is_zero()) && !self.is_enabled("GracefulNodeShutdown") {
            problems.push(
                "specifying shutdownGracePeriod or shutdownGracePeriodCriticalPods requires feature gate \
                 GracefulNodeShutdown"
                    .to_owned(),
            );
        }
        let by_priority = "GracefulNodeShutdownBasedOnPodPriority";
        if !self.shutdown_grace_period_by_pod_priority.is_empty() && !self.is_enabled(by_priority) {
            problems.push(format!(
                "specifying shutdownGracePeriodByPodPriority requires feature gate {by_priority}"
            ));
        }
        problems
    }
}

/// What `--feature-gates` says: `A=true,B=false`.
pub fn parse(text: &str) -> Result<BTreeMap<String, bool>, String> {
    let pairs = text.split(',').map(str::trim).filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| {
            let (name, value) = pair.split_once('=').ok_or(format!("missing bool value for {pair}"))?;
            let is_on = match value.trim() {
                "true" | "True" | "TRUE" | "t" | "T" | "1" => true,
                "false" | "False" | "FALSE" | "f" | "F" | "0" => false,
                _ => return Err(format!("invalid value of {name}={value}, expected true or false")),
            };
            Ok((name.trim().to_owned(), is_on))
        })
        .collect()
}
