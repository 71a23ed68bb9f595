//! The verbose part of statuses: what helps a person who looks for a cause, as JSON. Its form may change at any time.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::error::RuntimeError;
use crate::runtime::Runtime;

impl Runtime {
    /// What is known of a sandbox beyond its status.
    pub fn sandbox_info(&self, id: &str) -> Result<BTreeMap<String, String>, RuntimeError> {
        let record = self.sandbox(id)?.record.get();
        let dns = record.config.dns_config.clone().unwrap_or_default();
        let info = json!({
            "name": record.name,
            "pid": record.pid,
            "netns": record.netns,
            "network": record.network,
            "addresses": record.addresses,
            "runtimeHandler": record.runtime_handler,
            "cgroupParent": record.cgroup_parent(),
            "phase": format!("{:?}", record.phase()),
            "hostname": record.config.hostname,
            "logDirectory": record.config.log_directory,
            "dns": { "servers": dns.servers, "searches": dns.searches, "options": dns.options },
            "containers": self.registry.containers_of(id).iter().map(|one| one.id.clone()).collect::<Vec<_>>(),
        });
        Ok(one(&info))
    }

    /// What is known of a container beyond its status: also what containerd knows, when it answers.
    pub async fn container_info(&self, id: &str) -> Result<BTreeMap<String, String>, RuntimeError> {
        let record = self.container(id)?.record.get();
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

fn one(info: &Value) -> BTreeMap<String, String> {
    BTreeMap::from([("info".to_owned(), info.to_string())])
}
