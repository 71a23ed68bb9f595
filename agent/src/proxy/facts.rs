//! What the proxy keeps of Services and EndpointSlices: the few fields that decide where a connection goes.
//!
//! Pure conversion from API objects. Objects that are not for a service proxy (headless, ExternalName, claimed by
//! another proxy, of unknown address type) become nothing; fields that make no sense are left out, never guessed.

use std::net::IpAddr;

use ebpf_common::Protocol;
use ebpf_loader::Family;
use k8s_openapi::api::{
    core::v1::{Service, ServicePort, ServiceSpec},
    discovery::v1::{Endpoint, EndpointSlice},
};
use kube::Resource;

/// A Service or EndpointSlice that carries this label is some other proxy's business.
const OTHER_PROXY: &str = "service.kubernetes.io/service-proxy-name";
/// Marks Services and slices that have no virtual address.
const HEADLESS: &str = "service.kubernetes.io/headless";
/// Names the Service a slice belongs to.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Kubernetes' default for ClientIP affinity.
const DEFAULT_AFFINITY_SECS: u32 = 10_800;

/// Namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ObjectName {
    pub(super) namespace: String,
    pub(super) name: String,
}

/// A Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ServiceFacts {
    pub(super) uid: String,
    pub(super) ports: Vec<PortFacts>,
    pub(super) cluster_ips: Vec<IpAddr>,
    /// External IPs and load-balancer addresses.
    pub(super) external_ips: Vec<IpAddr>,
    /// 0 without affinity.
    pub(super) affinity_secs: u32,
    /// `internalTrafficPolicy: Local`.
    pub(super) internal_local: bool,
}

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PortFacts {
    pub(super) name: String,
    pub(super) port: u16,
    pub(super) protocol: Protocol,
    pub(super) node_port: Option<u16>,
}

/// An EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SliceFacts {
    pub(super) service: ObjectName,
    pub(super) family: Family,
    /// Name, protocol and number.
    pub(super) ports: Vec<(String, Protocol, u16)>,
    pub(super) endpoints: Vec<EndpointFacts>,
}

/// One endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct EndpointFacts {
    pub(super) address: IpAddr,
    /// Runs on this node.
    pub(super) local: bool,
    pub(super) state: EndpointState,
    /// Whether it is hinted for this node; `None` without hints for nodes.
    pub(super) hinted: Option<bool>,
}

/// Whether an endpoint takes connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EndpointState {
    /// Yes.
    Ready,
    /// Only where no endpoint is ready: it is being deleted but still serves.
    Draining,
    /// No.
    Unready,
}

/// Namespace and name of any namespaced object.
pub(super) fn object_name<K: Resource>(object: &K) -> ObjectName {
    let meta = object.meta();
    ObjectName {
        namespace: meta.namespace.clone().unwrap_or_default(),
        name: meta.name.clone().unwrap_or_default(),
    }
}

fn has_label<K: Resource>(object: &K, label: &str) -> bool {
    object.meta().labels.as_ref().is_some_and(|labels| labels.contains_key(label))
}

/// A Service as the proxy needs it; `None` for one that it must leave alone.
pub(super) fn service(service: &Service) -> Option<ServiceFacts> {
    let spec = service.spec.as_ref()?;
    if has_label(service, OTHER_PROXY)
        || has_label(service, HEADLESS)
        || spec.type_.as_deref() == Some("ExternalName")
    {
        return None;
    }
    let cluster_ips = cluster_ips(spec);
    if cluster_ips.is_empty() {
        return None;
    }
    Some(ServiceFacts {
        uid: service.metadata.uid.clone().unwrap_or_default(),
        ports: spec.ports.iter().flatten().filter_map(port).collect(),
        cluster_ips,
        external_ips: external_ips(service, spec),
        affinity_secs: affinity(spec),
        internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
    })
}

/// Addresses; none for headless services, whose address is the word `None`.
fn cluster_ips(spec: &ServiceSpec) -> Vec<IpAddr> {
    let listed = spec.cluster_ips.iter().flatten().map(String::as_str);
    let mut addresses: Vec<IpAddr> =
        listed.chain(spec.cluster_ip.as_deref()).filter_map(|text| text.parse().ok()).collect();
    addresses.sort();
    addresses.dedup();
    addresses
}

/// External IPs, and load-balancer addresses unless the balancer wants its traffic sent through itself.
fn external_ips(service: &Service, spec: &ServiceSpec) -> Vec<IpAddr> {
    let balancer = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = balancer.and_then(|balancer| balancer.ingress.as_ref()).into_iter().flatten();
    let direct = ingress.filter(|ingress| ingress.ip_mode.as_deref() != Some("Proxy"));
    let texts = spec.external_ips.iter().flatten().map(String::as_str);
    texts
        .chain(direct.filter_map(|ingress| ingress.ip.as_deref()))
        .filter_map(|text| text.parse().ok())
        .collect()
}

fn affinity(spec: &ServiceSpec) -> u32 {
    if spec.session_affinity.as_deref() != Some("ClientIP") {
        return 0;
    }
    let configured =
        spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref()?.timeout_seconds);
    configured.and_then(|secs| u32::try_from(secs).ok()).unwrap_or(DEFAULT_AFFINITY_SECS)
}

fn port(port: &ServicePort) -> Option<PortFacts> {
    Some(PortFacts {
        name: port.name.clone().unwrap_or_default(),
        port: u16::try_from(port.port).ok()?,
        protocol: protocol(port.protocol.as_deref())?,
        node_port: port.node_port.and_then(|port| u16::try_from(port).ok()).filter(|port| *port != 0),
    })
}

