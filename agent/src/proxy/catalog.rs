//! All Services and EndpointSlices as last seen, and what the data plane must do about their changes. Pure.
//!
//! Watch events go in; they mark services as touched. [`Catalog::changes`] turns touched services into the data
//! plane's changes, [`Catalog::table`] all of them into its whole table. Costs what was touched.

use std::collections::{BTreeMap, BTreeSet};

use ebpf_loader::{
    Change, DesiredBackend, DesiredFrontend, DesiredService, Family, Listen, Place, Policy, ServiceKey,
    ServiceTable,
};

use super::facts::{EndpointFacts, EndpointState, ObjectName, PortFacts, ServiceFacts, SliceFacts};

/// One step of a watch, already reduced to facts; `None` stands for an object the proxy leaves alone.
#[derive(Debug)]
pub(super) enum Seen<F> {
    /// A fresh listing begins.
    Restart,
    /// An object of the listing.
    Listed(ObjectName, Option<F>),
    /// The listing is complete: what it did not name is gone.
    Complete,
    /// An object was made or changed.
    Changed(ObjectName, Option<F>),
    /// An object was deleted.
    Gone(ObjectName),
}

/// Objects of one kind, and how far their listing is.
#[derive(Debug)]
struct Cache<F> {
    objects: BTreeMap<ObjectName, F>,
    /// Names met since the listing began; `None` outside of a listing.
    listing: Option<BTreeSet<ObjectName>>,
    synced: bool,
}

/// Everything known, by kind.
#[derive(Debug, Default)]
pub(super) struct Catalog {
    services: Cache<ServiceFacts>,
    slices: Cache<SliceFacts>,
    slices_of: BTreeMap<ObjectName, BTreeSet<ObjectName>>,
    /// What was handed to the data plane, per Service.
    handed: BTreeMap<ObjectName, BTreeSet<ServiceKey>>,
    touched: BTreeSet<ObjectName>,
}

impl<F> Default for Cache<F> {
    fn default() -> Self {
        Self { objects: BTreeMap::new(), listing: None, synced: false }
    }
}

impl<F> Cache<F> {
    /// Takes a step in; returns each object it touched with its former facts.
    fn take(&mut self, seen: Seen<F>) -> Vec<(ObjectName, Option<F>)> {
        match seen {
            Seen::Restart => {
                self.listing = Some(BTreeSet::new());
                Vec::new()
            }
            Seen::Listed(name, facts) => {
                if let Some(listing) = &mut self.listing {
                    listing.insert(name.clone());
                }
                vec![self.put(name, facts)]
            }
            Seen::Changed(name, facts) => vec![self.put(name, facts)],
            Seen::Gone(name) => vec![self.put(name, None)],
            Seen::Complete => {
                self.synced = true;
                let listed = self.listing.take().unwrap_or_default();
                let gone: Vec<ObjectName> =
                    self.objects.keys().filter(|name| !listed.contains(*name)).cloned().collect();
                gone.into_iter().map(|name| self.put(name, None)).collect()
            }
        }
    }

    fn put(&mut self, name: ObjectName, facts: Option<F>) -> (ObjectName, Option<F>) {
        let before = match facts {
            Some(facts) => self.objects.insert(name.clone(), facts),
            None => self.objects.remove(&name),
        };
        (name, before)
    }
}

impl Catalog {
    /// Takes a step of the Service watch in.
    pub(super) fn service(&mut self, seen: Seen<ServiceFacts>) {
        for (name, _) in self.services.take(seen) {
            self.touched.insert(name);
        }
    }

    /// Takes a step of the EndpointSlice watch in.
    pub(super) fn slice(&mut self, seen: Seen<SliceFacts>) {
        for (name, before) in self.slices.take(seen) {
            if let Some(before) = before {
                if let Some(slices) = self.slices_of.get_mut(&before.service) {
                    slices.remove(&name);
                    if slices.is_empty() {
                        self.slices_of.remove(&before.service);
                    }
                }
                self.touched.insert(before.service);
            }
            if let Some(now) = self.slices.objects.get(&name) {
                self.slices_of.entry(now.service.clone()).or_default().insert(name);
                self.touched.insert(now.service.clone());
            }
        }
    }

    /// Whether both listings were complete once: before that, nothing may be removed.
    pub(super) fn synced(&self) -> bool {
        self.services.synced && self.slices.synced
    }

    /// Whether a Service is touched whose change was not handed out.
    pub(super) fn is_touched(&self) -> bool {
        !self.touched.is_empty()
    }

    /// The whole table.
    pub(super) fn table(&mut self) -> ServiceTable {
        self.touched = self.services.objects.keys().cloned().collect();
        let mut table = ServiceTable::new();
        for change in self.changes() {
            if let Change::Upsert(key, desired) = change {
                table.insert(key, desired);
            }
        }
        table
    }

    /// What changed since the last call.
    pub(super) fn changes(&mut self) -> Vec<Change> {
        let mut changes = Vec::new();
        for name in std::mem::take(&mut self.touched) {
            let built =
                self.services.objects.get(&name).map(|facts| self.build(&name, facts)).unwrap_or_default();
            let keys: BTreeSet<ServiceKey> = built.iter().map(|(key, _)| key.clone()).collect();
            let before = self.handed.remove(&name).unwrap_or_default();
            changes.extend(before.difference(&keys).cloned().map(Change::Remove));
            changes.extend(built.into_iter().map(|(key, desired)| Change::Upsert(key, desired)));
            if !keys.is_empty() {
                self.handed.insert(name, keys);
            }
        }
        changes
    }

