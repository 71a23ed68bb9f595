//! What a Service loses when its type changes.
//!
//! Input: the new and the stored form. Output: the new form without the fields that only the old type has, where the
//! client left them as they were; a value the client changed stays and is for validation to refuse.

use serde_json::Value;

use crate::value::{int, list, list_mut, text};

/// Drops what belongs to the old type only.
pub(super) fn drop_old_types_fields(new: &mut Value, old: &Value) {
    let (before, after) = (text(old, "/spec/type").to_owned(), text(new, "/spec/type").to_owned());
    if before == after {
        return;
    }
    let exposed = |kind: &str| matches!(kind, "NodePort" | "LoadBalancer");
    if exposed(&before) && !exposed(&after) {
        if node_ports(new) == node_ports(old) {
            for port in list_mut(&mut new["spec"], "ports") {
                drop_field(port, "nodePort");
            }
        }
        drop_unchanged(new, old, &["externalTrafficPolicy", "healthCheckNodePort"]);
    }
    if before == "LoadBalancer" {
        drop_unchanged(new, old, &["allocateLoadBalancerNodePorts", "loadBalancerClass", "loadBalancerIP"]);
    }
    if before == "ExternalName" {
        drop_unchanged(new, old, &["externalName"]);
    }
    if after == "ExternalName" {
        let cluster = ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy", "internalTrafficPolicy"];
        drop_unchanged(new, old, &cluster);
    }
}

fn node_ports(service: &Value) -> Vec<Option<i64>> {
    list(service, "/spec/ports").iter().map(|port| int(port, "/nodePort")).collect()
}

fn drop_unchanged(new: &mut Value, old: &Value, fields: &[&str]) {
    for field in fields {
        if new["spec"].get(field) == old["spec"].get(field) {
            drop_field(&mut new["spec"], field);
        }
    }
}

fn drop_field(holder: &mut Value, field: &str) {
    if let Some(map) = holder.as_object_mut() {
        map.remove(field);
    }
}
