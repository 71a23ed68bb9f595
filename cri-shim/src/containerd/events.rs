//! containerd's event stream, reduced to the events that change a container, an exit and an OOM kill, and to those that tell
//! of changed images.

use std::time::Duration;

use containerd_client::events::{TaskExit, TaskOom};
use containerd_client::services::v1::{PublishRequest, SubscribeRequest};
use prost::Message;

use super::tasks::Exit;
use super::{Client, ContainerdError, METADATA_DEADLINE, call};

/// Topic of an event of our own: containerd answers a subscription only with its first event, and until then it is not
/// known whether the subscription is in force.
const LISTENING: &str = "/keelson/listening";
/// Pause between two of them.
const ANNOUNCEMENT: Duration = Duration::from_millis(20);

/// Topics of changes of images.
const IMAGES: [&str; 3] = ["/images/create", "/images/update", "/images/delete"];

/// Something that happened to a task or to an image of our namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TaskEvent {
    /// The first process of a container has ended.
    Exit {
        /// The container.
        container: String,
        /// How.
        exit: Exit,
    },
    /// The kernel killed a process of the container because its memory limit was reached.
    OutOfMemory {
        /// The container.
        container: String,
    },
    /// An image was made, changed or removed, by us or by somebody else.
    Images,
}

/// An open subscription.
#[derive(Debug)]
pub struct TaskEvents {
    stream: tonic::Streaming<containerd_client::types::Envelope>,
}

impl Client {
    /// Subscribes to the events of our namespace. What happened before is not repeated: list after subscribing.
    pub async fn subscribe(&self) -> Result<TaskEvents, ContainerdError> {
        const NAME: &str = "Events.Subscribe";
        let topics = ["/tasks/exit", "/tasks/oom", LISTENING].into_iter().chain(IMAGES);
        let filters =
            topics.map(|topic| format!("topic==\"{topic}\",namespace==\"{}\"", self.namespace())).collect();
        let mut client = self.events_client();
        let answer = client.subscribe(SubscribeRequest { filters });
        tokio::pin!(answer);
        let listening = async {
            loop {
                // Cancel-safe: the answer is polled again, a publication that is cut off is repeated.
                tokio::select! {
                    answer = &mut answer => return answer,
                    () = self.announce() => tokio::time::sleep(ANNOUNCEMENT).await,
                }
            }
        };
        let stream = call(NAME, "", METADATA_DEADLINE, listening).await?;
        Ok(TaskEvents { stream })
    }

    /// Publishes an event that only we listen for. Whether it arrives is what counts, so its own answer does not.
    async fn announce(&self) {
        let event = prost_types::Any { type_url: "keelson.Listening".to_owned(), value: Vec::new() };
        let request = PublishRequest { topic: LISTENING.to_owned(), event: Some(event) };
        drop(
            call("Events.Publish", LISTENING, METADATA_DEADLINE, self.events_client().publish(request)).await,
        );
    }
}

impl TaskEvents {
    /// The next event; an error (also at the end of the stream) means: subscribe again and list.
    pub async fn next(&mut self) -> Result<TaskEvent, ContainerdError> {
        loop {
            let envelope = match self.stream.message().await {
                Ok(Some(envelope)) => envelope,
                Ok(None) => {
                    let status = tonic::Status::unavailable("the event stream ended");
                    return Err(ContainerdError::call("Events.Subscribe", "", status));
                }
                Err(status) => return Err(ContainerdError::call("Events.Subscribe", "", status)),
            };
            if IMAGES.contains(&envelope.topic.as_str()) {
                return Ok(TaskEvent::Images);
            }
            if let Some(event) = envelope.event.and_then(|any| decode(&any)) {
                return Ok(event);
            }
        }
    }
}

/// Our reading of one event; nothing for exec processes and kinds we do not use.
fn decode(any: &prost_types::Any) -> Option<TaskEvent> {
    match any.type_url.rsplit('/').next() {
        Some("containerd.events.TaskExit") => {
            let event = TaskExit::decode(any.value.as_slice()).ok()?;
            // An exec process carries its own id there.
            (event.id == event.container_id).then(|| TaskEvent::Exit {
                container: event.container_id,
                exit: Exit::new(event.exit_status, event.exited_at),
            })
        }
        Some("containerd.events.TaskOOM") => {
            let event = TaskOom::decode(any.value.as_slice()).ok()?;
            Some(TaskEvent::OutOfMemory { container: event.container_id })
        }
        _ => None,
    }
}
