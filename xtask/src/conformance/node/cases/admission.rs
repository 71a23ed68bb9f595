//! What the node, or the API server, does not let through; sysctls, runtime classes and priorities.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::super::super::case::{Case, case, holds, same, skip};
use super::super::api::refusal;
use super::super::context::T;
use super::super::live::{condition, container};
use super::prints;
use super::resources::{milli, with};

pub(super) fn cases() -> Vec<Case<T>> {
    let (admission, sysctls, classes) = ("Pod admission", "Sysctls", "RuntimeClass");
    let (priority, scheduling) = ("Priority", "Scheduling");
    vec![
        case(admission, "more CPU than the node has is rejected as OutOfcpu", |t| out_of(t, "cpu", "100000")),
        case(admission, "more memory than the node has is rejected as OutOfmemory", |t| {
            out_of(t, "memory", "100Ti")
        }),
        case(
            admission,
            "more ephemeral storage than the node has is rejected as OutOfephemeral-storage",
            |t| out_of(t, "ephemeral-storage", "10000Ti"),
        ),
        case(admission, "a node selector that the node does not match is rejected", node_selector),
        case(admission, "a node affinity that the node does not match is rejected", node_affinity),
        case(admission, "a node affinity that the node matches is let through", node_affinity_fits),
        case(admission, "a pod for another operating system is rejected", other_system),
        case(admission, "what is rejected stays so, and can be deleted", stays_rejected),
        case(admission, "a container for which no processors are left is rejected", no_processors),
        case(admission, "a resource that nobody has is no reason of the node's", unknown_resource),
        prints(
            sysctls,
            "a safe sysctl is set in the pod",
            "cat /proc/sys/kernel/shm_rmid_forced",
            |pod| {
                pod.spec(json!({"securityContext": {"sysctls": [{"name": "kernel.shm_rmid_forced", "value": "1"}]}}))
            },
            "1",
        ),
        prints(
            sysctls,
            "a sysctl may be written with slashes",
            "cat /proc/sys/net/ipv4/ip_local_port_range",
            |pod| {
                pod.spec(json!({"securityContext": {"sysctls": [{"name": "net/ipv4/ip_local_port_range", "value": "40000 41000"}]}}))
            },
            "40000\t41000",
        ),
        case(sysctls, "an unsafe sysctl is rejected by the node", unsafe_sysctl),
        case(sysctls, "names that are none are refused", invalid_sysctls),
        case(sysctls, "a sysctl of the network is refused in the node's network", host_network_sysctl),
        case(classes, "a runtime class that does not exist is refused", no_class),
        case(classes, "a handler that the runtime does not know holds the pod back and is told", no_handler),
        case(classes, "the default handler's class runs", default_class),
        case(classes, "a class's overhead is the pod's", overhead),
        case(classes, "a class's node selector is the pod's", class_selector),
        case(priority, "a priority class gives its number", priority_number),
        case(priority, "a priority class that does not exist is refused", no_priority),
        case(priority, "a critical pod pushes out one of low priority", critical).serial(),
        case(scheduling, "a pod without a node is scheduled, and it is told", scheduled),
        case(scheduling, "what no node can take waits with the reason", unschedulable),
        case(scheduling, "a scheduling gate holds the pod until it is taken away", gated),
    ]
}

async fn out_of(t: T, resource: &str, amount: &str) -> Result<()> {
    let pod = with(t.idle(), json!({resource: amount}), json!({}));
    let live = t.run(pod).await?;
    let reason = format!("OutOf{resource}");
    let pod = live.failed(&reason).await?;
    let message = pod["status"]["message"].as_str().unwrap_or_default();
    holds("the message", message, &format!("Node didn't have enough resource: {resource}, requested: "))?;
    live.event(&reason, &format!("Node didn't have enough resource: {resource}, requested: ")).await.map(drop)
}

async fn rejected_for_labels(t: &T, spec: Value) -> Result<()> {
    let live = t.run(t.idle().spec(spec)).await?;
    let pod = live.failed("NodeAffinity").await?;
    let message = pod["status"]["message"].as_str().unwrap_or_default();
    holds("the message", message, "Predicate NodeAffinity failed")?;
    live.never("it ran", |pod| container(pod, "main")["state"]["running"].is_object())
}

