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
    check(wanted, node)?;
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
    if !wanted.unified.is_empty() {
        let unified: HashMap<String, String> = wanted.unified.clone().into_iter().collect();
        resources.set_unified(Some(unified));
    }
    Ok(resources)
}

/// Refuses values that no kernel takes, and those this node would drop silently.
pub fn check(wanted: &LinuxContainerResources, node: &NodeFacts) -> Result<(), SpecError> {
    let lowest = [
        ("resources.cpu_period", wanted.cpu_period, 0),
        ("resources.cpu_quota", wanted.cpu_quota, -1),
        ("resources.cpu_shares", wanted.cpu_shares, 0),
        ("resources.memory_limit_in_bytes", wanted.memory_limit_in_bytes, -1),
        ("resources.memory_swap_limit_in_bytes", wanted.memory_swap_limit_in_bytes, -1),
    ];
    for (field, value, least) in lowest {
        if value < least {
            return Err(SpecError::Invalid { field, problem: format!("{value} is less than {least}") });
        }
    }
    let sets =
        [("resources.cpuset_cpus", &wanted.cpuset_cpus), ("resources.cpuset_mems", &wanted.cpuset_mems)];
    for (field, set) in sets {
        if !set.is_empty() && !is_set(set) {
            return Err(SpecError::Invalid { field, problem: format!("{set:?} is no list such as 0-3,7") });
        }
    }
    for limit in &wanted.hugepage_limits {
        if !is_page_size(&limit.page_size) {
            let problem = format!("page size {:?} is none such as 2MB", limit.page_size);
            return Err(SpecError::Invalid { field: "resources.hugepage_limits", problem });
        }
    }
    for (key, value) in &wanted.unified {
        let file = key.contains('.') && !key.contains(['/', '\0']) && !key.starts_with('.');
        if !file || value.contains('\0') {
            let problem = format!("{key:?} is no file of a cgroup");
            return Err(SpecError::Invalid { field: "resources.unified", problem });
        }
        if !node.cgroup_v2 {
            let problem = format!("{key}: this node has cgroups of version 1");
            return Err(SpecError::Unsupported { field: "resources.unified", problem });
        }
    }
    Ok(())
}

/// Whether a text is a list of numbers and ascending ranges.
fn is_set(text: &str) -> bool {
    let number = |text: &str| text.trim().parse::<u32>().ok();
    text.split(',').all(|part| match part.split_once('-') {
        None => number(part).is_some(),
        Some((first, last)) => number(first).zip(number(last)).is_some_and(|(first, last)| first <= last),
    })
}

/// Whether a text is a size as the names of hugetlb files have it: a number and KB, MB or GB.
fn is_page_size(text: &str) -> bool {
    ["KB", "MB", "GB"]
        .into_iter()
        .find_map(|unit| text.strip_suffix(unit))
        .is_some_and(|number| number.parse::<u32>().is_ok_and(|number| number > 0))
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

    #[test]
    fn impossible_limits_are_refused_by_name() {
        use cri_shim_api::v1::HugepageLimit;
        let plain = LinuxContainerResources::default;
        let v2 = NodeFacts { cgroup_v2: true, ..NodeFacts::default() };
        let unified = |key: &str| [(key.to_owned(), "1".to_owned())].into();
        let cases = [
            (LinuxContainerResources { cpu_period: -1, ..plain() }, "cpu_period"),
            (LinuxContainerResources { cpu_quota: -2, ..plain() }, "cpu_quota"),
            (LinuxContainerResources { cpu_shares: -1, ..plain() }, "cpu_shares"),
            (LinuxContainerResources { memory_limit_in_bytes: -5, ..plain() }, "memory_limit_in_bytes"),
            (LinuxContainerResources { cpuset_cpus: "0-".into(), ..plain() }, "cpuset_cpus"),
            (LinuxContainerResources { cpuset_mems: "3-1".into(), ..plain() }, "cpuset_mems"),
            (
                LinuxContainerResources {
                    hugepage_limits: vec![HugepageLimit { page_size: "2Mi".into(), limit: 1 }],
                    ..plain()
                },
                "hugepage_limits",
            ),
            (LinuxContainerResources { unified: unified("../x.y"), ..plain() }, "unified"),
        ];
        for (resources, field) in cases {
            let error = limits(&resources, &v2).unwrap_err().to_string();
            assert!(error.starts_with(&format!("resources.{field}")), "{field}: {error}");
        }
        let wanted = LinuxContainerResources { unified: unified("memory.high"), ..plain() };
        assert!(limits(&wanted, &NodeFacts::default()).unwrap_err().to_string().contains("version 1"));
        let json = serde_json::to_value(limits(&wanted, &v2).unwrap()).unwrap();
        assert_eq!(json["unified"]["memory.high"], "1");
    }

    #[test]
    fn every_field_arrives() {
        use cri_shim_api::v1::HugepageLimit;
        let wanted = LinuxContainerResources {
            cpu_period: 50_000,
            cpu_quota: 25_000,
            cpu_shares: 512,
            memory_limit_in_bytes: 64 << 20,
            memory_swap_limit_in_bytes: 96 << 20,
            oom_score_adj: 7,
            cpuset_cpus: "0-1,3".into(),
            cpuset_mems: "0".into(),
            hugepage_limits: vec![HugepageLimit { page_size: "2MB".into(), limit: 4 << 20 }],
            ..LinuxContainerResources::default()
        };
        let node = NodeFacts { hugetlb: true, swap_limits: true, ..NodeFacts::default() };
        let json = serde_json::to_value(limits(&wanted, &node).unwrap()).unwrap();
        let cpu = serde_json::json!(
            { "shares": 512, "quota": 25_000, "period": 50_000, "cpus": "0-1,3", "mems": "0" }
        );
        assert_eq!(json["cpu"], cpu);
        assert_eq!(json["memory"], serde_json::json!({ "limit": 64 << 20, "swap": 96 << 20 }));
        assert_eq!(json["hugepageLimits"], serde_json::json!([{ "pageSize": "2MB", "limit": 4 << 20 }]));
        let poor = serde_json::to_value(limits(&wanted, &NodeFacts::default()).unwrap()).unwrap();
        assert!(poor["memory"].get("swap").is_none() && poor.get("hugepageLimits").is_none());
    }
}
