//! EndpointSlices: at most 100 endpoints each, changed as little as possible.
//!
//! Every changed slice goes to every node, so an endpoint stays in the slice it is in, new ones go where a
//! write is needed anyway or where they fit best, and a slice is only made when none has room.
//! Semantics: <https://kubernetes.io/docs/concepts/services-networking/endpoint-slices/>.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::{
    api::{
        core::v1::{Pod, Service, ServiceSpec},
        discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice},
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use super::{Family, HEADLESS, Port, SERVICE_NAME};
use crate::{
    adoption::controller_reference,
    object::{self, StringMap},
};

/// Label that names who keeps an EndpointSlice.
pub const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
/// This controller's value of [`MANAGED_BY`].
pub const CONTROLLER: &str = "endpointslice-controller.k8s.io";
/// The most endpoints in one slice.
pub const CAPACITY: usize = 100;

/// The writes for one Service.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Slices to create; the API server completes their names.
    pub create: Vec<EndpointSlice>,
    /// Whole slices to write over the version they carry.
    pub update: Vec<EndpointSlice>,
    /// Slices to delete.
    pub delete: Vec<Arc<EndpointSlice>>,
}

/// Endpoints by identity: the pod's uid and its addresses.
type Endpoints = BTreeMap<(String, Vec<String>), Endpoint>;

/// Decides about the Service's slices. `slices`: those with this Service's [`SERVICE_NAME`] and our
/// [`MANAGED_BY`]; `zones`: node name → zone.
pub fn plan(
    service: &Service,
    pods: &[Arc<Pod>],
    slices: &[Arc<EndpointSlice>],
    zones: &BTreeMap<String, String>,
) -> Plan {
    let mut plan = Plan::default();
    let Some((spec, _)) = super::selected_spec(service) else { return plan };
    let families = super::families(spec);
    for slice in slices {
        if !families.iter().any(|family| family.as_str() == slice.address_type) {
            plan.delete.push(Arc::clone(slice));
        }
    }
    for family in families {
        let desired = desired_endpoints(service, spec, pods, family, zones);
        let existing = slices.iter().filter(|slice| slice.address_type == family.as_str()).cloned();
        let packing = Packing { service, spec, family, plan: &mut plan };
        packing.run(desired, existing.collect());
    }
    plan
}

/// The endpoints the Service should have, by the set of ports they serve.
fn desired_endpoints(
    service: &Service,
    spec: &ServiceSpec,
    pods: &[Arc<Pod>],
    family: Family,
    zones: &BTreeMap<String, String>,
) -> BTreeMap<Vec<Port>, Endpoints> {
    let publish_all = spec.publish_not_ready_addresses == Some(true);
    let mut desired = BTreeMap::<_, Endpoints>::new();
    for pod in pods.iter().filter(|pod| super::selects(service, pod) && super::may_serve(pod, true)) {
        let Some(address) = super::address_of(pod, family) else { continue };
        let ports = super::ports_of(spec, pod);
        if !super::is_reachable(spec, &ports) {
            continue;
        }
        let serving = object::is_pod_ready(pod);
        let terminating = object::is_being_deleted(&pod.metadata);
        let node = object::pod_node(pod);
        let endpoint = Endpoint {
            addresses: vec![address.to_owned()],
            conditions: Some(EndpointConditions {
                ready: Some(publish_all || serving && !terminating),
                serving: Some(serving),
                terminating: Some(terminating),
            }),
            hostname: super::hostname_of(pod, service),
            node_name: node.map(str::to_owned),
            zone: node.and_then(|node| zones.get(node)).cloned(),
            target_ref: Some(super::reference(pod)),
            ..Endpoint::default()
        };
        desired.entry(ports).or_default().insert(identity(&endpoint), endpoint);
    }
    desired
}

fn identity(endpoint: &Endpoint) -> (String, Vec<String>) {
    let uid = endpoint.target_ref.as_ref().and_then(|target| target.uid.clone());
    (uid.unwrap_or_default(), endpoint.addresses.clone())
}

