//! Volumes by claim: what a PersistentVolumeClaim leads to.
//!
//! Input: the claim's name, the API server. Output: the path of a `hostPath` or `local` PersistentVolume, a volume on a server, or a
//! driver's volume. What a claim led to is kept in the pod's directory: it does not change while the pod lives, and containers start again without an
//! API server.

use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_openapi::api::core::v1::{HostPathVolumeSource, PersistentVolume, PersistentVolumeClaim, Pod};
use kube::{Api, Client};
use serde::{Deserialize, Serialize};

use super::host_path;
use super::remote::NetworkVolume;

/// Deadline of one request.
const DEADLINE: Duration = Duration::from_secs(10);

/// What a claim leads to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum Found {
    /// A directory of the node.
    Path(FoundPath),
    /// A driver's volume: its PersistentVolume, and whether it is a device.
    Csi { volume: String, block: bool },
    /// A volume on a server.
    Network { network: Box<NetworkVolume> },
}

/// A directory of the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FoundPath {
    path: String,
    kind: Option<String>,
}

impl FoundPath {
    /// Where it is.
    pub(super) fn path(&self) -> PathBuf {
        PathBuf::from(&self.path)
    }

    /// Checks that it is there; a `hostPath` that may be made is made. Blocks.
    pub(super) fn check(&self) -> Result<PathBuf, String> {
        host_path::check(&HostPathVolumeSource { path: self.path.clone(), type_: self.kind.clone() })?;
        Ok(PathBuf::from(&self.path))
    }
}

/// A claim with the volume that it is bound to.
pub(super) struct Bound {
    pub(super) claim: PersistentVolumeClaim,
    pub(super) volume: PersistentVolume,
}

fn record(pod_dir: &Path, volume: &str) -> PathBuf {
    pod_dir.join("claims").join(format!("{volume}.json"))
}

/// What the claim led to, as written down for this pod.
pub(super) async fn recall(pod_dir: &Path, volume: &str) -> Option<Found> {
    let bytes = tokio::fs::read(record(pod_dir, volume)).await.ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// Writes down what the claim leads to.
pub(super) async fn note(pod_dir: &Path, volume: &str, found: &Found) -> Result<(), String> {
    let record = record(pod_dir, volume);
    let text = serde_json::to_string(found).map_err(|error| error.to_string())?;
    let kept = tokio::task::spawn_blocking(move || crate::files::write_private(&record, &text)).await;
    kept.map_err(|error| error.to_string())?
        .map_err(|error| format!("the claim cannot be written down: {error}"))
}

/// The claim and its volume, as the API server has them. A claim that was made for one pod is nobody else's: `maker` is that pod.
pub(super) async fn ask(
    client: &Client,
    (namespace, name): (&str, &str),
    maker: Option<&Pod>,
) -> Result<Bound, String> {
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), namespace);
    let claim = within(claims.get_opt(name)).await?;
    let claim = claim.ok_or_else(|| format!("persistentvolumeclaim \"{name}\" not found"))?;
    if let Some(pod) = maker {
        let owners = claim.metadata.owner_references.iter().flatten();
        let mut controllers = owners.filter(|owner| owner.controller.unwrap_or(false));
        if !controllers.any(|owner| Some(&owner.uid) == pod.metadata.uid.as_ref()) {
            let pod = pod.metadata.name.as_deref().unwrap_or_default();
            return Err(format!(
                "PVC {namespace}/{name} was not created for pod {namespace}/{pod} (pod is not owner)"
            ));
        }
    }
    let volume = volume_of(&claim)?;
    let volumes: Api<PersistentVolume> = Api::all(client.clone());
    let found = within(volumes.get_opt(volume)).await?;
    let found = found.ok_or_else(|| format!("persistentvolume \"{volume}\" not found"))?;
    belongs(&claim, &found)?;
    Ok(Bound { claim, volume: found })
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
    Ok(volume)
}

