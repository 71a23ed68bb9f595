//! What a node can do whose kernel has more than the least: swap, huge pages, AppArmor. Nodes without are skipped.

use anyhow::{Result, ensure};
use serde_json::json;

use super::super::super::case::{Case, case, holds, same, skip};
use super::super::context::T;
use super::super::pod::Pod;
use super::resources::{bytes, with};

const RESOURCES: &str = "Container resources";
const SECURITY: &str = "Security Context";

pub(super) fn cases() -> Vec<Case<T>> {
    vec![
        case(
            RESOURCES,
            "a Burstable container may swap in proportion to its request, others not",
            swap_shares,
        ),
        case(RESOURCES, "huge pages are limited, and mounted where a volume asks for them", huge_pages),
        case(
            SECURITY,
            "AppArmor confines a container by the runtime's profile, unless told not to",
            apparmor,
        ),
        case(SECURITY, "an AppArmor profile that the node lacks is told", apparmor_missing),
    ]
}

/// Memory and swap of a node whose containers may swap.
async fn swap_of_node(t: &T) -> Result<(u64, u64)> {
    let config = super::kubelet::config(t).await?;
    if config["memorySwap"]["swapBehavior"] != "LimitedSwap" {
        return skip("the kubelet's memorySwap.swapBehavior is not LimitedSwap");
    }
    let status = &t.suite().node_object["status"];
    let swap = status["nodeInfo"]["swap"]["capacity"].as_u64().unwrap_or(0);
    if swap == 0 {
        return skip("the node has no swap");
    }
    Ok((bytes(status["capacity"]["memory"].as_str().unwrap_or_default()), swap))
}

const SWAP: &str = "cat /sys/fs/cgroup/memory.swap.max 2>/dev/null || echo none";

fn memory(pod: Pod, request: &str, limit: &str) -> Pod {
    // Without processors in both the class is not Guaranteed.
    let amounts = |memory: &str| json!({"cpu": "100m", "memory": memory});
    with(pod, amounts(request), amounts(limit))
}

async fn swap_shares(t: T) -> Result<()> {
    let (node, swap) = swap_of_node(&t).await?;
    let output = t.output(memory(t.pod(SWAP), "64Mi", "96Mi")).await?;
    let Ok(found) = output.trim().parse::<u64>() else {
        return skip(format!(
            "swap cannot be limited alone: the node's cgroups are of version 1 ({})",
            output.trim()
        ));
    };
    let wanted = u64::try_from(u128::from(swap) * (64 << 20) / u128::from(node.max(1)))?;
    // Whole pages, and what upstream's rounding makes of it.
    ensure!(found.abs_diff(wanted) <= 8192, "memory.swap.max is {found}, expected {wanted}");
    let guaranteed = t.output(memory(t.pod(SWAP), "64Mi", "64Mi")).await?;
    same("the swap of Guaranteed", guaranteed.trim(), "0")?;
    same("the swap of BestEffort", t.output(t.pod(SWAP)).await?.trim(), "0")
}

async fn huge_pages(t: T) -> Result<()> {
    let has =
        t.suite().node_object["status"]["allocatable"]["hugepages-2Mi"].as_str().unwrap_or("0").to_owned();
    if bytes(&has) < 8 << 20 {
        return skip(format!("the node has {has} of huge pages of 2 MiB"));
    }
    let amounts = json!({"cpu": "50m", "memory": "32Mi", "hugepages-2Mi": "4Mi"});
    let script = "cat /sys/fs/cgroup/hugetlb.2MB.max 2>/dev/null || \
                  cat /sys/fs/cgroup/hugetlb/hugetlb.2MB.limit_in_bytes; grep ' /v/huge ' /proc/mounts";
    let pod = with(t.pod(script), amounts.clone(), amounts);
    let output = t.output(pod.volume("huge", json!({"emptyDir": {"medium": "HugePages"}}))).await?;
    let (limit, mount) = output.trim().split_once('\n').unwrap_or_default();
    same("the limit", limit, "4194304")?;
    holds("the mount", mount, "hugetlbfs")?;
    holds("the mount", mount, "pagesize=2M")
}

fn confined(pod: Pod, profile: serde_json::Value) -> Pod {
    pod.main(json!({"securityContext": {"appArmorProfile": profile}}))
}

async fn need_apparmor(t: &T) -> Result<()> {
    let enabled =
        t.output(t.pod("cat /sys/module/apparmor/parameters/enabled 2>/dev/null || echo N")).await?;
    if enabled.trim() == "Y" { Ok(()) } else { skip("the node's kernel has no AppArmor") }
}

const PROFILE: &str = "cat /proc/self/attr/apparmor/current 2>/dev/null || cat /proc/self/attr/current";

async fn apparmor(t: T) -> Result<()> {
    need_apparmor(&t).await?;
    for pod in [t.pod(PROFILE), confined(t.pod(PROFILE), json!({"type": "RuntimeDefault"}))] {
        holds("the profile", &t.output(pod).await?, "(enforce)")?;
    }
    let free = confined(t.pod(PROFILE), json!({"type": "Unconfined"}));
    same("the profile", t.output(free).await?.trim_end_matches(['\0', '\n']), "unconfined")
}

async fn apparmor_missing(t: T) -> Result<()> {
    need_apparmor(&t).await?;
    let profile = json!({"type": "Localhost", "localhostProfile": "keelson-no-such-profile"});
    let live = t.run(confined(t.pod("true"), profile)).await?;
    holds("the message", &live.waiting("main", "CreateContainerError").await?, "keelson-no-such-profile")
}