/// One slice on the way to its next content.
struct Draft {
    before: Arc<EndpointSlice>,
    endpoints: Vec<Endpoint>,
    changed: bool,
}

impl Draft {
    fn room(&self) -> usize {
        CAPACITY.saturating_sub(self.endpoints.len())
    }

    fn add(&mut self, endpoints: impl IntoIterator<Item = Endpoint>) {
        let before = self.endpoints.len();
        self.endpoints.extend(endpoints);
        self.changed |= self.endpoints.len() != before;
    }
}

struct Packing<'a> {
    service: &'a Service,
    spec: &'a ServiceSpec,
    family: Family,
    plan: &'a mut Plan,
}

impl Packing<'_> {
    fn run(mut self, desired: BTreeMap<Vec<Port>, Endpoints>, existing: Vec<Arc<EndpointSlice>>) {
        let mut by_ports = BTreeMap::<Vec<Port>, Vec<Arc<EndpointSlice>>>::new();
        for slice in existing {
            by_ports.entry(ports_of(&slice)).or_default().push(slice);
        }
        if desired.is_empty() {
            return self.keep_one_empty(by_ports.into_values().flatten().collect());
        }
        for (ports, endpoints) in desired {
            let slices = by_ports.remove(&ports).unwrap_or_default();
            self.pack(&ports, endpoints, slices);
        }
        self.plan.delete.extend(by_ports.into_values().flatten());
    }

    /// A Service without endpoints keeps one empty slice, so that consumers can tell "none" from "not yet".
    fn keep_one_empty(&mut self, mut slices: Vec<Arc<EndpointSlice>>) {
        slices.sort_by(|left, right| left.metadata.name.cmp(&right.metadata.name));
        let mut slices = slices.into_iter();
        match slices.next() {
            None => self.plan.create.push(self.slice(Vec::new(), &[])),
            Some(first) => {
                let changed = first.endpoints.as_ref().is_some_and(|endpoints| !endpoints.is_empty())
                    || first.ports.as_ref().is_some_and(|ports| !ports.is_empty());
                self.finish(Draft { before: first, endpoints: Vec::new(), changed }, &[]);
            }
        }
        self.plan.delete.extend(slices);
    }

    fn pack(&mut self, ports: &[Port], mut desired: Endpoints, mut slices: Vec<Arc<EndpointSlice>>) {
        slices.sort_by(|left, right| left.metadata.name.cmp(&right.metadata.name));
        let mut drafts: Vec<_> = slices.into_iter().map(|slice| keep_desired(slice, &mut desired)).collect();
        let mut missing: Vec<_> = desired.into_values().collect();
        for draft in drafts.iter_mut().filter(|draft| draft.changed) {
            let taken = missing.len().min(draft.room());
            draft.add(missing.drain(..taken));
        }
        while missing.len() >= CAPACITY {
            let full = missing.drain(..CAPACITY).collect();
            self.plan.create.push(self.slice(full, ports));
        }
        if !missing.is_empty() {
            let fits = drafts.iter_mut().filter(|draft| draft.room() >= missing.len());
            match fits.min_by_key(|draft| draft.room()) {
                Some(draft) => draft.add(missing),
                None => self.plan.create.push(self.slice(missing, ports)),
            }
        }
        for draft in drafts {
            if draft.endpoints.is_empty() {
                self.plan.delete.push(draft.before);
            } else {
                self.finish(draft, ports);
            }
        }
    }

    /// Adds the draft to the plan if it differs from what exists.
    fn finish(&mut self, draft: Draft, ports: &[Port]) {
        let wanted = self.slice(draft.endpoints, ports);
        let before = &draft.before.metadata;
        if !draft.changed
            && before.labels == wanted.metadata.labels
            && before.owner_references == wanted.metadata.owner_references
        {
            return;
        }
        let mut next = EndpointSlice::clone(&draft.before);
        next.metadata.labels = wanted.metadata.labels;
        next.metadata.owner_references = wanted.metadata.owner_references;
        next.endpoints = wanted.endpoints;
        next.ports = wanted.ports;
        self.plan.update.push(next);
    }

    fn slice(&self, endpoints: Vec<Endpoint>, ports: &[Port]) -> EndpointSlice {
        EndpointSlice {
            metadata: ObjectMeta {
                generate_name: Some(format!("{}-", object::name(&self.service.metadata))),
                namespace: self.service.metadata.namespace.clone(),
                labels: Some(self.labels()),
                owner_references: Some(vec![controller_reference("v1", "Service", &self.service.metadata)]),
                ..ObjectMeta::default()
            },
            address_type: self.family.as_str().into(),
            endpoints: Some(endpoints),
            ports: Some(ports.iter().map(endpoint_port).collect()),
        }
    }

    /// The Service's own labels and the three that consumers select by.
    fn labels(&self) -> StringMap {
        let mut labels = self.service.metadata.labels.clone().unwrap_or_default();
        labels.remove(HEADLESS);
        if super::is_headless(self.spec) {
            labels.insert(HEADLESS.into(), String::new());
        }
        labels.insert(SERVICE_NAME.into(), object::name(&self.service.metadata).into());
        labels.insert(MANAGED_BY.into(), CONTROLLER.into());
        labels
    }
}

