//! Which NUMA nodes could give a container its devices, and devices that are promised to containers of admitted pods.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Container, PodSpec};

use super::{Device, Holder, Ledger, Offer, is_init};
use crate::model::{ContainerKind, containers};
use crate::numa::{Hints, Nodes, hints};

/// What containers are promised. It ends as grants, or with the pod.
pub(super) type Promises = BTreeMap<Holder, BTreeMap<String, Promise>>;

/// Devices of one resource.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Promise {
    ids: BTreeSet<String>,
    /// Others of these nodes are as good.
    near: Option<Nodes>,
}

/// There are too few devices.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "requested number of devices unavailable for {resource}. Requested: {requested}, Available: {available}"
)]
pub struct TooFew {
    /// Of which resource.
    pub resource: String,
    /// By the container.
    pub requested: u64,
    /// On the node.
    pub available: usize,
}

impl Device {
    /// Its nodes; none where its plugin does not tell.
    fn place(&self) -> Nodes {
        self.nodes.iter().filter_map(|node| u32::try_from(*node).ok()).collect()
    }
}

impl Ledger {
    /// The nodes, of all that there are, that could give the container its devices: for each resource that it asks for.
    pub fn hints(&self, holder: &Holder, container: &Container, spec: &PodSpec, all: Nodes) -> Vec<Hints> {
        let wanted = self.wanted(container);
        let each = wanted.iter().map(|(resource, count)| {
            let held = self.held(holder, resource);
            let offer = if held.is_empty() {
                self.offer(resource, holder, spec)
            } else {
                Offer { available: held, ..Offer::default() }
            };
            self.hints_of(resource, *count, &offer, all)
        });
        each.collect()
    }

    /// The same for all of a pod's containers together.
    pub fn hints_of_pod(&self, pod_uid: &str, spec: &PodSpec, all: Nodes) -> Vec<Hints> {
        let (mut beside, mut peak) = (BTreeMap::<String, u64>::new(), BTreeMap::<String, u64>::new());
        for entry in containers(spec) {
            for (resource, count) in self.wanted(entry.container) {
                if entry.kind == ContainerKind::Init {
                    let peak = peak.entry(resource).or_default();
                    *peak = count.max(*peak);
                } else {
                    *beside.entry(resource).or_default() += count;
                }
            }
        }
        let names: BTreeSet<&String> = beside.keys().chain(peak.keys()).collect();
        let each = names.into_iter().map(|resource| {
            let count = |counts: &BTreeMap<String, u64>| counts.get(resource).copied().unwrap_or(0);
            let whole = (pod_uid.to_owned(), String::new());
            self.hints_of(
                resource,
                count(&beside).max(count(&peak)),
                &self.offer(resource, &whole, spec),
                all,
            )
        });
        each.collect()
    }

    fn hints_of(&self, resource: &str, count: u64, offer: &Offer, all: Nodes) -> Hints {
        let place = |id: &String| {
            let devices = self.resources.get(resource)?;
            devices.get(id).map(Device::place).filter(|place| !place.is_empty())
        };
        let mut known = self.resources.get(resource).into_iter().flatten();
        known.find(|(_, device)| !device.place().is_empty())?;
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        let near = |ids: &BTreeSet<String>, set: &Nodes| {
            ids.iter().filter_map(place).filter(|place| !place.and(*set).is_empty()).count()
        };
        let machine: BTreeSet<String> = self.devices(resource).map(|(id, _)| id.to_owned()).collect();
        let fewest = all.subsets().filter(|set| near(&machine, set) >= count).map(Nodes::len).min();
        let sets = all.subsets().filter(|set| {
            // What init containers had is taken over: it has to be among these.
            let has_own = offer.own.iter().filter_map(place).all(|place| !place.and(*set).is_empty());
            has_own && near(&offer.available, set) >= count
        });
        Some(hints(sets, fewest.unwrap_or(all.len())))
    }

