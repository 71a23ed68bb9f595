//! What a container's memory gets beside its limit: swap, throttling, and how the kernel ends it. Pure.
//!
//! Formulas: KEP 2400 (swap) and KEP 2570 (`memory.high`), as a kubelet 1.36 applies them.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod};

use crate::eviction::is_critical;
use crate::qos::QosClass;
use crate::resources::{Side, amount, request};

/// What the kernel rounds `memory.high` to.
const PAGE: u64 = 4096;
/// Unit of [`MemoryRules::throttling`].
const MILLION: u128 = 1_000_000;

/// `memorySwap.swapBehavior`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SwapBehavior {
    /// Containers do not swap.
    #[default]
    NoSwap,
    /// Those of Burstable pods may, in proportion to what they request.
    LimitedSwap,
}

/// Settings and facts of the node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryRules {
    /// There are no version 1 cgroups.
    pub unified: bool,
    /// The kernel counts swap per cgroup.
    pub swap_controller: bool,
    /// What is configured.
    pub swap: SwapBehavior,
    /// Swap of the node in bytes.
    pub swap_capacity: u64,
    /// The kernel ends all of a container's processes, or the one that it picks.
    pub kill_together: bool,
    /// How much of the way from request to limit a container goes before it is slowed down, in millionths; `None`: it never
    /// is.
    pub throttling: Option<u32>,
    /// What all pods may use, for containers without a limit.
    pub allocatable: Option<u64>,
}

/// What one container gets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ContainerMemory {
    /// Version 1: memory and swap together.
    pub with_swap: Option<u64>,
    /// memory.swap.max.
    pub swap_max: Option<u64>,
    /// memory.high.
    pub high: Option<u64>,
    /// memory.oom.group.
    pub kill_together: bool,
}

impl ContainerMemory {
    /// Values for a container of `pod` on a node with so much memory.
    pub fn of(pod: &Pod, container: &Container, rules: &MemoryRules, node_memory: u64) -> Self {
        let limit = positive(amount(container.resources.as_ref(), Side::Limits, "memory"));
        if !rules.unified {
            // Nobody swaps where swap cannot be told from memory; without swap there is nothing to forbid.
            let counts = rules.swap_controller && rules.swap_capacity > 0;
            return Self { with_swap: limit.filter(|_| counts), ..Self::default() };
        }
        let wanted = positive(Some(request(container, "memory"))).unwrap_or(0);
        let swaps = rules.swap == SwapBehavior::LimitedSwap && may_swap(pod, limit, wanted);
        let swap = if swaps { share(rules.swap_capacity, wanted, node_memory) } else { 0 };
        Self {
            with_swap: None,
            swap_max: rules.swap_controller.then_some(swap),
            high: rules.throttling.and_then(|part| high(wanted, limit, rules.allocatable, part)),
            kill_together: rules.kill_together,
        }
    }

    /// The files of version 2 that have no field in the CRI.
    pub fn files(&self) -> BTreeMap<String, String> {
        let together = self.kill_together.then_some(1);
        [("memory.swap.max", self.swap_max), ("memory.high", self.high), ("memory.oom.group", together)]
            .into_iter()
            .filter_map(|(file, value)| Some((file.to_owned(), value?.to_string())))
            .collect()
    }
}

/// Only containers of Burstable pods that ask for less than they may have; the node's own pods must not become slow.
fn may_swap(pod: &Pod, limit: Option<u64>, wanted: u64) -> bool {
    let class = pod.spec.as_ref().map_or(QosClass::BestEffort, QosClass::of);
    class == QosClass::Burstable && !is_critical(pod) && wanted > 0 && limit != Some(wanted)
}

/// The part of `whole` that `part` is of `of`.
fn share(whole: u64, part: u64, of: u64) -> u64 {
    let share = u128::from(whole) * u128::from(part) / u128::from(of.max(1));
    u64::try_from(share).unwrap_or(u64::MAX).min(whole)
}

/// request + throttling × (limit − request), whole pages; `None` where that is no more than the request.
fn high(wanted: u64, limit: Option<u64>, allocatable: Option<u64>, part: u32) -> Option<u64> {
    if limit == Some(wanted) {
        return None;
    }
    let most = limit.or(allocatable)?;
    let way = u128::from(most.saturating_sub(wanted)) * u128::from(part) / MILLION;
    let high = wanted.saturating_add(u64::try_from(way).ok()?) / PAGE * PAGE;
    (high > wanted).then_some(high)
}

