//! Limits and requests as containers feel them, classes of service, and what happens above the limits.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::super::super::case::{Case, case, holds, same, skip};
use super::super::context::{IDLE, T};
use super::super::live::container;
use super::super::pod::Pod;

const GROUP: &str = "Container resources";

pub(super) fn cases() -> Vec<Case<T>> {
    let qos = "Pods";
    vec![
        case(GROUP, "the CPU limit is the cgroup's quota", cpu_limit),
        case(GROUP, "the CPU request is the cgroup's share", cpu_request),
        case(GROUP, "the memory limit is the cgroup's", memory_limit),
        case(GROUP, "without limits there is none", no_limits),
        case(GROUP, "what uses more memory than its limit is OOMKilled", oom_killed),
        case(GROUP, "a child that uses too much memory ends its container, or itself alone", oom_child),
        case(GROUP, "a container that was OOMKilled is started again", oom_restarts),
        case(GROUP, "the limit of process ids of pods is kept", pids),
        case(GROUP, "status tells the resources that a container has", told),
        case(GROUP, "requests are limits where only limits are given", defaulted),
        case(GROUP, "a request above its limit is refused", above_limit),
        case(GROUP, "writing more than the ephemeral storage limit evicts the pod", ephemeral_storage),
        case(GROUP, "oom_score_adj is by class of service", oom_score),
        case(GROUP, "the cgroups of a pod are gone with it", cgroups_gone),
        case(qos, "equal requests and limits make the class Guaranteed", |t| {
            class(t, "64Mi", "64Mi", "Guaranteed")
        }),
        case(qos, "requests below limits make the class Burstable", |t| {
            class(t, "32Mi", "64Mi", "Burstable")
        }),
        case(qos, "an init container's resources count for the class", class_of_init),
    ]
}

/// A quantity of CPU in thousandths.
pub(super) fn milli(text: &str) -> u64 {
    match text.strip_suffix('m') {
        Some(thousandths) => thousandths.parse().unwrap_or_default(),
        None => text.parse::<u64>().unwrap_or_default() * 1000,
    }
}

/// A quantity of bytes.
pub(super) fn bytes(text: &str) -> u64 {
    let units = [("Ki", 10), ("Mi", 20), ("Gi", 30), ("Ti", 40)];
    let found = units.iter().find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, *shift)));
    let (number, shift) = found.unwrap_or((text, 0));
    number.parse::<u64>().unwrap_or_default() << shift
}

pub(super) fn with(pod: Pod, requests: Value, limits: Value) -> Pod {
    pod.main(json!({"resources": {"requests": requests, "limits": limits}}))
}

/// Prints a value of the container's cgroup: the file of version 2, or that of version 1.
fn cgroup_file(new: &str, old: &str) -> String {
    format!("cat /sys/fs/cgroup/{new} 2>/dev/null || cat /sys/fs/cgroup/{old}")
}

/// The CPU limit as a container sees it, in thousandths; nothing for none.
pub(super) const CPU_LIMIT: &str = "if test -e /sys/fs/cgroup/cpu.max; then set -- $(cat /sys/fs/cgroup/cpu.max); else d=/sys/fs/cgroup/cpu; \
    test -e $d || d=/sys/fs/cgroup/cpu,cpuacct; set -- $(cat $d/cpu.cfs_quota_us) $(cat $d/cpu.cfs_period_us); fi; \
    case $1 in max|-1) ;; *) echo $(($1 * 1000 / $2));; esac";

async fn cpu_limit(t: T) -> Result<()> {
    let output = t.output(with(t.pod(CPU_LIMIT), json!({"cpu": "10m"}), json!({"cpu": "250m"}))).await?;
    same("the quota in thousandths of a CPU", output.trim(), "250")
}

