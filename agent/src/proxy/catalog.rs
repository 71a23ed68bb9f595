//! All Services and EndpointSlices as last seen, and what the data plane must do about their changes. Pure.
//!
//! Watch events go in; they mark services as touched. [`Catalog::changes`] turns touched services into the data
//! plane's changes, [`Catalog::each`] makes all of them, one by one. Costs what was touched. Objects are kept packed
//! ([`store`], [`pack`]), and nothing is kept of what the data plane was told: which services a Service was before
//! it changed is noted when it changes.

mod pack;
mod store;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use ebpf_loader::{
    Change, DesiredBackend, DesiredFrontend, DesiredService, Family, Listen, Place, Policy, ServiceKey,
    ServiceTable, SourcePrefix,
};

use self::store::{Called, Id, Pack, Records};
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
    objects: Records<F>,
    listing: Option<Listing>,
    synced: bool,
    /// A listing named nothing at all, and was not believed.
    unbelieved: bool,
}

/// What a listing has named so far.
#[derive(Debug, Default)]
struct Listing {
    /// By number; others are not named.
    met: Vec<bool>,
    /// Whether it named anything, of use or not.
    any: bool,
}

impl Listing {
    fn meet(&mut self, id: Option<Id>) {
        self.any = true;
        if let Some(id) = id {
            let index = id as usize;
            self.met.resize(self.met.len().max(index + 1), false);
            self.met[index] = true;
        }
    }

    fn has_met(&self, id: Id) -> bool {
        self.met.get(id as usize).copied().unwrap_or_default()
    }
}

/// An object that a step touched, with its former facts.
type Touched<F> = (ObjectName, Option<F>);

/// Everything known, by kind.
#[derive(Debug, Default)]
pub(super) struct Catalog {
    services: Cache<ServiceFacts>,
    slices: Cache<SliceFacts>,
    /// Services that changed since they were handed to the data plane, and under which keys it has those whose own
    /// object changed. `None` until everything is handed out for the first time.
    touched: Option<BTreeMap<ObjectName, Option<Vec<ServiceKey>>>>,
    /// This node's zone.
    zone: Option<String>,
    /// External IPs must not lie in here.
    service_ranges: Vec<Cidr>,
    /// Services that ask for direct answers have them on NodePorts too.
    direct_node_ports: bool,
    /// When the changes happened that are not handed out yet.
    triggers: Vec<jiff::Timestamp>,
}

impl<F: Pack> Default for Cache<F> {
    fn default() -> Self {
        Self { objects: Records::default(), listing: None, synced: false, unbelieved: false }
    }
}

impl<F: Pack> Cache<F> {
    /// Takes a step in; returns each object it touched.
    fn take(&mut self, seen: Seen<F>) -> Vec<Touched<F>> {
        match seen {
            Seen::Restart => {
                self.listing = Some(Listing::default());
                Vec::new()
            }
            Seen::Listed(name, facts) => {
                let before = self.put(&name, facts);
                let id = self.objects.id(&name);
                if let Some(listing) = &mut self.listing {
                    listing.meet(id);
                }
                vec![(name, before)]
            }
            Seen::Changed(name, facts) => {
                // The server that listed nothing now tells something: it is at work.
                self.synced |= self.listing.is_none();
                let before = self.put(&name, facts);
                vec![(name, before)]
            }
            Seen::Gone(name) => {
                let before = self.put(&name, None);
                vec![(name, before)]
            }
            Seen::Complete => {
                let listing = self.listing.take().unwrap_or_default();
                // Every cluster has the Service `kubernetes` and its slice: a server that lists nothing has lost its
                // data, or has not read it yet. Deletions that it tells one by one are believed.
                if !listing.any {
                    self.unbelieved = true;
                    return Vec::new();
                }
                self.synced = true;
                let gone = self.objects.ids().filter(|id| !listing.has_met(*id));
                let gone: Vec<ObjectName> = gone.map(|id| self.objects.name(id).to_object()).collect();
                gone.into_iter().map(|name| (name.clone(), self.put(&name, None))).collect()
            }
        }
    }

    fn put(&mut self, name: &ObjectName, facts: Option<F>) -> Option<F> {
        let before = self.objects.get(name);
        if let Some(facts) = facts {
            self.objects.put(name, &facts);
        } else {
            self.objects.remove(name);
        }
        before
    }
}

