//! Lets a volume that has grown be used to its new size, and tells its claim.

use std::collections::BTreeMap;

use agent_core::resources::whole;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

use super::mount::text;
use super::wire::{self, CallError, CapacityRange, ExpandRequest, ExpandResponse};
use super::{Csi, MountOrder, Mounted, ask};
use crate::contracts::VolumeEvent;

/// Pause after a driver could not do it.
const AGAIN: SignedDuration = SignedDuration::from_secs(60);
/// Conditions that end with the new size.
const ENDED: [&str; 4] = ["Resizing", "FileSystemResizePending", "ControllerResizeError", "NodeResizeError"];

impl Csi {
    /// Takes the volume's new size, where it has one and the driver has to be asked; what happens is added to `mounted`.
    pub(super) async fn expand(&self, order: &MountOrder<'_>, mounted: &mut Mounted) {
        let Some(size) = wanted(order) else { return };
        let Ok(driver) = self.0.drivers.get(&order.volume.driver) else { return };
        let deadline = self.0.settings.call_deadline;
        let capabilities = match driver.capabilities(deadline).await {
            // Who cannot has a controller that does all of it.
            Ok(capabilities) if !capabilities.expand => return,
            Err(_asked_again) => return,
            Ok(capabilities) => capabilities,
        };
        let volume = &order.volume;
        let outcome = async {
            let alone = self.lock(&volume.driver, &volume.handle).await;
            let secrets = self.secrets(volume.expand_secret.as_ref(), "NodeExpandSecretRef").await?;
            let staging = text(&self.staging(order));
            let staged = capabilities.stage.then_some(staging);
            let path = text(&mounted.path);
            let request = ExpandRequest {
                volume_id: volume.handle.clone(),
                volume_path: staged.clone().filter(|_| !volume.block).unwrap_or(path),
                capacity_range: Some(CapacityRange { required_bytes: size, limit_bytes: 0 }),
                staging_target_path: staged.unwrap_or_default(),
                volume_capability: Some(volume.capability(capabilities, order.group)),
                secrets,
            };
            let grown: Result<ExpandResponse, CallError> =
                wire::call(&driver.channel, wire::EXPAND, request, deadline).await;
            grown.map_err(|error| error.to_string())?;
            drop(alone);
            self.tell_claim(order).await
        };
        let name = &volume.spec_name;
        match outcome.await {
            Ok(()) => {
                let node = &self.0.settings.node_name;
                let message = format!("MountVolume.NodeExpandVolume succeeded for volume \"{name}\" {node}");
                mounted.events.push(VolumeEvent::normal("FileSystemResizeSuccessful", message));
            }
            Err(problem) => {
                let message = format!("NodeExpandVolume failed for volume \"{name}\" : {problem}");
                mounted.events.push(VolumeEvent::warning("VolumeResizeFailed", message));
                let again = Timestamp::now() + AGAIN;
                mounted.refresh_at = Some(mounted.refresh_at.map_or(again, |at| at.min(again)));
            }
        }
    }

    /// Writes the new size into the claim's status.
    async fn tell_claim(&self, order: &MountOrder<'_>) -> Result<(), String> {
        let Some(claim) = order.claim else { return Ok(()) };
        let namespace = claim.metadata.namespace.clone().unwrap_or_default();
        let name = claim.metadata.name.clone().unwrap_or_default();
        let claims: Api<PersistentVolumeClaim> = Api::namespaced(self.0.client.clone(), &namespace);
        let patch = Patch::Merge(patch(claim, order.volume.capacity.unwrap_or_default()));
        ask(claims.patch_status(&name, &PatchParams::default(), &patch)).await.map(|_| ())
    }
}

/// The size to take: that of the volume, where the claim does not have it yet.
fn wanted(order: &MountOrder<'_>) -> Option<i64> {
    let size = order.volume.capacity?;
    if order.volume.read_only {
        return None;
    }
    let status = order.claim?.status.as_ref()?;
    let storage = |list: &Option<BTreeMap<String, Quantity>>| whole(list.as_ref()?.get("storage")?);
    let steps = status.allocated_resource_statuses.as_ref();
    let step = steps.and_then(|steps| steps.get("storage")).map(String::as_str);
    let hopeless = matches!(step, Some("NodeResizeInfeasible" | "NodeResizeFailed"));
    storage(&status.capacity).filter(|known| *known < size && !hopeless).map(|_| size)
}

/// The claim's status with that size.
fn patch(claim: &PersistentVolumeClaim, size: i64) -> Value {
    let status = claim.status.as_ref();
    let conditions = status.and_then(|status| status.conditions.as_ref()).into_iter().flatten();
    let left: Vec<_> = conditions.filter(|condition| !ENDED.contains(&condition.type_.as_str())).collect();
    let size = quantity(size);
    json!({"status": {
        "capacity": {"storage": size},
        "conditions": left,
        "allocatedResourceStatuses": {"storage": null},
    }})
}

/// As people write sizes.
fn quantity(bytes: i64) -> String {
    let units = [("Ti", 1_i64 << 40), ("Gi", 1 << 30), ("Mi", 1 << 20), ("Ki", 1 << 10)];
    let unit = units.iter().find(|(_, size)| bytes > 0 && bytes % size == 0);
    unit.map_or_else(|| bytes.to_string(), |(name, size)| format!("{}{name}", bytes / size))
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Pod;

    use super::super::CsiVolume;
    use super::*;

    fn claim(status: &Value) -> PersistentVolumeClaim {
        serde_json::from_value(json!({"metadata": {"name": "c"}, "status": status})).unwrap()
    }

    #[test]
    fn a_claim_that_is_behind_its_volume_wants_to_grow() {
        let pod = Pod::default();
        let of = |claim: &PersistentVolumeClaim, read_only| {
            let volume = CsiVolume { capacity: Some(2 << 30), read_only, ..CsiVolume::default() };
            let order = MountOrder {
                pod: &pod,
                name: "v",
                volume,
                claim: Some(claim),
                group: None,
                group_always: false,
            };
            wanted(&order)
        };
        let behind = claim(&json!({"capacity": {"storage": "1Gi"}}));
        assert_eq!((of(&behind, false), of(&behind, true)), (Some(2 << 30), None));
        assert_eq!(of(&claim(&json!({"capacity": {"storage": "2Gi"}})), false), None);
        assert_eq!(of(&claim(&json!({})), false), None, "not bound yet");
        let hopeless = json!({"capacity": {"storage": "1Gi"},
            "allocatedResourceStatuses": {"storage": "NodeResizeInfeasible"}});
        assert_eq!(of(&claim(&hopeless), false), None);
    }

    #[test]
    fn the_claim_is_told_and_its_conditions_end() {
        let claim = claim(&json!({"conditions": [
            {"type": "FileSystemResizePending", "status": "True"}, {"type": "Other", "status": "True"}]}));
        let patch = patch(&claim, 3 << 29);
        assert_eq!(patch["status"]["capacity"]["storage"], "1536Mi");
        let left = patch["status"]["conditions"].as_array().unwrap();
        assert_eq!((left.len(), &left[0]["type"]), (1, &json!("Other")));
        assert_eq!((quantity(7), quantity(0)), ("7".to_owned(), "0".to_owned()));
    }
}