async fn node_selector(t: T) -> Result<()> {
    rejected_for_labels(&t, json!({"nodeSelector": {"example.com/none": "x"}})).await
}

fn affinity(key: &str, operator: &str, values: Value) -> Value {
    let term = json!({"matchExpressions": [{"key": key, "operator": operator, "values": values}]});
    json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}}})
}

async fn node_affinity(t: T) -> Result<()> {
    rejected_for_labels(&t, affinity("example.com/none", "In", json!(["x"]))).await
}

async fn node_affinity_fits(t: T) -> Result<()> {
    let system = t.node_label("kubernetes.io/os");
    same("the node's label kubernetes.io/os", system, "linux")?;
    t.ready(t.idle().spec(affinity("kubernetes.io/os", "In", json!(["plan9", "linux"])))).await?;
    t.ready(t.idle().spec(affinity("example.com/none", "NotIn", json!(["x"])))).await.map(drop)
}

async fn other_system(t: T) -> Result<()> {
    let live = t
        .run(t.idle().spec(json!({"os": {"name": "windows"}, "automountServiceAccountToken": false})))
        .await?;
    live.failed("PodOSNotSupported").await.map(drop)
}

async fn stays_rejected(t: T) -> Result<()> {
    let live = t.run(with(t.idle(), json!({"cpu": "100000"}), json!({}))).await?;
    live.failed("OutOfcpu").await?;
    // A change of the object makes nothing good.
    live.patch(json!({"metadata": {"labels": {"a": "b"}}})).await?;
    let pod = live.until("the label", |pod| pod["metadata"]["labels"]["a"] == "b").await?;
    same("the phase", &pod["status"]["phase"], "Failed")?;
    live.delete(30).await?;
    live.gone().await
}

async fn no_processors(t: T) -> Result<()> {
    if super::kubelet::config(&t).await?["cpuManagerPolicy"] != "static" {
        return skip("the kubelet's cpuManagerPolicy is not static");
    }
    let fresh = t.api().get(&format!("/api/v1/nodes/{}", t.node())).await?;
    let all = milli(fresh["status"]["allocatable"]["cpu"].as_str().unwrap_or_default()) / 1000;
    let limits = json!({"cpu": all.to_string(), "memory": "32Mi"});
    // What shares the processors takes nothing of the node's sum that would be missed.
    let live = t.run(with(t.idle(), limits.clone(), limits)).await?;
    let pod = live.until("admitted or not", |pod| pod["status"]["phase"] != "Pending").await?;
    if pod["status"]["phase"] == "Running" {
        return skip("the node gives all of its processors away");
    }
    let reason = pod["status"]["reason"].as_str().unwrap_or_default();
    ensure!(["UnexpectedAdmissionError", "OutOfcpu"].contains(&reason), "the reason is {reason:?}");
    Ok(())
}

async fn unknown_resource(t: T) -> Result<()> {
    let one = json!({"example.com/none": "1"});
    t.ready(with(t.idle(), one.clone(), one)).await.map(drop)
}

fn sysctl(name: &str, value: &str) -> Value {
    json!({"securityContext": {"sysctls": [{"name": name, "value": value}]}})
}

async fn unsafe_sysctl(t: T) -> Result<()> {
    let allowed = super::kubelet::config(&t).await?;
    if allowed["allowedUnsafeSysctls"].as_array().is_some_and(|all| !all.is_empty()) {
        return skip("the kubelet allows unsafe sysctls");
    }
    let live = t.run(t.idle().spec(sysctl("kernel.msgmax", "65536"))).await?;
    let pod = live.failed("SysctlForbidden").await?;
    let message = pod["status"]["message"].as_str().unwrap_or_default();
    holds("the message", message, "forbidden sysctl: \"kernel.msgmax\" not allowlisted")?;
    live.event("SysctlForbidden", "forbidden sysctl: \"kernel.msgmax\" not allowlisted").await.map(drop)
}