impl Catalog {
    /// Nothing known yet; external IPs within these ranges are refused, and NodePorts may be answered directly or not.
    pub(super) fn new(service_ranges: Vec<Cidr>, direct_node_ports: bool) -> Self {
        Self { service_ranges, direct_node_ports, ..Self::default() }
    }

    /// Says in which zone this node is.
    pub(super) fn set_zone(&mut self, zone: Option<String>) {
        if self.zone != zone {
            self.zone = zone;
            self.touch_each(|_, _| true);
        }
    }

    /// Takes a step of the Service watch in.
    pub(super) fn service(&mut self, seen: Seen<ServiceFacts>) {
        for (name, before) in self.services.take(seen) {
            if let Some(touched) = &mut self.touched {
                let keys = before.map(|before| keys_of(named(&name), &before)).unwrap_or_default();
                // What the data plane has is what was there before the first of several changes.
                touched.entry(name).or_default().get_or_insert(keys);
            }
        }
    }

    /// Takes a step of the EndpointSlice watch in.
    pub(super) fn slice(&mut self, seen: Seen<SliceFacts>) {
        for (name, before) in self.slices.take(seen) {
            let now = self.slices.objects.get(&name);
            if let Some(now) = &now
                && before.as_ref().is_none_or(|before| before.triggered != now.triggered)
            {
                self.triggers.extend(now.triggered);
            }
            if let Some(touched) = &mut self.touched {
                for facts in before.into_iter().chain(now) {
                    touched.entry(facts.service).or_default();
                }
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
        self.touched.as_ref().is_none_or(|touched| !touched.is_empty())
    }

    /// Everything, one service after the other, as handed out.
    pub(super) fn each(&mut self) -> impl Iterator<Item = (ServiceKey, DesiredService)> + use<'_> {
        self.touched = Some(BTreeMap::new());
        self.all()
    }

    /// Everything, one service after the other, without forgetting what was touched.
    pub(super) fn all(&self) -> impl Iterator<Item = (ServiceKey, DesiredService)> + use<'_> {
        let mut place = 0;
        self.services.objects.ids().flat_map(move |id| {
            let name = self.services.objects.name(id);
            let members = self.slices.objects.next_members(&mut place, name);
            let slices: Vec<SliceFacts> = members.iter().map(|id| self.slices.objects.read(*id)).collect();
            self.build(name, &self.services.objects.read(id), &slices)
        })
    }

    /// The whole table.
    pub(super) fn table(&mut self) -> ServiceTable {
        self.each().collect()
    }

    /// The services whose endpoints may not be known yet: no EndpointSlice names them, not even an empty one.
    pub(super) fn without_slices(&self) -> BTreeSet<ServiceKey> {
        let mut place = 0;
        let all = self.services.objects.ids().map(|id| (id, self.services.objects.name(id)));
        let bare = all.filter(|(_, name)| self.slices.objects.next_members(&mut place, *name).is_empty());
        bare.flat_map(|(id, name)| keys_of(name, &self.services.objects.read(id))).collect()
    }

    /// Has the services without slices handed out once more, with no endpoint.
    pub(super) fn touch_without_slices(&mut self) {
        self.touch_each(|catalog, name| catalog.slices.objects.members(name).is_empty());
    }

    /// Has every Service handed out once more of which this is true.
    fn touch_each(&mut self, choose: impl Fn(&Self, Called<'_>) -> bool) {
        let Some(mut touched) = self.touched.take() else {
            return;
        };
        for name in self.services.objects.ids().map(|id| self.services.objects.name(id)) {
            if choose(self, name) {
                touched.entry(name.to_object()).or_default();
            }
        }
        self.touched = Some(touched);
    }

    /// Whether, since the last call, a listing named nothing at all and was not believed.
    pub(super) fn take_unbelieved(&mut self) -> bool {
        std::mem::take(&mut self.services.unbelieved) | std::mem::take(&mut self.slices.unbelieved)
    }

    /// The keys of everything.
    pub(super) fn keys(&self) -> impl Iterator<Item = ServiceKey> + use<'_> {
        let all = self.services.objects.ids();
        all.flat_map(move |id| keys_of(self.services.objects.name(id), &self.services.objects.read(id)))
    }

