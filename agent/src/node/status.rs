//! The node's status, and whether it must be written. Pure.

use std::collections::{BTreeMap, BTreeSet};

use agent_core::eviction::Signal;
use cri_shim_api::v1::Image;
use k8s_openapi::api::core::v1::{
    ContainerImage, DaemonEndpoint, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeStatus,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::conditions::TYPES;
use super::machine::Machine;
use crate::config::{AgentConfig, EvictionConfig};
use crate::contracts::RuntimeHealth;
use crate::devices::Counts;
use crate::host::stats::NodeFigures;

/// Names of one image listed at most.
const MAX_NAMES: usize = 5;

/// Everything the status is made from.
pub(super) struct Inputs<'a> {
    pub(super) config: &'a AgentConfig,
    pub(super) machine: &'a Machine,
    pub(super) figures: &'a NodeFigures,
    pub(super) devices: &'a Counts,
    pub(super) volumes_in_use: &'a BTreeSet<String>,
    pub(super) health: &'a RuntimeHealth,
    pub(super) images: &'a [Image],
    pub(super) conditions: Vec<NodeCondition>,
    /// The object's status now.
    pub(super) current: Option<&'a NodeStatus>,
}

/// The status to have. Conditions of others are carried over.
pub(super) fn desired(inputs: Inputs<'_>) -> NodeStatus {
    let capacity = capacity(inputs.config, inputs.machine, inputs.figures);
    let mut left = allocatable(inputs.config, &capacity);
    let mut capacity = quantities(&capacity);
    for (name, (all, healthy)) in inputs.devices {
        capacity.insert(name.clone(), Quantity(all.to_string()));
        left.insert(name.clone(), Quantity(healthy.to_string()));
    }
    // Resources that somebody else has told the API server of are theirs.
    let told = inputs.current.and_then(|status| status.capacity.as_ref());
    let told_left = inputs.current.and_then(|status| status.allocatable.as_ref());
    for (name, amount) in told.into_iter().flatten().filter(|(name, _)| name.contains('/')) {
        if !capacity.contains_key(name) {
            let amount_left = told_left.and_then(|told| told.get(name)).unwrap_or(amount);
            left.insert(name.clone(), amount_left.clone());
            capacity.insert(name.clone(), amount.clone());
        }
    }
    let foreign = inputs
        .current
        .and_then(|status| status.conditions.as_ref())
        .into_iter()
        .flatten()
        .filter(|condition| !TYPES.contains(&condition.type_.as_str()));
    let address = |type_: &str, address: String| NodeAddress { type_: type_.to_owned(), address };
    NodeStatus {
        addresses: Some(match given_addresses(&inputs) {
            Some(given) => given,
            None => vec![
                address("InternalIP", inputs.config.keelson.node_ip.to_string()),
                address("Hostname", inputs.config.keelson.node_name.clone()),
            ],
        }),
        allocatable: Some(left),
        capacity: Some(capacity),
        conditions: Some(foreign.cloned().chain(inputs.conditions).collect()),
        daemon_endpoints: Some(NodeDaemonEndpoints {
            kubelet_endpoint: Some(DaemonEndpoint { port: i32::from(inputs.config.port) }),
        }),
        images: Some(images(inputs.images, inputs.config.node_status_max_images)),
        // Also an empty list: a merge would leave the old one.
        volumes_in_use: Some(inputs.volumes_in_use.iter().cloned().collect()),
        features: inputs.health.features.clone(),
        node_info: Some(inputs.machine.info.node_info(&inputs.health.version)),
        runtime_handlers: Some(inputs.health.handlers.clone()).filter(|handlers| !handlers.is_empty()),
        ..NodeStatus::default()
    }
}

/// Those that a controller of the node's provider knows better.
fn given_addresses(inputs: &Inputs<'_>) -> Option<Vec<NodeAddress>> {
    let is_external = inputs.config.keelson.cloud_provider == "external";
    let given = inputs.current?.addresses.clone()?;
    (is_external && !given.is_empty()).then_some(given)
}

