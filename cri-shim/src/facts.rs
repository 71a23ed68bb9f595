//! What this node can do, found out once at start, and the list of it that is logged.

use std::path::Path;

use cri_shim_core::oci::NodeFacts;

use crate::host::cgroup::{Hierarchies, Roots};

/// Looks at the node.
pub fn find() -> anyhow::Result<(NodeFacts, Hierarchies, Roots)> {
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    let hierarchies = Hierarchies::from_mountinfo(&table);
    let (cgroup_v2, hugetlb, swap_limits) = match &hierarchies {
        Hierarchies::V1(controllers) => (
            false,
            controllers.contains_key("hugetlb"),
            hierarchies.root_has("memory", "memory.memsw.limit_in_bytes"),
        ),
        Hierarchies::V2(root) => {
            let controllers = std::fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
            let has = |name| controllers.split_ascii_whitespace().any(|controller| controller == name);
            (true, has("hugetlb"), has("memory") && Path::new("/proc/swaps").exists())
        }
    };
    let facts = NodeFacts {
        cgroup_v2,
        hugetlb,
        swap_limits,
        seccomp: Path::new("/proc/sys/kernel/seccomp/actions_avail").exists(),
        apparmor: std::fs::read_to_string("/sys/module/apparmor/parameters/enabled")
            .is_ok_and(|enabled| enabled.trim() == "Y"),
        // Loaded later: see `Runtime::open`.
        apparmor_default: false,
        selinux: Path::new("/sys/fs/selinux/enforce").exists(),
        // Each handler's own: see `Runtime::node_for`.
        recursive_readonly: false,
        lowest_oom_score: lowest_oom_score(),
        capabilities: capabilities(),
    };
    tell(&facts, &hierarchies);
    Ok((facts, hierarchies, Roots::from_mountinfo(&table)))
}

/// One line per finding, so that a bad node explains itself.
fn tell(facts: &NodeFacts, hierarchies: &Hierarchies) {
    let mode = if facts.cgroup_v2 { "v2" } else { "v1" };
    tracing::info!(cgroups = mode, swap_limits = facts.swap_limits, hugetlb = facts.hugetlb, "probe");
    if let Hierarchies::V1(controllers) = hierarchies
        && !controllers.contains_key("memory")
    {
        tracing::warn!("probe: no memory controller is mounted; memory limits and figures are missing");
    }
    tracing::info!(seccomp = facts.seccomp, apparmor = facts.apparmor, "probe");
    if facts.lowest_oom_score > -1000 {
        tracing::warn!(
            lowest = facts.lowest_oom_score,
            "probe: no CAP_SYS_RESOURCE; OOM scores are raised to what may be set"
        );
    }
}

/// Without CAP_SYS_RESOURCE no process can get a lower score than ours.
fn lowest_oom_score() -> i32 {
    if caps::has_cap(None, caps::CapSet::Effective, caps::Capability::CAP_SYS_RESOURCE).unwrap_or(false) {
        return -1000;
    }
    std::fs::read_to_string("/proc/self/oom_score_adj")
        .ok()
        .and_then(|score| score.trim().parse().ok())
        .unwrap_or(0)
}

/// What can be given to a container: what we have ourselves.
fn capabilities() -> Vec<String> {
    let mut names: Vec<String> = caps::read(None, caps::CapSet::Bounding)
        .unwrap_or_default()
        .iter()
        .map(|capability| capability.to_string().trim_start_matches("CAP_").to_owned())
        .collect();
    names.sort();
    names
}
