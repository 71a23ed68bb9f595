//! What the node tells the cluster of its drivers: the CSINode, topology labels, and the annotation with the node's ids.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::storage::v1::{CSINode, CSINodeDriver, CSINodeSpec, VolumeNodeResources};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::drivers::Driver;
use super::wire::{self, Empty, InfoResponse};
use super::{Csi, ask};
use crate::plugins::Plugin;

/// The Node's annotation with how each driver calls it.
const NODE_IDS: &str = "csi.volume.kubernetes.io/nodeid";
/// Deadline of NodeGetInfo.
const INFO_DEADLINE: Duration = Duration::from_secs(60);
/// Pauses between attempts to make the CSINode.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Attempts of a write that others are in the way of.
const ATTEMPTS: usize = 5;
/// Longest name of a driver, by the specification.
const LONGEST_NAME: usize = 63;

/// Whether the driver can be called: its name and the version of its API.
pub(super) fn check(plugin: &Plugin) -> Result<(), String> {
    let (name, endpoint) = (&plugin.name, plugin.endpoint.display());
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"-.".contains(&byte);
    let ends = [name.bytes().next(), name.bytes().last()];
    let starts_and_ends_well = ends.iter().all(|end| end.is_some_and(|byte| byte.is_ascii_alphanumeric()));
    if name.len() > LONGEST_NAME || !name.bytes().all(good) || !starts_and_ends_well {
        return Err(format!(
            "CSI driver name {name:?} is invalid: expected a domain name of at most {LONGEST_NAME} characters"
        ));
    }
    let is_known = |version: &String| {
        version.trim_start_matches('v').split('.').next().is_some_and(|major| major == "1")
    };
    if plugin.versions.iter().any(is_known) {
        return Ok(());
    }
    Err(format!(
        "validation failed for CSI Driver {name} at endpoint {endpoint}: None of the versions specified {:?} are supported",
        plugin.versions
    ))
}

/// How the driver calls this node.
pub(super) async fn info(driver: &Driver) -> Result<InfoResponse, String> {
    let info: InfoResponse = wire::call(&driver.channel, wire::INFO, Empty {}, INFO_DEADLINE)
        .await
        .map_err(|error| format!("NodeGetInfo failed: {error}"))?;
    if info.node_id.is_empty() {
        return Err("error adding CSI driver node info: driverNodeID must not be empty".to_owned());
    }
    Ok(info)
}

impl Csi {
    /// Makes the node's CSINode, however long it takes; then waits for `cancel`.
    pub async fn announce(self, cancel: CancellationToken) {
        let made = async {
            let mut pause = FIRST_PAUSE;
            loop {
                {
                    let _alone = self.0.publishing.lock().await;
                    if let Err(problem) = self.csi_node().await {
                        debug!(%problem, "no CSINode yet");
                    } else {
                        return;
                    }
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        };
        // Cancel-safe: an object is made or not.
        tokio::select! {
            () = cancel.cancelled() => return,
            () = made => {}
        }
        cancel.cancelled().await;
    }

    /// Tells the cluster of a driver.
    pub(super) async fn install(&self, driver: &str, info: &InfoResponse) -> Result<(), String> {
        let _alone = self.0.publishing.lock().await;
        let topology = info.accessible_topology.as_ref();
        let segments = topology.map(|topology| topology.segments.clone()).unwrap_or_default();
        self.label_node(driver, Some(&info.node_id), &segments)
            .await
            .map_err(|problem| format!("error updating Node object with CSI driver node info: {problem}"))?;
        let count = i32::try_from(info.max_volumes_per_node.max(0)).unwrap_or(i32::MAX);
        let keys: Vec<String> = segments.into_keys().collect();
        let entry = CSINodeDriver {
            name: driver.to_owned(),
            node_id: info.node_id.clone(),
            topology_keys: (!keys.is_empty()).then_some(keys),
            allocatable: (count > 0).then_some(VolumeNodeResources { count: Some(count) }),
        };
        self.change(driver, Some(&entry))
            .await
            .map_err(|problem| format!("error updating CSINode object with CSI driver node info: {problem}"))
    }

    /// Tells the cluster that a driver has gone.
    pub(super) async fn uninstall(&self, driver: &str) {
        let _alone = self.0.publishing.lock().await;
        let removed = self.change(driver, None).await;
        let forgotten = self.label_node(driver, None, &BTreeMap::new()).await;
        if let Err(problem) = removed.and(forgotten) {
            warn!(%driver, %problem, "the cluster is not told that a CSI driver has gone");
        }
    }

    /// The CSINode, made where it is not there.
    async fn csi_node(&self) -> Result<CSINode, String> {
        let (name, client) = (&self.0.settings.node_name, self.0.client.clone());
        let csi_nodes: Api<CSINode> = Api::all(client.clone());
        if let Some(found) = ask(csi_nodes.get_opt(name)).await? {
            return Ok(found);
        }
        let nodes: Api<Node> = Api::all(client);
        let node = ask(nodes.get(name)).await?;
        let owner = OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Node".to_owned(),
            name: name.clone(),
            uid: node.metadata.uid.unwrap_or_default(),
            ..OwnerReference::default()
        };
        let new = CSINode {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                owner_references: Some(vec![owner]),
                ..ObjectMeta::default()
            },
            spec: CSINodeSpec { drivers: Vec::new() },
        };
        ask(csi_nodes.create(&PostParams::default(), &new)).await
    }

