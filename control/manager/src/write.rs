//! Writes through the API: merge patches guarded by resourceVersion, deadlines, and what errors mean.
//!
//! Every request goes through [`call`], which bounds its time and names what it was for.

use std::{fmt::Debug, time::Duration};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams, Preconditions},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};
use thiserror::Error;

use crate::informer::Key;

/// No single request may take longer.
const DEADLINE: Duration = Duration::from_secs(30);

/// A write (or the read before it) that did not work; the reconcile is repeated.
#[derive(Debug, Error)]
pub(crate) enum WriteError {
    /// The API server refused or could not be reached.
    #[error("cannot {action}")]
    Api {
        action: String,
        #[source]
        source: Box<kube::Error>,
    },
    /// No answer in time.
    #[error("cannot {action}: no answer within {} s", DEADLINE.as_secs())]
    Deadline { action: String },
    /// The whole reconcile took too long.
    #[error("reconcile did not end in time")]
    ReconcileDeadline,
    /// The API server serves no such kind.
    #[error("the API server serves no {kind} in {api_version}")]
    UnknownKind { api_version: String, kind: String },
    /// The pod range is used up.
    #[error("cannot give node {node} a pod range")]
    NoPodRange {
        node: String,
        #[source]
        source: control_decide::node_ipam::Exhausted,
    },
}

impl WriteError {
    /// For a reconcile that was cut off.
    pub(crate) fn reconcile_deadline() -> Self {
        WriteError::ReconcileDeadline
    }

    fn code(&self) -> Option<u16> {
        match self {
            WriteError::Api { source, .. } => code(source),
            _ => None,
        }
    }

    /// The object changed since it was read.
    pub(crate) fn is_conflict(&self) -> bool {
        self.code() == Some(409) && !self.is_already_exists()
    }

    /// The object, or what it refers to, does not exist.
    pub(crate) fn is_not_found(&self) -> bool {
        self.code() == Some(404)
    }

    /// The name is taken.
    pub(crate) fn is_already_exists(&self) -> bool {
        self.reason() == Some("AlreadyExists")
    }

    /// The namespace is being deleted and takes no new objects.
    pub(crate) fn is_namespace_terminating(&self) -> bool {
        self.code() == Some(403) && self.message().contains("is being terminated")
    }

    fn reason(&self) -> Option<&str> {
        match self {
            WriteError::Api { source, .. } => match source.as_ref() {
                kube::Error::Api(status) => Some(&status.reason),
                _ => None,
            },
            _ => None,
        }
    }

    /// The API server's own words where there are any; for events and conditions.
    pub(crate) fn message(&self) -> String {
        match self {
            WriteError::Api { source, .. } => match source.as_ref() {
                kube::Error::Api(status) => status.message.clone(),
                other => other.to_string(),
            },
            other => other.to_string(),
        }
    }
}

fn code(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}

/// The error and its causes, as one line for the log.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        // The API server's words say it all; the client's rendering of them is five times as long.
        if let Some(kube::Error::Api(status)) = next.downcast_ref() {
            return format!("{line}: {}", status.message);
        }
        // The client's errors repeat what caused them; saying it once is enough.
        let text = next.to_string();
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = next.source();
    }
    line
}

/// A list for a merge patch: an empty one removes the field, as if it had never been there.
pub(crate) fn list_or_null<T: Serialize>(list: &[T]) -> Value {
    // Serialising API types to JSON cannot fail.
    if list.is_empty() { Value::Null } else { serde_json::to_value(list).unwrap_or(Value::Null) }
}

/// True when a watch cannot go on from its version.
pub(crate) fn is_expired(error: &kube::Error) -> bool {
    code(error) == Some(410)
}

/// Awaits a request within the deadline; `action` completes the sentence "cannot …".
pub(crate) async fn call<T>(
    action: impl Fn() -> String,
    request: impl Future<Output = kube::Result<T>>,
) -> Result<T, WriteError> {
    match tokio::time::timeout(DEADLINE, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(WriteError::Api { action: action(), source: Box::new(error) }),
        Err(_elapsed) => Err(WriteError::Deadline { action: action() }),
    }
}

