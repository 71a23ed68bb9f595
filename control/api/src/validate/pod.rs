//! Pods and the pod templates of workloads.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{
    Errors,
    container::{self, Around, Role},
    metadata, names,
    path::Path,
    volume,
};
use crate::{
    status::FieldError,
    value::{flag, int, list, map, text},
};

/// Checks a pod.
pub(super) fn create(errors: &mut Errors, pod: &Value) {
    match pod.get("spec") {
        Some(found) if found.is_object() => spec(errors, &Path::new("spec"), found),
        _ => errors.required(&Path::new("spec").child("containers")),
    }
}

/// Checks a pod's spec, at `spec` or below a workload's template.
pub(super) fn spec(errors: &mut Errors, at: &Path<'_>, spec: &Value) {
    let volumes = volume::check(errors, &at.child("volumes"), spec);
    containers(errors, at, spec, &volumes);
    let restart = text(spec, "/restartPolicy");
    errors.one_of(&at.child("restartPolicy"), restart, &["Always", "Never", "OnFailure"]);
    let dns = text(spec, "/dnsPolicy");
    let policies = ["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"];
    errors.one_of(&at.child("dnsPolicy"), dns, &policies);
    if dns == "None" && list(spec, "/dnsConfig/nameservers").is_empty() {
        let why = "must provide at least one DNS nameserver when `dnsPolicy` is None";
        errors.push(FieldError::required(&at.child("dnsConfig").child("nameservers"), why));
    }
    errors.at_least_zero(
        &at.child("terminationGracePeriodSeconds"),
        int(spec, "/terminationGracePeriodSeconds"),
    );
    if let Some(seconds) = int(spec, "/activeDeadlineSeconds") {
        errors.in_range(&at.child("activeDeadlineSeconds"), seconds, 1, i64::from(i32::MAX));
    }
    metadata::labels(errors, &at.child("nodeSelector"), map(spec, "/nodeSelector"));
    tolerations(errors, &at.child("tolerations"), spec);
    for (key, rule) in NAMED_FIELDS {
        let found = spec.get(*key).and_then(Value::as_str).unwrap_or_default();
        if !found.is_empty() {
            errors.syntax(&at.child(key), found, rule(found));
        }
    }
    for (index, secret) in list(spec, "/imagePullSecrets").iter().enumerate() {
        if text(secret, "/name").is_empty() {
            errors.required(&at.child("imagePullSecrets").index(index).child("name"));
        }
    }
    security(errors, &at.child("securityContext"), spec);
}

type NameSyntax = fn(&str) -> Option<String>;

const NAMED_FIELDS: &[(&str, NameSyntax)] = &[
    ("nodeName", names::subdomain_1123),
    ("serviceAccountName", names::subdomain_1123),
    ("hostname", names::label_1123),
    ("subdomain", names::label_1123),
    ("priorityClassName", names::subdomain_1123),
    ("runtimeClassName", names::subdomain_1123),
];

fn containers(errors: &mut Errors, at: &Path<'_>, spec: &Value, volumes: &BTreeSet<&str>) {
    let lists = [
        ("containers", Role::Main),
        ("initContainers", Role::Init),
        ("ephemeralContainers", Role::Ephemeral),
    ];
    if list(spec, "/containers").is_empty() {
        errors.required(&at.child("containers"));
    }
    let mut seen = BTreeSet::new();
    let mut host_ports = BTreeSet::new();
    let targets = list(spec, "/containers").iter().chain(list(spec, "/initContainers"));
    let targets: BTreeSet<&str> = targets.map(|container| text(container, "/name")).collect();
    for (key, role) in lists {
        let at = at.child(key);
        for (index, found) in list(spec, &format!("/{key}")).iter().enumerate() {
            let at = at.index(index);
            errors.own_label(&at.child("name"), text(found, "/name"), &mut seen);
            container::check(errors, &at, found, &Around { role, volumes, targets: &targets });
            if role == Role::Main {
                host_port_clashes(errors, &at.child("ports"), found, &mut host_ports);
            }
        }
    }
}

