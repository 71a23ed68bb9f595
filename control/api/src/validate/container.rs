//! Containers: image, ports, environment, mounts, probes.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{Errors, names, path::Path, resources};
use crate::{
    status::FieldError,
    value::{int, list, text},
};

/// What kind of container, which decides what it may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Main,
    Init,
    Ephemeral,
}

/// What a container is checked against.
pub(super) struct Around<'a> {
    pub(super) role: Role,
    pub(super) volumes: &'a BTreeSet<&'a str>,
    /// Containers that an ephemeral one may target.
    pub(super) targets: &'a BTreeSet<&'a str>,
}

/// What an ephemeral container cannot have, as nobody would act on it.
const NOT_EPHEMERAL: [&str; 4] = ["ports", "lifecycle", "resizePolicy", "restartPolicy"];
/// Rules of one container at most.
const MAX_RESTART_RULES: usize = 20;
/// Exit codes of one rule at most.
const MAX_EXIT_CODES: usize = 255;

/// Checks one container.
pub(super) fn check(errors: &mut Errors, at: &Path<'_>, container: &Value, around: &Around<'_>) {
    let image = text(container, "/image");
    if image.is_empty() {
        errors.required(&at.child("image"));
    } else if image.trim() != image {
        errors.invalid(&at.child("image"), image, "must not have leading or trailing whitespace");
    }
    let pull = text(container, "/imagePullPolicy");
    errors.one_of(&at.child("imagePullPolicy"), pull, &["Always", "IfNotPresent", "Never"]);
    let message = text(container, "/terminationMessagePolicy");
    errors.one_of(&at.child("terminationMessagePolicy"), message, &["FallbackToLogsOnError", "File"]);
    ports(errors, &at.child("ports"), container);
    environment(errors, &at.child("env"), container);
    mounts(errors, &at.child("volumeMounts"), container, around);
    if let Some(found) = container.get("resources") {
        resources::check(errors, &at.child("resources"), found);
    }
    probes(errors, at, container, around.role);
    hooks(errors, &at.child("lifecycle"), container);
    restarts(errors, at, container, around.role);
    if around.role == Role::Ephemeral {
        ephemeral(errors, at, container, around);
    }
    security(errors, &at.child("securityContext"), container);
}

fn ports(errors: &mut Errors, at: &Path<'_>, container: &Value) {
    let mut seen = BTreeSet::new();
    for (index, port) in list(container, "/ports").iter().enumerate() {
        let at = at.index(index);
        let name = text(port, "/name");
        if !name.is_empty() {
            for why in names::port_name(name) {
                errors.invalid(&at.child("name"), name, why);
            }
            if !seen.insert(name) {
                errors.push(FieldError::duplicate(&at.child("name"), name));
            }
        }
        match int(port, "/containerPort").unwrap_or(0) {
            0 => errors.required(&at.child("containerPort")),
            number => errors.port(&at.child("containerPort"), number),
        }
        if let Some(number) = int(port, "/hostPort").filter(|n| *n != 0) {
            errors.port(&at.child("hostPort"), number);
        }
        errors.one_of(&at.child("protocol"), text(port, "/protocol"), &["SCTP", "TCP", "UDP"]);
    }
}

fn environment(errors: &mut Errors, at: &Path<'_>, container: &Value) {
    for (index, variable) in list(container, "/env").iter().enumerate() {
        let at = at.index(index);
        let name = text(variable, "/name");
        if name.is_empty() {
            errors.required(&at.child("name"));
        } else {
            errors.syntax(&at.child("name"), name, names::env_name(name));
        }
        let Some(source) = variable.get("valueFrom").filter(|s| s.is_object()) else { continue };
        let at = at.child("valueFrom");
        let known = ["fieldRef", "resourceFieldRef", "configMapKeyRef", "secretKeyRef", "fileKeyRef"];
        let given = known.iter().filter(|k| source.get(**k).is_some()).count();
        if given == 0 {
            let why = "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef` or \
                       `fileKeyRef`";
            errors.invalid(&at, "", why);
        } else if !text(variable, "/value").is_empty() {
            errors.invalid(&at, "", "may not be specified when `value` is not empty");
        } else if given > 1 {
            errors.invalid(&at, "", "may not have more than one field specified at a time");
        }
        for key in ["configMapKeyRef", "secretKeyRef"] {
            if let Some(reference) = source.get(key)
                && text(reference, "/key").is_empty()
            {
                errors.required(&at.child(key).child("key"));
            }
        }
        if let Some(field) = source.get("fieldRef") {
            let (at, path) = (at.child("fieldRef"), text(field, "/fieldPath"));
            if path.is_empty() {
                errors.required(&at.child("fieldPath"));
            } else if !FIELDS.contains(&path) && !is_map_entry(path) {
                let why = format!("error converting fieldPath: field label not supported: {path}");
                errors.invalid(&at.child("fieldPath"), path, why);
            }
        }
    }
}

