//! Whether this node can take a pod at all. Pure.
//!
//! The scheduler has decided by its own picture; this is the node's last word, with upstream's reasons.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod, PodSpec};

use crate::eviction::is_critical;
use crate::qos::QosClass;
use crate::resources::{ResourceList, milli, pod_request, whole};

/// A refusal: the pod's phase becomes Failed with these.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// `OutOfcpu`, `NodeAffinity`, ….
    pub reason: String,
    /// For people.
    pub message: String,
}

/// Sysctls that every pod may set (namespaced and safe), as the API's documentation lists them.
const SAFE_SYSCTLS: [&str; 10] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
];

/// Admits `pod` beside `others`, the pods that hold resources now.
pub fn admit(
    pod: &Pod,
    node: &Node,
    others: &[Arc<Pod>],
    allowed_unsafe_sysctls: &[String],
) -> Result<(), Rejection> {
    let default = PodSpec::default();
    let spec = pod.spec.as_ref().unwrap_or(&default);
    check_os(spec)?;
    check_sysctls(spec, allowed_unsafe_sysctls)?;
    check_labels(spec, node.metadata.labels.as_ref())?;
    let allocatable = node.status.as_ref().and_then(|status| status.allocatable.as_ref());
    allocatable.map_or(Ok(()), |allocatable| check_resources(spec, allocatable, others))
}

/// The pods that must go so that a critical pod fits, by uid: never critical ones, the least important first, and no more
/// than needed. `None` when it does not fit even so.
pub fn victims(
    pod: &Pod,
    node: &Node,
    others: &[Arc<Pod>],
    allowed_unsafe_sysctls: &[String],
) -> Option<Vec<String>> {
    let rank = |other: &Arc<Pod>| {
        let spec = other.spec.as_ref();
        let class = spec.map_or(QosClass::BestEffort, QosClass::of);
        (
            spec.and_then(|spec| spec.priority).unwrap_or(0),
            std::cmp::Reverse(class),
            other.metadata.uid.clone(),
        )
    };
    let fits = |left: &[Arc<Pod>]| admit(pod, node, left, allowed_unsafe_sysctls).is_ok();
    let (mut left, mut candidates): (Vec<Arc<Pod>>, Vec<Arc<Pod>>) =
        others.iter().cloned().partition(|other| is_critical(other));
    if !fits(&left) {
        return None;
    }
    // The most important ones come back first, as long as the new pod fits beside them.
    candidates.sort_by_key(rank);
    let mut gone = Vec::new();
    for candidate in candidates.into_iter().rev() {
        left.push(Arc::clone(&candidate));
        if !fits(&left) {
            left.pop();
            gone.extend(candidate.metadata.uid.clone());
        }
    }
    Some(gone)
}

/// `wanted` matches a name or, ending in `*`, a prefix.
fn matches(pattern: &str, name: &str) -> bool {
    pattern.strip_suffix('*').map_or(pattern == name, |prefix| name.starts_with(prefix))
}

fn check_os(spec: &PodSpec) -> Result<(), Rejection> {
    match spec.os.as_ref().map(|os| os.name.as_str()) {
        None | Some("linux" | "") => Ok(()),
        Some(_) => Err(Rejection {
            reason: "PodOSNotSupported".to_owned(),
            message: "Failed to admit pod as the OS field doesn't match node OS".to_owned(),
        }),
    }
}

fn check_sysctls(spec: &PodSpec, allowed: &[String]) -> Result<(), Rejection> {
    let sysctls = spec.security_context.as_ref().and_then(|context| context.sysctls.as_deref());
    for sysctl in sysctls.unwrap_or_default() {
        let name = sysctl.name.replace('/', ".");
        let known =
            SAFE_SYSCTLS.contains(&name.as_str()) || allowed.iter().any(|pattern| matches(pattern, &name));
        let shared = spec.host_network.unwrap_or(false) && name.starts_with("net.");
        if !known || shared {
            return Err(Rejection {
                reason: "SysctlForbidden".to_owned(),
                message: format!("forbidden sysctl: {:?} not allowlisted", sysctl.name),
            });
        }
    }
    Ok(())
}

fn check_labels(spec: &PodSpec, labels: Option<&BTreeMap<String, String>>) -> Result<(), Rejection> {
    let fits = spec
        .node_selector
        .iter()
        .flatten()
        .all(|(key, value)| labels.and_then(|labels| labels.get(key)).is_some_and(|have| have == value));
    if fits {
        return Ok(());
    }
    Err(Rejection {
        reason: "NodeAffinity".to_owned(),
        message: "Pod was rejected: Predicate NodeAffinity failed: node(s) didn't match Pod's node \
                  affinity/selector"
            .to_owned(),
    })
}