    /// What changed since the last call.
    pub(super) fn changes(&mut self) -> Vec<Change> {
        let Some(touched) = &mut self.touched else {
            return self.each().map(|(key, desired)| Change::Upsert(key, desired)).collect();
        };
        let mut changes = Vec::new();
        for (name, before) in std::mem::take(touched) {
            let built = self.build_one(&name);
            let gone =
                before.into_iter().flatten().filter(|key| !built.iter().any(|(other, _)| other == key));
            changes.extend(gone.map(Change::Remove));
            changes.extend(built.into_iter().map(|(key, desired)| Change::Upsert(key, desired)));
        }
        changes
    }

    fn build_one(&self, name: &ObjectName) -> Vec<(ServiceKey, DesiredService)> {
        let Some(facts) = self.services.objects.get(name) else {
            return Vec::new();
        };
        let slices: Vec<SliceFacts> = self.slices_of(name).collect();
        self.build(named(name), &facts, &slices)
    }

    /// The Service that the data plane's key stands for.
    pub(super) fn owner(&self, key: &ServiceKey) -> Option<ObjectName> {
        let (path, _) = key.0.split_once(':')?;
        let (namespace, name) = path.split_once('/')?;
        let name = ObjectName { namespace: namespace.to_owned(), name: name.to_owned() };
        self.services.objects.id(&name).map(|_| name)
    }

    /// The names of Services that were touched by the last steps, and not handed out yet.
    pub(super) fn touched(&self) -> Vec<ObjectName> {
        self.touched.iter().flatten().map(|(name, _)| name.clone()).collect()
    }

    /// All Services of which something is to be told or served beside their addresses.
    pub(super) fn noteworthy(&self) -> Vec<ObjectName> {
        let mut place = 0;
        let noteworthy = self.services.objects.ids().filter_map(|id| {
            let name = self.services.objects.name(id);
            let members = self.slices.objects.next_members(&mut place, name);
            let facts = self.services.objects.read(id);
            let told = facts.health_check_port.is_some()
                || !facts.problems.is_empty()
                || self.foreign_ips(&facts).next().is_some()
                || members.iter().any(|id| !self.slices.objects.read(*id).problems.is_empty());
            told.then(|| name.to_object())
        });
        noteworthy.collect()
    }

    /// One Service.
    pub(super) fn facts(&self, name: &ObjectName) -> Option<ServiceFacts> {
        self.services.objects.get(name)
    }

    /// Where a load balancer asks for a Service's endpoints on this node.
    pub(super) fn health_check_port(&self, name: &ObjectName) -> Option<u16> {
        self.facts(name).filter(|facts| facts.external_local)?.health_check_port
    }

    /// What makes no sense about a Service, its slices included.
    pub(super) fn problems(&self, name: &ObjectName) -> Vec<String> {
        let Some(facts) = self.facts(name) else {
            return Vec::new();
        };
        let foreign = self.foreign_ips(&facts).map(|ip| {
            format!("spec.externalIPs: {ip} lies in the service range, where only clusterIPs may lie")
        });
        let slices = self.slices_of(name).flat_map(|slice| slice.problems);
        facts.problems.iter().cloned().chain(foreign).chain(slices).collect()
    }

    /// Endpoints on this node that are ready, once per address: what a load balancer asks for.
    pub(super) fn local_ready(&self, name: &ObjectName) -> usize {
        let all = self.slices_of(name).flat_map(|slice| slice.endpoints);
        let ready = all.filter(|endpoint| endpoint.local && endpoint.state == EndpointState::Ready);
        ready.map(|endpoint| endpoint.address).collect::<BTreeSet<_>>().len()
    }