/// Applies a JSON merge patch.
pub(crate) async fn merge_patch<K>(
    api: &Api<K>,
    kind: &str,
    key: &Key,
    patch: &Value,
) -> Result<K, WriteError>
where
    K: Clone + DeserializeOwned + Debug,
{
    let request = async { api.patch(&key.name, &PatchParams::default(), &Patch::Merge(patch)).await };
    call(|| format!("patch {kind} {key}"), request).await
}

/// Applies a JSON merge patch to the status.
pub(crate) async fn merge_patch_status<K>(
    api: &Api<K>,
    kind: &str,
    key: &Key,
    patch: &Value,
) -> Result<K, WriteError>
where
    K: Clone + DeserializeOwned + Debug,
{
    let request = async { api.patch_status(&key.name, &PatchParams::default(), &Patch::Merge(patch)).await };
    call(|| format!("patch the status of {kind} {key}"), request).await
}

/// The status patch that turns `old` into `new`, valid only for the version of the object given.
pub(crate) fn status_patch<S: Serialize>(version: Option<&str>, old: Option<&S>, new: &S) -> Value {
    // Serialising API types to JSON cannot fail; null would only make the patch write everything.
    let old = serde_json::to_value(old).unwrap_or(Value::Null);
    let new = serde_json::to_value(new).unwrap_or(Value::Null);
    guarded(version, Map::from_iter([("status".to_owned(), difference(&old, &new))]))
}

/// A patch with a resourceVersion precondition.
pub(crate) fn guarded(version: Option<&str>, mut patch: Map<String, Value>) -> Value {
    if let Some(version) = version {
        let metadata = patch.entry("metadata").or_insert_with(|| Value::Object(Map::new()));
        if let Value::Object(metadata) = metadata {
            metadata.insert("resourceVersion".into(), Value::String(version.to_owned()));
        }
    }
    Value::Object(patch)
}

/// The merge patch from `old` to `new`: changed fields, and null for those that are gone.
fn difference(old: &Value, new: &Value) -> Value {
    let (Value::Object(old), Value::Object(new)) = (old, new) else { return new.clone() };
    let gone = old.keys().filter(|key| !new.contains_key(*key)).map(|key| (key.clone(), Value::Null));
    let changed = new
        .iter()
        .filter(|(key, value)| old.get(*key) != Some(value))
        .map(|(key, value)| (key.clone(), difference(old.get(key).unwrap_or(&Value::Null), value)));
    Value::Object(gone.chain(changed).collect())
}

/// Deletes the object if it is still the one with this uid. `Ok(false)`: it was gone already.
pub(crate) async fn delete<K>(
    api: &Api<K>,
    kind: &str,
    key: &Key,
    uid: &str,
    params: DeleteParams,
) -> Result<bool, WriteError>
where
    K: Clone + DeserializeOwned + Debug,
{
    let preconditions = Preconditions { uid: Some(uid.to_owned()), ..Preconditions::default() };
    let params = match params.preconditions {
        Some(_) => params,
        None => params.preconditions(preconditions),
    };
    let deletion = async { api.delete(&key.name, &params).await };
    match call(|| format!("delete {kind} {key}"), deletion).await {
        Ok(_) => Ok(true),
        Err(error) if error.is_not_found() => Ok(false),
        Err(error) => Err(error),
    }
}

/// The number of a resourceVersion; 0 when it is not one.
pub(crate) fn version_number(meta: &ObjectMeta) -> u64 {
    meta.resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn status_patches_say_only_what_changed() {
        let old = json!({"replicas": 3, "readyReplicas": 2, "conditions": [1]});
        let new = json!({"replicas": 3, "availableReplicas": 1, "conditions": [2]});
        assert_eq!(
            status_patch(Some("7"), Some(&old), &new),
            json!({
                "metadata": {"resourceVersion": "7"},
                "status": {"readyReplicas": null, "availableReplicas": 1, "conditions": [2]},
            })
        );
        assert_eq!(status_patch(None, None, &new), json!({"status": new}));
    }
}
