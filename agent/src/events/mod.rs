//! Events: what `kubectl describe` shows below a pod or node.
//!
//! Input: facts from any task, by a cheap handle that never waits. Output: `v1` Event objects, with a repeated fact
//! counted up in place. One task owns the state; its queue holds [`QUEUE`] facts and drops further ones with a log
//! line, because an event is never worth delaying a pod for.

mod series;

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, Node, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use series::{Decision, SeriesTable};

use crate::chain::chain;
use crate::pace::Pace;

/// Facts waiting to be written.
const QUEUE: usize = 512;
/// Deadline of one write.
const WRITE_DEADLINE: Duration = Duration::from_secs(10);

/// Attempts while the API server cannot be reached, and the pause after the first; together some 25 s.
const ATTEMPTS: u32 = 8;
const FIRST_PAUSE: Duration = Duration::from_millis(200);

/// `type` of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventType {
    /// Informative.
    Normal,
    /// Something went wrong.
    Warning,
}

impl EventType {
    fn as_str(self) -> &'static str {
        match self {
            Self::Normal => "Normal",
            Self::Warning => "Warning",
        }
    }
}

/// One fact.
#[derive(Debug, Clone)]
pub struct Fact {
    object: ObjectReference,
    kind: EventType,
    reason: String,
    message: String,
    at: Timestamp,
}

/// Handle to record events with; clone freely.
#[derive(Debug, Clone)]
pub struct EventRecorder {
    queue: mpsc::Sender<Fact>,
}

impl EventRecorder {
    /// A recorder, and the task's half to pass to [`run`].
    pub fn new() -> (Self, mpsc::Receiver<Fact>) {
        let (queue, facts) = mpsc::channel(QUEUE);
        (Self { queue }, facts)
    }

    /// Records about any object.
    pub fn record(&self, object: ObjectReference, kind: EventType, reason: &str, message: impl Into<String>) {
        let message = message.into();
        let name = object.name.clone().unwrap_or_default();
        debug!(object = %name, reason, %message, "event");
        let fact = Fact { object, kind, reason: reason.to_owned(), message, at: Timestamp::now() };
        if let Err(error) = self.queue.try_send(fact) {
            warn!(object = %name, reason, %error, "event dropped");
        }
    }

    /// Records about a pod, or about one of its containers.
    pub fn pod(
        &self,
        pod: &Pod,
        container: Option<&str>,
        kind: EventType,
        reason: &str,
        message: impl Into<String>,
    ) {
        self.record(pod_reference(pod, container), kind, reason, message);
    }

    /// Records about a node.
    pub fn node(&self, node: &Node, kind: EventType, reason: &str, message: impl Into<String>) {
        let name = node.metadata.name.clone().unwrap_or_default();
        let object = ObjectReference {
            kind: Some("Node".to_owned()),
            // Upstream uses the name here too, so that `kubectl describe node` finds the event.
            uid: Some(name.clone()),
            name: Some(name),
            ..ObjectReference::default()
        };
        self.record(object, kind, reason, message);
    }
}

/// The reference that an event about `pod` carries.
pub fn pod_reference(pod: &Pod, container: Option<&str>) -> ObjectReference {
    let field_path = container.and_then(|name| {
        let spec = pod.spec.as_ref()?;
        let is_init = spec.init_containers.iter().flatten().any(|init| init.name == name);
        let is_ephemeral = spec.ephemeral_containers.iter().flatten().any(|other| other.name == name);
        let list = match (is_init, is_ephemeral) {
            (true, _) => "initContainers",
            (false, true) => "ephemeralContainers",
            (false, false) => "containers",
        };
        Some(format!("spec.{list}{{{name}}}"))
    });
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        namespace: pod.metadata.namespace.clone(),
        name: pod.metadata.name.clone(),
        uid: pod.metadata.uid.clone(),
        resource_version: pod.metadata.resource_version.clone(),
        field_path,
    }
}

/// Writes facts until `cancel`, or until every recorder is gone; no faster than `pace`.
pub async fn run(
    client: Client,
    node_name: String,
    mut facts: mpsc::Receiver<Fact>,
    pace: Option<Pace>,
    cancel: CancellationToken,
) {
    let mut table = SeriesTable::default();
    loop {
        // Both arms are cancel-safe: a token and a channel receive.
        let fact = tokio::select! {
            () = cancel.cancelled() => return,
            fact = facts.recv() => match fact {
                Some(fact) => fact,
                // Nobody is left who could tell anything: a role that is off must not end the others.
                None => return cancel.cancelled().await,
            },
        };
        let decision = table.decide(&fact);
        // Cancel-safe: a write that is cut off has at worst made the event.
        let written = tokio::select! {
            () = cancel.cancelled() => return,
            written = paced(pace.as_ref(), write(&client, &node_name, &fact, &decision)) => written,
        };
        if let Err(error) = written {
            table.forget(&fact);
            warn!(reason = %fact.reason, error = %error, "event not written");
        }
    }
}