    fn slices_of<'c>(&'c self, name: &ObjectName) -> impl Iterator<Item = SliceFacts> + use<'c> {
        let members = self.slices.objects.members(named(name));
        members.iter().map(|id| self.slices.objects.read(*id))
    }

    fn foreign_ips<'f>(&'f self, facts: &'f ServiceFacts) -> impl Iterator<Item = &'f IpAddr> {
        let inside = |ip: &IpAddr| self.service_ranges.iter().any(|range| range.contains(*ip));
        facts.external_ips.iter().filter(move |ip| inside(ip))
    }

    /// One service of the data plane per port and family.
    fn build(
        &self,
        name: Called<'_>,
        facts: &ServiceFacts,
        slices: &[SliceFacts],
    ) -> Vec<(ServiceKey, DesiredService)> {
        let ports = ports_of(facts);
        ports
            .map(|(port, family)| {
                (service_key(name, port, family), self.build_port(facts, slices, port, family))
            })
            .collect()
    }

    fn build_port(
        &self,
        facts: &ServiceFacts,
        slices: &[SliceFacts],
        port: &PortFacts,
        family: Family,
    ) -> DesiredService {
        let refused: Vec<IpAddr> = self.foreign_ips(facts).copied().collect();
        let prefixes = facts.source_ranges.iter().filter(|range| is_of(&range.network, family));
        let mut source_ranges: Vec<SourcePrefix> =
            prefixes.map(|range| SourcePrefix { address: range.network, bits: range.prefix }).collect();
        source_ranges.sort();
        source_ranges.dedup();
        let endpoints = endpoints(slices, port, family);
        DesiredService {
            frontends: frontends(facts, port, family, &refused, self.direct_node_ports),
            backends: self.backends(&endpoints),
            affinity_secs: facts.affinity_secs,
            source_ranges,
            consistent: facts.choices.consistent,
            weights: weights(facts, &endpoints),
        }
    }

    /// The endpoints that take connections for a port, by policy. As kube-proxy has it, each policy looks at its own
    /// endpoints: the ready ones; where there is none, those that still serve while they are being deleted.
    fn backends(&self, all: &[(SocketAddr, &EndpointFacts)]) -> Vec<DesiredBackend> {
        let each = || all.iter().map(|(_, endpoint)| *endpoint);
        let here = serving_state(each().filter(|endpoint| endpoint.local));
        let anywhere = serving_state(each());
        let preference = self.preference(all, anywhere);
        let placed = all.iter().filter_map(|(address, endpoint)| {
            let local = endpoint.local && endpoint.state == here;
            let cluster = endpoint.state == anywhere && self.is_preferred(endpoint, preference);
            let place = match (local, cluster) {
                (true, false) => Place::LocalOnly,
                (true, true) => Place::Local,
                (false, true) => Place::Far,
                (false, false) => return None,
            };
            Some(DesiredBackend { place, address: *address })
        });
        placed.collect()
    }

    /// Whom policy `Cluster` prefers: endpoints that are hinted for this node, else for its zone, where every one
    /// carries such a hint and at least one is for us.
    fn preference(&self, all: &[(SocketAddr, &EndpointFacts)], anywhere: EndpointState) -> Preference {
        let cluster =
            || all.iter().map(|(_, endpoint)| *endpoint).filter(|endpoint| endpoint.state == anywhere);
        let hinted = |hints: &dyn Fn(&EndpointFacts) -> bool, preference| {
            cluster().all(hints) && cluster().any(|endpoint| self.is_preferred(endpoint, preference))
        };
        if hinted(&|endpoint| endpoint.for_node.is_some(), Preference::Node) {
            Preference::Node
        } else if hinted(&|endpoint| endpoint.for_zones.is_some(), Preference::Zone) {
            Preference::Zone
        } else {
            Preference::Nobody
        }
    }

    fn is_preferred(&self, endpoint: &EndpointFacts, preference: Preference) -> bool {
        match preference {
            Preference::Nobody => true,
            Preference::Node => endpoint.for_node == Some(true),
            Preference::Zone => {
                let zones = endpoint.for_zones.iter().flatten();
                self.zone.as_ref().is_some_and(|zone| zones.into_iter().any(|other| other == zone))
            }
        }
    }
}

/// Whose hints count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Preference {
    /// Nobody's: all are equal.
    Nobody,
    /// Those for this node.
    Node,
    /// Those for its zone.
    Zone,
}

/// The state that endpoints must have to be sent connections.
fn serving_state<'e>(mut asked: impl Iterator<Item = &'e EndpointFacts>) -> EndpointState {
    let ready = asked.any(|endpoint| endpoint.state == EndpointState::Ready);
    if ready { EndpointState::Ready } else { EndpointState::Draining }
}

/// Shares of endpoints, where hashing is consistent.
fn weights(facts: &ServiceFacts, all: &[(SocketAddr, &EndpointFacts)]) -> BTreeMap<SocketAddr, u16> {
    if !facts.choices.consistent {
        return BTreeMap::new();
    }
    let weight = |(at, endpoint): &(SocketAddr, &EndpointFacts)| {
        Some((*at, facts.choices.weight(at.ip(), endpoint.node)?))
    };
    all.iter().filter_map(weight).collect()
}

