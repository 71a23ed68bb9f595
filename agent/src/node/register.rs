//! Makes the Node object, or corrects its labels when it exists.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Node, NodeSpec, Taint};
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::json;
use tracing::{info, warn};

use super::machine::Machine;
use super::{Pause, RequestError, within};
use crate::config::AgentConfig;

/// Registers, however long it takes; returns the object.
pub(super) async fn register(client: &Client, config: &AgentConfig, machine: &Machine) -> Node {
    let api: Api<Node> = Api::all(client.clone());
    let mut pause = Pause::new();
    loop {
        match try_register(&api, config, machine).await {
            Ok(node) => return node,
            Err(error) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                warn!(%error, cause, "cannot register the node yet");
            }
        }
        pause.wait().await;
    }
}

async fn try_register(
    api: &Api<Node>,
    config: &AgentConfig,
    machine: &Machine,
) -> Result<Node, RequestError> {
    let name = config.keelson.node_name.as_str();
    let labels = labels(config, machine);
    if config.register_node {
        match within(api.create(&PostParams::default(), &node(config, labels.clone()))).await {
            Ok(node) => {
                info!(node = name, "node registered");
                return Ok(node);
            }
            Err(error) if error.code() == Some(409) => {}
            Err(error) => return Err(error),
        }
    }
    let existing = within(api.get(name)).await?;
    let current = existing.metadata.labels.clone().unwrap_or_default();
    if labels.iter().all(|(key, value)| current.get(key) == Some(value)) {
        return Ok(existing);
    }
    let patch = Patch::Merge(json!({"metadata": {"labels": labels}}));
    within(api.patch(name, &PatchParams::default(), &patch)).await
}

pub(super) fn node(config: &AgentConfig, labels: BTreeMap<String, String>) -> Node {
    let provider_id = Some(config.provider_id.clone()).filter(|id| !id.is_empty());
    let mut taints = config.register_with_taints.clone();
    let mut annotations = BTreeMap::from([(
        "volumes.kubernetes.io/controller-managed-attach-detach".to_owned(),
        "true".to_owned(),
    )]);
    if config.keelson.cloud_provider == "external" {
        // Its controller takes the taint away once the node is known to the provider.
        taints.push(Taint {
            key: "node.cloudprovider.kubernetes.io/uninitialized".to_owned(),
            value: Some("true".to_owned()),
            effect: "NoSchedule".to_owned(),
            time_added: None,
        });
        let address = config.keelson.node_ip.to_string();
        annotations.insert("alpha.kubernetes.io/provided-node-ip".to_owned(), address);
    }
    let taints = Some(taints).filter(|taints| !taints.is_empty());
    Node {
        metadata: ObjectMeta {
            name: Some(config.keelson.node_name.clone()),
            labels: Some(labels),
            annotations: Some(annotations),
            ..ObjectMeta::default()
        },
        spec: Some(NodeSpec { taints, provider_id, ..NodeSpec::default() }),
        ..Node::default()
    }
}

pub(super) fn labels(config: &AgentConfig, machine: &Machine) -> BTreeMap<String, String> {
    let mut labels = config.keelson.node_labels.clone();
    for prefix in ["kubernetes.io", "beta.kubernetes.io"] {
        labels.insert(format!("{prefix}/os"), "linux".to_owned());
        labels.insert(format!("{prefix}/arch"), machine.info.architecture.clone());
    }
    labels.insert("kubernetes.io/hostname".to_owned(), config.keelson.node_name.clone());
    labels
}
