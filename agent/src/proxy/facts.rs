//! What the proxy keeps of Services and EndpointSlices: the few fields that decide where a connection goes.
//!
//! Pure conversion from API objects. Objects that are not for a service proxy (headless, ExternalName, claimed by
//! another proxy, of unknown address type) become nothing; fields that make no sense are left out, never guessed, and
//! told in `problems`.

use std::net::IpAddr;

use ebpf_common::Protocol;
use ebpf_loader::Family;
use k8s_openapi::api::{
    core::v1::{Service, ServicePort, ServiceSpec},
    discovery::v1::{Endpoint, EndpointSlice},
};
use kube::Resource;

use super::{
    choices::{self, Choices},
    cidr::Cidr,
};

/// A Service or EndpointSlice that carries this label is some other proxy's business.
const OTHER_PROXY: &str = "service.kubernetes.io/service-proxy-name";
/// Marks Services and slices that have no virtual address.
const HEADLESS: &str = "service.kubernetes.io/headless";
/// Names the Service a slice belongs to.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// When whatever changed that made the slice change.
const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
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
    /// `externalIPs`: whoever writes the Service chooses them.
    pub(super) external_ips: Vec<IpAddr>,
    /// Addresses of load balancers: the cluster chooses them.
    pub(super) balancer_ips: Vec<IpAddr>,
    /// `loadBalancerSourceRanges`; empty: everybody.
    pub(super) source_ranges: Vec<Cidr>,
    /// 0 without affinity.
    pub(super) affinity_secs: u32,
    /// `internalTrafficPolicy: Local`.
    pub(super) internal_local: bool,
    /// `externalTrafficPolicy: Local`.
    pub(super) external_local: bool,
    /// Where a load balancer asks whether this node has endpoints.
    pub(super) health_check_port: Option<u16>,
    /// What its annotations choose.
    pub(super) choices: Choices,
    /// What makes no sense and was left out, one sentence each.
    pub(super) problems: Vec<String>,
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
    /// When the pods or the Service changed that made this slice change.
    pub(super) triggered: Option<jiff::Timestamp>,
    /// What makes no sense and was left out, one sentence each.
    pub(super) problems: Vec<String>,
}

/// One endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct EndpointFacts {
    pub(super) address: IpAddr,
    /// Runs on this node.
    pub(super) local: bool,
    /// The node's name, as weights know it.
    pub(super) node: u32,
    pub(super) state: EndpointState,
    /// Whether it is hinted for this node; `None` without hints for nodes.
    pub(super) for_node: Option<bool>,
    /// Zones it is hinted for; `None` without hints for zones.
    pub(super) for_zones: Option<Vec<String>>,
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
    let mut problems = Vec::new();
    let cluster_ips = cluster_ips(spec, &mut problems);
    if cluster_ips.is_empty() {
        return None;
    }
    let external_ips = addresses("spec.externalIPs", spec.external_ips.iter().flatten(), &mut problems);
    Some(ServiceFacts {
        uid: service.metadata.uid.clone().unwrap_or_default(),
        ports: ports(spec, &mut problems),
        cluster_ips,
        external_ips,
        balancer_ips: balancer_ips(service, &mut problems),
        source_ranges: source_ranges(spec, &mut problems),
        affinity_secs: affinity(spec),
        internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
        external_local: spec.external_traffic_policy.as_deref() == Some("Local"),
        health_check_port: spec
            .health_check_node_port
            .filter(|port| *port != 0)
            .and_then(|number| port_number("spec.healthCheckNodePort", number, &mut problems)),
        choices: Choices::read(service.metadata.annotations.as_ref(), &mut problems),
        problems,
    })
}

/// Addresses; none for headless services, whose address is the word `None`.
fn cluster_ips(spec: &ServiceSpec, problems: &mut Vec<String>) -> Vec<IpAddr> {
    let texts = spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip);
    addresses("spec.clusterIPs", texts.filter(|text| !text.is_empty() && *text != "None"), problems)
}

/// The addresses that can be dialled, once each, in the order in which they stand.
fn addresses<'t>(
    field: &str,
    texts: impl Iterator<Item = &'t String>,
    problems: &mut Vec<String>,
) -> Vec<IpAddr> {
    let mut found = Vec::new();
    for text in texts {
        match text.parse::<IpAddr>() {
            Ok(ip) if unusable(ip) => {
                problems.push(format!("{field}: {ip} is no address that a Service can have"));
            }
            Ok(ip) if !found.contains(&ip) => found.push(ip),
            Ok(_) => {}
            Err(_) => problems.push(format!("{field}: {text:?} is not an IP address")),
        }
    }
    // Kept for every Service of the cluster.
    found.shrink_to_fit();
    found
}

