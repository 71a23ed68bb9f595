//! The verbose part of statuses: what helps a person who looks for a cause, as JSON. Its form may change at any time.

use std::collections::BTreeMap;

use cri_shim_api::v1::PodSandboxConfig;
use serde_json::{Value, json};

use crate::error::RuntimeError;
use crate::runtime::Runtime;

impl Runtime {
    /// What is known of a sandbox beyond its status.
    pub fn sandbox_info(&self, id: &str) -> Result<BTreeMap<String, String>, RuntimeError> {
        let record = self.sandbox(id)?.record.get();
        let info = json!({
            "name": record.name,
            "pid": record.pid,
            "netns": record.netns,
            "network": record.network,
            "addresses": record.addresses,
            "runtimeHandler": record.runtime_handler,
            "cgroupParent": record.cgroup_parent(),
            "phase": format!("{:?}", record.phase()),
            "config": config(&record.config),
            "runtimeSpec": self.pause_spec(&record).ok(),
            "containers": self.registry.containers_of(id).iter().map(|one| one.id.clone()).collect::<Vec<_>>(),
        });
        Ok(one(&info))
    }

    /// What is known of a container beyond its status: also what containerd knows, when it answers.
    pub async fn container_info(&self, id: &str) -> Result<BTreeMap<String, String>, RuntimeError> {
        let container = self.container(id)?;
        let record = container.record.get();
        if record.registration.is_some() {
            // It is just being made.
            drop(container.operation.lock().await);
        }
        let mut info = json!({
            "name": record.name,
            "pid": record.pid,
            "sandboxID": record.sandbox_id,
            "snapshotKey": record.id,
            "cgroup": record.cgroup,
            "logPath": record.log_path,
            "phase": format!("{:?}", record.phase()),
            "stopSignal": record.stop_signal,
        });
        if let Ok(Some(stored)) = self.client.container(id).await {
            let spec = stored.spec.and_then(|spec| serde_json::from_slice(&spec.value).ok());
            info["runtimeType"] = json!(stored.runtime.map(|runtime| runtime.name));
            info["snapshotter"] = json!(stored.snapshotter);
            info["runtimeSpec"] = spec.unwrap_or(Value::Null);
        }
        Ok(one(&info))
    }
}

/// What was asked for, with the names that the CRI gives its fields.
fn config(config: &PodSandboxConfig) -> Value {
    let metadata = config.metadata.clone().unwrap_or_default();
    let dns = config.dns_config.clone().unwrap_or_default();
    let ports = config.port_mappings.iter().map(|port| {
        json!({
            "protocol": port.protocol,
            "container_port": port.container_port,
            "host_port": port.host_port,
            "host_ip": port.host_ip,
        })
    });
    let linux = config.linux.clone().unwrap_or_default();
    json!({
        "metadata": {
            "name": metadata.name,
            "uid": metadata.uid,
            "namespace": metadata.namespace,
            "attempt": metadata.attempt,
        },
        "hostname": config.hostname,
        "log_directory": config.log_directory,
        "dns_config": { "servers": dns.servers, "searches": dns.searches, "options": dns.options },
        "port_mappings": ports.collect::<Vec<_>>(),
        "labels": config.labels,
        "annotations": config.annotations,
        "linux": { "cgroup_parent": linux.cgroup_parent, "sysctls": linux.sysctls },
    })
}

fn one(info: &Value) -> BTreeMap<String, String> {
    BTreeMap::from([("info".to_owned(), info.to_string())])
}
