//! Limits of CPU, memory, huge pages, and the OOM score.

use std::collections::HashMap;

use cri_shim_api::v1::LinuxContainerResources;
use oci_spec::runtime::{
    LinuxCpu, LinuxCpuBuilder, LinuxHugepageLimitBuilder, LinuxMemory, LinuxMemoryBuilder, LinuxResources,
    LinuxResourcesBuilder,
};

use super::{NodeFacts, SpecError};

/// The limits as the specification holds them; a field that is 0 or empty stays unset.
pub fn limits(wanted: &LinuxContainerResources, node: &NodeFacts) -> Result<LinuxResources, SpecError> {
    let mut resources = LinuxResourcesBuilder::default().build()?;
    resources.set_cpu(Some(cpu(wanted)?)).set_memory(Some(memory(wanted, node)?));
    if node.hugetlb && !wanted.hugepage_limits.is_empty() {
        let mut limits = Vec::new();
        for limit in &wanted.hugepage_limits {
            let bytes = i64::try_from(limit.limit).unwrap_or(i64::MAX);
            limits.push(
                LinuxHugepageLimitBuilder::default()
                    .page_size(limit.page_size.clone())
                    .limit(bytes)
                    .build()?,
            );
        }
        resources.set_hugepage_limits(Some(limits));
    }
    if node.cgroup_v2 && !wanted.unified.is_empty() {
        let unified: HashMap<String, String> = wanted.unified.clone().into_iter().collect();
        resources.set_unified(Some(unified));
    }
    Ok(resources)
}

/// The OOM score adjustment, as low as it may be set here.
pub fn oom_score(wanted: i64, node: &NodeFacts) -> i32 {
    let wanted = i32::try_from(wanted.clamp(-1000, 1000)).unwrap_or_default();
    wanted.max(node.lowest_oom_score)
}

/// What is in force after an update: what is given replaces, what is not stays.
pub fn merged(old: &LinuxContainerResources, update: &LinuxContainerResources) -> LinuxContainerResources {
    let number = |new: i64, old: i64| if new == 0 { old } else { new };
    let text = |new: &str, old: &str| if new.is_empty() { old.to_owned() } else { new.to_owned() };
    let mut unified = old.unified.clone();
    unified.extend(update.unified.clone());
    LinuxContainerResources {
        cpu_period: number(update.cpu_period, old.cpu_period),
        cpu_quota: number(update.cpu_quota, old.cpu_quota),
        cpu_shares: number(update.cpu_shares, old.cpu_shares),
        memory_limit_in_bytes: number(update.memory_limit_in_bytes, old.memory_limit_in_bytes),
        oom_score_adj: number(update.oom_score_adj, old.oom_score_adj),
        cpuset_cpus: text(&update.cpuset_cpus, &old.cpuset_cpus),
        cpuset_mems: text(&update.cpuset_mems, &old.cpuset_mems),
        hugepage_limits: if update.hugepage_limits.is_empty() {
            old.hugepage_limits.clone()
        } else {
            update.hugepage_limits.clone()
        },
        unified,
        memory_swap_limit_in_bytes: number(update.memory_swap_limit_in_bytes, old.memory_swap_limit_in_bytes),
    }
}

fn cpu(wanted: &LinuxContainerResources) -> Result<LinuxCpu, SpecError> {
    let mut cpu = LinuxCpuBuilder::default().build()?;
    if let Some(shares) = u64::try_from(wanted.cpu_shares).ok().filter(|shares| *shares > 0) {
        cpu.set_shares(Some(shares));
    }
    if wanted.cpu_quota != 0 {
        cpu.set_quota(Some(wanted.cpu_quota));
    }
    if let Some(period) = u64::try_from(wanted.cpu_period).ok().filter(|period| *period > 0) {
        cpu.set_period(Some(period));
    }
    if !wanted.cpuset_cpus.is_empty() {
        cpu.set_cpus(Some(wanted.cpuset_cpus.clone()));
    }
    if !wanted.cpuset_mems.is_empty() {
        cpu.set_mems(Some(wanted.cpuset_mems.clone()));
    }
    Ok(cpu)
}

fn memory(wanted: &LinuxContainerResources, node: &NodeFacts) -> Result<LinuxMemory, SpecError> {
    let mut memory = LinuxMemoryBuilder::default().build()?;
    if wanted.memory_limit_in_bytes != 0 {
        memory.set_limit(Some(wanted.memory_limit_in_bytes));
    }
    if node.swap_limits && wanted.memory_swap_limit_in_bytes != 0 {
        memory.set_swap(Some(wanted.memory_swap_limit_in_bytes));
    }
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unset_limits_stay_unset() {
        let limits = limits(&LinuxContainerResources::default(), &NodeFacts::default()).unwrap();
        let json = serde_json::to_value(&limits).unwrap();
        assert_eq!(json["cpu"], serde_json::json!({}));
        assert_eq!(json["memory"], serde_json::json!({}));
    }

    #[test]
    fn the_oom_score_is_raised_to_what_may_be_set() {
        let node = NodeFacts { lowest_oom_score: 0, ..NodeFacts::default() };
        assert_eq!(oom_score(-998, &node), 0);
        assert_eq!(oom_score(1000, &node), 1000);
        let free = NodeFacts { lowest_oom_score: -1000, ..NodeFacts::default() };
        assert_eq!(oom_score(-998, &free), -998);
    }

    #[test]
    fn an_update_keeps_what_it_does_not_mention() {
        let old = LinuxContainerResources { cpu_shares: 2, cpu_quota: 5, ..Default::default() };
        let update = LinuxContainerResources { cpu_shares: 512, ..Default::default() };
        let new = merged(&old, &update);
        assert_eq!((new.cpu_shares, new.cpu_quota), (512, 5));
    }
}