/// Addresses that mean something else to every machine: a Service or endpoint there would open what is closed.
fn unusable(ip: IpAddr) -> bool {
    let link_local = match ip {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.to_ipv4_mapped().is_some(),
    };
    link_local || ip.is_loopback() || ip.is_unspecified() || ip.is_multicast()
}

/// Load-balancer addresses, unless the balancer wants its traffic sent through itself.
fn balancer_ips(service: &Service, problems: &mut Vec<String>) -> Vec<IpAddr> {
    let balancer = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = balancer.and_then(|balancer| balancer.ingress.as_ref()).into_iter().flatten();
    let direct = ingress.filter(|ingress| ingress.ip_mode.as_deref() != Some("Proxy"));
    let texts = direct.filter_map(|ingress| ingress.ip.as_ref()).filter(|text| !text.is_empty());
    addresses("status.loadBalancer.ingress", texts, problems)
}

fn source_ranges(spec: &ServiceSpec, problems: &mut Vec<String>) -> Vec<Cidr> {
    let mut ranges = Vec::new();
    let texts = spec.load_balancer_source_ranges.iter().flatten();
    for text in texts {
        match text.parse() {
            Ok(range) => ranges.push(range),
            Err(error) => problems.push(format!("spec.loadBalancerSourceRanges: {error:#}")),
        }
    }
    // A list of which nothing can be read must not open the Service to everybody.
    let asked = spec.load_balancer_source_ranges.as_ref().is_some_and(|texts| !texts.is_empty());
    if asked && ranges.is_empty() {
        ranges.extend(Cidr::new(IpAddr::from([255, 255, 255, 255]), 32));
    }
    ranges
}

fn affinity(spec: &ServiceSpec) -> u32 {
    if spec.session_affinity.as_deref() != Some("ClientIP") {
        return 0;
    }
    let configured =
        spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref()?.timeout_seconds);
    configured
        .and_then(|secs| u32::try_from(secs).ok())
        .filter(|secs| *secs > 0)
        .unwrap_or(DEFAULT_AFFINITY_SECS)
}

/// The ports, each number and protocol once.
fn ports(spec: &ServiceSpec, problems: &mut Vec<String>) -> Vec<PortFacts> {
    let mut found: Vec<PortFacts> = Vec::new();
    for (index, port) in spec.ports.iter().flatten().enumerate() {
        let Some(facts) = port_facts(index, port, problems) else {
            continue;
        };
        if found.iter().any(|other| (other.port, other.protocol) == (facts.port, facts.protocol)) {
            problems.push(format!(
                "spec.ports[{index}]: {}/{} stands in the list twice",
                facts.port,
                facts.protocol.name()
            ));
        } else {
            found.push(facts);
        }
    }
    found.shrink_to_fit();
    found
}

fn port_facts(index: usize, port: &ServicePort, problems: &mut Vec<String>) -> Option<PortFacts> {
    let field = format!("spec.ports[{index}]");
    let node_port = port.node_port.filter(|number| *number != 0);
    Some(PortFacts {
        name: port.name.clone().unwrap_or_default(),
        port: port_number(&format!("{field}.port"), port.port, problems)?,
        protocol: protocol(&field, port.protocol.as_deref(), problems)?,
        node_port: node_port.and_then(|number| port_number(&format!("{field}.nodePort"), number, problems)),
    })
}

fn port_number(field: &str, number: i32, problems: &mut Vec<String>) -> Option<u16> {
    let valid = u16::try_from(number).ok().filter(|number| *number != 0);
    if valid.is_none() {
        problems.push(format!("{field}: {number} is not a port number (1 to 65535)"));
    }
    valid
}