    /// What the container has, or was promised.
    fn held(&self, holder: &Holder, resource: &str) -> BTreeSet<String> {
        let granted = self.grants.get(holder).and_then(|grants| grants.get(resource)).map(|grant| &grant.ids);
        let promised = || self.promises.get(holder)?.get(resource).map(|promise| &promise.ids);
        granted.or_else(promised).cloned().unwrap_or_default()
    }

    /// Whether one of the pod's containers has devices.
    pub fn has(&self, pod_uid: &str) -> bool {
        self.grants.keys().any(|(uid, _)| uid == pod_uid)
    }

    /// The pod was not admitted.
    pub fn take_back(&mut self, pod_uid: &str) {
        self.promises.retain(|(uid, _), _| uid != pod_uid);
    }

    /// Promises the container its devices, those of some nodes before others. What it has stays.
    pub fn promise(
        &mut self,
        holder: &Holder,
        container: &Container,
        spec: &PodSpec,
        near: Option<Nodes>,
    ) -> Result<(), TooFew> {
        for (resource, requested) in self.wanted(container) {
            if !self.held(holder, &resource).is_empty() {
                continue;
            }
            let offer = self.offer(&resource, holder, spec);
            let too_few =
                || TooFew { resource: resource.clone(), requested, available: offer.available.len() };
            let ids = self.nearest(&resource, &offer, requested, near).ok_or_else(too_few)?;
            self.promises.entry(holder.clone()).or_default().insert(resource, Promise { ids, near });
        }
        Ok(())
    }

    /// Of what may be taken: what the pod has, then what is near, then what is elsewhere, then what is nowhere.
    fn nearest(
        &self,
        resource: &str,
        offer: &Offer,
        count: u64,
        near: Option<Nodes>,
    ) -> Option<BTreeSet<String>> {
        let count = usize::try_from(count).ok().filter(|count| *count <= offer.available.len())?;
        let rank = |id: &&String| {
            let device = self.resources.get(resource).and_then(|devices| devices.get(*id));
            let place = device.map(Device::place).unwrap_or_default();
            let is_near = near.is_none_or(|near| !near.and(place).is_empty());
            (!offer.own.contains(*id), !is_near, place.is_empty())
        };
        let mut ids: Vec<&String> = offer.available.iter().collect();
        ids.sort_by_key(rank);
        Some(ids.into_iter().take(count).cloned().collect())
    }

    /// What the holder was promised of a resource, as long as it is to be had, and what would be as good.
    pub fn promised(
        &self,
        resource: &str,
        holder: &Holder,
        offer: &Offer,
    ) -> Option<(BTreeSet<String>, Offer)> {
        let promise = self.promises.get(holder)?.get(resource)?;
        let near = promise.near.unwrap_or_default();
        let is_near = |id: &String| {
            let device = self.resources.get(resource).and_then(|devices| devices.get(id));
            device.is_some_and(|device| !device.place().and(near).is_empty())
        };
        let may_choose = promise.ids.iter().all(is_near);
        let good = |id: &&String| promise.ids.contains(*id) || may_choose && is_near(id);
        let good = |ids: &BTreeSet<String>| ids.iter().filter(good).cloned().collect();
        let alike = Offer { own: good(&offer.own), available: good(&offer.available) };
        promise.ids.is_subset(&alike.available).then(|| (promise.ids.clone(), alike))
    }

    /// What others were promised: by the pod's own containers that run beside this one, and by other pods'.
    pub(super) fn promised_to_others(
        &self,
        resource: &str,
        holder: &Holder,
        spec: &PodSpec,
    ) -> BTreeSet<String> {
        let mut ids = BTreeSet::new();
        for (other, promises) in self.promises.iter().filter(|(other, _)| *other != holder) {
            let is_shared = other.0 == holder.0 && (is_init(spec, &holder.1) || is_init(spec, &other.1));
            if let Some(promise) = promises.get(resource).filter(|_| !is_shared) {
                ids.extend(promise.ids.iter().cloned());
            }
        }
        ids
    }
}
