//! Labels and annotations on CRI objects: how the agent finds its pods again after a restart, and how other tools do.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod};

/// Pod name.
pub const POD_NAME: &str = "io.kubernetes.pod.name";
/// Namespace.
pub const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
/// Pod uid.
pub const POD_UID: &str = "io.kubernetes.pod.uid";
/// Container name.
pub const CONTAINER_NAME: &str = "io.kubernetes.container.name";
/// Hash of the container's definition.
pub const CONTAINER_HASH: &str = "io.kubernetes.container.hash";
/// Restart count.
pub const RESTART_COUNT: &str = "io.kubernetes.container.restartCount";
/// Path of the termination message inside the container.
pub const MESSAGE_PATH: &str = "io.kubernetes.container.terminationMessagePath";
/// `File` or `FallbackToLogsOnError`.
pub const MESSAGE_POLICY: &str = "io.kubernetes.container.terminationMessagePolicy";
/// Grace period of the pod.
pub const GRACE: &str = "io.kubernetes.pod.terminationGracePeriod";

/// Selects a pod's objects.
pub fn of_pod(uid: &str) -> BTreeMap<String, String> {
    BTreeMap::from([(POD_UID.to_owned(), uid.to_owned())])
}

/// Labels of a pod's sandbox: the pod's own and the identifying ones, which win.
pub fn sandbox_labels(pod: &Pod) -> BTreeMap<String, String> {
    let mut labels = pod.metadata.labels.clone().unwrap_or_default();
    labels.extend(identity(pod));
    labels
}

/// Labels of a container.
pub fn container_labels(pod: &Pod, container: &str) -> BTreeMap<String, String> {
    let mut labels = identity(pod);
    labels.insert(CONTAINER_NAME.to_owned(), container.to_owned());
    labels
}

/// Annotations of a container.
pub fn container_annotations(pod: &Pod, container: &Container, attempt: u32) -> BTreeMap<String, String> {
    let mut annotations = BTreeMap::from([
        (CONTAINER_HASH.to_owned(), agent_core::hash::container_hash(container)),
        (RESTART_COUNT.to_owned(), attempt.to_string()),
        (MESSAGE_PATH.to_owned(), message_path(container).to_owned()),
        (
            MESSAGE_POLICY.to_owned(),
            container.termination_message_policy.clone().unwrap_or_else(|| "File".to_owned()),
        ),
    ]);
    let grace = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds);
    if let Some(grace) = grace {
        annotations.insert(GRACE.to_owned(), grace.to_string());
    }
    annotations
}

/// Where the container writes its termination message.
pub fn message_path(container: &Container) -> &str {
    container
        .termination_message_path
        .as_deref()
        .filter(|path| !path.is_empty())
        .unwrap_or("/dev/termination-log")
}

fn identity(pod: &Pod) -> BTreeMap<String, String> {
    let metadata = &pod.metadata;
    BTreeMap::from([
        (POD_NAME.to_owned(), metadata.name.clone().unwrap_or_default()),
        (POD_NAMESPACE.to_owned(), metadata.namespace.clone().unwrap_or_default()),
        (POD_UID.to_owned(), metadata.uid.clone().unwrap_or_default()),
    ])
}
