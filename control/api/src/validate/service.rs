//! Services.

use std::{collections::BTreeSet, net::IpAddr};

use serde_json::{Value, json};

use super::{Errors, container::port_or_name, metadata, names, path::Path};
use crate::{
    status::FieldError,
    value::{int, list, map, text},
};

const BAD_ADDRESS: &str = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";

/// Checks a Service.
pub(super) fn check(errors: &mut Errors, object: &Value) {
    let at = Path::new("spec");
    let Some(spec) = object.get("spec").filter(|s| s.is_object()) else {
        errors.required(&at.child("ports"));
        return;
    };
    let kind = text(spec, "/type");
    errors.one_of(&at.child("type"), kind, &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"]);
    errors.one_of(&at.child("sessionAffinity"), text(spec, "/sessionAffinity"), &["ClientIP", "None"]);
    let headless = text(spec, "/clusterIP") == "None";
    if list(spec, "/ports").is_empty() && !headless && kind != "ExternalName" {
        errors.required(&at.child("ports"));
    }
    if kind == "ExternalName" {
        external_name(errors, &at, spec);
    }
    ports(errors, &at.child("ports"), spec);
    metadata::labels(errors, &at.child("selector"), map(spec, "/selector"));
    addresses(errors, &at, spec);
    policies(errors, &at, spec);
    if let Some(seconds) = int(spec, "/sessionAffinityConfig/clientIP/timeoutSeconds") {
        let config = at.child("sessionAffinityConfig");
        let client = config.child("clientIP");
        errors.in_range(&client.child("timeoutSeconds"), seconds, 1, 86_400);
    }
}

/// What may not change while the type stays.
pub(super) fn update(errors: &mut Errors, new: &Value, old: &Value) {
    let (before, after) = (text(old, "/spec/clusterIP"), text(new, "/spec/clusterIP"));
    let external = |o: &Value| text(o, "/spec/type") == "ExternalName";
    if before.is_empty() || before == after || external(old) || external(new) {
        return;
    }
    let at = Path::new("spec").child("clusterIPs").index(0).to_string();
    let shown = new.pointer("/spec/clusterIPs").cloned().unwrap_or_else(|| json!([after]));
    errors.push(FieldError::invalid(at, shown, "may not change once set"));
}

fn external_name(errors: &mut Errors, at: &Path<'_>, spec: &Value) {
    if !text(spec, "/clusterIP").is_empty() {
        errors.forbidden(&at.child("clusterIPs"), "may not be set for ExternalName services");
    }
    let name = text(spec, "/externalName");
    if name.is_empty() {
        errors.required(&at.child("externalName"));
    } else {
        let name = name.strip_suffix('.').unwrap_or(name);
        errors.syntax(&at.child("externalName"), name, names::subdomain_1123(name));
    }
}

fn ports(errors: &mut Errors, at: &Path<'_>, spec: &Value) {
    let ports = list(spec, "/ports");
    let (mut by_name, mut by_number, mut by_node_port) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for (index, port) in ports.iter().enumerate() {
        let at = at.index(index);
        let (name, protocol) = (text(port, "/name"), text(port, "/protocol"));
        if name.is_empty() {
            if ports.len() > 1 {
                errors.required(&at.child("name"));
            }
        } else {
            errors.syntax(&at.child("name"), name, names::label_1123(name));
            if !by_name.insert(name) {
                errors.push(FieldError::duplicate(&at.child("name"), name));
            }
        }
        let number = int(port, "/port").unwrap_or(0);
        errors.port(&at.child("port"), number);
        errors.one_of(&at.child("protocol"), protocol, &["SCTP", "TCP", "UDP"]);
        if text(spec, "/type") != "ExternalName" {
            port_or_name(errors, &at.child("targetPort"), port.get("targetPort"));
        }
        if !by_number.insert((protocol, number)) {
            let shown = json!({ "protocol": protocol, "port": number });
            errors.push(FieldError::duplicate(&at, shown));
        }
        node_port(errors, &at.child("nodePort"), port, text(spec, "/type"), &mut by_node_port);
    }
}

fn node_port<'a>(
    errors: &mut Errors,
    at: &Path<'_>,
    port: &'a Value,
    kind: &str,
    taken: &mut BTreeSet<(&'a str, i64)>,
) {
    let Some(number) = int(port, "/nodePort").filter(|n| *n != 0) else { return };
    if kind == "ClusterIP" {
        errors.forbidden(at, "may not be used when `type` is 'ClusterIP'");
    } else if !taken.insert((text(port, "/protocol"), number)) {
        errors.push(FieldError::duplicate(at, number));
    } else {
        errors.port(at, number);
    }
}

fn addresses(errors: &mut Errors, at: &Path<'_>, spec: &Value) {
    let clusters = at.child("clusterIPs");
    let address = text(spec, "/clusterIP");
    let all = list(spec, "/clusterIPs");
    if let Some(first) = all.first().and_then(Value::as_str)
        && !address.is_empty()
        && first != address
    {
        errors.invalid(&clusters, all.to_vec(), "first value must match `clusterIP`");
    }
    for (index, found) in all.iter().enumerate() {
        let found = found.as_str().unwrap_or_default();
        if found != "None" && found.parse::<IpAddr>().is_err() {
            errors.invalid(&clusters.index(index), found, BAD_ADDRESS);
        }
    }
    let external = at.child("externalIPs");
    for (index, found) in list(spec, "/externalIPs").iter().enumerate() {
        let found = found.as_str().unwrap_or_default();
        if found.parse::<IpAddr>().is_err() {
            errors.invalid(&external.index(index), found, BAD_ADDRESS);
        }
    }
}

fn policies(errors: &mut Errors, at: &Path<'_>, spec: &Value) {
    let external = text(spec, "/externalTrafficPolicy");
    errors.one_of(&at.child("externalTrafficPolicy"), external, &["Cluster", "Local"]);
    let reachable =
        matches!(text(spec, "/type"), "NodePort" | "LoadBalancer") || !list(spec, "/externalIPs").is_empty();
    if !external.is_empty() && !reachable {
        let why = "may only be set for externally-accessible services";
        errors.invalid(&at.child("externalTrafficPolicy"), external, why);
    }
    let internal = text(spec, "/internalTrafficPolicy");
    errors.one_of(&at.child("internalTrafficPolicy"), internal, &["Cluster", "Local"]);
    let families = ["PreferDualStack", "RequireDualStack", "SingleStack"];
    errors.one_of(&at.child("ipFamilyPolicy"), text(spec, "/ipFamilyPolicy"), &families);
}
