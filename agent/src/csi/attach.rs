//! Volumes that have to be attached to the node before they are used: waits for the VolumeAttachment, and sees to it that
//! nobody detaches what is in use.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use k8s_openapi::api::storage::v1::VolumeAttachment;
use kube::Api;

use super::layout::attachment_name;
use super::{Csi, MountOrder, ask};
use crate::contracts::{Dependency, VolumeError, VolumeStep};
use crate::sources::node::NodeWatch;

/// How long the node's status may take to say that a volume is in use.
const REPORT_DEADLINE: Duration = Duration::from_secs(10);

impl Csi {
    /// What attaching the volume gave, once it is attached.
    pub(super) async fn attached(
        &self,
        order: &MountOrder<'_>,
    ) -> Result<BTreeMap<String, String>, VolumeError> {
        let volume = &order.volume;
        let name = attachment_name(&volume.handle, &volume.driver, &self.0.settings.node_name);
        self.0.objects.depend(order.uid(), &[Dependency::Attachment(name.clone())]);
        let attachments: Api<VolumeAttachment> = Api::all(self.0.client.clone());
        let found = ask(attachments.get_opt(&name)).await.map_err(|problem| {
            let text =
                format!("volume {} has GET error for volume attachment {name}: {problem}", volume.handle);
            order.error(VolumeStep::WaitForAttach, text)
        })?;
        let key = (order.uid().to_owned(), volume.spec_name.clone());
        let Some(found) = found else { return Err(self.still_waiting(order, key)) };
        if found.metadata.deletion_timestamp.is_some() {
            return Err(order.error(VolumeStep::WaitForAttach, "volume attachment is being deleted"));
        }
        let status = found.status.unwrap_or_default();
        if status.attached {
            self.state().waiting.remove(&key);
            return Ok(status.attachment_metadata.unwrap_or_default());
        }
        match status.attach_error {
            Some(error) => Err(order.error(VolumeStep::Attach, error.message.unwrap_or_default())),
            None => Err(self.still_waiting(order, key)),
        }
    }

    /// Not attached, which is told only after some time: that it takes a while is nothing special.
    fn still_waiting(&self, order: &MountOrder<'_>, key: (String, String)) -> VolumeError {
        let since = *self.state().waiting.entry(key).or_insert_with(Instant::now);
        let (driver, handle) = (&order.volume.driver, &order.volume.handle);
        let is_late = since.elapsed() >= self.0.settings.attach_patience;
        let text = if is_late {
            format!(
                "timed out waiting for external-attacher of {driver} CSI driver to attach volume {handle}"
            )
        } else {
            format!("waiting for external-attacher of {driver} CSI driver to attach volume {handle}")
        };
        VolumeError { waits: !is_late, ..order.error(VolumeStep::Attach, text) }
    }

    /// Notes that the pod uses the volume, and waits until the API server knows.
    pub(super) async fn report_use(&self, order: &MountOrder<'_>) -> Result<(), VolumeError> {
        let name = order.volume.unique_name();
        {
            let mut state = self.state();
            state.users.entry(name.clone()).or_default().insert(order.uid().to_owned());
            self.tell_in_use(&state);
        }
        let Some(mut node) = self.0.settings.node.clone() else { return Ok(()) };
        match tokio::time::timeout(REPORT_DEADLINE, reported(&mut node, &name)).await {
            Ok(()) => Ok(()),
            Err(_elapsed) => {
                let text = format!(
                    "Volume {name} has not been added to the list of VolumesInUse in the node's volume status"
                );
                Err(order.error(VolumeStep::WaitForAttach, text))
            }
        }
    }

    /// The pod uses nothing any more.
    pub(super) fn forget_user(&self, uid: &str) {
        let mut state = self.state();
        state.users.retain(|_, users| {
            users.remove(uid);
            !users.is_empty()
        });
        state.waiting.retain(|(waiting, _), _| waiting != uid);
        self.tell_in_use(&state);
    }
}

async fn reported(node: &mut NodeWatch, name: &str) {
    let says_so = |node: &Option<std::sync::Arc<k8s_openapi::api::core::v1::Node>>| {
        let status = node.as_ref().and_then(|node| node.status.as_ref());
        let mut in_use = status.into_iter().flat_map(|status| status.volumes_in_use.iter().flatten());
        in_use.any(|known| known == name)
    };
    if node.wait_for(says_so).await.is_err() {
        // The agent is stopping.
        std::future::pending::<()>().await;
    }
}
