//! Resize in place.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::super::super::case::{Case, case, holds, same};
use super::super::api::refusal;
use super::super::context::T;
use super::super::live::{Live, condition, container};
use super::resources::{CPU_LIMIT, with};

pub(super) fn cases() -> Vec<Case<T>> {
    let group = "Pod InPlace Resize Container";
    vec![
        case(group, "more CPU reaches the running container without a restart", more_cpu),
        case(group, "less CPU reaches the running container without a restart", less_cpu),
        case(group, "more memory reaches the running container without a restart", more_memory),
        case(
            group,
            "a policy of RestartContainer restarts the container with its new memory",
            restart_policy,
        ),
        case(group, "what the node can never give is Infeasible, and the container goes on", infeasible),
        case(group, "a change of the class of service is refused", other_class),
        case(group, "resources cannot be changed but through the subresource", other_way),
    ]
}

fn amounts(cpu: &str, memory: &str) -> Value {
    json!({"cpu": cpu, "memory": memory})
}

async fn started(t: &T, cpu: &str, memory: &str, policy: Value) -> Result<Live> {
    let pod = with(t.idle().always(), amounts(cpu, memory), amounts(cpu, memory));
    t.ready(pod.main(json!({"resizePolicy": policy}))).await
}

async fn resize(t: &T, live: &Live, requests: Value, limits: Value) -> Result<Value> {
    let patch = json!({"spec": {"containers": [{"name": "main", "resources": {"requests": requests, "limits": limits}}]}});
    t.api().patch(&format!("{}/resize", live.path()), &patch).await
}

/// Waits until the status tells these limits and no resize is under way.
async fn resized(live: &Live, limits: &Value) -> Result<Value> {
    let done = |pod: &Value| {
        container(pod, "main")["resources"]["limits"] == *limits
            && condition(pod, "PodResizeInProgress").is_null()
            && condition(pod, "PodResizePending").is_null()
    };
    live.until("the resize", done).await
}

async fn cpu_to(t: &T, from: &str, to: &str) -> Result<()> {
    let live = started(t, from, "32Mi", json!([])).await?;
    let (before, new) = (container(&live.ready().await?, "main")["containerID"].clone(), amounts(to, "32Mi"));
    resize(t, &live, new.clone(), new.clone()).await?;
    let pod = resized(&live, &new).await?;
    same("the container", &container(&pod, "main")["containerID"], &before)?;
    same("allocated", &container(&pod, "main")["allocatedResources"], &new)?;
    same("the limit inside", format!("{}m", live.exec(CPU_LIMIT).await?), to.to_owned())
}

async fn more_cpu(t: T) -> Result<()> {
    cpu_to(&t, "50m", "100m").await
}

async fn less_cpu(t: T) -> Result<()> {
    cpu_to(&t, "100m", "50m").await
}

const MEMORY: &str =
    "cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes";

async fn more_memory(t: T) -> Result<()> {
    let live = started(&t, "50m", "32Mi", json!([])).await?;
    let new = amounts("50m", "48Mi");
    resize(&t, &live, new.clone(), new.clone()).await?;
    let pod = resized(&live, &new).await?;
    same("restarts", &container(&pod, "main")["restartCount"], 0)?;
    same("the limit inside", live.exec(MEMORY).await?.as_str(), "50331648")
}

async fn restart_policy(t: T) -> Result<()> {
    let policy = json!([{"resourceName": "memory", "restartPolicy": "RestartContainer"}]);
    let live = started(&t, "50m", "32Mi", policy).await?;
    let new = amounts("50m", "48Mi");
    resize(&t, &live, new.clone(), new.clone()).await?;
    live.restarted("main", 1).await?;
    resized(&live, &new).await?;
    live.ready().await?;
    same("the limit inside", live.exec(MEMORY).await?.as_str(), "50331648")
}

async fn infeasible(t: T) -> Result<()> {
    let live = started(&t, "50m", "32Mi", json!([])).await?;
    let new = amounts("100000", "32Mi");
    resize(&t, &live, new.clone(), new).await?;
    let pending = |pod: &Value| condition(pod, "PodResizePending")["reason"] == "Infeasible";
    let pod = live.until("PodResizePending", pending).await?;
    same("the condition", &condition(&pod, "PodResizePending")["status"], "True")?;
    same("the limits", &container(&pod, "main")["resources"]["limits"], &amounts("50m", "32Mi"))?;
    same("restarts", &container(&pod, "main")["restartCount"], 0)?;
    // Taken back, it is forgotten.
    let old = amounts("50m", "32Mi");
    resize(&t, &live, old.clone(), old.clone()).await?;
    resized(&live, &old).await.map(drop)
}

async fn other_class(t: T) -> Result<()> {
    let live = started(&t, "50m", "32Mi", json!([])).await?;
    let refused =
        refusal("the resize", resize(&t, &live, amounts("20m", "32Mi"), amounts("50m", "32Mi")).await)?;
    same("the code", refused.code, 422)?;
    holds("the message", &refused.message, "Pod QOS Class may not change as a result of resizing")
}

async fn other_way(t: T) -> Result<()> {
    let live = started(&t, "50m", "32Mi", json!([])).await?;
    let change = json!({"spec": {"containers": [{"name": "main", "resources": {"limits": {"cpu": "60m"}}}]}});
    let refused = refusal("the change", live.patch(change).await)?;
    same("the code", refused.code, 422)?;
    ensure!(refused.message.contains("pod updates may not change fields other than"), "{}", refused.message);
    Ok(())
}