async fn invalid_sysctls(t: T) -> Result<()> {
    for name in ["foo-", "bar..", "kernel.shm;x", ""] {
        let refused = t.refused(t.idle().spec(sysctl(name, "1"))).await?;
        same(name, refused.code, 422)?;
        holds("the message", &refused.message, "spec.securityContext.sysctls[0].name")?;
    }
    Ok(())
}

async fn host_network_sysctl(t: T) -> Result<()> {
    let spec = sysctl("net.ipv4.tcp_syncookies", "1");
    let made = t.run(t.idle().spec(spec).spec(json!({"hostNetwork": true}))).await;
    match made {
        // The API server of newer versions sees it first.
        Err(_) => {
            let refused = refusal("the pod", made.map(|live| live.name))?;
            holds("the message", &refused.message, "sysctl")
        }
        Ok(live) => live.failed("SysctlForbidden").await.map(drop),
    }
}

async fn no_class(t: T) -> Result<()> {
    let refused = t.refused(t.idle().spec(json!({"runtimeClassName": t.unique("none")}))).await?;
    same("the code", refused.code, 403)?;
    holds("the message", &refused.message, "RuntimeClass")?;
    holds("the message", &refused.message, "not found")
}

/// A runtime class of this case; its name.
async fn class(t: &T, handler: &str, more: Value) -> Result<String> {
    let name = t.unique("class");
    let mut object = json!({"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": name}, "handler": handler});
    if let (Some(object), Value::Object(more)) = (object.as_object_mut(), more) {
        object.extend(more);
    }
    t.make("/apis/node.k8s.io/v1/runtimeclasses", &object).await?;
    Ok(name)
}

/// A pod of a class that was just made: the node may learn of it a moment later.
fn of_class(t: &T, name: &str) -> super::super::pod::Pod {
    t.idle().spec(json!({"runtimeClassName": name}))
}

async fn no_handler(t: T) -> Result<()> {
    let name = class(&t, "no-such-handler", json!({})).await?;
    let live = t.run(of_class(&t, &name)).await?;
    live.event("FailedCreatePodSandBox", "no-such-handler").await?;
    live.never("it ran", |pod| container(pod, "main")["state"]["running"].is_object())
}

/// A handler of the node with a name.
fn named_handler(t: &T) -> Result<String> {
    let handlers = t.suite().node_object["status"]["runtimeHandlers"].as_array();
    let mut names = handlers.into_iter().flatten().filter_map(|handler| handler["name"].as_str());
    match names.find(|name| !name.is_empty()) {
        Some(name) => Ok(name.to_owned()),
        None => skip("the node's status names no runtime handler"),
    }
}

async fn default_class(t: T) -> Result<()> {
    let name = class(&t, &named_handler(&t)?, json!({})).await?;
    let live = t.ready(of_class(&t, &name)).await?;
    same("the hostname", live.exec("hostname").await?, live.name.clone())
}

async fn overhead(t: T) -> Result<()> {
    let fixed = json!({"cpu": "10m", "memory": "8Mi"});
    let name = class(&t, &named_handler(&t)?, json!({"overhead": {"podFixed": fixed}})).await?;
    let pod = t.ready(of_class(&t, &name)).await?.ready().await?;
    same("spec.overhead", &pod["spec"]["overhead"], &fixed)
}

async fn class_selector(t: T) -> Result<()> {
    let scheduling = json!({"scheduling": {"nodeSelector": {"kubernetes.io/os": "linux"}}});
    let name = class(&t, &named_handler(&t)?, scheduling).await?;
    let pod = t.ready(of_class(&t, &name)).await?.ready().await?;
    same("spec.nodeSelector", &pod["spec"]["nodeSelector"]["kubernetes.io/os"], "linux")
}

async fn priority_class(t: &T, value: i64) -> Result<String> {
    let name = t.unique("priority");
    let object = json!({"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": name}, "value": value});
    t.make("/apis/scheduling.k8s.io/v1/priorityclasses", &object).await?;
    Ok(name)
}