/// What a variable can tell of its pod.
const FIELDS: &[&str] = &[
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];

/// One label or annotation.
fn is_map_entry(path: &str) -> bool {
    let key = |map: &str| path.strip_prefix(map)?.strip_prefix("['")?.strip_suffix("']");
    ["metadata.labels", "metadata.annotations"].iter().any(|map| key(map).is_some_and(|key| !key.is_empty()))
}

fn mounts(errors: &mut Errors, at: &Path<'_>, container: &Value, around: &Around<'_>) {
    let mut paths = BTreeSet::new();
    for (index, mount) in list(container, "/volumeMounts").iter().enumerate() {
        let at = at.index(index);
        let name = text(mount, "/name");
        if name.is_empty() {
            errors.required(&at.child("name"));
        } else if !around.volumes.contains(name) {
            errors.push(FieldError::not_found(&at.child("name"), name));
        }
        let target = text(mount, "/mountPath");
        if target.is_empty() {
            errors.required(&at.child("mountPath"));
        } else if !paths.insert(target) {
            errors.invalid(&at.child("mountPath"), target, "must be unique");
        }
        for key in ["subPath", "subPathExpr"] {
            let inner = mount.get(key).and_then(Value::as_str).unwrap_or_default();
            if inner.starts_with('/') {
                errors.invalid(&at.child(key), inner, "must be a relative path");
            } else if inner.split('/').any(|part| part == "..") {
                errors.invalid(&at.child(key), inner, "must not contain '..'");
            }
        }
        let expression = text(mount, "/subPathExpr");
        if !expression.is_empty() && !text(mount, "/subPath").is_empty() {
            errors.invalid(
                &at.child("subPathExpr"),
                expression,
                "subPathExpr and subPath are mutually exclusive",
            );
        }
        let propagation = text(mount, "/mountPropagation");
        let modes = ["Bidirectional", "HostToContainer", "None"];
        errors.one_of(&at.child("mountPropagation"), propagation, &modes);
    }
}

fn probes(errors: &mut Errors, at: &Path<'_>, container: &Value, role: Role) {
    let restartable = text(container, "/restartPolicy") == "Always";
    for key in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let Some(probe) = container.get(key).filter(|p| p.is_object()) else { continue };
        let at = at.child(key);
        match role {
            Role::Ephemeral => {
                errors.forbidden(&at, "cannot be set for an Ephemeral Container");
                continue;
            }
            Role::Init if !restartable => {
                errors.forbidden(&at, "may not be set for init containers without restartPolicy=Always");
                continue;
            }
            Role::Main | Role::Init => {}
        }
        handler(errors, &at, probe, &["exec", "httpGet", "tcpSocket", "grpc"]);
        for field in
            ["initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"]
        {
            errors.at_least_zero(&at.child(field), probe.get(field).and_then(Value::as_i64));
        }
        if let Some(threshold) = int(probe, "/successThreshold")
            && threshold != 1
            && key != "readinessProbe"
        {
            errors.invalid(&at.child("successThreshold"), threshold, "must be 1");
        }
    }
}

fn hooks(errors: &mut Errors, at: &Path<'_>, container: &Value) {
    for key in ["postStart", "preStop"] {
        if let Some(hook) = container.get("lifecycle").and_then(|l| l.get(key)).filter(|h| h.is_object()) {
            handler(errors, &at.child(key), hook, &["exec", "httpGet", "tcpSocket", "sleep"]);
        }
    }
}

fn handler(errors: &mut Errors, at: &Path<'_>, holder: &Value, kinds: &[&str]) {
    let mut found = 0;
    for kind in kinds {
        let Some(handler) = holder.get(*kind).filter(|h| h.is_object()) else { continue };
        let at = at.child(kind);
        found += 1;
        if found > 1 {
            errors.forbidden(&at, "may not specify more than 1 handler type");
            continue;
        }
        match *kind {
            "exec" if list(handler, "/command").is_empty() => errors.required(&at.child("command")),
            "httpGet" => {
                if text(handler, "/path").is_empty() {
                    errors.required(&at.child("path"));
                }
                port_or_name(errors, &at.child("port"), handler.get("port"));
                errors.one_of(&at.child("scheme"), text(handler, "/scheme"), &["HTTP", "HTTPS"]);
            }
            "tcpSocket" | "grpc" => port_or_name(errors, &at.child("port"), handler.get("port")),
            _ => {}
        }
    }
    if found == 0 {
        errors.push(FieldError::required(at, "must specify a handler type"));
    }
}