fn host_port_clashes(
    errors: &mut Errors,
    at: &Path<'_>,
    container: &Value,
    taken: &mut BTreeSet<(String, String, i64)>,
) {
    for (index, port) in list(container, "/ports").iter().enumerate() {
        let Some(number) = int(port, "/hostPort").filter(|n| *n != 0) else { continue };
        let (protocol, address) = (text(port, "/protocol"), text(port, "/hostIP"));
        if !taken.insert((protocol.to_owned(), address.to_owned(), number)) {
            let shown = format!("{protocol}/{address}/{number}");
            errors.push(FieldError::duplicate(&at.index(index).child("hostPort"), shown));
        }
    }
}

fn tolerations(errors: &mut Errors, at: &Path<'_>, spec: &Value) {
    for (index, toleration) in list(spec, "/tolerations").iter().enumerate() {
        let at = at.index(index);
        let (key, operator) = (text(toleration, "/key"), text(toleration, "/operator"));
        let (value, effect) = (text(toleration, "/value"), text(toleration, "/effect"));
        if !key.is_empty() {
            for why in names::qualified_name(key) {
                errors.invalid(&at.child("key"), key, why);
            }
        }
        if key.is_empty() && operator != "Exists" {
            let why =
                "operator must be Exists when `key` is empty, which means \"match all values and all keys\"";
            errors.invalid(&at.child("operator"), operator, why);
        }
        if toleration.get("tolerationSeconds").is_some_and(|s| !s.is_null()) && effect != "NoExecute" {
            let why = "effect must be 'NoExecute' when `tolerationSeconds` is set";
            errors.invalid(&at.child("effect"), effect, why);
        }
        match operator {
            "" | "Equal" | "Lt" | "Gt" => {
                errors.syntax(&at.child("operator"), value, names::label_value(value));
            }
            "Exists" if !value.is_empty() => {
                errors.invalid(
                    &at.child("operator"),
                    operator,
                    "value must be empty when `operator` is 'Exists'",
                );
            }
            "Exists" => {}
            other => errors.one_of(&at.child("operator"), other, &["Equal", "Exists"]),
        }
        errors.one_of(&at.child("effect"), effect, &["NoSchedule", "PreferNoSchedule", "NoExecute"]);
    }
}

fn security(errors: &mut Errors, at: &Path<'_>, spec: &Value) {
    for key in ["runAsUser", "runAsGroup", "fsGroup"] {
        if let Some(id) = int(spec, &format!("/securityContext/{key}")) {
            errors.in_range(&at.child(key), id, 0, i64::from(i32::MAX));
        }
    }
    sysctls(errors, &at.child("sysctls"), spec);
    for kind in ["containers", "initContainers"] {
        for (index, found) in list(spec, &format!("/{kind}")).iter().enumerate() {
            let mount = text(found, "/securityContext/procMount");
            if mount == "Unmasked" && spec.get("hostUsers").and_then(Value::as_bool) != Some(false) {
                let place = format!("spec.{kind}[{index}].securityContext.procMount");
                errors.push(FieldError::invalid(place, mount, "`hostUsers` must be false to use `Unmasked`"));
            }
        }
    }
    let host_network = flag(spec, "/hostNetwork");
    for (index, found) in list(spec, "/containers").iter().enumerate().filter(|_| host_network) {
        for (at_port, port) in list(found, "/ports").iter().enumerate() {
            let (inner, outer) = (int(port, "/containerPort"), int(port, "/hostPort"));
            if outer.is_some() && inner != outer {
                let place = format!("spec.containers[{index}].ports[{at_port}].hostPort");
                let why = "must match `containerPort` when `hostNetwork` is true";
                errors.push(FieldError::invalid(place, outer.unwrap_or(0), why));
            }
        }
    }
}

fn sysctls(errors: &mut Errors, at: &Path<'_>, spec: &Value) {
    let mut seen = BTreeSet::new();
    for (index, sysctl) in list(spec, "/securityContext/sysctls").iter().enumerate() {
        let at = at.index(index);
        let name = text(sysctl, "/name");
        if name.is_empty() {
            errors.required(&at.child("name"));
        } else if !is_sysctl(name) {
            errors.invalid(
                &at.child("name"),
                name,
                "must have at most 253 characters and consist of segments of \
                lower case letters, digits, '-' and '_' between dots or slashes",
            );
        } else if !seen.insert(name.replace('/', ".")) {
            errors.push(FieldError::duplicate(&at.child("name"), name));
        }
    }
}

