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

    /// How many follow.
    pub fn followers(&self) -> usize {
        self.sender.receiver_count()
    }

    /// Follows from now on.
    pub fn follow(&self) -> broadcast::Receiver<ContainerEventResponse> {
        self.sender.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::broadcast::error::RecvError;

    fn event(number: usize) -> ContainerEventResponse {
        ContainerEventResponse { container_id: number.to_string(), ..ContainerEventResponse::default() }
    }

    #[tokio::test]
    async fn a_slow_follower_is_told_what_it_missed_and_holds_nobody_up() {
        let hub = EventHub::default();
        assert!(!hub.followed());
        let (mut slow, mut quick) = (hub.follow(), hub.follow());
        for number in 0..KEPT + 10 {
            hub.tell(event(number));
            assert_eq!(quick.recv().await.unwrap().container_id, number.to_string());
        }
        assert_eq!(slow.recv().await, Err(RecvError::Lagged(10)));
        assert_eq!(slow.recv().await.unwrap().container_id, "10", "the oldest that is kept");
        drop((slow, quick));
        assert!(!hub.followed(), "nobody is kept for");
        hub.tell(event(0));
    }
}