    /// Puts the driver's entry into the CSINode, or takes it out.
    async fn change(&self, driver: &str, entry: Option<&CSINodeDriver>) -> Result<(), String> {
        let csi_nodes: Api<CSINode> = Api::all(self.0.client.clone());
        let name = &self.0.settings.node_name;
        let mut last = String::new();
        for _ in 0..ATTEMPTS {
            let mut node = self.csi_node().await?;
            let known = node.spec.drivers.iter().find(|known| known.name == driver);
            if known == entry {
                return Ok(());
            }
            // What is there cannot become another one: it goes first.
            let replaces = known.is_some_and(|known| {
                entry.is_some_and(|entry| {
                    (&known.node_id, &known.topology_keys) != (&entry.node_id, &entry.topology_keys)
                })
            });
            node.spec.drivers.retain(|known| known.name != driver);
            if !replaces {
                node.spec.drivers.extend(entry.cloned());
            }
            match ask(csi_nodes.replace(name, &PostParams::default(), &node)).await {
                Ok(_) if !replaces => return Ok(()),
                Ok(_) => {}
                Err(problem) => last = problem,
            }
        }
        Err(last)
    }

    /// Sets topology labels and the driver's id of the node; `None` forgets the id.
    async fn label_node(
        &self,
        driver: &str,
        id: Option<&str>,
        segments: &BTreeMap<String, String>,
    ) -> Result<(), String> {
        let nodes: Api<Node> = Api::all(self.0.client.clone());
        let name = &self.0.settings.node_name;
        let node = ask(nodes.get(name)).await?;
        let Some(patch) = label_patch(&node, driver, id, segments)? else { return Ok(()) };
        ask(nodes.patch(name, &PatchParams::default(), &Patch::Merge(patch))).await.map(|_| ())
    }
}

/// What to change of the node; nothing where all of it is so.
fn label_patch(
    node: &Node,
    driver: &str,
    id: Option<&str>,
    segments: &BTreeMap<String, String>,
) -> Result<Option<Value>, String> {
    let labels = node.metadata.labels.clone().unwrap_or_default();
    for (key, value) in segments {
        if let Some(known) = labels.get(key).filter(|known| *known != value) {
            return Err(format!(
                "detected topology value collision: driver reported {key:?}:{value:?} but existing label is {key:?}:{known:?}"
            ));
        }
    }
    let written = node.metadata.annotations.as_ref().and_then(|annotations| annotations.get(NODE_IDS));
    let known: BTreeMap<String, String> =
        written.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    let mut ids = known.clone();
    match id {
        Some(id) => ids.insert(driver.to_owned(), id.to_owned()),
        None => ids.remove(driver),
    };
    if ids == known && segments.keys().all(|key| labels.contains_key(key)) {
        return Ok(None);
    }
    let ids = if ids.is_empty() { Value::Null } else { json!(json!(ids).to_string()) };
    Ok(Some(json!({"metadata": {"labels": segments, "annotations": {NODE_IDS: ids}}})))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn plugin(name: &str, version: &str) -> Plugin {
        Plugin {
            name: name.to_owned(),
            endpoint: PathBuf::from("/csi.sock"),
            versions: vec![version.to_owned()],
            socket: PathBuf::new(),
        }
    }

    #[test]
    fn drivers_need_a_name_and_a_version() {
        for version in ["1.0.0", "v1.9.1", "1"] {
            assert_eq!(check(&plugin("hostpath.csi.k8s.io", version)), Ok(()));
        }
        assert!(check(&plugin("d", "0.3.0")).unwrap_err().contains("None of the versions"));
        for name in ["", "../x", "-a", "a.", "a/b", &"x".repeat(64)] {
            assert!(check(&plugin(name, "1.0.0")).unwrap_err().contains("is invalid"), "{name}");
        }
    }

    #[test]
    fn labels_and_ids_are_added_and_collisions_told() {
        let node = |labels: Value, ids: Option<&str>| -> Node {
            let annotations = ids.map(|ids| json!({NODE_IDS: ids}));
            serde_json::from_value(
                json!({"metadata": {"name": "n", "labels": labels, "annotations": annotations}}),
            )
            .unwrap()
        };
        let segments = BTreeMap::from([("topology.d/zone".to_owned(), "z1".to_owned())]);
        let patch = label_patch(&node(json!({}), None), "d", Some("i"), &segments).unwrap().unwrap();
        assert_eq!(patch["metadata"]["labels"]["topology.d/zone"], "z1");
        assert_eq!(patch["metadata"]["annotations"][NODE_IDS], "{\"d\":\"i\"}");
        let there = node(json!({"topology.d/zone": "z1"}), Some("{\"d\":\"i\"}"));
        assert_eq!(label_patch(&there, "d", Some("i"), &segments).unwrap(), None);
        let patch = label_patch(&there, "d", None, &BTreeMap::new()).unwrap().unwrap();
        assert_eq!(patch["metadata"]["annotations"][NODE_IDS], Value::Null);
        let other = node(json!({"topology.d/zone": "z2"}), None);
        assert!(label_patch(&other, "d", Some("i"), &segments).unwrap_err().contains("collision"));
    }
}
