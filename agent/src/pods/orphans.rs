//! Finds what the node holds of pods that nobody wants: in the CRI, on disk, in cgroups, in logs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use agent_core::fate::DEFAULT_GRACE;
use agent_core::model::Fate;
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use tracing::{debug, warn};

use super::context::PodContext;
use crate::runtime::events::FoundPod;

/// Every pod that left a trace, by uid; `found` are those of the CRI.
pub(super) async fn traces(context: &PodContext, found: &[FoundPod]) -> Vec<FoundPod> {
    let mut traces: BTreeMap<String, FoundPod> =
        found.iter().map(|pod| (pod.uid.clone(), pod.clone())).collect();
    let mut add = |uid: String, namespace: &str, name: &str| {
        traces.entry(uid.clone()).or_insert_with(|| FoundPod {
            uid,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            containers: BTreeSet::new(),
            grace: None,
        });
    };
    for (uid, namespace) in context.claims.pods() {
        add(uid, &namespace, "");
    }
    match context.host.volumes.on_disk().await {
        Ok(uids) => uids.into_iter().for_each(|uid| add(uid, "", "")),
        Err(error) => warn!(%error, "cannot list pod directories"),
    }
    match context.host.cgroups.list_pods().await {
        Ok(cgroups) => cgroups.into_iter().for_each(|cgroup| add(cgroup.pod_uid, "", "")),
        Err(error) => warn!(%error, "cannot list pod cgroups"),
    }
    for (namespace, name, uid) in log_directories(&context.config.pod_logs_dir).await {
        add(uid, &namespace, &name);
    }
    traces.into_values().collect()
}

/// A pod that only the node knows, as far as its labels tell: enough to end it.
pub(super) fn orphan(found: &FoundPod) -> (Pod, Fate) {
    let container = |name: &String| Container { name: name.clone(), ..Container::default() };
    let pod = Pod {
        metadata: ObjectMeta {
            name: Some(found.name.clone()),
            namespace: Some(found.namespace.clone()),
            uid: Some(found.uid.clone()),
            ..ObjectMeta::default()
        },
        spec: Some(PodSpec {
            containers: found.containers.iter().map(container).collect(),
            ..PodSpec::default()
        }),
        status: None,
    };
    (pod, Fate::Terminate { grace: found.grace.unwrap_or(DEFAULT_GRACE), gone: true })
}

/// `<namespace>_<name>_<uid>` directories.
async fn log_directories(root: &Path) -> Vec<(String, String, String)> {
    let mut found = Vec::new();
    let mut directory = match tokio::fs::read_dir(root).await {
        Ok(directory) => directory,
        Err(error) => {
            debug!(path = %root.display(), %error, "no pod logs to look through");
            return found;
        }
    };
    while let Ok(Some(entry)) = directory.next_entry().await {
        let file_name = entry.file_name().to_string_lossy().into_owned();
        let mut parts = file_name.split('_');
        if let (Some(namespace), Some(name), Some(uid), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        {
            found.push((namespace.to_owned(), name.to_owned(), uid.to_owned()));
        }
    }
    found
}