async fn priority_number(t: T) -> Result<()> {
    let name = priority_class(&t, 1234).await?;
    let pod = t.ready(t.idle().spec(json!({"priorityClassName": name}))).await?.ready().await?;
    same("spec.priority", &pod["spec"]["priority"], 1234)?;
    same("spec.preemptionPolicy", &pod["spec"]["preemptionPolicy"], "PreemptLowerPriority")
}

async fn no_priority(t: T) -> Result<()> {
    let refused = t.refused(t.idle().spec(json!({"priorityClassName": t.unique("none")}))).await?;
    same("the code", refused.code, 403)?;
    holds("the message", &refused.message, "no PriorityClass with name")
}

/// CPU of the node that no pod has asked for, in thousandths.
async fn free_cpu(t: &T) -> Result<u64> {
    let node = t.api().get(&format!("/api/v1/nodes/{}", t.node())).await?;
    let all = milli(node["status"]["allocatable"]["cpu"].as_str().unwrap_or_default());
    let pods = t.api().get(&format!("/api/v1/pods?fieldSelector=spec.nodeName%3D{}", t.node())).await?;
    let running = |pod: &&Value| !matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
    let asked = |pod: &Value| -> u64 {
        let containers = pod["spec"]["containers"].as_array().into_iter().flatten();
        containers.map(|one| milli(one["resources"]["requests"]["cpu"].as_str().unwrap_or("0"))).sum()
    };
    let used: u64 = pods["items"].as_array().into_iter().flatten().filter(running).map(asked).sum();
    all.checked_sub(used).context("more is asked for than there is")
}

async fn critical(t: T) -> Result<()> {
    let low = priority_class(&t, -1000).await?;
    let free = free_cpu(&t).await?;
    if free < 100 {
        return skip(format!("only {free}m of the node's CPU are free"));
    }
    let cpu = |amount: u64| json!({"cpu": format!("{amount}m")});
    let hog =
        t.ready(with(t.idle(), cpu(free - 20), json!({})).spec(json!({"priorityClassName": low}))).await?;
    let pod = with(t.idle(), cpu(60), json!({})).spec(json!({"priorityClassName": "system-node-critical"}));
    let live = t.run(pod).await?;
    let gone = hog.failed("Preempting").await?;
    holds(
        "the message",
        gone["status"]["message"].as_str().unwrap_or_default(),
        "Preempted in order to admit critical pod",
    )?;
    same("DisruptionTarget", &condition(&gone, "DisruptionTarget")["status"], "True")?;
    hog.event("Preempting", "Preempted in order to admit critical pod").await?;
    live.ready().await.map(drop)
}

fn scheduler(t: &T) -> super::super::pod::Pod {
    let here = json!({"nodeName": null, "nodeSelector": {"kubernetes.io/hostname": t.node_label("kubernetes.io/hostname")}});
    t.idle().spec(here)
}

async fn scheduled(t: T) -> Result<()> {
    let live = t.ready(scheduler(&t)).await?;
    let pod = live.ready().await?;
    same("the node", &pod["spec"]["nodeName"], t.node())?;
    let message = format!("Successfully assigned {}/{} to {}", live.namespace, live.name, t.node());
    live.event("Scheduled", &message).await.map(drop)
}

async fn unschedulable(t: T) -> Result<()> {
    let live = t.run(with(scheduler(&t), json!({"cpu": "100000"}), json!({}))).await?;
    let pod = live.until("the reason", |pod| condition(pod, "PodScheduled")["status"] == "False").await?;
    same("the reason", &condition(&pod, "PodScheduled")["reason"], "Unschedulable")?;
    live.event("FailedScheduling", "Insufficient cpu").await.map(drop)
}

async fn gated(t: T) -> Result<()> {
    let live = t.run(scheduler(&t).spec(json!({"schedulingGates": [{"name": "example.com/gate"}]}))).await?;
    let pod = live.until("the reason", |pod| condition(pod, "PodScheduled")["status"] == "False").await?;
    same("the reason", &condition(&pod, "PodScheduled")["reason"], "SchedulingGated")?;
    t.api().merge(&live.path(), &json!({"spec": {"schedulingGates": null}})).await?;
    live.ready().await.map(drop)
}