fn check_resources(spec: &PodSpec, allocatable: &ResourceList, others: &[Arc<Pod>]) -> Result<(), Rejection> {
    let holders = || others.iter().filter_map(|other| other.spec.as_ref());
    let pods = allocatable.get("pods").and_then(whole).unwrap_or(i64::MAX);
    if i64::try_from(others.len()).unwrap_or(i64::MAX) >= pods {
        return Err(out_of("pods", 1, i64::try_from(others.len()).unwrap_or(i64::MAX), pods));
    }
    for (name, capacity) in allocatable {
        let wanted = pod_request(spec, name);
        let scale = if name == "cpu" { milli } else { whole };
        let Some(capacity) = scale(capacity).filter(|_| wanted > 0 && name != "pods") else { continue };
        let used: i64 = holders().map(|holder| pod_request(holder, name)).sum();
        if used.saturating_add(wanted) > capacity {
            return Err(out_of(name, wanted, used, capacity));
        }
    }
    Ok(())
}

fn out_of(resource: &str, requested: i64, used: i64, capacity: i64) -> Rejection {
    Rejection {
        reason: format!("OutOf{resource}"),
        message: format!(
            "Pod was rejected: Node didn't have enough resource: {resource}, requested: {requested}, used: {used}, \
             capacity: {capacity}"
        ),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(spec: serde_json::Value) -> Pod {
        let mut spec = spec;
        if spec.get("containers").is_none() {
            spec["containers"] = json!([]);
        }
        serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": spec})).expect("a pod")
    }

    #[track_caller]
    fn check(spec: serde_json::Value, others: usize, expected: Option<&str>) {
        let node: Node = serde_json::from_value(json!({"metadata": {"labels": {"disk": "ssd"}},
            "status": {"allocatable": {"cpu": "2", "memory": "1Gi", "pods": "3"}}}))
        .expect("a node");
        let other =
            Arc::new(pod(json!({"containers": [{"name": "a", "resources": {"requests": {"cpu": "900m"}}}]})));
        let result = admit(&pod(spec), &node, &vec![other; others], &["kernel.msg*".to_owned()]);
        assert_eq!(result.err().map(|rejection| rejection.reason).as_deref(), expected);
    }

    #[test]
    fn a_critical_pod_pushes_out_as_few_as_needed() {
        let node: Node =
            serde_json::from_value(json!({"status": {"allocatable": {"cpu": "2", "pods": "10"}}}))
                .expect("a node");
        let other = |uid: &str, cpu: &str, priority: i32| {
            let mut other = pod(json!({"priority": priority,
                "containers": [{"name": "a", "resources": {"requests": {"cpu": cpu}}}]}));
            other.metadata.uid = Some(uid.to_owned());
            Arc::new(other)
        };
        let others = [
            other("low", "500m", 0),
            other("high", "500m", 100),
            other("lower", "500m", -1),
            other("system", "500m", 2_000_000_000),
        ];
        let wanted =
            |cpu: &str| pod(json!({"containers": [{"name": "a", "resources": {"requests": {"cpu": cpu}}}]}));
        let victims = |cpu: &str| victims(&wanted(cpu), &node, &others, &[]);
        assert_eq!(victims("500m"), Some(vec!["lower".to_owned()]));
        assert_eq!(victims("1"), Some(vec!["low".to_owned(), "lower".to_owned()]));
        assert_eq!(victims("1501m"), None, "critical pods stay");
    }

    #[test]
    fn reasons_are_upstreams() {
        let cpu =
            |amount: &str| json!({"containers": [{"name": "a", "resources": {"requests": {"cpu": amount}}}]});
        check(cpu("200m"), 2, None);
        check(cpu("201m"), 2, Some("OutOfcpu"));
        check(json!({}), 3, Some("OutOfpods"));
        check(json!({"nodeSelector": {"disk": "hdd"}}), 0, Some("NodeAffinity"));
        check(json!({"os": {"name": "windows"}}), 0, Some("PodOSNotSupported"));
        let sysctl = |name: &str| json!({"securityContext": {"sysctls": [{"name": name, "value": "1"}]}});
        check(sysctl("kernel.shm_rmid_forced"), 0, None);
        check(sysctl("kernel.msgmax"), 0, None);
        check(sysctl("vm.swappiness"), 0, Some("SysctlForbidden"));
    }
}