/// Segments as upstream's pattern has them: they begin and end with a letter or digit.
fn is_sysctl(name: &str) -> bool {
    let end = |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    let inner = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_".contains(byte);
    name.len() <= 253
        && name.split(['.', '/']).all(|segment| {
            let bytes = segment.as_bytes();
            end(bytes.first()) && end(bytes.last()) && bytes.iter().all(inner)
        })
}

/// A stored pod keeps its spec, but for images, deadlines and more tolerations.
pub(super) fn update(errors: &mut Errors, new: &Value, old: &Value) {
    let (Some(new_spec), Some(old_spec)) = (new.get("spec"), old.get("spec")) else { return };
    let at = Path::new("spec");
    for key in ["containers", "initContainers"] {
        let pointer = format!("/{key}");
        if list(new_spec, &pointer).len() != list(old_spec, &pointer).len() {
            errors.forbidden(&at.child(key), "pod updates may not add or remove containers");
            return;
        }
    }
    let kept = list(old_spec, "/tolerations").iter().all(|t| list(new_spec, "/tolerations").contains(t));
    if !kept {
        errors.forbidden(
            &at.child("tolerations"),
            "existing toleration can not be modified except its tolerationSeconds",
        );
    }
    if fixed_part(new_spec) != fixed_part(old_spec) {
        errors.forbidden(
            &at,
            "pod updates may not change fields other than `spec.containers[*].image`,\
             `spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to \
             existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously \
             negative)",
        );
    }
}

/// The spec without what may change.
fn fixed_part(spec: &Value) -> Value {
    let mut fixed = spec.clone();
    for key in ["containers", "initContainers"] {
        for container in crate::value::list_mut(&mut fixed, key) {
            if let Some(map) = container.as_object_mut() {
                map.remove("image");
            }
        }
    }
    if let Some(map) = fixed.as_object_mut() {
        for key in ["activeDeadlineSeconds", "tolerations", "schedulingGates"] {
            map.remove(key);
        }
        map.retain(|_, value| !value.as_array().is_some_and(Vec::is_empty));
    }
    fixed
}

/// A new pod brings no ephemeral containers: they are added to one that exists.
pub(super) fn no_ephemeral_containers(errors: &mut Errors, pod: &Value) {
    if !list(pod, "/spec/ephemeralContainers").is_empty() {
        let at = Path::new("spec");
        errors.forbidden(&at.child("ephemeralContainers"), "cannot be set on create");
    }
}

/// Ephemeral containers may be added, never changed or taken away.
pub(super) fn ephemeral_containers(errors: &mut Errors, new: &Value, old: &Value) {
    let spec = Path::new("spec");
    let at = spec.child("ephemeralContainers");
    let is_mirror = |pod: &Value| pod.pointer("/metadata/annotations/kubernetes.io~1config.mirror").is_some();
    if is_mirror(old) {
        errors.forbidden(&Path::new("metadata"), "static pods do not support ephemeral containers");
    }
    let (added, known) = (list(new, "/spec/ephemeralContainers"), list(old, "/spec/ephemeralContainers"));
    for before in known {
        let name = text(before, "/name");
        match added.iter().find(|container| text(container, "/name") == name) {
            None => {
                errors.forbidden(&at, &format!("existing ephemeral containers {name:?} may not be removed"));
            }
            Some(after) if after != before => {
                errors.forbidden(&at, &format!("existing ephemeral containers {name:?} may not be changed"));
            }
            Some(_) => {}
        }
    }
}

/// Checks a status write.
pub(super) fn status(errors: &mut Errors, pod: &Value) {
    let phase = text(pod, "/status/phase");
    let phases = ["Failed", "Pending", "Running", "Succeeded", "Unknown"];
    errors.one_of(&Path::new("status").child("phase"), phase, &phases);
}
