//! Tells people what the proxy could not do: Events on the Service or Node concerned, and a log line each. The same
//! thing is said once, until it changes.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use ebpf_common::Protocol;
use ebpf_loader::{DesiredService, Listen, Refused, ServiceKey};
use k8s_openapi::api::core::v1::ObjectReference;

use super::{catalog::Catalog, facts::ObjectName, node_ports};
use crate::events::{EventRecorder, EventType};

/// A NodePort of a service.
type NodePort = (ServiceKey, Protocol, u16);

/// What was said already.
pub(super) struct Reports {
    events: EventRecorder,
    node: ObjectReference,
    refusals: BTreeMap<ServiceKey, String>,
    problems: BTreeMap<ObjectName, Vec<String>>,
    checked_ports: BTreeSet<NodePort>,
    unserved: BTreeMap<String, String>,
}

impl Reports {
    /// Nothing said yet.
    pub(super) fn new(events: EventRecorder, node_name: &str) -> Self {
        let node = ObjectReference {
            kind: Some("Node".to_owned()),
            // By custom a node's events carry its name as uid.
            uid: Some(node_name.to_owned()),
            name: Some(node_name.to_owned()),
            ..ObjectReference::default()
        };
        Self {
            events,
            node,
            refusals: BTreeMap::new(),
            problems: BTreeMap::new(),
            checked_ports: BTreeSet::new(),
            unserved: BTreeMap::new(),
        }
    }

    /// The data plane does not work at all.
    pub(super) fn unavailable(&self, error: &anyhow::Error) {
        let message = format!("Services are not reachable through this node's data plane: {error:#}");
        self.events.record(self.node.clone(), EventType::Warning, "ServiceProxyUnavailable", message);
    }

    /// The API server lists nothing where every cluster has something.
    pub(super) fn empty_listing(&self) {
        let message = "the API server lists no Service or no EndpointSlice at all, which no cluster is without: what is \
                       programmed stays as it is until it lists some";
        tracing::warn!("{message}");
        let message = message.to_owned();
        self.events.record(self.node.clone(), EventType::Warning, "ServiceListEmpty", message);
    }

    /// Routes that would carry untranslated service traffic away.
    pub(super) fn clashing_routes(&self, range: &str, clashes: &[String]) {
        if clashes.is_empty() {
            return;
        }
        let message = format!(
            "the service range {range} overlaps with the route(s) {}: addresses there may be hidden by Services",
            clashes.join(", ")
        );
        tracing::warn!("{message}");
        self.events.record(self.node.clone(), EventType::Warning, "ServiceRangeClash", message);
    }

    /// A port of the proxy itself that cannot be served.
    pub(super) fn port_taken(&self, field: &str, address: SocketAddr, error: &std::io::Error) {
        let hint = if error.kind() == std::io::ErrorKind::AddrInUse {
            " (another agent or kube-proxy in this network namespace? set another port, or 0 for none)"
        } else {
            ""
        };
        let message = format!("{field}: {address} cannot be served: {error}{hint}");
        tracing::warn!("{message}");
        self.events.record(self.node.clone(), EventType::Warning, "ServiceProxyPortTaken", message);
    }

    /// Devices through which clients outside are not served, with the reason.
    pub(super) fn unserved_devices(&mut self, failed: &[(String, String)]) {
        let failed: BTreeMap<String, String> = failed.iter().cloned().collect();
        for (device, why) in failed.iter().filter(|(device, why)| self.unserved.get(*device) != Some(*why)) {
            let message = format!("clients outside are not served through {device}: {why}");
            tracing::warn!("{message}");
            self.events.record(self.node.clone(), EventType::Warning, "ServiceDeviceNotServed", message);
        }
        self.unserved = failed;
    }

