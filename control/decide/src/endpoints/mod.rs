//! Services to endpoints: which pods stand behind a Service, on which ports, in which state.
//!
//! [`slice::plan`] packs them into EndpointSlices, [`legacy::plan`] into the old Endpoints object. Input: a
//! Service, the pods of its namespace, what exists. Neither ever touches endpoints of a Service without a
//! selector: those belong to whoever made them.

pub mod legacy;
pub mod slice;
pub mod trigger;

use std::net::IpAddr;

use k8s_openapi::{
    api::core::v1::{Container, ObjectReference, Pod, Service, ServicePort, ServiceSpec},
    apimachinery::pkg::util::intstr::IntOrString,
};

use crate::{
    object::{self, StringMap},
    selector,
};

/// Label that names the Service an EndpointSlice belongs to.
pub const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Label and annotation-free mark of headless Services' endpoints.
pub const HEADLESS: &str = "service.kubernetes.io/headless";

/// An IP family, as `spec.ipFamilies` and EndpointSlices' `addressType` spell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// `IPv4`
    V4,
    /// `IPv6`
    V6,
}

impl Family {
    /// The API's spelling.
    pub fn as_str(self) -> &'static str {
        match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        }
    }

    fn of(address: &str) -> Option<Self> {
        match address.parse().ok()? {
            IpAddr::V4(_) => Some(Family::V4),
            IpAddr::V6(_) => Some(Family::V6),
        }
    }
}

/// One resolved port of a Service on a pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Port {
    name: String,
    number: i32,
    protocol: String,
    app_protocol: Option<String>,
}

/// The spec of a Service whose endpoints are made from its selector; `None` for all other Services.
pub fn selected_spec(service: &Service) -> Option<(&ServiceSpec, &StringMap)> {
    let spec = service.spec.as_ref()?;
    let selector = spec.selector.as_ref().filter(|selector| !selector.is_empty())?;
    (spec.type_.as_deref() != Some("ExternalName")).then_some((spec, selector))
}

/// True when the Service has a selector that covers the pod.
pub fn selects(service: &Service, pod: &Pod) -> bool {
    let Some((_, wanted)) = selected_spec(service) else { return false };
    service.metadata.namespace == pod.metadata.namespace
        && pod.metadata.labels.as_ref().is_some_and(|labels| selector::contains(labels, wanted))
}

/// True when the change of a pod can change the endpoints it is part of.
pub fn is_relevant_change(old: &Pod, new: &Pod) -> bool {
    let state = |pod: &Pod| {
        (object::is_pod_ready(pod), object::is_pod_terminal(pod), object::is_being_deleted(&pod.metadata))
    };
    let addresses = |pod: &Pod| pod.status.as_ref().map(|status| status.pod_ips.clone().unwrap_or_default());
    state(old) != state(new)
        || object::pod_node(old) != object::pod_node(new)
        || old.metadata.labels != new.metadata.labels
        || old.metadata.uid != new.metadata.uid
        || addresses(old) != addresses(new)
}

/// The families a Service has endpoints of, the primary first.
fn families(spec: &ServiceSpec) -> Vec<Family> {
    let named = spec.ip_families.iter().flatten().filter_map(|family| match family.as_str() {
        "IPv4" => Some(Family::V4),
        "IPv6" => Some(Family::V6),
        _ => None,
    });
    let families: Vec<_> = named.collect();
    if families.is_empty() {
        vec![spec.cluster_ip.as_deref().and_then(Family::of).unwrap_or(Family::V4)]
    } else {
        families
    }
}

/// True for a Service that has no virtual address.
fn is_headless(spec: &ServiceSpec) -> bool {
    matches!(spec.cluster_ip.as_deref(), None | Some("" | "None"))
}

/// The pod's address of the family.
fn address_of(pod: &Pod, family: Family) -> Option<&str> {
    let status = pod.status.as_ref()?;
    let listed = status.pod_ips.iter().flatten().map(|address| address.ip.as_str());
    listed.chain(status.pod_ip.as_deref()).find(|address| Family::of(address) == Some(family))
}

/// True when the pod can be an endpoint at all: it has not ended.
fn may_serve(pod: &Pod, include_terminating: bool) -> bool {
    !object::is_pod_terminal(pod) && (include_terminating || !object::is_being_deleted(&pod.metadata))
}

/// The Service's ports as this pod serves them; a named target port the pod lacks is left out.
fn ports_of(spec: &ServiceSpec, pod: &Pod) -> Vec<Port> {
    let mut ports: Vec<_> = spec
        .ports
        .iter()
        .flatten()
        .filter_map(|port| {
            Some(Port {
                name: port.name.clone().unwrap_or_default(),
                number: target_port(port, pod)?,
                protocol: protocol(port.protocol.as_deref()).to_owned(),
                app_protocol: port.app_protocol.clone(),
            })
        })
        .collect();
    ports.sort();
    ports
}