/// Whether `desired` says anything that `current` does not, heartbeats aside.
pub(super) fn differs(desired: &NodeStatus, current: &NodeStatus) -> bool {
    let conditions = |status: &NodeStatus| -> BTreeMap<String, (String, Option<String>, Option<String>)> {
        let ours =
            status.conditions.iter().flatten().filter(|condition| TYPES.contains(&condition.type_.as_str()));
        ours.map(|condition| {
            let state = (condition.status.clone(), condition.reason.clone(), condition.message.clone());
            (condition.type_.clone(), state)
        })
        .collect()
    };
    let is_same = desired.addresses == current.addresses
        && desired.allocatable == current.allocatable
        && desired.capacity == current.capacity
        && desired.daemon_endpoints == current.daemon_endpoints
        && desired.images.as_deref().unwrap_or_default() == current.images.as_deref().unwrap_or_default()
        // What is not told is not written, so it stays whatever it was.
        && (desired.features.is_none() || desired.features == current.features)
        && desired.node_info == current.node_info
        && desired.volumes_in_use.as_deref().unwrap_or_default()
            == current.volumes_in_use.as_deref().unwrap_or_default()
        && (desired.runtime_handlers.is_none() || desired.runtime_handlers == current.runtime_handlers)
        && conditions(desired) == conditions(current);
    !is_same
}

/// An amount of a resource, in thousandths for cpu.
type Amounts = BTreeMap<String, u64>;

fn capacity(config: &AgentConfig, machine: &Machine, figures: &NodeFigures) -> Amounts {
    let mut capacity = machine.huge_pages.clone();
    capacity.insert("cpu".to_owned(), machine.cpus * 1000);
    capacity.insert("memory".to_owned(), figures.memory.total);
    if config.machine.local_storage_capacity_isolation {
        capacity.insert("ephemeral-storage".to_owned(), figures.node_fs.capacity);
    }
    capacity.insert("pods".to_owned(), config.pods_at_most(machine.cpus));
    capacity
}

/// Capacity less what is reserved and less the hard eviction thresholds.
fn allocatable(config: &AgentConfig, capacity: &Amounts) -> BTreeMap<String, Quantity> {
    let hard = EvictionConfig::of(config).map(|config| config.thresholds).unwrap_or_default();
    let threshold = |name: &str, amount: u64| {
        let signal = match name {
            "memory" => Signal::MemoryAvailable,
            "ephemeral-storage" => Signal::NodeFsAvailable,
            _ => return 0,
        };
        let found = hard.iter().find(|threshold| threshold.signal == signal && threshold.grace.is_none());
        found.map_or(0, |threshold| threshold.value.of(amount))
    };
    let left = |(name, amount): (&String, &u64)| {
        let left = amount.saturating_sub(config.reserved(name)).saturating_sub(threshold(name, *amount));
        (name.clone(), left)
    };
    quantities(&capacity.iter().map(left).collect())
}

/// As upstream writes them: memory in Ki, cpu in cores or thousandths.
fn quantities(amounts: &Amounts) -> BTreeMap<String, Quantity> {
    let text = |name: &str, amount: u64| match name {
        "cpu" if amount.is_multiple_of(1000) => (amount / 1000).to_string(),
        "cpu" => format!("{amount}m"),
        "memory" => format!("{}Ki", amount / 1024),
        "ephemeral-storage" if amount.is_multiple_of(1024) => format!("{}Ki", amount / 1024),
        name if name.starts_with("hugepages-") && amount > 0 => format!("{}Ki", amount / 1024),
        _ => amount.to_string(),
    };
    amounts.iter().map(|(name, amount)| (name.clone(), Quantity(text(name, *amount)))).collect()
}

