//! What the configuration demands of the machine before anything runs.
//!
//! Inputs: the configuration and the machine. Output: demands that are not met; the agent does not start with one.

use std::fmt;
use std::path::Path;

use super::cgroups::{self, others};
use super::{kernel_memory, tunables};
use crate::config::AgentConfig;

/// A demand that is not met.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unmet {
    /// The field that demands it.
    pub field: &'static str,
    /// What is the case instead.
    pub found: String,
    /// How to mend it.
    pub mend: &'static str,
}

impl fmt::Display for Unmet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { field, found, mend } = self;
        write!(f, "{field}: {found}; {mend}")
    }
}

/// The machine, as far as demands are about it.
#[derive(Debug, Clone, Default)]
struct Facts {
    swaps: Vec<String>,
    unified: bool,
    tunables: Vec<String>,
    /// Cgroups that are to be limited and do not exist.
    missing_cgroups: Vec<String>,
}

/// Demands of `config` that this machine does not meet.
pub fn unmet(config: &AgentConfig) -> Vec<Unmet> {
    let deviations = tunables::deviations(Path::new(tunables::ROOT));
    let reserved = config.reserved_cgroups();
    unmet_by(
        config,
        &Facts {
            // Who cannot tell does not swap.
            swaps: kernel_memory::swaps().unwrap_or_default(),
            unified: cgroups::is_unified().unwrap_or(false),
            tunables: deviations.iter().map(ToString::to_string).collect(),
            missing_cgroups: reserved.iter().filter_map(|cgroup| others::missing(cgroup).err()).collect(),
        },
    )
}

fn unmet_by(config: &AgentConfig, facts: &Facts) -> Vec<Unmet> {
    let machine = &config.machine;
    let mut unmet = Vec::new();
    if machine.fail_swap_on && !facts.swaps.is_empty() {
        unmet.push(Unmet {
            field: "failSwapOn",
            found: format!(
                "running with swap on is not supported; /proc/swaps contains {}",
                facts.swaps.join(", ")
            ),
            mend: "swapoff -a, or set failSwapOn to false (and memorySwap.swapBehavior as you like)",
        });
    }
    if machine.fail_cgroup_v1 == Some(true) && !facts.unified {
        unmet.push(Unmet {
            field: "failCgroupV1",
            found: "kubelet is configured to not run on a host using cgroup v1".to_owned(),
            mend: "boot with systemd.unified_cgroup_hierarchy=1, or set it to false",
        });
    }
    if machine.single_process_oom_kill == Some(false) && !facts.unified {
        unmet.push(Unmet {
            field: "singleProcessOOMKill",
            found: "must not be explicitly set to false when using cgroup v1".to_owned(),
            mend: "leave it out",
        });
    }
    if machine.protect_kernel_defaults {
        unmet.extend(facts.tunables.iter().map(|found| Unmet {
            field: "protectKernelDefaults",
            found: found.clone(),
            mend: "set it with sysctl, or set protectKernelDefaults to false",
        }));
    }
    unmet.extend(facts.missing_cgroups.iter().map(|found| Unmet {
        field: "enforceNodeAllocatable",
        found: found.clone(),
        mend: "make the cgroup and put those processes into it that the reservation is for",
    }));
    unmet
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(extra: &str, facts: &Facts) -> Vec<&'static str> {
        let text = format!(
            "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n\
             keelson: {{nodeName: n, nodeIP: 10.0.0.1, kubeconfig: /x}}\n{extra}"
        );
        let config = AgentConfig::parse(Path::new("test"), &text).unwrap();
        unmet_by(&config, facts).into_iter().map(|unmet| unmet.field).collect()
    }

    #[test]
    fn demands_are_about_what_is_there() {
        let swapping = Facts { swaps: vec!["/swapfile".to_owned()], unified: true, ..Facts::default() };
        let old = Facts { tunables: vec!["invalid kernel flag".to_owned()], ..Facts::default() };
        assert_eq!(fields("", &swapping), ["failSwapOn"]);
        assert_eq!(
            fields("failSwapOn: false\nmemorySwap: {swapBehavior: LimitedSwap}\n", &swapping),
            [""; 0]
        );
        assert_eq!(
            fields("", &old),
            [""; 0],
            "cgroup v1 and other kernel settings are no reason by themselves"
        );
        assert_eq!(fields("failCgroupV1: true\n", &old), ["failCgroupV1"]);
        assert_eq!(fields("failCgroupV1: true\n", &Facts { unified: true, ..old.clone() }), [""; 0]);
        assert_eq!(fields("singleProcessOOMKill: false\n", &old), ["singleProcessOOMKill"]);
        assert_eq!(fields("protectKernelDefaults: true\n", &old), ["protectKernelDefaults"]);
    }
}