    /// The Service that the data plane's key stands for, with its uid.
    pub(super) fn owner(&self, key: &ServiceKey) -> Option<(&ObjectName, &ServiceFacts)> {
        let (path, _) = key.0.split_once(':')?;
        let (namespace, name) = path.split_once('/')?;
        self.services
            .objects
            .get_key_value(&ObjectName { namespace: namespace.to_owned(), name: name.to_owned() })
    }

    /// One service of the data plane per port and family.
    fn build(&self, name: &ObjectName, facts: &ServiceFacts) -> Vec<(ServiceKey, DesiredService)> {
        let mut built = Vec::new();
        for family in [Family::V4, Family::V6] {
            if !facts.cluster_ips.iter().any(|ip| is_of(ip, family)) {
                continue;
            }
            for port in &facts.ports {
                built.push((service_key(name, port, family), self.build_port(name, facts, port, family)));
            }
        }
        built
    }

    fn build_port(
        &self,
        name: &ObjectName,
        facts: &ServiceFacts,
        port: &PortFacts,
        family: Family,
    ) -> DesiredService {
        let endpoints = self.endpoints(name, port, family);
        let near = !endpoints.is_empty() && endpoints.iter().all(|(endpoint, _)| endpoint.hinted.is_some());
        let policy = if near { Policy::Near } else { Policy::All };
        let backends = endpoints.iter().map(|(endpoint, port)| DesiredBackend {
            place: place(endpoint, near),
            address: (endpoint.address, *port).into(),
        });
        DesiredService {
            frontends: frontends(facts, port, family, policy),
            backends: backends.collect(),
            affinity_secs: facts.affinity_secs,
        }
    }

    /// The endpoints that take connections for a port: the ready ones; where there is none, those that still serve
    /// while they are being deleted.
    fn endpoints(&self, name: &ObjectName, port: &PortFacts, family: Family) -> Vec<(&EndpointFacts, u16)> {
        let mut ready = BTreeMap::new();
        let mut draining = BTreeMap::new();
        let slices =
            self.slices_of.get(name).into_iter().flatten().filter_map(|slice| self.slices.objects.get(slice));
        for slice in slices.filter(|slice| slice.family == family) {
            let numbers = slice
                .ports
                .iter()
                .filter(|(name, protocol, _)| *name == port.name && *protocol == port.protocol);
            for (_, _, number) in numbers {
                for endpoint in &slice.endpoints {
                    let set = match endpoint.state {
                        EndpointState::Ready => &mut ready,
                        EndpointState::Draining => &mut draining,
                        EndpointState::Unready => continue,
                    };
                    // An endpoint can stand in two slices while it moves between them.
                    set.insert((endpoint.address, *number), endpoint);
                }
            }
        }
        let chosen = if ready.is_empty() { draining } else { ready };
        chosen.into_iter().map(|((_, number), endpoint)| (endpoint, number)).collect()
    }
}

/// Where a port listens. NodePorts and external addresses take all endpoints whatever `externalTrafficPolicy` says:
/// the socket hooks serve clients inside the cluster, to which that policy does not apply.
fn frontends(facts: &ServiceFacts, port: &PortFacts, family: Family, policy: Policy) -> Vec<DesiredFrontend> {
    let internal = if facts.internal_local { Policy::Local } else { policy };
    let protocol = port.protocol;
    let on = |policy| {
        move |ip: &std::net::IpAddr| DesiredFrontend {
            listen: Listen::Address(*ip),
            port: port.port,
            protocol,
            policy,
        }
    };
    let cluster = facts.cluster_ips.iter().filter(|ip| is_of(ip, family)).map(on(internal));
    let external = facts.external_ips.iter().filter(|ip| is_of(ip, family)).map(on(policy));
    let node = port.node_port.map(|number| DesiredFrontend {
        listen: Listen::Node(family),
        port: number,
        protocol,
        policy,
    });
    let mut all: Vec<DesiredFrontend> = cluster.chain(external).chain(node).collect();
    all.sort();
    all.dedup_by(|a, b| (a.listen, a.port, a.protocol) == (b.listen, b.port, b.protocol));
    all
}

fn place(endpoint: &EndpointFacts, near: bool) -> Place {
    if endpoint.local {
        Place::Local
    } else if near && endpoint.hinted == Some(true) {
        Place::Near
    } else {
        Place::Far
    }
}

fn is_of(ip: &std::net::IpAddr, family: Family) -> bool {
    ip.is_ipv4() == (family == Family::V4)
}

/// `namespace/name:port/protocol/family`: stable, and readable in messages.
fn service_key(name: &ObjectName, port: &PortFacts, family: Family) -> ServiceKey {
    let family = match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    };
    let protocol = match port.protocol {
        ebpf_common::Protocol::Tcp => "TCP",
        ebpf_common::Protocol::Udp => "UDP",
    };
    ServiceKey(format!("{}/{}:{}/{protocol}/{family}", name.namespace, name.name, port.port))
}

#[cfg(test)]
mod tests;
