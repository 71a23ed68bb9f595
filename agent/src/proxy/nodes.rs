//! The addresses of all nodes, where NodePorts are answered directly: a packet that one node sends on as it is must be known
//! by the other one.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use anyhow::anyhow;
use futures::{Stream, StreamExt, future::ready, stream};
use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, Client,
    runtime::{watcher, watcher::Event},
};

use super::network::is_reachable;

/// Every set of addresses that differs from the one before, as soon as all nodes are listed; without a client, that there are
/// none, once.
pub(super) fn addresses(client: Option<Client>) -> impl Stream<Item = BTreeSet<IpAddr>> {
    match client {
        None => stream::once(ready(BTreeSet::new())).boxed(),
        Some(client) => {
            let events = crate::sources::follow(Api::<Node>::all(client), watcher::Config::default());
            let sets = events.scan(Nodes::default(), |nodes, event| {
                ready(Some(match event {
                    Ok(event) => nodes.take(event),
                    Err(error) => {
                        let error = format!("{:#}", anyhow!(error));
                        tracing::warn!(error, "watch of the nodes interrupted, trying again");
                        None
                    }
                }))
            });
            sets.filter_map(ready).boxed()
        }
    }
}

/// Addresses by the name of their node.
#[derive(Debug, Default)]
struct Nodes {
    known: BTreeMap<String, BTreeSet<IpAddr>>,
    listed: Option<BTreeMap<String, BTreeSet<IpAddr>>>,
    told: Option<BTreeSet<IpAddr>>,
}

impl Nodes {
    /// Takes an event in; all addresses, where they are others than before.
    fn take(&mut self, event: Event<Node>) -> Option<BTreeSet<IpAddr>> {
        match event {
            Event::Init => self.listed = Some(BTreeMap::new()),
            Event::InitApply(node) => {
                self.listed.get_or_insert_default().insert(name_of(&node), addresses_of(&node));
            }
            Event::InitDone => {
                let listed = self.listed.take().unwrap_or_default();
                // This node is one of them: a server that lists none has lost them, or not read them yet.
                if !listed.is_empty() {
                    self.known = listed;
                }
            }
            Event::Apply(node) => drop(self.known.insert(name_of(&node), addresses_of(&node))),
            Event::Delete(node) => drop(self.known.remove(&name_of(&node))),
        }
        if self.listed.is_some() || self.known.is_empty() {
            return None;
        }
        let all: BTreeSet<IpAddr> = self.known.values().flatten().copied().collect();
        let differs = self.told.as_ref() != Some(&all);
        differs.then(|| self.told.insert(all).clone())
    }
}

fn name_of(node: &Node) -> String {
    node.metadata.name.clone().unwrap_or_default()
}

/// Its addresses, but not those that are everybody's.
fn addresses_of(node: &Node) -> BTreeSet<IpAddr> {
    let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    let told = addresses.filter(|address| matches!(address.type_.as_str(), "InternalIP" | "ExternalIP"));
    told.filter_map(|address| address.address.parse().ok()).filter(|ip| is_reachable(*ip)).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(name: &str, addresses: &[(&str, &str)]) -> Node {
        let addresses: Vec<_> =
            addresses.iter().map(|(kind, address)| json!({"type": kind, "address": address})).collect();
        serde_json::from_value(json!({"metadata": {"name": name}, "status": {"addresses": addresses}}))
            .unwrap()
    }

    fn set(texts: &[&str]) -> BTreeSet<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn addresses_are_told_when_all_are_listed_and_when_they_change() {
        let mut nodes = Nodes::default();
        let a = node("a", &[("InternalIP", "192.0.2.1"), ("Hostname", "a"), ("ExternalIP", "198.51.100.1")]);
        let b =
            node("b", &[("InternalIP", "192.0.2.2"), ("InternalIP", "fd00::2"), ("InternalIP", "127.0.0.1")]);
        assert_eq!(nodes.take(Event::Init), None);
        assert_eq!(nodes.take(Event::InitApply(a.clone())), None);
        assert_eq!(nodes.take(Event::InitApply(b.clone())), None);
        let all = set(&["192.0.2.1", "192.0.2.2", "198.51.100.1", "fd00::2"]);
        assert_eq!(nodes.take(Event::InitDone), Some(all));
        assert_eq!(nodes.take(Event::Apply(b.clone())), None, "a status without news");
        let left = set(&["192.0.2.1", "198.51.100.1"]);
        assert_eq!(nodes.take(Event::Delete(b)), Some(left));
        for event in [Event::Init, Event::InitDone] {
            assert_eq!(nodes.take(event), None, "a listing of nothing is not believed");
        }
    }
}
