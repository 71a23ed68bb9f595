//! The stream of container events that CRI clients follow.

use cri_shim_api::v1::ContainerEventResponse;
use tokio::sync::broadcast;

/// Events kept for a slow reader; one that falls further behind is told so and lists anew.
const KEPT: usize = 1024;

/// Where events are told and followed. Clones share it.
#[derive(Clone, Debug)]
pub struct EventHub {
    sender: broadcast::Sender<ContainerEventResponse>,
}

impl Default for EventHub {
    fn default() -> Self {
        Self { sender: broadcast::Sender::new(KEPT) }
    }
}

impl EventHub {
    /// Tells everybody who follows; nobody may.
    pub fn tell(&self, event: ContainerEventResponse) {
        // An error only says that nobody follows.
        drop(self.sender.send(event));
    }

    /// Whether anybody follows.
    pub fn followed(&self) -> bool {
        self.sender.receiver_count() > 0
    }

    /// Follows from now on.
    pub fn follow(&self) -> broadcast::Receiver<ContainerEventResponse> {
        self.sender.subscribe()
    }
}