async fn cpu_request(t: T) -> Result<()> {
    let file = cgroup_file("cpu.weight", "cpu/cpu.shares");
    let small: u64 = t.output(with(t.pod(&file), json!({"cpu": "10m"}), json!({}))).await?.trim().parse()?;
    let large: u64 = t.output(with(t.pod(&file), json!({"cpu": "100m"}), json!({}))).await?.trim().parse()?;
    ensure!(large > small, "a request of 100m has share {large}, one of 10m {small}");
    if large > 90 {
        // Version 1 has upstream's numbers; those of version 2 are the runtime's conversion.
        same("the shares", (small, large), (10, 102))?;
    }
    Ok(())
}

async fn memory_limit(t: T) -> Result<()> {
    let script = cgroup_file("memory.max", "memory/memory.limit_in_bytes");
    let output = t.output(with(t.pod(&script), json!({}), json!({"memory": "64Mi"}))).await?;
    same("the limit", output.trim(), "67108864")
}

async fn no_limits(t: T) -> Result<()> {
    let script = format!("{CPU_LIMIT}; {}", cgroup_file("memory.max", "memory/memory.limit_in_bytes"));
    let output = t.output(t.pod(&script)).await?;
    let limit = output.trim();
    ensure!(
        limit == "max" || limit.parse::<u64>().is_ok_and(|bytes| bytes > 1 << 50),
        "the limits are {limit:?}"
    );
    Ok(())
}

/// Fills its memory.
const HOG: &str = "tail /dev/zero";

fn small(pod: Pod) -> Pod {
    with(pod, json!({}), json!({"memory": "20Mi"}))
}

async fn oom_killed(t: T) -> Result<()> {
    let live = t.run(small(t.pod("exec tail /dev/zero"))).await?;
    let state = live.terminated("main").await?;
    same("the reason", &state["reason"], "OOMKilled")?;
    same("the exit code", &state["exitCode"], 137)?;
    live.phase("Failed").await.map(drop)
}

async fn oom_child(t: T) -> Result<()> {
    let live = t.run(small(t.pod(&format!("{HOG}; echo went on; exit 5")))).await?;
    let state = live.terminated("main").await?;
    // cgroups of version 2 end all of a container, those of version 1 the one process.
    let whole = state["reason"] == "OOMKilled" && state["exitCode"] == 137;
    let alone = state["exitCode"] == 5 && live.log("").await?.contains("went on");
    ensure!(whole || alone, "the state is {state}");
    Ok(())
}

async fn oom_restarts(t: T) -> Result<()> {
    let live = t.run(small(t.pod("exec tail /dev/zero").always())).await?;
    let main = live.restarted("main", 1).await?;
    same("the last reason", &main["lastState"]["terminated"]["reason"], "OOMKilled")
}

async fn pids(t: T) -> Result<()> {
    let limit = super::kubelet::config(&t).await?["podPidsLimit"].as_i64().unwrap_or(-1);
    if !(1..=2000).contains(&limit) {
        return skip("the kubelet's podPidsLimit is not set, or too high to be reached");
    }
    let script = format!("i=0; while [ $i -lt {limit} ]; do sleep 60 & i=$((i+1)); done; echo all");
    let live = t.run(t.pod(&script)).await?;
    ensure!(live.terminated("main").await?["exitCode"] != 0, "more processes than {limit} were made");
    Ok(())
}

async fn told(t: T) -> Result<()> {
    let pod =
        with(t.idle(), json!({"cpu": "10m", "memory": "16Mi"}), json!({"cpu": "50m", "memory": "32Mi"}));
    let pod = t.ready(pod).await?.ready().await?;
    let main = container(&pod, "main");
    same("requests", &main["resources"]["requests"], &json!({"cpu": "10m", "memory": "16Mi"}))?;
    same("limits", &main["resources"]["limits"], &json!({"cpu": "50m", "memory": "32Mi"}))?;
    same("allocated", &main["allocatedResources"], &json!({"cpu": "10m", "memory": "16Mi"}))
}

