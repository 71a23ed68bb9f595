//! Whether this node can take a pod at all. Pure.
//!
//! The scheduler has decided by its own picture; this is the node's last word, with upstream's reasons.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodSpec};

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
    check_labels(spec, node)?;
    check_ports(spec, others)?;
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

fn check_labels(spec: &PodSpec, node: &Node) -> Result<(), Rejection> {
    let label = |key: &str| node.metadata.labels.as_ref()?.get(key).map(String::as_str);
    let selected = spec.node_selector.iter().flatten().all(|(key, value)| label(key) == Some(value));
    let affinity = spec.affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref());
    let required =
        affinity.and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref());
    let fits = required.is_none_or(|required| {
        required.node_selector_terms.iter().any(|term| term_fits(term, node.metadata.name.as_deref(), label))
    });
    if selected && fits {
        return Ok(());
    }
    Err(predicate("NodeAffinity", "node(s) didn't match Pod's node affinity/selector"))
}

/// All of a term's requirements hold; a term without any fits no node.
fn term_fits<'a>(
    term: &NodeSelectorTerm,
    name: Option<&str>,
    label: impl Fn(&str) -> Option<&'a str>,
) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    let field_holds = |wanted: &NodeSelectorRequirement| wanted.key == "metadata.name" && holds(wanted, name);
    !(expressions.is_empty() && fields.is_empty())
        && expressions.iter().all(|wanted| holds(wanted, label(&wanted.key)))
        && fields.iter().all(field_holds)
}

fn holds(wanted: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = wanted.values.as_deref().unwrap_or_default();
    let listed = value.is_some_and(|value| values.iter().any(|one| one == value));
    let number = |text: Option<&str>| text.and_then(|text| text.parse::<i64>().ok());
    let numbers = (number(value), number(values.first().map(String::as_str)));
    match wanted.operator.as_str() {
        "In" => listed,
        "NotIn" => !listed,
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => matches!(numbers, (Some(value), Some(limit)) if value > limit),
        "Lt" => matches!(numbers, (Some(value), Some(limit)) if value < limit),
        _ => false,
    }
}

/// A port of the node that a pod asks for: protocol, address and number.
type HostPort<'a> = (&'a str, &'a str, i32);

fn host_ports(spec: &PodSpec) -> impl Iterator<Item = HostPort<'_>> {
    let sidecars = spec.init_containers.iter().flatten();
    let sidecars = sidecars.filter(|container| container.restart_policy.as_deref() == Some("Always"));
    let ports = spec.containers.iter().chain(sidecars).flat_map(|container| container.ports.iter().flatten());
    ports.filter_map(|port| {
        let number = port.host_port.filter(|number| *number > 0)?;
        let address = port.host_ip.as_deref().filter(|address| !address.is_empty());
        Some((port.protocol.as_deref().unwrap_or("TCP"), address.unwrap_or("0.0.0.0"), number))
    })
}

fn check_ports(spec: &PodSpec, others: &[Arc<Pod>]) -> Result<(), Rejection> {
    let all = |address: &str| matches!(address, "0.0.0.0" | "::");
    let meet = |one: HostPort<'_>, other: HostPort<'_>| {
        one.0 == other.0 && one.2 == other.2 && (all(one.1) || all(other.1) || one.1 == other.1)
    };
    let taken = |port: HostPort<'_>| {
        let specs = others.iter().filter_map(|other| other.spec.as_ref());
        specs.flat_map(host_ports).any(|other| meet(port, other))
    };
    if host_ports(spec).any(taken) {
        return Err(predicate("NodePorts", "node(s) didn't have free ports for the requested pod ports"));
    }
    Ok(())
}

fn predicate(name: &str, why: &str) -> Rejection {
    Rejection {
        reason: name.to_owned(),
        message: format!("Pod was rejected: Predicate {name} failed: {why}"),
    }
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
    fn a_port_of_the_node_is_given_once() {
        let with = |port: serde_json::Value| pod(json!({"containers": [{"name": "a", "ports": [port]}]}));
        let node: Node = serde_json::from_value(json!({})).expect("a node");
        let others = [Arc::new(with(json!({"containerPort": 1, "hostPort": 80, "hostIP": "127.0.0.1"})))];
        let taken = |port: serde_json::Value| {
            admit(&with(port), &node, &others, &[]).err().map(|rejection| rejection.reason)
        };
        assert_eq!(taken(json!({"containerPort": 1, "hostPort": 80})).as_deref(), Some("NodePorts"));
        assert_eq!(taken(json!({"containerPort": 1, "hostPort": 80, "protocol": "UDP"})), None);
        assert_eq!(taken(json!({"containerPort": 1, "hostPort": 80, "hostIP": "192.0.2.1"})), None);
        assert_eq!(taken(json!({"containerPort": 80, "hostPort": 81})), None);
    }

    #[test]
    fn reasons_are_upstreams() {
        let cpu =
            |amount: &str| json!({"containers": [{"name": "a", "resources": {"requests": {"cpu": amount}}}]});
        check(cpu("200m"), 2, None);
        check(cpu("201m"), 2, Some("OutOfcpu"));
        check(json!({}), 3, Some("OutOfpods"));
        check(json!({"nodeSelector": {"disk": "hdd"}}), 0, Some("NodeAffinity"));
        let affinity = |key: &str, operator: &str, value: &str| {
            let term = json!({"matchExpressions": [{"key": key, "operator": operator, "values": [value]}]});
            json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution":
                {"nodeSelectorTerms": [term]}}}})
        };
        check(affinity("disk", "In", "ssd"), 0, None);
        check(affinity("disk", "NotIn", "ssd"), 0, Some("NodeAffinity"));
        check(affinity("none", "Exists", "x"), 0, Some("NodeAffinity"));
        check(affinity("none", "NotIn", "x"), 0, None);
        check(json!({"os": {"name": "windows"}}), 0, Some("PodOSNotSupported"));
        let sysctl = |name: &str| json!({"securityContext": {"sysctls": [{"name": name, "value": "1"}]}});
        check(sysctl("kernel.shm_rmid_forced"), 0, None);
        check(sysctl("kernel.msgmax"), 0, None);
        check(sysctl("vm.swappiness"), 0, Some("SysctlForbidden"));
    }
}
