//! Services, Endpoints, EndpointSlices.

use jiff::Timestamp;
use serde_json::Value;

use super::{AGE, Column, NAME, age, first_three, name, or_none, text_column, wide};
use crate::value::{int, list, map, text};

/// kubectl's columns of a Service.
pub(super) const SERVICE: &[Column] = &[
    NAME,
    text_column("Type", "How the service is reached."),
    text_column("Cluster-IP", "Address within the cluster."),
    text_column("External-IP", "Address outside of the cluster."),
    text_column("Port(s)", "Ports, with their node ports."),
    AGE,
    wide("Selector", "Labels of the pods behind it."),
];

/// kubectl's columns of Endpoints.
pub(super) const ENDPOINTS: &[Column] =
    &[NAME, text_column("Endpoints", "Addresses and ports that are ready."), AGE];

/// kubectl's columns of an EndpointSlice.
pub(super) const SLICE: &[Column] = &[
    NAME,
    text_column("AddressType", "Kind of the addresses."),
    text_column("Ports", "Ports of the endpoints."),
    text_column("Endpoints", "Addresses."),
    AGE,
];

/// A Service's cells.
pub(super) fn service(object: &Value, now: Timestamp) -> Vec<Value> {
    let address = match text(object, "/spec/clusterIPs/0") {
        "" => text(object, "/spec/clusterIP"),
        address => address,
    };
    let labels: Vec<String> = map(object, "/spec/selector")
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
        .collect();
    vec![
        name(object),
        text(object, "/spec/type").into(),
        or_none(address),
        external_address(object).into(),
        service_ports(object).into(),
        age(object, now),
        or_none(&labels.join(",")),
    ]
}

/// Cells of Endpoints.
pub(super) fn endpoints(object: &Value, now: Timestamp) -> Vec<Value> {
    let mut found = Vec::new();
    for subset in list(object, "/subsets") {
        let ports = list(subset, "/ports");
        for address in list(subset, "/addresses") {
            let ip = text(address, "/ip");
            if ports.is_empty() {
                found.push(ip.to_owned());
            }
            for port in ports {
                found.push(host_port(ip, int(port, "/port").unwrap_or(0)));
            }
        }
    }
    vec![name(object), first_three(&found, "<none>").into(), age(object, now)]
}

/// An EndpointSlice's cells.
pub(super) fn slice(object: &Value, now: Timestamp) -> Vec<Value> {
    let ports: Vec<String> = list(object, "/ports")
        .iter()
        .map(|port| match (int(port, "/port"), text(port, "/name")) {
            (Some(number), _) => number.to_string(),
            (None, "") => "*".to_owned(),
            (None, name) => name.to_owned(),
        })
        .collect();
    let addresses: Vec<String> = list(object, "/endpoints")
        .iter()
        .flat_map(|endpoint| list(endpoint, "/addresses"))
        .filter_map(|address| address.as_str().map(str::to_owned))
        .collect();
    vec![
        name(object),
        text(object, "/addressType").into(),
        first_three(&ports, "<unset>").into(),
        first_three(&addresses, "<unset>").into(),
        age(object, now),
    ]
}

fn host_port(ip: &str, port: i64) -> String {
    if ip.contains(':') { format!("[{ip}]:{port}") } else { format!("{ip}:{port}") }
}

fn external_address(object: &Value) -> String {
    let kind = text(object, "/spec/type");
    if kind == "ExternalName" {
        return text(object, "/spec/externalName").to_owned();
    }
    let mut found: Vec<&str> = list(object, "/status/loadBalancer/ingress")
        .iter()
        .map(|ingress| match text(ingress, "/ip") {
            "" => text(ingress, "/hostname"),
            ip => ip,
        })
        .filter(|_| kind == "LoadBalancer")
        .collect();
    found.extend(list(object, "/spec/externalIPs").iter().filter_map(Value::as_str));
    match (found.is_empty(), kind) {
        (false, _) => found.join(","),
        (true, "LoadBalancer") => "<pending>".to_owned(),
        (true, _) => "<none>".to_owned(),
    }
}

fn service_ports(object: &Value) -> String {
    let ports: Vec<String> = list(object, "/spec/ports")
        .iter()
        .map(|port| {
            let (number, protocol) = (int(port, "/port").unwrap_or(0), text(port, "/protocol"));
            match int(port, "/nodePort").filter(|n| *n != 0) {
                Some(node_port) => format!("{number}:{node_port}/{protocol}"),
                None => format!("{number}/{protocol}"),
            }
        })
        .collect();
    if ports.is_empty() { "<none>".to_owned() } else { ports.join(",") }
}