async fn defaulted(t: T) -> Result<()> {
    let pod = t.idle().main(json!({"resources": {"limits": {"cpu": "50m", "memory": "32Mi"}}}));
    let pod = t.ready(pod).await?.ready().await?;
    let requests = &pod["spec"]["containers"][0]["resources"]["requests"];
    same("requests", requests, &json!({"cpu": "50m", "memory": "32Mi"}))?;
    same("the class", &pod["status"]["qosClass"], "Guaranteed")
}

async fn above_limit(t: T) -> Result<()> {
    let refused = t.refused(with(t.idle(), json!({"cpu": "100m"}), json!({"cpu": "50m"}))).await?;
    same("the code", refused.code, 422)?;
    holds("the message", &refused.message, "must be less than or equal to cpu limit")
}

async fn ephemeral_storage(t: T) -> Result<()> {
    let script = format!("head -c 6000000 /dev/zero > /tmp/file; {IDLE}");
    let live = t.run(with(t.pod(&script), json!({}), json!({"ephemeral-storage": "2Mi"}))).await?;
    let pod = live.failed("Evicted").await?;
    let message = pod["status"]["message"].as_str().unwrap_or_default();
    let container = "Container main exceeded its local ephemeral storage limit \"2Mi\". ";
    let whole = "Pod ephemeral local storage usage exceeds the total limit of containers 2Mi. ";
    ensure!(message == container || message == whole, "the message is {message:?}");
    Ok(())
}

async fn oom_score(t: T) -> Result<()> {
    let lowers = t.pod("echo -998 > /proc/self/oom_score_adj 2>/dev/null || echo refused");
    if t.output(lowers.main(json!({"securityContext": {"privileged": true}}))).await?.contains("refused") {
        return skip("the node's processes may not lower oom_score_adj: CAP_SYS_RESOURCE is missing");
    }
    let script = "cat /proc/self/oom_score_adj";
    let limits = json!({"cpu": "50m", "memory": "32Mi"});
    let guaranteed = t.output(with(t.pod(script), limits.clone(), limits)).await?;
    same("Guaranteed", guaranteed.trim(), "-997")?;
    same("BestEffort", t.output(t.pod(script)).await?.trim(), "1000")?;
    let burstable: i32 =
        t.output(with(t.pod(script), json!({"memory": "16Mi"}), json!({}))).await?.trim().parse()?;
    ensure!((3..=999).contains(&burstable), "Burstable is {burstable}");
    Ok(())
}

async fn cgroups_gone(t: T) -> Result<()> {
    let host = json!({"hostPath": {"path": "/sys/fs/cgroup"}});
    let mount = json!({"mountPath": "/v/cgroup", "readOnly": true});
    let looker = t.ready(t.idle().volume_at("cgroup", host, mount)).await?;
    let pod = t.ready(t.idle()).await?;
    let uid = &pod.uid;
    let find = format!(
        "find /v/cgroup -type d \\( -name '*{uid}*' -o -name '*{}*' \\) | grep -q .",
        uid.replace('-', "_")
    );
    looker.exec(&find).await?;
    pod.delete(1).await?;
    pod.gone().await?;
    looker.exec_until(&format!("! {find}")).await
}

async fn class(t: T, request: &str, limit: &str, wanted: &str) -> Result<()> {
    let pod =
        with(t.idle(), json!({"cpu": "50m", "memory": request}), json!({"cpu": "50m", "memory": limit}));
    let pod = t.ready(pod).await?.ready().await?;
    same("the class", &pod["status"]["qosClass"], wanted)
}

async fn class_of_init(t: T) -> Result<()> {
    let limits = json!({"cpu": "50m", "memory": "32Mi"});
    let pod = with(t.idle(), limits.clone(), limits.clone()).init(
        "first",
        "true",
        json!({"resources": {"limits": {"cpu": "50m"}}}),
    );
    let pod = t.ready(pod).await?.ready().await?;
    same("the class", &pod["status"]["qosClass"], "Burstable")
}