/// A port number or a port's name.
pub(super) fn port_or_name(errors: &mut Errors, at: &Path<'_>, port: Option<&Value>) {
    match port {
        Some(Value::String(name)) => {
            for why in names::port_name(name) {
                errors.invalid(at, name.as_str(), why);
            }
        }
        port => errors.port(at, port.and_then(Value::as_i64).unwrap_or(0)),
    }
}

/// A container's own restart policy, and rules by exit code.
fn restarts(errors: &mut Errors, at: &Path<'_>, container: &Value, role: Role) {
    let policy = text(container, "/restartPolicy");
    if role != Role::Ephemeral {
        errors.one_of(&at.child("restartPolicy"), policy, &["Always", "Never", "OnFailure"]);
    }
    let rules = list(container, "/restartPolicyRules");
    let at = at.child("restartPolicyRules");
    if rules.is_empty() {
        return;
    }
    if policy.is_empty() {
        errors.push(FieldError::required(&at, "must specify restartPolicy when restart rules are used"));
    }
    if policy == "Always" && role == Role::Init {
        errors.forbidden(&at, "may not be set for sidecar containers");
    }
    if rules.len() > MAX_RESTART_RULES {
        errors.invalid(&at, rules.len(), format!("must have at most {MAX_RESTART_RULES} items"));
    }
    for (index, rule) in rules.iter().enumerate() {
        let at = at.index(index);
        match text(rule, "/action") {
            "" => errors.required(&at.child("action")),
            action => errors.one_of(&at.child("action"), action, &["Restart", "RestartAllContainers"]),
        }
        let Some(codes) = rule.get("exitCodes").filter(|codes| codes.is_object()) else {
            errors.push(FieldError::required(&at.child("exitCodes"), "must be specified"));
            continue;
        };
        let at = at.child("exitCodes");
        match text(codes, "/operator") {
            "" => errors.required(&at.child("operator")),
            operator => errors.one_of(&at.child("operator"), operator, &["In", "NotIn"]),
        }
        if list(codes, "/values").len() > MAX_EXIT_CODES {
            errors.invalid(
                &at.child("values"),
                list(codes, "/values").len(),
                format!("must have at most {MAX_EXIT_CODES} items"),
            );
        }
    }
}

fn ephemeral(errors: &mut Errors, at: &Path<'_>, container: &Value, around: &Around<'_>) {
    const WHY: &str = "cannot be set for an Ephemeral Container";
    for key in NOT_EPHEMERAL {
        let set = match container.get(key) {
            None | Some(Value::Null) => false,
            Some(Value::Array(items)) => !items.is_empty(),
            Some(Value::String(text)) => !text.is_empty(),
            Some(_) => true,
        };
        if set {
            errors.forbidden(&at.child(key), WHY);
        }
    }
    if container.get("resources").and_then(Value::as_object).is_some_and(|found| !found.is_empty()) {
        errors.forbidden(&at.child("resources"), WHY);
    }
    for (index, mount) in list(container, "/volumeMounts").iter().enumerate() {
        let at = at.child("volumeMounts");
        for key in ["subPath", "subPathExpr"] {
            if !text(mount, &format!("/{key}")).is_empty() {
                errors.forbidden(&at.index(index).child(key), WHY);
            }
        }
    }
    let target = text(container, "/targetContainerName");
    if !target.is_empty() && !around.targets.contains(target) {
        errors.push(FieldError::not_found(&at.child("targetContainerName"), target));
    }
}

fn security(errors: &mut Errors, at: &Path<'_>, holder: &Value) {
    for key in ["runAsUser", "runAsGroup"] {
        let pointer = format!("/securityContext/{key}");
        if let Some(id) = int(holder, &pointer) {
            errors.in_range(&at.child(key), id, 0, i64::from(i32::MAX));
        }
    }
    let is = |key: &str, wanted: bool| {
        holder.pointer(&format!("/securityContext/{key}")).and_then(Value::as_bool) == Some(wanted)
    };
    if is("allowPrivilegeEscalation", false) && is("privileged", true) {
        let why = "cannot set `allowPrivilegeEscalation` to false and `privileged` to true";
        errors.invalid(at, "", why);
    }
}
