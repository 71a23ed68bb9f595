//! The cluster as the scheduler sees it: nodes, what they offer, and what is taken of it.
//!
//! Kept up to date by events, one small change each. A pod that was just bound is placed here before any
//! event says so ([`ClusterState::place`]), so that pods scheduled back to back never overcommit a node.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use k8s_openapi::api::core::v1::{Node, Pod};

use super::resources::Resources;
use crate::{object, quantity};

/// A port of the node itself that a pod occupies: address, protocol, number.
pub type HostPort = (String, String, i32);

/// What one pod takes of a node.
#[derive(Clone, Debug)]
struct Usage {
    requested: Resources,
    scored: Resources,
    host_ports: BTreeSet<HostPort>,
}

impl Usage {
    fn of(pod: &Pod) -> Self {
        Usage {
            requested: Resources::requested_by(pod),
            scored: Resources::scored_for(pod),
            host_ports: host_ports(pod),
        }
    }
}

/// One node with its load.
#[derive(Clone, Debug, Default)]
pub struct NodeInfo {
    node: Arc<Node>,
    /// False while only pods on it are known.
    known: bool,
    allocatable: Resources,
    most_pods: usize,
    requested: Resources,
    scored: Resources,
    pods: BTreeMap<String, Usage>,
}

impl NodeInfo {
    /// The node object.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// The node's name.
    pub fn name(&self) -> &str {
        object::name(&self.node.metadata)
    }

    /// What the node offers to pods.
    pub fn allocatable(&self) -> &Resources {
        &self.allocatable
    }

    /// What its pods have asked for.
    pub fn requested(&self) -> &Resources {
        &self.requested
    }

    /// The same, with a default for pods that ask for nothing.
    pub fn scored(&self) -> &Resources {
        &self.scored
    }

    /// How many pods it may run.
    pub fn most_pods(&self) -> usize {
        self.most_pods
    }

    /// How many pods it runs.
    pub fn pod_count(&self) -> usize {
        self.pods.len()
    }

    /// True when one of its pods occupies the host port (an unspecified address collides with every one).
    pub fn occupies(&self, wanted: &HostPort) -> bool {
        self.pods.values().flat_map(|usage| &usage.host_ports).any(|held| {
            held.1 == wanted.1
                && held.2 == wanted.2
                && (held.0 == wanted.0 || held.0 == ANY_ADDRESS || wanted.0 == ANY_ADDRESS)
        })
    }

    fn set_node(&mut self, node: Arc<Node>) {
        let allocatable = node.status.as_ref().and_then(|status| status.allocatable.as_ref());
        self.allocatable = Resources::of(allocatable);
        let pods = allocatable.and_then(|list| list.get("pods")).map_or(0, quantity::value);
        self.most_pods = usize::try_from(pods).unwrap_or(0);
        self.node = node;
        self.known = true;
    }

    fn insert(&mut self, uid: &str, usage: Usage) {
        self.remove(uid);
        self.requested.add(&usage.requested);
        self.scored.add(&usage.scored);
        self.pods.insert(uid.to_owned(), usage);
    }

    fn remove(&mut self, uid: &str) {
        if let Some(usage) = self.pods.remove(uid) {
            self.requested.subtract(&usage.requested);
            self.scored.subtract(&usage.scored);
        }
    }
}

/// All nodes and the pods placed on them.
#[derive(Clone, Debug, Default)]
pub struct ClusterState {
    nodes: BTreeMap<String, NodeInfo>,
    /// Pod uid → node name.
    placed: BTreeMap<String, String>,
}

impl ClusterState {
    /// The nodes that exist, by name.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeInfo> {
        self.nodes.values().filter(|info| info.known)
    }

    /// Adds a node or takes over its new state.
    pub fn set_node(&mut self, node: Arc<Node>) {
        let name = object::name(&node.metadata).to_owned();
        self.nodes.entry(name).or_default().set_node(node);
    }

    /// Removes a node; its pods stay accounted for until they go.
    pub fn remove_node(&mut self, name: &str) {
        if let Some(info) = self.nodes.get_mut(name) {
            info.known = false;
            if info.pods.is_empty() {
                self.nodes.remove(name);
            }
        }
    }

    /// Takes over what an event says about a pod. A pod without a node changes nothing, since it may be
    /// placed here already; one that has ended frees its place. True when a place was freed.
    pub fn observe_pod(&mut self, pod: &Pod) -> bool {
        if object::is_pod_terminal(pod) {
            return self.remove_pod(object::uid(&pod.metadata));
        }
        if let Some(node) = object::pod_node(pod) {
            self.place(pod, node);
        }
        false
    }

    /// Puts the pod on the node, taking it from wherever it was thought to be.
    pub fn place(&mut self, pod: &Pod, node: &str) {
        let uid = object::uid(&pod.metadata);
        if self.placed.get(uid).is_some_and(|before| before != node) {
            self.remove_pod(uid);
        }
        self.placed.insert(uid.to_owned(), node.to_owned());
        self.nodes.entry(node.to_owned()).or_default().insert(uid, Usage::of(pod));
    }

    /// Takes the pod off its node. True when it was on one.
    pub fn remove_pod(&mut self, uid: &str) -> bool {
        let Some(name) = self.placed.remove(uid) else { return false };
        if let Some(info) = self.nodes.get_mut(&name) {
            info.remove(uid);
            if !info.known && info.pods.is_empty() {
                self.nodes.remove(&name);
            }
        }
        true
    }
}

const ANY_ADDRESS: &str = "0.0.0.0";

/// The host ports the pod occupies.
pub fn host_ports(pod: &Pod) -> BTreeSet<HostPort> {
    let spec = pod.spec.as_ref();
    let sidecars = spec.and_then(|spec| spec.init_containers.as_ref()).into_iter().flatten();
    let sidecars = sidecars.filter(|container| container.restart_policy.as_deref() == Some("Always"));
    let containers = spec.into_iter().flat_map(|spec| &spec.containers);
    containers
        .chain(sidecars)
        .flat_map(|container| container.ports.iter().flatten())
        .filter_map(|port| {
            let number = port.host_port.filter(|number| *number > 0)?;
            let address = port.host_ip.as_deref().filter(|address| !address.is_empty());
            let protocol = port.protocol.as_deref().filter(|protocol| !protocol.is_empty());
            let address = match address.unwrap_or(ANY_ADDRESS) {
                "::" => ANY_ADDRESS,
                address => address,
            };
            Some((address.to_owned(), protocol.unwrap_or("TCP").to_owned(), number))
        })
        .collect()
}
