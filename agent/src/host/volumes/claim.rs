//! Volumes by claim: the directory that a PersistentVolumeClaim leads to.
//!
//! Input: the claim's name, the API server. Output: the path of a `hostPath` or `local` PersistentVolume. What a claim led to is
//! kept in the pod's directory: neither changes while the pod lives, and containers start again without an API server.

use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_openapi::api::core::v1::{HostPathVolumeSource, PersistentVolume, PersistentVolumeClaim};
use kube::{Api, Client};
use serde::{Deserialize, Serialize};

use super::host_path;

/// Deadline of one request.
const DEADLINE: Duration = Duration::from_secs(10);

/// What a claim leads to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Found {
    path: String,
    kind: Option<String>,
}

impl Found {
    /// Checks that it is there; a `hostPath` that may be made is made. Blocks.
    pub(super) fn check(&self) -> Result<PathBuf, String> {
        host_path::check(&HostPathVolumeSource { path: self.path.clone(), type_: self.kind.clone() })?;
        Ok(PathBuf::from(&self.path))
    }
}

/// What the claim leads to: as written down for this pod, else as the API server says.
pub(super) async fn find(
    client: &Client,
    (namespace, claim): (&str, &str),
    pod_dir: &Path,
    volume: &str,
) -> Result<Found, String> {
    let record = pod_dir.join("claims").join(format!("{volume}.json"));
    if let Some(found) =
        tokio::fs::read(&record).await.ok().and_then(|bytes| serde_json::from_slice(&bytes).ok())
    {
        return Ok(found);
    }
    let found = ask(client, namespace, claim).await?;
    let text = serde_json::to_string(&found).map_err(|error| error.to_string())?;
    let kept = tokio::task::spawn_blocking(move || crate::certificates::write_private(&record, &text)).await;
    kept.map_err(|error| error.to_string())?
        .map_err(|error| format!("the claim cannot be written down: {error}"))?;
    Ok(found)
}

async fn ask(client: &Client, namespace: &str, name: &str) -> Result<Found, String> {
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), namespace);
    let claim = within(claims.get_opt(name)).await?;
    let claim = claim.ok_or_else(|| format!("persistentvolumeclaim \"{name}\" not found"))?;
    let volume = volume_of(&claim)?;
    let volumes: Api<PersistentVolume> = Api::all(client.clone());
    let found = within(volumes.get_opt(volume)).await?;
    let found = found.ok_or_else(|| format!("persistentvolume \"{volume}\" not found"))?;
    source_of(&claim, &found)
}

async fn within<T>(call: impl Future<Output = kube::Result<T>>) -> Result<T, String> {
    match tokio::time::timeout(DEADLINE, call).await {
        Ok(answer) => answer.map_err(|error| crate::chain::chain(&error)),
        Err(_elapsed) => Err(format!("no answer of the API server within {} s", DEADLINE.as_secs())),
    }
}

/// The volume of a bound claim.
fn volume_of(claim: &PersistentVolumeClaim) -> Result<&str, String> {
    let name = claim.metadata.name.as_deref().unwrap_or_default();
    let bound = claim.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Bound");
    let volume = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()).unwrap_or_default();
    if claim.metadata.deletion_timestamp.is_some() {
        return Err(format!("persistentvolumeclaim \"{name}\" is being deleted"));
    }
    if !bound || volume.is_empty() {
        return Err(format!("persistentvolumeclaim \"{name}\" is not bound"));
    }
    if claim.spec.as_ref().and_then(|spec| spec.volume_mode.as_deref()) == Some("Block") {
        return Err(format!("persistentvolumeclaim \"{name}\" is a block device, which is not supported"));
    }
    Ok(volume)
}

/// The directory of a volume that belongs to the claim.
fn source_of(claim: &PersistentVolumeClaim, volume: &PersistentVolume) -> Result<Found, String> {
    let (name, spec) = (volume.metadata.name.as_deref().unwrap_or_default(), volume.spec.as_ref());
    let owner = spec.and_then(|spec| spec.claim_ref.as_ref()).and_then(|owner| owner.uid.as_deref());
    if owner.is_none() || owner != claim.metadata.uid.as_deref() {
        return Err(format!("persistentvolume \"{name}\" is bound to another claim"));
    }
    if let Some(source) = spec.and_then(|spec| spec.host_path.as_ref()) {
        return Ok(Found { path: source.path.clone(), kind: source.type_.clone() });
    }
    match spec.and_then(|spec| spec.local.as_ref()) {
        // It must be there: what belongs on another disk must not land on this one.
        Some(source) => Ok(Found { path: source.path.clone(), kind: Some("Directory".to_owned()) }),
        None => Err(format!(
            "persistentvolume \"{name}\" is neither hostPath nor local: no volume plugin matched"
        )),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn claim(phase: &str) -> PersistentVolumeClaim {
        serde_json::from_value(json!({
            "metadata": {"name": "data", "uid": "u1"}, "spec": {"volumeName": "pv"}, "status": {"phase": phase},
        }))
        .unwrap()
    }

    fn volume(uid: &str, source: &Value) -> PersistentVolume {
        let mut spec = json!({"claimRef": {"name": "data", "uid": uid}});
        for (key, value) in source.as_object().unwrap() {
            spec[key] = value.clone();
        }
        serde_json::from_value(json!({"metadata": {"name": "pv"}, "spec": spec})).unwrap()
    }

    #[test]
    fn a_bound_claim_leads_to_its_directory_and_to_no_other() {
        assert_eq!(volume_of(&claim("Bound")), Ok("pv"));
        assert!(volume_of(&claim("Pending")).unwrap_err().contains("is not bound"));
        let found = |uid: &str, source: Value| source_of(&claim("Bound"), &volume(uid, &source));
        let host = found("u1", json!({"hostPath": {"path": "/d", "type": "DirectoryOrCreate"}})).unwrap();
        assert_eq!((host.path.as_str(), host.kind.as_deref()), ("/d", Some("DirectoryOrCreate")));
        let local = found("u1", json!({"local": {"path": "/mnt/d"}})).unwrap();
        assert_eq!(local.kind.as_deref(), Some("Directory"));
        assert!(found("u2", json!({"hostPath": {"path": "/d"}})).unwrap_err().contains("another claim"));
        assert!(
            found("u1", json!({"nfs": {"path": "/d", "server": "s"}}))
                .unwrap_err()
                .contains("no volume plugin")
        );
    }

    #[tokio::test]
    async fn what_was_written_down_needs_no_api_server() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("claims")).unwrap();
        let known = Found { path: "/d".to_owned(), kind: None };
        let record = directory.path().join("claims/data.json");
        std::fs::write(record, serde_json::to_string(&known).unwrap()).unwrap();
        let client = crate::sources::offline::client();
        assert_eq!(find(&client, ("d", "c"), directory.path(), "data").await, Ok(known));
        assert!(find(&client, ("d", "c"), directory.path(), "other").await.is_err());
    }
}