/// Whether the volume is the claim's.
fn belongs(claim: &PersistentVolumeClaim, volume: &PersistentVolume) -> Result<(), String> {
    let (name, spec) = (volume.metadata.name.as_deref().unwrap_or_default(), volume.spec.as_ref());
    let owner = spec.and_then(|spec| spec.claim_ref.as_ref()).and_then(|owner| owner.uid.as_deref());
    if owner.is_none() || owner != claim.metadata.uid.as_deref() {
        return Err(format!("persistentvolume \"{name}\" is bound to another claim"));
    }
    Ok(())
}

/// A device is a driver's business.
fn refuse_block(volume: &PersistentVolume) -> Result<(), String> {
    let mode = volume.spec.as_ref().and_then(|spec| spec.volume_mode.as_deref());
    if mode == Some("Block") {
        let name = volume.metadata.name.as_deref().unwrap_or_default();
        return Err(format!(
            "persistentvolume \"{name}\" is a block device, which is supported for CSI volumes only"
        ));
    }
    Ok(())
}

/// The volume on a server, where it is one. `read_only` is the pod's wish.
pub(super) fn network_of(
    volume: &PersistentVolume,
    read_only: bool,
) -> Result<Option<NetworkVolume>, String> {
    let found = NetworkVolume::of_persistent(volume, read_only);
    if found.is_some() {
        refuse_block(volume)?;
    }
    Ok(found)
}

/// The directory of a volume that is one of the node's.
pub(super) fn path_of(volume: &PersistentVolume) -> Result<FoundPath, String> {
    refuse_block(volume)?;
    let (name, spec) = (volume.metadata.name.as_deref().unwrap_or_default(), volume.spec.as_ref());
    if let Some(source) = spec.and_then(|spec| spec.host_path.as_ref()) {
        return Ok(FoundPath { path: source.path.clone(), kind: source.type_.clone() });
    }
    match spec.and_then(|spec| spec.local.as_ref()) {
        // It must be there: what belongs on another disk must not land on this one.
        Some(source) => Ok(FoundPath { path: source.path.clone(), kind: Some("Directory".to_owned()) }),
        None => Err(format!(
            "persistentvolume \"{name}\" is neither CSI, NFS, iSCSI, hostPath nor local: no volume plugin matched"
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
        let found = |source: Value| path_of(&volume("u1", &source));
        let host = found(json!({"hostPath": {"path": "/d", "type": "DirectoryOrCreate"}})).unwrap();
        assert_eq!((host.path.as_str(), host.kind.as_deref()), ("/d", Some("DirectoryOrCreate")));
        let local = found(json!({"local": {"path": "/mnt/d"}})).unwrap();
        assert_eq!(local.kind.as_deref(), Some("Directory"));
        let rbd = json!({"rbd": {"image": "i", "monitors": ["m"]}});
        assert!(found(rbd).unwrap_err().contains("no volume plugin matched"));
        let nfs = json!({"nfs": {"path": "/d", "server": "s"}});
        assert!(network_of(&volume("u1", &nfs), false).unwrap().is_some());
        let block = json!({"nfs": {"path": "/d", "server": "s"}, "volumeMode": "Block"});
        assert!(network_of(&volume("u1", &block), false).unwrap_err().contains("is a block device"));
        let block = json!({"local": {"path": "/dev/x"}, "volumeMode": "Block"});
        assert!(found(block).unwrap_err().contains("is a block device"));
        let foreign = volume("u2", &json!({"hostPath": {"path": "/d"}}));
        assert!(belongs(&claim("Bound"), &foreign).unwrap_err().contains("another claim"));
    }

    #[test]
    fn records_of_earlier_agents_are_read() {
        let found: Found = serde_json::from_str(r#"{"path":"/d","kind":null}"#).unwrap();
        assert!(matches!(found, Found::Path(found) if found.path == "/d"));
        let csi = Found::Csi { volume: "pv".to_owned(), block: true };
        let text = serde_json::to_string(&csi).unwrap();
        assert_eq!(serde_json::from_str::<Found>(&text).unwrap(), csi);
        let nfs = json!({"nfs": {"path": "/d", "server": "s"}});
        let network = network_of(&volume("u1", &nfs), true).unwrap().unwrap();
        let found = Found::Network { network: Box::new(network) };
        let text = serde_json::to_string(&found).unwrap();
        assert_eq!(serde_json::from_str::<Found>(&text).unwrap(), found);
    }
}