/// All endpoints of a port, once each, by address; one that moves between slices counts by its better state.
fn endpoints<'s>(
    slices: &'s [SliceFacts],
    port: &PortFacts,
    family: Family,
) -> Vec<(SocketAddr, &'s EndpointFacts)> {
    let mut found: Vec<(SocketAddr, &EndpointFacts)> = Vec::new();
    for slice in slices.iter().filter(|slice| slice.family == family) {
        let numbers =
            slice.ports.iter().filter(|(name, protocol, _)| *name == port.name && *protocol == port.protocol);
        for (_, _, number) in numbers {
            found.extend(slice.endpoints.iter().map(|one| (SocketAddr::new(one.address, *number), one)));
        }
    }
    // Those of one address stay in their order.
    found.sort_by_key(|(address, _)| *address);
    found.dedup_by(|(later, endpoint), (address, known)| {
        if later != address {
            return false;
        }
        if known.state != EndpointState::Ready && endpoint.state != EndpointState::Unready {
            *known = *endpoint;
        }
        true
    });
    found
}

/// Ports of a Service with the families that it has.
fn ports_of(facts: &ServiceFacts) -> impl Iterator<Item = (&PortFacts, Family)> {
    let families = [Family::V4, Family::V6].into_iter();
    let families = families.filter(|family| facts.cluster_ips.iter().any(|ip| is_of(ip, *family)));
    families.flat_map(|family| facts.ports.iter().map(move |port| (port, family)))
}

/// What the data plane calls the ports of a Service.
fn keys_of(name: Called<'_>, facts: &ServiceFacts) -> Vec<ServiceKey> {
    ports_of(facts).map(|(port, family)| service_key(name, port, family)).collect()
}

fn named(name: &ObjectName) -> Called<'_> {
    Called { namespace: &name.namespace, name: &name.name, group: "" }
}

/// Where a port listens.
fn frontends(
    facts: &ServiceFacts,
    port: &PortFacts,
    family: Family,
    refused: &[IpAddr],
    direct_node_ports: bool,
) -> Vec<DesiredFrontend> {
    let policy = |local: bool| if local { Policy::Local } else { Policy::All };
    let (internal, external) = (policy(facts.internal_local), policy(facts.external_local));
    let of_family = |ips: &[IpAddr]| -> Vec<IpAddr> {
        ips.iter().copied().filter(|ip| is_of(ip, family) && !refused.contains(ip)).collect()
    };
    let on = |ip: IpAddr| DesiredFrontend::new(Listen::Address(ip), port.port, port.protocol);
    let mut all = Vec::new();
    for ip in of_family(&facts.cluster_ips) {
        all.push(DesiredFrontend { policy: internal, external: internal, ..on(ip) });
    }
    // Clients inside the cluster reach every endpoint here, whatever `externalTrafficPolicy` says.
    let ranged = !facts.source_ranges.is_empty();
    // Policy Local keeps the client's address anyhow.
    let direct = facts.choices.direct && !facts.external_local;
    for ip in of_family(&facts.balancer_ips) {
        all.push(DesiredFrontend { external, ranged, direct, ..on(ip) });
    }
    for ip in of_family(&facts.external_ips) {
        all.push(DesiredFrontend { external, guarded: true, direct, ..on(ip) });
    }
    if let Some(number) = port.node_port {
        let node = DesiredFrontend::new(Listen::Node(family), number, port.protocol);
        all.push(DesiredFrontend { external, direct: direct && direct_node_ports, ..node });
    }
    // The first of several frontends on one address wins: what the cluster chose before what the user did.
    let mut seen = BTreeSet::new();
    all.retain(|frontend| seen.insert((frontend.listen, frontend.port, frontend.protocol)));
    all
}

fn is_of(ip: &IpAddr, family: Family) -> bool {
    ip.is_ipv4() == (family == Family::V4)
}

/// `namespace/name:port/protocol/family`: stable, and readable in messages.
fn service_key(name: Called<'_>, port: &PortFacts, family: Family) -> ServiceKey {
    let family = match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    };
    let protocol = port.protocol.name();
    ServiceKey(format!("{}/{}:{}/{protocol}/{family}", name.namespace, name.name, port.port))
}

#[cfg(test)]
mod tests;