/// SCTP has no socket hooks; such ports are left out.
fn protocol(text: Option<&str>) -> Option<Protocol> {
    match text {
        None | Some("" | "TCP") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some(_) => None,
    }
}

/// A slice as the proxy needs it; `None` for one that belongs to no Service of ours.
pub(super) fn slice(slice: &EndpointSlice, node_name: &str) -> Option<SliceFacts> {
    if has_label(slice, OTHER_PROXY) || has_label(slice, HEADLESS) {
        return None;
    }
    let family = match slice.address_type.as_str() {
        "IPv4" => Family::V4,
        "IPv6" => Family::V6,
        _ => return None,
    };
    let service = slice.metadata.labels.as_ref()?.get(SERVICE_NAME).filter(|name| !name.is_empty())?;
    let ports = slice.ports.iter().flatten().filter_map(|port| {
        let number = u16::try_from(port.port?).ok()?;
        Some((port.name.clone().unwrap_or_default(), protocol(port.protocol.as_deref())?, number))
    });
    Some(SliceFacts {
        service: ObjectName { namespace: object_name(slice).namespace, name: service.clone() },
        family,
        ports: ports.collect(),
        endpoints: slice.endpoints.iter().flatten().filter_map(|e| endpoint(e, family, node_name)).collect(),
    })
}

fn endpoint(endpoint: &Endpoint, family: Family, node_name: &str) -> Option<EndpointFacts> {
    let address: IpAddr = endpoint.addresses.first()?.parse().ok()?;
    if address.is_ipv4() != (family == Family::V4) {
        return None;
    }
    let conditions = endpoint.conditions.as_ref();
    let ready = conditions.and_then(|c| c.ready).unwrap_or(true);
    let serving = conditions.and_then(|c| c.serving).unwrap_or(ready);
    let terminating = conditions.and_then(|c| c.terminating).unwrap_or(false);
    let state = match (ready, serving && terminating) {
        (true, _) => EndpointState::Ready,
        (false, true) => EndpointState::Draining,
        (false, false) => EndpointState::Unready,
    };
    let nodes = endpoint.hints.as_ref().and_then(|hints| hints.for_nodes.as_ref());
    Some(EndpointFacts {
        address,
        local: endpoint.node_name.as_deref() == Some(node_name),
        state,
        hinted: nodes.map(|nodes| nodes.iter().any(|node| node.name == node_name)),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn parse(value: Value) -> Option<ServiceFacts> {
        service(&serde_json::from_value(value).unwrap())
    }

    #[test]
    fn services_without_a_virtual_address_are_left_alone() {
        for spec in [
            json!({"clusterIP": "None", "ports": [{"port": 80}]}),
            json!({"type": "ExternalName", "externalName": "example.org"}),
            json!({"ports": [{"port": 80}]}),
        ] {
            assert_eq!(parse(json!({"metadata": {"name": "x"}, "spec": spec})), None);
        }
        let labelled = json!({
            "metadata": {"name": "x", "labels": {"service.kubernetes.io/service-proxy-name": "other"}},
            "spec": {"clusterIP": "10.96.0.5", "ports": [{"port": 80}]},
        });
        assert_eq!(parse(labelled), None);
    }

    #[test]
    fn a_node_port_service_keeps_what_decides() {
        let facts = parse(json!({
            "metadata": {"name": "web", "uid": "u"},
            "spec": {
                "type": "NodePort", "clusterIP": "10.96.0.5", "clusterIPs": ["10.96.0.5", "fd00::5"],
                "externalIPs": ["192.0.2.1"], "sessionAffinity": "ClientIP", "internalTrafficPolicy": "Local",
                "ports": [
                    {"name": "http", "port": 80, "nodePort": 30000},
                    {"name": "dns", "port": 53, "protocol": "UDP"},
                    {"name": "sctp", "port": 9, "protocol": "SCTP"},
                ],
            },
            "status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.1"}, {"ip": "198.51.100.2", "ipMode": "Proxy"}]}},
        }))
        .unwrap();
        assert_eq!(facts.cluster_ips.len(), 2);
        let external: Vec<String> = facts.external_ips.iter().map(ToString::to_string).collect();
        assert_eq!(external, ["192.0.2.1", "198.51.100.1"]);
        assert_eq!((facts.affinity_secs, facts.internal_local), (10_800, true));
        let ports: Vec<_> = facts.ports.iter().map(|p| (p.port, p.protocol, p.node_port)).collect();
        assert_eq!(ports, [(80, Protocol::Tcp, Some(30000)), (53, Protocol::Udp, None)]);
    }

    #[test]
    fn endpoint_conditions_follow_kube_proxy() {
        let slice_of = |conditions: Value| {
            let value = json!({
                "metadata": {"name": "web-1", "namespace": "a", "labels": {"kubernetes.io/service-name": "web"}},
                "addressType": "IPv4",
                "endpoints": [{"addresses": ["10.244.0.1"], "nodeName": "n1", "conditions": conditions}],
                "ports": [{"port": 80}],
            });
            slice(&serde_json::from_value(value).unwrap(), "n1").unwrap().endpoints[0].clone()
        };
        assert_eq!(slice_of(json!({})).state, EndpointState::Ready);
        assert_eq!(slice_of(json!({"ready": false})).state, EndpointState::Unready);
        let draining = json!({"ready": false, "serving": true, "terminating": true});
        assert_eq!(slice_of(draining).state, EndpointState::Draining);
        let gone = json!({"ready": false, "serving": false, "terminating": true});
        assert_eq!(slice_of(gone).state, EndpointState::Unready);
        assert!(slice_of(json!({})).local);
    }
}