    /// What makes no sense about a Service; said again only when it changes.
    pub(super) fn problems(&mut self, catalog: &Catalog, name: &ObjectName, problems: &[String]) {
        let known = self.problems.get(name).map(Vec::as_slice).unwrap_or_default();
        if known == problems {
            return;
        }
        let fresh: Vec<&String> = problems.iter().filter(|problem| !known.contains(problem)).collect();
        for problem in fresh {
            self.on_object(catalog, name, "ServicePartlyProgrammed", problem);
        }
        if problems.is_empty() {
            self.problems.remove(name);
        } else {
            self.problems.insert(name.clone(), problems.to_vec());
        }
    }

    /// What an update refused, and what it mended.
    pub(super) fn updated<'k>(
        &mut self,
        catalog: &Catalog,
        written: impl Iterator<Item = &'k ServiceKey>,
        refused: &[(ServiceKey, Refused)],
    ) {
        let refused_keys: BTreeSet<&ServiceKey> = refused.iter().map(|(key, _)| key).collect();
        for key in written.filter(|key| !refused_keys.contains(key)) {
            self.refusals.remove(key);
        }
        for (key, why) in refused {
            let why = chain(why);
            if self.refusals.get(key) == Some(&why) {
                continue;
            }
            let reason = if why.starts_with("no room") { "ServiceMapFull" } else { "ServiceNotProgrammed" };
            self.on_service(catalog, key, reason, &why);
            self.refusals.insert(key.clone(), why);
        }
    }

    /// A service is gone; if it comes back, everything is said again.
    pub(super) fn removed(&mut self, key: &ServiceKey) {
        self.refusals.remove(key);
        self.checked_ports.retain(|(other, _, _)| other != key);
    }

    /// Looks for processes on ports that these services newly want as NodePorts.
    pub(super) async fn taken_node_ports(&mut self, catalog: &Catalog, ports: Vec<NodePort>) {
        let fresh: Vec<NodePort> =
            ports.into_iter().filter(|port| self.checked_ports.insert(port.clone())).collect();
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let wanted: Vec<&NodePort> = fresh.iter().filter(|(_, other, _)| *other == protocol).collect();
            if wanted.is_empty() {
                continue;
            }
            let numbers: Vec<u16> = wanted.iter().map(|(_, _, port)| *port).collect();
            let search = tokio::task::spawn_blocking(move || node_ports::holders(protocol, &numbers));
            let holders = search.await.unwrap_or_default();
            for (key, _, port) in wanted {
                if let Some(holder) = holders.get(port) {
                    let message = format!(
                        "nodePort {port} is also bound by {holder} on this node: clients on this node reach the \
                         Service, others reach that process"
                    );
                    self.on_service(catalog, key, "NodePortTaken", &message);
                }
            }
        }
    }

    fn on_service(&self, catalog: &Catalog, key: &ServiceKey, reason: &str, message: &str) {
        if let Some(name) = catalog.owner(key) {
            self.on_object(catalog, &name, reason, message);
        } else {
            tracing::warn!(service = %key, reason, "{message}");
        }
    }

    fn on_object(&self, catalog: &Catalog, name: &ObjectName, reason: &str, message: &str) {
        tracing::warn!(service = %format_args!("{}/{}", name.namespace, name.name), reason, "{message}");
        let Some(facts) = catalog.facts(name) else {
            return;
        };
        let service = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Service".to_owned()),
            namespace: Some(name.namespace.clone()),
            name: Some(name.name.clone()),
            uid: Some(facts.uid),
            ..ObjectReference::default()
        };
        self.events.record(service, EventType::Warning, reason, message);
    }
}

/// The NodePorts of these services.
pub(super) fn node_ports_of<'d>(
    services: impl Iterator<Item = (&'d ServiceKey, &'d DesiredService)>,
) -> Vec<NodePort> {
    let mut ports = Vec::new();
    for (key, desired) in services {
        let on_node = desired.frontends.iter().filter(|frontend| matches!(frontend.listen, Listen::Node(_)));
        ports.extend(on_node.map(|frontend| (key.clone(), frontend.protocol, frontend.port)));
    }
    ports
}

/// An error with all its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