fn protocol(field: &str, text: Option<&str>, problems: &mut Vec<String>) -> Option<Protocol> {
    match text {
        None | Some("" | "TCP") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some("SCTP") => Some(Protocol::Sctp),
        Some(other) => {
            problems.push(format!("{field}.protocol: {other:?} is none of TCP, UDP and SCTP"));
            None
        }
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
    let name = object_name(slice);
    let mut problems = Vec::new();
    let mut ports = Vec::new();
    for (index, port) in slice.ports.iter().flatten().enumerate() {
        let field = format!("EndpointSlice {}: ports[{index}]", name.name);
        let Some(number) = port.port.and_then(|number| port_number(&field, number, &mut problems)) else {
            continue;
        };
        if let Some(protocol) = protocol(&field, port.protocol.as_deref(), &mut problems) {
            ports.push((port.name.clone().unwrap_or_default(), protocol, number));
        }
    }
    ports.shrink_to_fit();
    let mut endpoints = Vec::with_capacity(slice.endpoints.as_ref().map_or(0, Vec::len));
    for one in slice.endpoints.iter().flatten() {
        match endpoint(one, family, node_name) {
            Ok(facts) => endpoints.push(facts),
            Err(problem) => problems.push(format!("EndpointSlice {}: {problem}", name.name)),
        }
    }
    let service = ObjectName { namespace: name.namespace, name: service.clone() };
    let annotations = slice.metadata.annotations.as_ref();
    let triggered = annotations.and_then(|all| all.get(TRIGGER_TIME)?.parse().ok());
    Some(SliceFacts { service, family, ports, endpoints, triggered, problems })
}

fn endpoint(endpoint: &Endpoint, family: Family, node_name: &str) -> Result<EndpointFacts, String> {
    let text = endpoint.addresses.first().ok_or("an endpoint has no address")?;
    let address: IpAddr = text.parse().map_err(|_not| format!("endpoint {text:?} is not an IP address"))?;
    if address.is_ipv4() != (family == Family::V4) {
        return Err(format!("endpoint {address} is not of the slice's addressType"));
    }
    if unusable(address) {
        return Err(format!("endpoint {address} is no address that an endpoint can have"));
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
    let hints = endpoint.hints.as_ref();
    let nodes = hints.and_then(|hints| hints.for_nodes.as_ref()).filter(|nodes| !nodes.is_empty());
    let zones = hints.and_then(|hints| hints.for_zones.as_ref()).filter(|zones| !zones.is_empty());
    Ok(EndpointFacts {
        address,
        local: endpoint.node_name.as_deref() == Some(node_name),
        node: choices::name_hash(endpoint.node_name.as_deref().unwrap_or_default()),
        state,
        for_node: nodes.map(|nodes| nodes.iter().any(|node| node.name == node_name)),
        for_zones: zones.map(|zones| zones.iter().map(|zone| zone.name.clone()).collect()),
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
        let external: Vec<String> =
            facts.external_ips.iter().chain(&facts.balancer_ips).map(ToString::to_string).collect();
        assert_eq!(external, ["192.0.2.1", "198.51.100.1"], "a balancer in proxy mode gets its own traffic");
        assert_eq!((facts.affinity_secs, facts.internal_local), (10_800, true));
        let ports: Vec<_> = facts.ports.iter().map(|p| (p.port, p.protocol, p.node_port)).collect();
        let expected =
            [(80, Protocol::Tcp, Some(30000)), (53, Protocol::Udp, None), (9, Protocol::Sctp, None)];
        assert_eq!(ports, expected);
        assert_eq!(facts.problems, Vec::<String>::new());
    }

    #[test]
    fn what_makes_no_sense_is_named_and_the_rest_stays() {
        let facts = parse(json!({
            "metadata": {"name": "web"},
            "spec": {
                "clusterIP": "10.96.0.5", "externalIPs": ["nonsense", "127.0.0.1", "192.0.2.1", "192.0.2.1"],
                "loadBalancerSourceRanges": ["10.0.0.0/99"],
                "ports": [
                    {"port": 0}, {"port": 70000}, {"port": 80, "nodePort": 99999}, {"port": 80},
                    {"port": 81, "protocol": "QUIC"},
                ],
            },
        }))
        .unwrap();
        let external: Vec<String> = facts.external_ips.iter().map(ToString::to_string).collect();
        assert_eq!(external, ["192.0.2.1"]);
        assert_eq!(facts.ports.len(), 1);
        assert_eq!((facts.ports[0].port, facts.ports[0].node_port), (80, None));
        assert!(!facts.source_ranges[0].contains([10, 0, 0, 1].into()), "an unreadable list lets nobody in");
        let all = facts.problems.join("\n");
        for part in [
            "\"nonsense\" is not an IP address",
            "127.0.0.1 is no address that a Service can have",
            "spec.ports[0].port: 0 is not a port number",
            "spec.ports[1].port: 70000",
            "spec.ports[2].nodePort: 99999",
            "spec.ports[3]: 80/TCP stands in the list twice",
            "spec.ports[4].protocol: \"QUIC\"",
            "10.0.0.0/99",
        ] {
            assert!(all.contains(part), "{part} is not in:\n{all}");
        }
    }

    #[test]
    fn endpoints_of_the_machine_itself_and_of_the_wrong_family_are_left_out() {
        let value = json!({
            "metadata": {"name": "web-1", "namespace": "a", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4",
            "endpoints": [
                {"addresses": ["127.0.0.1"]}, {"addresses": ["fd00::1"]}, {"addresses": ["x"]}, {"addresses": []},
                {"addresses": ["169.254.169.254"]}, {"addresses": ["10.244.0.1"]},
            ],
            "ports": [{"port": 80}, {"port": -1}],
        });
        let facts = slice(&serde_json::from_value(value).unwrap(), "n1").unwrap();
        assert_eq!(facts.endpoints.len(), 1);
        assert_eq!(facts.ports.len(), 1);
        assert_eq!(facts.problems.len(), 6, "{:?}", facts.problems);
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