/// True when every Service of this kind has its ports resolved, or needs none.
fn is_reachable(spec: &ServiceSpec, ports: &[Port]) -> bool {
    !ports.is_empty() || is_headless(spec) && spec.ports.as_ref().is_none_or(Vec::is_empty)
}

fn target_port(port: &ServicePort, pod: &Pod) -> Option<i32> {
    match port.target_port.as_ref() {
        None | Some(IntOrString::Int(0)) => Some(port.port),
        Some(IntOrString::Int(number)) => Some(*number),
        Some(IntOrString::String(name)) => named_port(pod, name, protocol(port.protocol.as_deref())),
    }
}

fn named_port(pod: &Pod, name: &str, wanted: &str) -> Option<i32> {
    let spec = pod.spec.as_ref()?;
    let is_sidecar = |container: &&Container| container.restart_policy.as_deref() == Some("Always");
    let sidecars = spec.init_containers.iter().flatten().filter(is_sidecar);
    sidecars.chain(&spec.containers).flat_map(|container| container.ports.iter().flatten()).find_map(|port| {
        let matches = port.name.as_deref() == Some(name) && protocol(port.protocol.as_deref()) == wanted;
        matches.then_some(port.container_port)
    })
}

fn protocol(protocol: Option<&str>) -> &str {
    protocol.filter(|protocol| !protocol.is_empty()).unwrap_or("TCP")
}

fn reference(pod: &Pod) -> ObjectReference {
    ObjectReference {
        kind: Some("Pod".into()),
        namespace: pod.metadata.namespace.clone(),
        name: pod.metadata.name.clone(),
        uid: pod.metadata.uid.clone(),
        ..ObjectReference::default()
    }
}

/// The DNS hostname of the endpoint: only when the pod asks for this Service as its subdomain.
fn hostname_of(pod: &Pod, service: &Service) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let hostname = spec.hostname.clone().filter(|hostname| !hostname.is_empty())?;
    (spec.subdomain == service.metadata.name).then_some(hostname)
}

fn pod_order(pod: &Pod) -> (&str, &str) {
    (object::name(&pod.metadata), object::uid(&pod.metadata))
}

#[cfg(test)]
pub(crate) mod fixtures {
    //! Services and pods for the tests of both forms.

    use k8s_openapi::{
        api::core::v1::{ContainerPort, PodCondition, PodIP, PodSpec, PodStatus},
        apimachinery::pkg::apis::meta::v1::ObjectMeta,
    };

    use super::*;

    pub(crate) fn labels() -> StringMap {
        StringMap::from([("app".into(), "web".into())])
    }

    pub(crate) fn service(target: IntOrString) -> Service {
        Service {
            metadata: ObjectMeta {
                name: Some("web".into()),
                namespace: Some("default".into()),
                uid: Some("service-uid".into()),
                labels: Some(StringMap::from([("team".into(), "a".into())])),
                ..ObjectMeta::default()
            },
            spec: Some(ServiceSpec {
                cluster_ip: Some("10.96.0.7".into()),
                ip_families: Some(vec!["IPv4".into()]),
                selector: Some(labels()),
                ports: Some(vec![ServicePort {
                    name: Some("http".into()),
                    port: 80,
                    target_port: Some(target),
                    ..ServicePort::default()
                }]),
                ..ServiceSpec::default()
            }),
            status: None,
        }
    }

    pub(crate) fn pod(index: u8, ready: bool) -> Pod {
        let address = format!("10.244.0.{index}");
        Pod {
            metadata: ObjectMeta {
                name: Some(format!("web-{index:03}")),
                namespace: Some("default".into()),
                uid: Some(format!("uid-{index:03}")),
                labels: Some(labels()),
                ..ObjectMeta::default()
            },
            spec: Some(PodSpec {
                node_name: Some("node-a".into()),
                containers: vec![Container {
                    ports: Some(vec![ContainerPort {
                        name: Some("web-port".into()),
                        container_port: 8080,
                        ..ContainerPort::default()
                    }]),
                    ..Container::default()
                }],
                ..PodSpec::default()
            }),
            status: Some(PodStatus {
                phase: Some("Running".into()),
                pod_ip: Some(address.clone()),
                pod_ips: Some(vec![PodIP { ip: address }]),
                conditions: Some(vec![PodCondition {
                    type_: "Ready".into(),
                    status: if ready { "True" } else { "False" }.into(),
                    ..PodCondition::default()
                }]),
                ..PodStatus::default()
            }),
        }
    }
}
