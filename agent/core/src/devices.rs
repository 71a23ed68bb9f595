//! Devices of plugins: what there is, who has what, and which ones the next container gets. Pure.
//!
//! A device belongs to one container at a time. Ordinary init containers have ended before the others of their pod start:
//! these take over their devices. A grant outlives restarts of its container and of the agent, and ends with the pod.

mod near;

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Container, PodSpec};

use crate::model::{ContainerKind, containers};
use crate::resources::{Side, amount};
pub use near::TooFew;

/// One device, as its plugin tells.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Device {
    /// It can be given away.
    pub healthy: bool,
    /// NUMA nodes that it is near.
    pub nodes: Vec<i64>,
}

/// Pod uid and container name.
pub type Holder = (String, String);

/// What a container has of one resource.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Grant {
    /// The devices.
    pub ids: BTreeSet<String>,
    /// What the plugin answered when they were given, as it came.
    pub answer: Vec<u8>,
}

/// Devices and grants.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ledger {
    resources: BTreeMap<String, BTreeMap<String, Device>>,
    grants: BTreeMap<Holder, BTreeMap<String, Grant>>,
    promises: near::Promises,
}

/// What may be chosen from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Offer {
    /// To be taken first: the devices of the pod's init containers.
    pub own: BTreeSet<String>,
    /// All that may be taken, these included.
    pub available: BTreeSet<String>,
}

impl Ledger {
    /// The resource has these devices and no others.
    pub fn set_devices(&mut self, resource: &str, devices: BTreeMap<String, Device>) {
        self.resources.insert(resource.to_owned(), devices);
    }

    /// The resource's plugin is away: nothing of it can be given.
    pub fn set_unhealthy(&mut self, resource: &str) {
        for device in self.resources.get_mut(resource).into_iter().flat_map(BTreeMap::values_mut) {
            device.healthy = false;
        }
    }

    /// The resource has no devices any more; it stays known, so that the node says 0.
    pub fn clear(&mut self, resource: &str) {
        self.resources.insert(resource.to_owned(), BTreeMap::new());
    }

    /// Names of all resources that plugins have or had.
    pub fn resources(&self) -> impl Iterator<Item = &str> {
        self.resources.keys().map(String::as_str)
    }

    /// The resource's devices.
    pub fn devices(&self, resource: &str) -> impl Iterator<Item = (&str, &Device)> {
        self.resources.get(resource).into_iter().flatten().map(|(id, device)| (id.as_str(), device))
    }

    /// How many devices of each resource there are, and how many can be given away.
    pub fn counts(&self) -> BTreeMap<String, (u64, u64)> {
        let count = |devices: &BTreeMap<String, Device>| {
            let healthy = devices.values().filter(|device| device.healthy).count();
            (devices.len() as u64, healthy as u64)
        };
        self.resources.iter().map(|(name, devices)| (name.clone(), count(devices))).collect()
    }

    /// What the container wants of the resources known here.
    pub fn wanted(&self, container: &Container) -> Vec<(String, u64)> {
        let count = |name: &String| {
            let count = amount(container.resources.as_ref(), Side::Limits, name)?;
            Some((name.clone(), u64::try_from(count).ok().filter(|count| *count > 0)?))
        };
        self.resources.keys().filter_map(count).collect()
    }

    /// What `holder` may get of the resource.
    pub fn offer(&self, resource: &str, holder: &Holder, spec: &PodSpec) -> Offer {
        let mut taken = self.promised_to_others(resource, holder, spec);
        let mut own = BTreeSet::new();
        for (other, grants) in &self.grants {
            let Some(grant) = grants.get(resource) else { continue };
            // Of the same pod: one that has ended when this one starts.
            let hands_over = other.0 == holder.0 && other.1 != holder.1 && is_init(spec, &other.1);
            if hands_over { own.extend(grant.ids.clone()) } else { taken.extend(grant.ids.clone()) }
        }
        let healthy = |id: &&String| {
            self.resources
                .get(resource)
                .is_some_and(|known| known.get(*id).is_some_and(|found| found.healthy))
        };
        let own: BTreeSet<String> =
            own.iter().filter(healthy).filter(|id| !taken.contains(*id)).cloned().collect();
        let all = self.resources.get(resource).into_iter().flatten();
        let free =
            all.filter(|(id, device)| device.healthy && !taken.contains(*id)).map(|(id, _)| id.clone());
        Offer { available: free.chain(own.iter().cloned()).collect(), own }
    }

    /// Gives devices to a container.
    pub fn grant(&mut self, holder: Holder, resource: &str, grant: Grant) {
        if let Some(promises) = self.promises.get_mut(&holder) {
            promises.remove(resource);
        }
        self.grants.entry(holder).or_default().insert(resource.to_owned(), grant);
    }

