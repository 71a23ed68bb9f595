//! All Services and EndpointSlices as last seen, and what the data plane must do about their changes. Pure.
//!
//! Watch events go in; they mark services as touched. [`Catalog::changes`] turns touched services into the data
//! plane's changes, [`Catalog::table`] all of them into its whole table. Costs what was touched.

use std::collections::{BTreeMap, BTreeSet};

use ebpf_loader::{
    Change, DesiredBackend, DesiredFrontend, DesiredService, Family, Listen, Place, Policy, ServiceKey,
    ServiceTable, SourcePrefix,
};

use super::{
    cidr::Cidr,
    facts::{EndpointFacts, EndpointState, ObjectName, PortFacts, ServiceFacts, SliceFacts},
};

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
    /// A listing named nothing at all, and was not believed.
    unbelieved: bool,
}

/// Everything known, by kind.
#[derive(Debug, Default)]
pub(super) struct Catalog {
    services: Cache<ServiceFacts>,
    slices: Cache<SliceFacts>,
    /// Names of the slices of each Service; they are in its namespace. Few, so that a list is smaller than a set.
    slices_of: BTreeMap<ObjectName, Vec<Box<str>>>,
    /// What was handed to the data plane, per Service.
    handed: BTreeMap<ObjectName, Vec<ServiceKey>>,
    touched: BTreeSet<ObjectName>,
    /// This node's zone.
    zone: Option<String>,
    /// External IPs must not lie in here.
    service_ranges: Vec<Cidr>,
    /// When the changes happened that are not handed out yet.
    triggers: Vec<jiff::Timestamp>,
}