/// The largest ones.
fn images(images: &[Image], most: i64) -> Vec<ContainerImage> {
    let mut list: Vec<ContainerImage> = images
        .iter()
        .map(|image| {
            let names = image.repo_digests.iter().chain(&image.repo_tags).take(MAX_NAMES).cloned().collect();
            ContainerImage { names: Some(names), size_bytes: i64::try_from(image.size).ok() }
        })
        .collect();
    // By name among equals: the CRI promises no order, and a changed order would be written.
    list.sort_by(|a, b| b.size_bytes.cmp(&a.size_bytes).then_with(|| a.names.cmp(&b.names)));
    list.truncate(usize::try_from(most).unwrap_or(usize::MAX));
    list
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::stats::{FsFigures, MemoryFigures};

    fn config() -> AgentConfig {
        let text = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n\
                    tlsCertFile: /c\ntlsPrivateKeyFile: /k\nmaxPods: 20\n\
                    systemReserved: {cpu: 100m, memory: 1Mi}\nkubeReserved: {cpu: 100m}\n\
                    keelson: {nodeName: n1, nodeIP: 192.0.2.1, kubeconfig: /kc}\n";
        AgentConfig::parse(std::path::Path::new("test"), text).unwrap()
    }

    fn make(conditions: Vec<NodeCondition>, current: Option<&NodeStatus>, images: &[Image]) -> NodeStatus {
        with_devices(conditions, current, images, &BTreeMap::new())
    }

    fn with_devices(
        conditions: Vec<NodeCondition>,
        current: Option<&NodeStatus>,
        images: &[Image],
        devices: &Counts,
    ) -> NodeStatus {
        let memory = MemoryFigures { total: 200 << 20, ..MemoryFigures::default() };
        let node_fs = FsFigures { capacity: 10_000 * 1024, ..FsFigures::default() };
        let figures = NodeFigures { memory, node_fs, ..NodeFigures::default() };
        let huge_pages = BTreeMap::from([("hugepages-2Mi".to_owned(), 0)]);
        let machine = Machine { cpus: 2, huge_pages, ..Machine::default() };
        desired(Inputs {
            config: &config(),
            machine: &machine,
            figures: &figures,
            devices,
            volumes_in_use: &BTreeSet::new(),
            health: &RuntimeHealth { version: "containerd://1.6".to_owned(), ..RuntimeHealth::default() },
            images,
            conditions,
            current,
        })
    }

    fn condition(kind: &str, status: &str, heartbeat: i64) -> NodeCondition {
        let time = jiff::Timestamp::from_second(heartbeat).unwrap();
        NodeCondition {
            type_: kind.to_owned(),
            status: status.to_owned(),
            last_heartbeat_time: Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(time)),
            ..NodeCondition::default()
        }
    }

    #[test]
    fn allocatable_is_capacity_less_reservations_and_thresholds() {
        let status = make(Vec::new(), None, &[]);
        let text = |list: &Option<BTreeMap<String, Quantity>>| -> Vec<String> {
            list.iter().flatten().map(|(name, amount)| format!("{name}={}", amount.0)).collect()
        };
        assert_eq!(
            text(&status.capacity),
            ["cpu=2", "ephemeral-storage=10000Ki", "hugepages-2Mi=0", "memory=204800Ki", "pods=20"]
        );
        assert_eq!(
            text(&status.allocatable),
            ["cpu=1800m", "ephemeral-storage=9000Ki", "hugepages-2Mi=0", "memory=101376Ki", "pods=20"]
        );
    }

    #[test]
    fn devices_are_counted_and_resources_of_others_stay() {
        let mut current = make(Vec::new(), None, &[]);
        for list in [&mut current.capacity, &mut current.allocatable] {
            list.get_or_insert_default().insert("example.com/licence".to_owned(), Quantity("7".to_owned()));
        }
        let devices = BTreeMap::from([("example.com/gpu".to_owned(), (4, 3))]);
        let status = with_devices(Vec::new(), Some(&current), &[], &devices);
        let amount =
            |list: &Option<BTreeMap<String, Quantity>>, name: &str| list.as_ref().unwrap()[name].0.clone();
        assert_eq!(amount(&status.capacity, "example.com/gpu"), "4");
        assert_eq!(amount(&status.allocatable, "example.com/gpu"), "3");
        assert_eq!(amount(&status.allocatable, "example.com/licence"), "7");
        assert!(!differs(&make(Vec::new(), Some(&current), &[]), &current));
    }

    #[test]
    fn heartbeats_alone_are_no_difference() {
        let first = make(vec![condition("Ready", "True", 1)], None, &[]);
        let later = make(vec![condition("Ready", "True", 100)], Some(&first), &[]);
        assert!(!differs(&later, &first));
        let unready = make(vec![condition("Ready", "False", 100)], Some(&first), &[]);
        assert!(differs(&unready, &first));
        assert!(differs(&first, &NodeStatus::default()));
    }

    #[test]
    fn conditions_of_others_stay_and_do_not_count() {
        let foreign = NodeStatus {
            conditions: Some(vec![
                condition("NetworkUnavailable", "False", 1),
                condition("Ready", "Unknown", 1),
            ]),
            ..NodeStatus::default()
        };
        let status = make(vec![condition("Ready", "True", 2)], Some(&foreign), &[]);
        let kinds: Vec<_> =
            status.conditions.iter().flatten().map(|c| format!("{}={}", c.type_, c.status)).collect();
        assert_eq!(kinds, ["NetworkUnavailable=False", "Ready=True"]);
        let without = NodeStatus { conditions: Some(vec![condition("Ready", "True", 2)]), ..status.clone() };
        assert!(!differs(&status, &without));
    }

    #[test]
    fn images_are_in_a_stable_order() {
        let image = |name: &str, size| Image { repo_tags: vec![name.to_owned()], size, ..Image::default() };
        let status = make(Vec::new(), None, &[image("b", 1), image("a", 1), image("c", 9)]);
        let names: Vec<_> =
            status.images.iter().flatten().flat_map(|image| image.names.iter().flatten()).cloned().collect();
        assert_eq!(names, ["c", "a", "b"]);
    }
}