    /// Takes back what was granted and could not be used.
    pub fn revoke(&mut self, holder: &Holder, resource: &str) {
        if let Some(grants) = self.grants.get_mut(holder) {
            grants.remove(resource);
        }
        self.grants.retain(|_, grants| !grants.is_empty());
    }

    /// What the container has.
    pub fn granted(&self, holder: &Holder) -> impl Iterator<Item = (&str, &Grant)> {
        self.grants.get(holder).into_iter().flatten().map(|(name, grant)| (name.as_str(), grant))
    }

    /// All grants.
    pub fn grants(&self) -> impl Iterator<Item = (&Holder, &str, &Grant)> {
        let flat = |(holder, grants)| {
            let grants: &BTreeMap<String, Grant> = grants;
            grants.iter().map(move |(name, grant)| (holder, name.as_str(), grant))
        };
        self.grants.iter().flat_map(flat)
    }

    /// The pod is over; whether it had anything.
    pub fn release(&mut self, pod_uid: &str) -> bool {
        self.take_back(pod_uid);
        let before = self.grants.len();
        self.grants.retain(|(uid, _), _| uid != pod_uid);
        before != self.grants.len()
    }
}

/// Whether a container of the pod ends before the others start.
fn is_init(spec: &PodSpec, name: &str) -> bool {
    containers(spec).any(|entry| entry.container.name == name && entry.kind == ContainerKind::Init)
}

impl Offer {
    /// `count` devices in a stable order, those of the pod first; `None` where there are not so many.
    pub fn choose(&self, count: u64) -> Option<BTreeSet<String>> {
        let count = usize::try_from(count).ok().filter(|count| *count <= self.available.len())?;
        let others = self.available.difference(&self.own);
        Some(self.own.iter().chain(others).take(count).cloned().collect())
    }