fn positive(amount: Option<i64>) -> Option<u64> {
    amount.and_then(|amount| u64::try_from(amount).ok()).filter(|amount| *amount > 0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const GIB: u64 = 1 << 30;

    fn rules() -> MemoryRules {
        MemoryRules {
            unified: true,
            swap_controller: true,
            swap: SwapBehavior::LimitedSwap,
            swap_capacity: 4 * GIB,
            ..MemoryRules::default()
        }
    }

    fn memory(priority: i32, resources: &serde_json::Value, rules: &MemoryRules) -> ContainerMemory {
        let pod: Pod = serde_json::from_value(json!({"spec": {"priority": priority,
            "containers": [{"name": "a", "resources": resources}]}}))
        .expect("a pod");
        let container = &pod.spec.as_ref().expect("a spec").containers[0];
        ContainerMemory::of(&pod, container, rules, 80 * GIB)
    }

    #[test]
    fn swap_is_shared_by_request_among_burstable_pods() {
        let burstable = json!({"requests": {"memory": "1Gi"}});
        let guaranteed = json!({"limits": {"cpu": "1", "memory": "1Gi"}});
        let equal = json!({"requests": {"memory": "1Gi"}, "limits": {"memory": "1Gi"}});
        for (priority, resources, swap) in [
            (0, &burstable, 53_687_091),
            (0, &json!({"requests": {"memory": "1Gi"}, "limits": {"memory": "2Gi"}}), 53_687_091),
            (0, &guaranteed, 0),
            (0, &equal, 0),
            (0, &json!({}), 0),
            (0, &json!({"requests": {"cpu": "1"}}), 0),
            (2_000_000_000, &burstable, 0),
        ] {
            assert_eq!(memory(priority, resources, &rules()).swap_max, Some(swap), "{resources}");
        }
        let off = MemoryRules { swap: SwapBehavior::NoSwap, ..rules() };
        assert_eq!(memory(0, &burstable, &off).swap_max, Some(0));
        let uncounted = MemoryRules { swap_controller: false, ..rules() };
        assert_eq!(memory(0, &burstable, &uncounted), ContainerMemory::default());
    }

    #[test]
    fn version_1_never_swaps() {
        let limited = json!({"requests": {"memory": "1Gi"}, "limits": {"memory": "2Gi"}});
        let old = MemoryRules { unified: false, throttling: Some(900_000), ..rules() };
        let found = memory(0, &limited, &old);
        assert_eq!(found, ContainerMemory { with_swap: Some(2 * GIB), ..ContainerMemory::default() });
        assert_eq!(memory(0, &json!({"requests": {"memory": "1Gi"}}), &old), ContainerMemory::default());
        let swapless = MemoryRules { swap_capacity: 0, ..old };
        assert_eq!(memory(0, &limited, &swapless), ContainerMemory::default());
    }

    #[test]
    fn throttling_begins_on_the_way_to_the_limit() {
        let rules = MemoryRules {
            throttling: Some(900_000),
            allocatable: Some(10 * GIB),
            unified: true,
            ..MemoryRules::default()
        };
        let high = |resources: serde_json::Value| memory(0, &resources, &rules).high;
        let limited = json!({"requests": {"memory": "1Gi"}, "limits": {"memory": "2Gi"}});
        assert_eq!(high(limited), Some((GIB + GIB / 10 * 9) / 4096 * 4096));
        assert_eq!(high(json!({})), Some(9 * GIB), "of what pods may use");
        assert_eq!(high(json!({"limits": {"memory": "1Gi"}})), None, "the limit is the request");
    }

    #[test]
    fn values_have_the_names_of_their_files() {
        let values =
            ContainerMemory { with_swap: Some(1), swap_max: Some(0), high: None, kill_together: true };
        let files: Vec<(String, String)> = values.files().into_iter().collect();
        let pair = |file: &str, value: &str| (file.to_owned(), value.to_owned());
        assert_eq!(files, [pair("memory.oom.group", "1"), pair("memory.swap.max", "0")]);
    }
}
