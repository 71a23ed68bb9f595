//! The API server: objects by name, resource versions, strategic merge of statuses, what each pod was before.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

/// States of a pod that may be told once more.
const REMEMBERED: usize = 6;

/// The server's objects.
#[derive(Debug, Default)]
pub(crate) struct Api {
    pub(crate) pods: BTreeMap<String, Arc<Pod>>,
    /// Earlier states of those pods.
    pub(crate) before: BTreeMap<String, Vec<Arc<Pod>>>,
    version: u64,
}

impl Api {
    pub(crate) fn by_uid(&self, uid: &str) -> Option<&Arc<Pod>> {
        self.pods.values().find(|pod| pod.metadata.uid.as_deref() == Some(uid))
    }

    pub(crate) fn put(&mut self, mut pod: Pod) -> Arc<Pod> {
        self.version += 1;
        pod.metadata.resource_version = Some(self.version.to_string());
        let name = pod.metadata.name.clone().unwrap_or_default();
        let pod = Arc::new(pod);
        if let Some(old) = self.pods.insert(name.clone(), Arc::clone(&pod)) {
            let before = self.before.entry(name).or_default();
            before.push(old);
            if before.len() > REMEMBERED {
                before.remove(0);
            }
        }
        pod
    }

    /// Removes the object for good.
    pub(crate) fn remove(&mut self, name: &str) -> Option<Arc<Pod>> {
        self.before.remove(name);
        let gone = self.pods.remove(name)?;
        let mut gone = Pod::clone(&gone);
        self.version += 1;
        gone.metadata.resource_version = Some(self.version.to_string());
        Some(Arc::new(gone))
    }

    /// Takes a status patch; the HTTP code where that fails.
    pub(crate) fn patched(&self, name: &str, patch: &Value) -> Result<Pod, u16> {
        let current = self.pods.get(name).ok_or(404_u16)?;
        if patch["metadata"]["uid"] != json!(current.metadata.uid) {
            return Err(409);
        }
        let current = serde_json::to_value(&**current).expect("a pod");
        let info = control_api::kinds::find("", "v1", "pods").expect("pods are known");
        let merged = control_api::patch::strategic_merge(info, &current, patch).expect("a good patch");
        Ok(serde_json::from_value(merged).expect("a pod"))
    }
}
