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
}

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
        if let Some(field) = source.get("fieldRef")
            && text(field, "/fieldPath").is_empty()
        {
            errors.required(&at.child("fieldRef").child("fieldPath"));
        }
    }
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

fn security(errors: &mut Errors, at: &Path<'_>, holder: &Value) {
    for key in ["runAsUser", "runAsGroup"] {
        let pointer = format!("/securityContext/{key}");
        if let Some(id) = int(holder, &pointer) {
            errors.in_range(&at.child(key), id, 0, i64::from(i32::MAX));
        }
    }
}
