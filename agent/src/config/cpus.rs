//! Settings of the CPU manager.

use agent_core::cpus::{CpuSet, Options};

use super::AgentConfig;

/// Options of upstream that are known and not served.
const NOT_SERVED: &[&str] = &[
    "align-by-socket",
    "distribute-cpus-across-cores",
    "distribute-cpus-across-numa",
    "prefer-align-cpus-by-uncorecache",
];

impl AgentConfig {
    /// Options of the policy `static`.
    pub fn cpu_options(&self) -> Options {
        let is_on =
            |name: &str| self.cpu_manager_policy_options.get(name).is_some_and(|value| value == "true");
        Options {
            full_cores_only: is_on("full-pcpus-only"),
            strict_reservation: is_on("strict-cpu-reservation"),
        }
    }

    /// Thousandths of processors that `reservedSystemCPUs` names; it replaces what is reserved by amount.
    pub(super) fn reserved_by_name(&self) -> Option<u64> {
        let named: CpuSet = self.reserved_system_cpus.parse().ok()?;
        u64::try_from(named.len()).ok().filter(|count| *count > 0).map(|count| count * 1000)
    }

    pub(super) fn cpu_problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if let Err(error) = self.reserved_system_cpus.parse::<CpuSet>() {
            problems.push(format!("reservedSystemCPUs: {error}"));
        }
        if !matches!(self.cpu_manager_policy.as_str(), "" | "none" | "static") {
            problems.push(format!("cpuManagerPolicy {:?}: expected none or static", self.cpu_manager_policy));
        }
        for (name, value) in &self.cpu_manager_policy_options {
            let field = format!("cpuManagerPolicyOptions {name:?}");
            match name.as_str() {
                "full-pcpus-only" | "strict-cpu-reservation"
                    if matches!(value.as_str(), "true" | "false") => {}
                "full-pcpus-only" | "strict-cpu-reservation" => {
                    problems.push(format!("{field}: expected \"true\" or \"false\", found {value:?}"));
                }
                _ if NOT_SERVED.contains(&name.as_str()) => {
                    problems.push(format!("{field} is not supported"));
                }
                _ => problems.push(format!("{field}: expected full-pcpus-only or strict-cpu-reservation")),
            }
        }
        if self.cpu_manager_policy == "static" && self.reserved("cpu") == 0 {
            problems.push(
                "cpuManagerPolicy static needs processors for the system: reservedSystemCPUs, or cpu in kubeReserved or \
                 systemReserved"
                    .to_owned(),
            );
        }
        problems
    }
}