async fn paced<T>(pace: Option<&Pace>, write: impl Future<Output = T>) -> T {
    if let Some(pace) = pace {
        pace.wait().await;
    }
    write.await
}

/// Logs facts until `cancel`, where there is no API server to write them to.
pub async fn log(mut facts: mpsc::Receiver<Fact>, cancel: CancellationToken) {
    loop {
        // Cancel-safe: a token and a channel receive.
        let fact = tokio::select! {
            () = cancel.cancelled() => return,
            fact = facts.recv() => match fact { Some(fact) => fact, None => return },
        };
        let object = &fact.object;
        let (namespace, name) = (object.namespace.as_deref(), object.name.as_deref().unwrap_or_default());
        match fact.kind {
            EventType::Normal => info!(namespace, object = name, reason = %fact.reason, "{}", fact.message),
            EventType::Warning => warn!(namespace, object = name, reason = %fact.reason, "{}", fact.message),
        }
    }
}

/// Writes until the API server has answered, a few times: it may just be restarting.
async fn write(client: &Client, node_name: &str, fact: &Fact, decision: &Decision) -> Result<(), WriteError> {
    let mut pause = FIRST_PAUSE;
    for _ in 1..ATTEMPTS {
        match write_once(client, node_name, fact, decision).await {
            Err(WriteError::Unreachable(_)) => tokio::time::sleep(pause).await,
            result => return result,
        }
        pause = pause.saturating_mul(2);
    }
    write_once(client, node_name, fact, decision).await
}

async fn write_once(
    client: &Client,
    node_name: &str,
    fact: &Fact,
    decision: &Decision,
) -> Result<(), WriteError> {
    match decision {
        Decision::Drop => Ok(()),
        Decision::Create { name } => create(client, node_name, fact, name.clone()).await,
        Decision::Count { name, count } => count_up(client, fact, name, *count).await,
    }
}

async fn create(client: &Client, node_name: &str, fact: &Fact, name: String) -> Result<(), WriteError> {
    let namespace = event_namespace(&fact.object);
    let event = Event {
        metadata: ObjectMeta {
            name: Some(name),
            namespace: Some(namespace.clone()),
            ..ObjectMeta::default()
        },
        involved_object: fact.object.clone(),
        reason: Some(fact.reason.clone()),
        message: Some(fact.message.clone()),
        type_: Some(fact.kind.as_str().to_owned()),
        source: Some(EventSource { component: Some("kubelet".to_owned()), host: Some(node_name.to_owned()) }),
        first_timestamp: Some(Time(fact.at)),
        last_timestamp: Some(Time(fact.at)),
        count: Some(1),
        reporting_component: Some("kubelet".to_owned()),
        reporting_instance: Some(node_name.to_owned()),
        ..Event::default()
    };
    let api: Api<Event> = Api::namespaced(client.clone(), &namespace);
    deadline(api.create(&PostParams::default(), &event)).await
}

async fn count_up(client: &Client, fact: &Fact, name: &str, count: i32) -> Result<(), WriteError> {
    let api: Api<Event> = Api::namespaced(client.clone(), &event_namespace(&fact.object));
    let patch =
        serde_json::json!({ "count": count, "lastTimestamp": Time(fact.at), "message": fact.message });
    deadline(api.patch(name, &PatchParams::default(), &Patch::Strategic(patch))).await
}

async fn deadline(write: impl Future<Output = Result<Event, kube::Error>>) -> Result<(), WriteError> {
    match tokio::time::timeout(WRITE_DEADLINE, write).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(kube::Error::Api(status))) => Err(WriteError::Refused(status.message.clone())),
        Ok(Err(error)) => Err(WriteError::Unreachable(chain(&error))),
        Err(_elapsed) => Err(WriteError::Unreachable("no answer within 10 s".to_owned())),
    }
}

/// An event could not be written.
#[derive(Debug, thiserror::Error)]
enum WriteError {
    #[error("refused: {0}")]
    Refused(String),
    #[error("the API server cannot be reached: {0}")]
    Unreachable(String),
}

/// Events about cluster-scoped objects live in `default`.
fn event_namespace(object: &ObjectReference) -> String {
    object.namespace.clone().filter(|namespace| !namespace.is_empty()).unwrap_or_else(|| "default".to_owned())
}