/// The slice with only those endpoints that are still wanted, in their present form; takes them out of
/// `desired`.
fn keep_desired(before: Arc<EndpointSlice>, desired: &mut Endpoints) -> Draft {
    let present = before.endpoints.as_deref().unwrap_or_default();
    let mut changed = false;
    let mut endpoints = Vec::with_capacity(present.len());
    for endpoint in present {
        match desired.remove(&identity(endpoint)) {
            Some(wanted) => {
                changed |= wanted != *endpoint;
                endpoints.push(wanted);
            }
            None => changed = true,
        }
    }
    Draft { before, endpoints, changed }
}

fn endpoint_port(port: &Port) -> EndpointPort {
    EndpointPort {
        name: Some(port.name.clone()),
        port: Some(port.number),
        protocol: Some(port.protocol.clone()),
        app_protocol: port.app_protocol.clone(),
    }
}

fn ports_of(slice: &EndpointSlice) -> Vec<Port> {
    let mut ports: Vec<_> = slice
        .ports
        .iter()
        .flatten()
        .map(|port| Port {
            name: port.name.clone().unwrap_or_default(),
            number: port.port.unwrap_or(0),
            protocol: super::protocol(port.protocol.as_deref()).to_owned(),
            app_protocol: port.app_protocol.clone(),
        })
        .collect();
    ports.sort();
    ports
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::{apis::meta::v1::Time, util::intstr::IntOrString};

    use super::*;
    use crate::endpoints::fixtures::{pod, service};

    /// Carries a plan out as the API server would, with names counted up.
    fn apply(plan: Plan, slices: &mut Vec<Arc<EndpointSlice>>, serial: &mut u32) -> usize {
        let writes = plan.create.len() + plan.update.len() + plan.delete.len();
        for gone in plan.delete {
            slices.retain(|slice| slice.metadata.name != gone.metadata.name);
        }
        for updated in plan.update {
            slices.retain(|slice| slice.metadata.name != updated.metadata.name);
            slices.push(Arc::new(updated));
        }
        for mut created in plan.create {
            *serial += 1;
            created.metadata.name = Some(format!("web-{serial:05}"));
            slices.push(Arc::new(created));
        }
        writes
    }

    fn pods(count: u8) -> Vec<Arc<Pod>> {
        (1..=count).map(|index| Arc::new(pod(index, true))).collect()
    }

    #[test]
    fn a_service_without_pods_has_one_empty_slice() {
        let service = service(IntOrString::Int(80));
        let (mut slices, mut serial) = (Vec::new(), 0);
        apply(plan(&service, &[], &slices, &BTreeMap::new()), &mut slices, &mut serial);
        assert_eq!(slices.len(), 1);
        assert_eq!(plan(&service, &[], &slices, &BTreeMap::new()), Plan::default());
        let labels = slices[0].metadata.labels.clone().expect("labels");
        assert_eq!(labels[SERVICE_NAME], "web");
        assert_eq!(labels[MANAGED_BY], CONTROLLER);
        assert_eq!(labels["team"], "a");
    }

    #[test]
    fn conditions_tell_ready_serving_and_terminating() {
        let service = service(IntOrString::String("web-port".into()));
        let zones = BTreeMap::from([("node-a".into(), "zone-1".into())]);
        let mut leaving = pod(3, true);
        leaving.metadata.deletion_timestamp = Some(Time(jiff::Timestamp::UNIX_EPOCH));
        let pods = [pod(1, true), pod(2, false), leaving].map(Arc::new);
        let plan = plan(&service, &pods, &[], &zones);
        let slice = &plan.create[0];
        let states: Vec<_> = slice.endpoints.iter().flatten().map(|e| e.conditions.clone()).collect();
        let state = |ready, serving, terminating| {
            Some(EndpointConditions {
                ready: Some(ready),
                serving: Some(serving),
                terminating: Some(terminating),
            })
        };
        assert_eq!(states, [state(true, true, false), state(false, false, false), state(false, true, true)]);
        assert_eq!(slice.ports.as_ref().expect("ports")[0].port, Some(8080), "named target port");
        let first = &slice.endpoints.as_ref().expect("endpoints")[0];
        assert_eq!((first.node_name.as_deref(), first.zone.as_deref()), (Some("node-a"), Some("zone-1")));
    }

    #[test]
    fn one_pod_more_or_less_changes_one_slice() {
        let service = service(IntOrString::Int(80));
        let (mut slices, mut serial) = (Vec::new(), 0);
        let zones = BTreeMap::new();
        assert_eq!(apply(plan(&service, &pods(250), &slices, &zones), &mut slices, &mut serial), 3);
        assert!(slices.iter().all(|slice| slice.endpoints.as_ref().is_some_and(|e| e.len() <= CAPACITY)));
        assert_eq!(plan(&service, &pods(250), &slices, &zones), Plan::default(), "settled");
        assert_eq!(apply(plan(&service, &pods(251), &slices, &zones), &mut slices, &mut serial), 1);
        let mut fewer = pods(251);
        fewer.remove(0);
        assert_eq!(apply(plan(&service, &fewer, &slices, &zones), &mut slices, &mut serial), 1);
        let total: usize = slices.iter().map(|slice| slice.endpoints.as_ref().map_or(0, Vec::len)).sum();
        assert_eq!(total, 250);
        assert!(apply(plan(&service, &[], &slices, &zones), &mut slices, &mut serial) >= 3);
        assert_eq!(slices.len(), 1, "one empty slice remains");
    }

    #[test]
    fn services_without_selector_are_left_alone() {
        let mut service = service(IntOrString::Int(80));
        service.spec.as_mut().expect("spec").selector = None;
        assert_eq!(plan(&service, &pods(1), &[], &BTreeMap::new()), Plan::default());
    }

    #[test]
    fn publishing_not_ready_addresses_makes_them_ready() {
        let mut service = service(IntOrString::Int(80));
        service.spec.as_mut().expect("spec").publish_not_ready_addresses = Some(true);
        let plan = plan(&service, &[Arc::new(pod(1, false))], &[], &BTreeMap::new());
        let conditions = plan.create[0].endpoints.as_ref().expect("endpoints")[0].conditions.clone();
        assert_eq!(conditions.map(|c| (c.ready, c.serving)), Some((Some(true), Some(false))));
    }
}
