//! The Endpoints object of a Service: what clients read that predate EndpointSlices.
//!
//! One object per Service, addresses grouped by the ports they serve, at most 1,000 of them.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::{
    api::core::v1::{EndpointAddress, EndpointPort, EndpointSubset, Endpoints, Pod, Service, ServiceSpec},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use super::{HEADLESS, Port};
use crate::object::{self, StringMap};

/// Label that names who keeps an Endpoints object.
pub const MANAGED_BY: &str = "endpoints.kubernetes.io/managed-by";
/// This controller's value of [`MANAGED_BY`].
pub const CONTROLLER: &str = "endpoint-controller";
/// Annotation of an object that had to leave addresses out.
const OVER_CAPACITY: &str = "endpoints.kubernetes.io/over-capacity";
/// The most addresses in one object.
const CAPACITY: usize = 1000;

/// The write for one Service.
#[derive(Clone, Debug, PartialEq)]
pub enum Plan {
    /// Everything is as it should be, or not ours.
    Nothing,
    /// Create the object.
    Create(Box<Endpoints>),
    /// Write the object over the version it carries.
    Update(Box<Endpoints>),
    /// The Service is gone: delete what we kept for it.
    Delete,
}

/// Decides about the Endpoints object `current` of `service` (`None`: the Service does not exist).
pub fn plan(service: Option<&Service>, pods: &[Arc<Pod>], current: Option<&Endpoints>) -> Plan {
    let Some(service) = service else {
        let ours = current.is_some_and(|current| {
            let labels = current.metadata.labels.as_ref();
            labels.and_then(|labels| labels.get(MANAGED_BY)).is_some_and(|by| by == CONTROLLER)
        });
        return if ours { Plan::Delete } else { Plan::Nothing };
    };
    let Some((spec, _)) = super::selected_spec(service) else { return Plan::Nothing };
    let (subsets, truncated) = subsets(service, spec, pods);
    let subsets = (!subsets.is_empty()).then_some(subsets);
    let labels = labels(service, spec);
    let mut annotations = service.metadata.annotations.clone().unwrap_or_default();
    annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
    if truncated {
        annotations.insert(OVER_CAPACITY.into(), "truncated".into());
    }
    let Some(current) = current else {
        let metadata = ObjectMeta {
            name: service.metadata.name.clone(),
            namespace: service.metadata.namespace.clone(),
            labels: Some(labels),
            annotations: (!annotations.is_empty()).then_some(annotations),
            ..ObjectMeta::default()
        };
        return Plan::Create(Box::new(Endpoints { metadata, subsets }));
    };
    let no_subsets = Vec::new();
    let same_subsets =
        current.subsets.as_ref().unwrap_or(&no_subsets) == subsets.as_ref().unwrap_or(&no_subsets);
    let flagged = object::annotation(&current.metadata, OVER_CAPACITY).is_some();
    if same_subsets && current.metadata.labels.as_ref() == Some(&labels) && flagged == truncated {
        return Plan::Nothing;
    }
    let mut next = current.clone();
    next.metadata.labels = Some(labels);
    next.metadata.annotations = (!annotations.is_empty()).then_some(annotations);
    next.subsets = subsets;
    Plan::Update(Box::new(next))
}

fn labels(service: &Service, spec: &ServiceSpec) -> StringMap {
    let mut labels = service.metadata.labels.clone().unwrap_or_default();
    labels.remove(HEADLESS);
    if super::is_headless(spec) {
        labels.insert(HEADLESS.into(), String::new());
    }
    labels.insert(MANAGED_BY.into(), CONTROLLER.into());
    labels
}

/// Addresses by the ports they serve, and whether some had to be left out.
fn subsets(service: &Service, spec: &ServiceSpec, pods: &[Arc<Pod>]) -> (Vec<EndpointSubset>, bool) {
    let publish_all = spec.publish_not_ready_addresses == Some(true);
    let family = super::families(spec)[0];
    let mut chosen: Vec<_> = pods
        .iter()
        .filter(|pod| super::selects(service, pod) && super::may_serve(pod, publish_all))
        .filter_map(|pod| {
            let ports = super::ports_of(spec, pod);
            let address = super::address_of(pod, family)?;
            let ready = publish_all || object::is_pod_ready(pod);
            super::is_reachable(spec, &ports).then_some((!ready, super::pod_order(pod), pod, address, ports))
        })
        .collect();
    // Ready addresses come first, so that they are the last to be left out.
    chosen.sort_by(|left, right| (left.0, left.1).cmp(&(right.0, right.1)));
    let truncated = chosen.len() > CAPACITY;
    chosen.truncate(CAPACITY);
    let mut grouped = BTreeMap::<Vec<Port>, EndpointSubset>::new();
    for (not_ready, _, pod, address, ports) in chosen {
        let subset = grouped.entry(ports).or_default();
        let list = if not_ready { &mut subset.not_ready_addresses } else { &mut subset.addresses };
        list.get_or_insert_default().push(EndpointAddress {
            ip: address.to_owned(),
            hostname: super::hostname_of(pod, service),
            node_name: object::pod_node(pod).map(str::to_owned),
            target_ref: Some(super::reference(pod)),
        });
    }
    let subsets = grouped.into_iter().map(|(ports, mut subset)| {
        let ports: Vec<_> = ports.iter().map(endpoint_port).collect();
        subset.ports = (!ports.is_empty()).then_some(ports);
        subset
    });
    (subsets.collect(), truncated)
}

fn endpoint_port(port: &Port) -> EndpointPort {
    EndpointPort {
        name: (!port.name.is_empty()).then(|| port.name.clone()),
        port: port.number,
        protocol: Some(port.protocol.clone()),
        app_protocol: port.app_protocol.clone(),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

    use super::*;
    use crate::endpoints::fixtures::{pod, service};

    #[test]
    fn ready_and_unready_pods_are_told_apart() {
        let service = service(IntOrString::Int(8080));
        let pods = [pod(1, true), pod(2, false)].map(Arc::new);
        let Plan::Create(created) = plan(Some(&service), &pods, None) else { panic!("nothing created") };
        let subset = &created.subsets.as_ref().expect("subsets")[0];
        assert_eq!(subset.addresses.as_ref().expect("ready")[0].ip, "10.244.0.1");
        assert_eq!(subset.not_ready_addresses.as_ref().expect("not ready")[0].ip, "10.244.0.2");
        assert_eq!(plan(Some(&service), &pods, Some(&created)), Plan::Nothing, "settled");
        assert_eq!(plan(None, &pods, Some(&created)), Plan::Delete);
    }

    #[test]
    fn endpoints_made_by_others_survive_without_their_service() {
        let foreign = Endpoints::default();
        assert_eq!(plan(None, &[], Some(&foreign)), Plan::Nothing);
    }
}