impl<F> Default for Cache<F> {
    fn default() -> Self {
        Self { objects: BTreeMap::new(), listing: None, synced: false, unbelieved: false }
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
            Seen::Changed(name, facts) => {
                // The server that listed nothing now tells something: it is at work.
                self.synced |= self.listing.is_none();
                vec![self.put(name, facts)]
            }
            Seen::Gone(name) => vec![self.put(name, None)],
            Seen::Complete => {
                let listed = self.listing.take().unwrap_or_default();
                // Every cluster has the Service `kubernetes` and its slice: a server that lists nothing has lost its
                // data, or has not read it yet. Deletions that it tells one by one are believed.
                if listed.is_empty() {
                    self.unbelieved = true;
                    return Vec::new();
                }
                self.synced = true;
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
    /// Nothing known yet; external IPs within these ranges are refused.
    pub(super) fn new(service_ranges: Vec<Cidr>) -> Self {
        Self { service_ranges, ..Self::default() }
    }

    /// Says in which zone this node is.
    pub(super) fn set_zone(&mut self, zone: Option<String>) {
        if self.zone != zone {
            self.zone = zone;
            self.touched.extend(self.services.objects.keys().cloned());
        }
    }

    /// Takes a step of the Service watch in.
    pub(super) fn service(&mut self, seen: Seen<ServiceFacts>) {
        for (name, _) in self.services.take(seen) {
            self.touched.insert(name);
        }
    }

    /// Takes a step of the EndpointSlice watch in.
    pub(super) fn slice(&mut self, seen: Seen<SliceFacts>) {
        for (name, before) in self.slices.take(seen) {
            if let Some(before) = &before {
                if let Some(slices) = self.slices_of.get_mut(&before.service) {
                    slices.retain(|slice| **slice != *name.name);
                    if slices.is_empty() {
                        self.slices_of.remove(&before.service);
                    }
                }
                self.touched.insert(before.service.clone());
            }
            if let Some(now) = self.slices.objects.get(&name) {
                let slices = self.slices_of.entry(now.service.clone()).or_default();
                if !slices.iter().any(|slice| **slice == *name.name) {
                    slices.reserve_exact(1);
                    slices.push(name.name.into_boxed_str());
                }
                if before.as_ref().is_none_or(|before| before.triggered != now.triggered) {
                    self.triggers.extend(now.triggered);
                }
                self.touched.insert(now.service.clone());
            }
        }
    }

    /// Whether both listings were complete once: before that, nothing may be removed.
    pub(super) fn synced(&self) -> bool {
        self.services.synced && self.slices.synced
    }

    /// When the changes happened that were taken in since the last call.
    pub(super) fn take_triggers(&mut self) -> Vec<jiff::Timestamp> {
        std::mem::take(&mut self.triggers)
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

    /// The services whose endpoints may not be known yet: no EndpointSlice names them, not even an empty one.
    pub(super) fn without_slices(&self) -> BTreeSet<ServiceKey> {
        let handed = self.handed.iter().filter(|(name, _)| !self.slices_of.contains_key(*name));
        handed.flat_map(|(_, keys)| keys).cloned().collect()
    }

    /// Has the services without slices handed out once more, with no endpoint.
    pub(super) fn touch_without_slices(&mut self) {
        let names = self.services.objects.keys().filter(|name| !self.slices_of.contains_key(*name));
        self.touched.extend(names.cloned());
    }

    /// Whether, since the last call, a listing named nothing at all and was not believed.
    pub(super) fn take_unbelieved(&mut self) -> bool {
        std::mem::take(&mut self.services.unbelieved) | std::mem::take(&mut self.slices.unbelieved)
    }

    /// The whole table, without forgetting what was touched.
    pub(super) fn whole_table(&self) -> ServiceTable {
        self.services.objects.iter().flat_map(|(name, facts)| self.build(name, facts)).collect()
    }

    /// What was handed to the data plane.
    pub(super) fn keys(&self) -> impl Iterator<Item = &ServiceKey> {
        self.handed.values().flatten()
    }

    /// What changed since the last call.
    pub(super) fn changes(&mut self) -> Vec<Change> {
        let mut changes = Vec::new();
        for name in std::mem::take(&mut self.touched) {
            let built =
                self.services.objects.get(&name).map(|facts| self.build(&name, facts)).unwrap_or_default();
            let keys: Vec<ServiceKey> = built.iter().map(|(key, _)| key.clone()).collect();
            let before = self.handed.remove(&name).unwrap_or_default();
            let now: BTreeSet<&ServiceKey> = keys.iter().collect();
            changes.extend(before.into_iter().filter(|key| !now.contains(key)).map(Change::Remove));
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

    /// The names of Services that were touched by the last steps, and not handed out yet.
    pub(super) fn touched(&self) -> impl Iterator<Item = &ObjectName> {
        self.touched.iter()
    }

    /// All Services that the proxy knows.
    pub(super) fn services(&self) -> impl Iterator<Item = (&ObjectName, &ServiceFacts)> {
        self.services.objects.iter()
    }

    /// One Service.
    pub(super) fn facts(&self, name: &ObjectName) -> Option<&ServiceFacts> {
        self.services.objects.get(name)
    }

    /// What makes no sense about a Service, its slices included.
    pub(super) fn problems(&self, name: &ObjectName) -> Vec<String> {
        let Some(facts) = self.services.objects.get(name) else {
            return Vec::new();
        };
        let foreign = self.foreign_ips(facts).map(|ip| {
            format!("spec.externalIPs: {ip} lies in the service range, where only clusterIPs may lie")
        });
        let slices = self.slices_of(name).flat_map(|slice| slice.problems.iter().cloned());
        facts.problems.iter().cloned().chain(foreign).chain(slices).collect()
    }

    /// Endpoints on this node that are ready, once per address: what a load balancer asks for.
    pub(super) fn local_ready(&self, name: &ObjectName) -> usize {
        let all = self.slices_of(name).flat_map(|slice| &slice.endpoints);
        let ready = all.filter(|endpoint| endpoint.local && endpoint.state == EndpointState::Ready);
        ready.map(|endpoint| endpoint.address).collect::<BTreeSet<_>>().len()
    }

    fn slices_of<'c>(&'c self, name: &ObjectName) -> impl Iterator<Item = &'c SliceFacts> + use<'c> {
        let namespace = name.namespace.clone();
        let names = self.slices_of.get(name).into_iter().flatten();
        names.filter_map(move |slice| {
            let slice = ObjectName { namespace: namespace.clone(), name: slice.to_string() };
            self.slices.objects.get(&slice)
        })
    }

    fn foreign_ips<'f>(&'f self, facts: &'f ServiceFacts) -> impl Iterator<Item = &'f std::net::IpAddr> {
        let inside = |ip: &std::net::IpAddr| self.service_ranges.iter().any(|range| range.contains(*ip));
        facts.external_ips.iter().filter(move |ip| inside(ip))
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
        let refused: Vec<std::net::IpAddr> = self.foreign_ips(facts).copied().collect();
        let prefixes = facts.source_ranges.iter().filter(|range| is_of(&range.network, family));
        let mut source_ranges: Vec<SourcePrefix> =
            prefixes.map(|range| SourcePrefix { address: range.network, bits: range.prefix }).collect();
        source_ranges.sort();
        source_ranges.dedup();
        DesiredService {
            frontends: frontends(facts, port, family, &refused),
            backends: self.backends(name, port, family),
            affinity_secs: facts.affinity_secs,
            source_ranges,
            consistent: facts.choices.consistent,
            weights: self.weights(name, facts, port, family),
        }
    }

    /// Shares of endpoints, where hashing is consistent.
    fn weights(
        &self,
        name: &ObjectName,
        facts: &ServiceFacts,
        port: &PortFacts,
        family: Family,
    ) -> BTreeMap<std::net::SocketAddr, u16> {
        if !facts.choices.consistent {
            return BTreeMap::new();
        }
        let all = self.endpoints(name, port, family);
        let weight = |at: std::net::SocketAddr, endpoint: &EndpointFacts| {
            Some((at, facts.choices.weight(at.ip(), endpoint.node)?))
        };
        all.into_iter().filter_map(|(at, endpoint)| weight(at, endpoint)).collect()
    }

    /// The endpoints that take connections for a port, by policy. As kube-proxy has it, each policy looks at its own
    /// endpoints: the ready ones; where there is none, those that still serve while they are being deleted.
    fn backends(&self, name: &ObjectName, port: &PortFacts, family: Family) -> Vec<DesiredBackend> {
        let all = self.endpoints(name, port, family);
        let serving = |local_only: bool| -> BTreeSet<usize> {
            let of = |state| {
                let asked = all
                    .iter()
                    .enumerate()
                    .filter(|(_, (_, endpoint))| endpoint.state == state && (!local_only || endpoint.local));
                asked.map(|(index, _)| index).collect::<BTreeSet<_>>()
            };
            let ready = of(EndpointState::Ready);
            if ready.is_empty() { of(EndpointState::Draining) } else { ready }
        };
        let local = serving(true);
        let cluster = self.preferred(&all, serving(false));
        let placed = all.iter().enumerate().filter_map(|(index, (address, _))| {
            let place = match (local.contains(&index), cluster.contains(&index)) {
                (true, false) => Place::LocalOnly,
                (true, true) => Place::Local,
                (false, true) => Place::Far,
                (false, false) => return None,
            };
            Some(DesiredBackend { place, address: *address })
        });
        placed.collect()
    }

    /// Of the endpoints for policy `Cluster`, those that are hinted for this node, else for its zone, where every one
    /// carries such a hint and at least one is for us.
    fn preferred(
        &self,
        all: &[(std::net::SocketAddr, &EndpointFacts)],
        cluster: BTreeSet<usize>,
    ) -> BTreeSet<usize> {
        let hinted = |for_us: &dyn Fn(&EndpointFacts) -> Option<bool>| {
            let mut ours = BTreeSet::new();
            for index in &cluster {
                match for_us(all[*index].1) {
                    Some(true) => drop(ours.insert(*index)),
                    Some(false) => {}
                    None => return None,
                }
            }
            (!ours.is_empty()).then_some(ours)
        };
        let in_zone = |endpoint: &EndpointFacts| {
            let zone = self.zone.as_ref()?;
            endpoint.for_zones.as_ref().map(|zones| zones.contains(zone))
        };
        hinted(&|endpoint| endpoint.for_node).or_else(|| hinted(&in_zone)).unwrap_or(cluster)
    }

    /// All endpoints of a port, once each; one that moves between slices counts by its better state.
    fn endpoints(
        &self,
        name: &ObjectName,
        port: &PortFacts,
        family: Family,
    ) -> Vec<(std::net::SocketAddr, &EndpointFacts)> {
        let mut found: BTreeMap<std::net::SocketAddr, &EndpointFacts> = BTreeMap::new();
        for slice in self.slices_of(name).filter(|slice| slice.family == family) {
            let numbers = slice
                .ports
                .iter()
                .filter(|(name, protocol, _)| *name == port.name && *protocol == port.protocol);
            for (_, _, number) in numbers {
                for endpoint in &slice.endpoints {
                    let known = found.entry((endpoint.address, *number).into()).or_insert(endpoint);
                    if known.state != EndpointState::Ready && endpoint.state != EndpointState::Unready {
                        *known = endpoint;
                    }
                }
            }
        }
        found.into_iter().collect()
    }
}

/// Where a port listens.
fn frontends(
    facts: &ServiceFacts,
    port: &PortFacts,
    family: Family,
    refused: &[std::net::IpAddr],
) -> Vec<DesiredFrontend> {
    let policy = |local: bool| if local { Policy::Local } else { Policy::All };
    let (internal, external) = (policy(facts.internal_local), policy(facts.external_local));
    let of_family = |ips: &[std::net::IpAddr]| -> Vec<std::net::IpAddr> {
        ips.iter().copied().filter(|ip| is_of(ip, family) && !refused.contains(ip)).collect()
    };
    let on = |ip: std::net::IpAddr| DesiredFrontend::new(Listen::Address(ip), port.port, port.protocol);
    let mut all = Vec::new();
    for ip in of_family(&facts.cluster_ips) {
        all.push(DesiredFrontend { policy: internal, external: internal, ..on(ip) });
    }
    // Clients inside the cluster reach every endpoint here, whatever `externalTrafficPolicy` says.
    let ranged = !facts.source_ranges.is_empty();
    // Policy Local keeps the client's address anyhow; other nodes know a node's own addresses as nothing of theirs.
    let direct = facts.choices.direct && !facts.external_local;
    for ip in of_family(&facts.balancer_ips) {
        all.push(DesiredFrontend { external, ranged, direct, ..on(ip) });
    }
    for ip in of_family(&facts.external_ips) {
        all.push(DesiredFrontend { external, guarded: true, direct, ..on(ip) });
    }
    if let Some(number) = port.node_port {
        let node = DesiredFrontend::new(Listen::Node(family), number, port.protocol);
        all.push(DesiredFrontend { external, ..node });
    }
    // The first of several frontends on one address wins: what the cluster chose before what the user did.
    let mut seen = BTreeSet::new();
    all.retain(|frontend| seen.insert((frontend.listen, frontend.port, frontend.protocol)));
    all
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
    let protocol = port.protocol.name();
    ServiceKey(format!("{}/{}:{}/{protocol}/{family}", name.namespace, name.name, port.port))
}

#[cfg(test)]
mod tests;