    /// Whether a plugin's own choice can be taken.
    pub fn accepts(&self, ids: &BTreeSet<String>, count: u64) -> bool {
        ids.len() as u64 == count && ids.is_subset(&self.available)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const RESOURCE: &str = "example.com/dev";

    fn ledger(devices: &[(&str, bool)]) -> Ledger {
        let mut ledger = Ledger::default();
        let device = |healthy| Device { healthy, nodes: vec![0] };
        let all = devices.iter().map(|(id, healthy)| ((*id).to_owned(), device(*healthy))).collect();
        ledger.set_devices(RESOURCE, all);
        ledger
    }

    fn holder(uid: &str, container: &str) -> Holder {
        (uid.to_owned(), container.to_owned())
    }

    fn spec() -> PodSpec {
        let limits = json!({"limits": {RESOURCE: "2", "cpu": "1"}});
        serde_json::from_value(json!({
            "initContainers": [{"name": "init", "resources": limits},
                {"name": "side", "restartPolicy": "Always", "resources": limits}],
            "containers": [{"name": "a", "resources": limits}]}))
        .unwrap()
    }

    fn give(ledger: &mut Ledger, holder: Holder, count: u64) -> Option<Vec<String>> {
        let ids = ledger.offer(RESOURCE, &holder, &spec()).choose(count)?;
        ledger.grant(holder, RESOURCE, Grant { ids: ids.clone(), answer: Vec::new() });
        Some(ids.into_iter().collect())
    }

    #[test]
    fn a_device_has_one_holder_and_sick_ones_none() {
        let mut ledger = ledger(&[("d0", true), ("d1", false), ("d2", true), ("d3", true)]);
        assert_eq!(ledger.counts()[RESOURCE], (4, 3));
        assert_eq!(ledger.wanted(&spec().containers[0]), [(RESOURCE.to_owned(), 2)]);
        assert_eq!(give(&mut ledger, holder("p", "a"), 2).unwrap(), ["d0", "d2"]);
        assert_eq!(give(&mut ledger, holder("q", "a"), 2), None);
        assert_eq!(give(&mut ledger, holder("q", "a"), 1).unwrap(), ["d3"]);
        assert!(ledger.release("p") && !ledger.release("p"));
        assert_eq!(give(&mut ledger, holder("r", "a"), 2).unwrap(), ["d0", "d2"]);
        ledger.set_unhealthy(RESOURCE);
        assert_eq!(ledger.counts()[RESOURCE], (4, 0));
        ledger.clear(RESOURCE);
        assert_eq!(ledger.counts()[RESOURCE], (0, 0), "the node says 0, not nothing");
    }

    #[test]
    fn init_containers_hand_over_and_sidecars_do_not() {
        let mut ledger = ledger(&[("d0", true), ("d1", true), ("d2", true), ("d3", true)]);
        assert_eq!(give(&mut ledger, holder("p", "init"), 2).unwrap(), ["d0", "d1"]);
        assert_eq!(give(&mut ledger, holder("p", "side"), 2).unwrap(), ["d0", "d1"]);
        assert_eq!(give(&mut ledger, holder("p", "a"), 2).unwrap(), ["d2", "d3"]);
        assert_eq!(give(&mut ledger, holder("q", "a"), 1), None);
    }

    #[test]
    fn what_is_promised_is_near_and_nobody_elses() {
        let mut ledger = Ledger::default();
        let device = |node: i64| Device { healthy: true, nodes: vec![node] };
        let all = [("a", 0), ("b", 0), ("c", 1), ("d", 1), ("e", 1)];
        ledger
            .set_devices(RESOURCE, all.iter().map(|(id, node)| ((*id).to_owned(), device(*node))).collect());
        let (spec, nodes) = (spec(), [0, 1].into_iter().collect());
        let container = &spec.containers[0];
        let hinted = |ledger: &Ledger, uid: &str| {
            let hints = ledger.hints(&holder(uid, "a"), container, &spec, nodes).remove(0).unwrap();
            let text = hints.iter().map(|hint| (hint.nodes.unwrap().to_string(), hint.preferred));
            text.collect::<Vec<_>>()
        };
        let told = |all: &[(&str, bool)]| {
            all.iter().map(|(nodes, preferred)| ((*nodes).to_owned(), *preferred)).collect::<Vec<_>>()
        };
        assert_eq!(hinted(&ledger, "p"), told(&[("0", true), ("1", true), ("0-1", false)]));
        let near = Some([1].into_iter().collect());
        ledger.promise(&holder("p", "a"), container, &spec, near).unwrap();
        assert_eq!(hinted(&ledger, "p"), told(&[("1", true), ("0-1", false)]), "what it was promised");
        assert_eq!(hinted(&ledger, "q"), told(&[("0", true), ("0-1", false)]));
        let offer = ledger.offer(RESOURCE, &holder("q", "a"), &spec);
        assert_eq!(offer.available.iter().collect::<Vec<_>>(), ["a", "b", "e"]);
        // An init container of the same pod may have them before.
        assert_eq!(ledger.offer(RESOURCE, &holder("p", "init"), &spec).available.len(), 5);
        assert_eq!(ledger.offer(RESOURCE, &holder("p", "side"), &spec).available.len(), 3);
        let offer = ledger.offer(RESOURCE, &holder("p", "a"), &spec);
        let (ids, alike) = ledger.promised(RESOURCE, &holder("p", "a"), &offer).unwrap();
        assert_eq!(ids.iter().collect::<Vec<_>>(), ["c", "d"]);
        assert_eq!(
            alike.available.iter().collect::<Vec<_>>(),
            ["c", "d", "e"],
            "its plugin may prefer another"
        );
        ledger.promise(&holder("q", "a"), container, &spec, near).unwrap();
        let error = ledger.promise(&holder("r", "a"), container, &spec, None).unwrap_err();
        assert_eq!((error.requested, error.available), (2, 1));
        ledger.release("p");
        ledger.promise(&holder("r", "a"), container, &spec, None).unwrap();
    }

    #[test]
    fn a_plugins_choice_is_checked() {
        let offer = ledger(&[("d0", true), ("d1", true)]).offer(RESOURCE, &holder("p", "a"), &spec());
        let ids = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect::<BTreeSet<_>>();
        assert!(offer.accepts(&ids(&["d1"]), 1));
        assert!(!offer.accepts(&ids(&["d9"]), 1) && !offer.accepts(&ids(&["d0", "d1"]), 1));
    }

    proptest! {
        #[test]
        fn no_two_pods_share_a_device(steps in proptest::collection::vec((0_u8..6, 0_u64..4, any::<bool>()), 0..40)) {
            let mut ledger = ledger(&[("a", true), ("b", true), ("c", true), ("d", false), ("e", true)]);
            for (pod, count, release) in steps {
                let uid = format!("p{pod}");
                if release {
                    ledger.release(&uid);
                } else if ledger.granted(&holder(&uid, "a")).next().is_none() {
                    give(&mut ledger, holder(&uid, "a"), count);
                }
                let mut seen = BTreeSet::new();
                for (_, _, grant) in ledger.grants() {
                    for id in &grant.ids {
                        prop_assert!(id != "d" && seen.insert(id.clone()), "{id} twice or sick");
                    }
                }
            }
        }
    }
}
