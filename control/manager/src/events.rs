//! Events: what users read at the end of `kubectl describe`.
//!
//! Publishing never waits: events go through a bounded channel to one task, which counts repetitions of the
//! same event up instead of writing it again. When the channel is full, events are dropped and counted.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{Event, EventSource, ObjectReference},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
};
use kube::{Api, Client, api::PostParams};
use serde_json::json;
use tokio::sync::mpsc;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    config::Controller,
    informer::Key,
    write::{WriteError, call, chain, merge_patch},
};

/// Events that may wait to be written.
const QUEUE_BOUND: usize = 1024;
/// Distinct events whose repetitions are counted; the least recently used is forgotten first.
const REMEMBERED_BOUND: usize = 2048;
/// A repetition later than this is a new event.
const REPEAT_WINDOW: Duration = Duration::from_secs(600);

/// How serious an event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Severity {
    Normal,
    Warning,
}

impl Severity {
    fn as_str(self) -> &'static str {
        match self {
            Severity::Normal => "Normal",
            Severity::Warning => "Warning",
        }
    }
}

/// Publishes events; cheap to clone.
#[derive(Clone)]
pub(crate) struct EventSink {
    sender: mpsc::Sender<Occurrence>,
    dropped: Arc<AtomicU64>,
}

#[derive(Clone, Debug)]
struct Occurrence {
    involved: ObjectReference,
    severity: Severity,
    reason: &'static str,
    message: String,
    component: &'static str,
    at: Timestamp,
}

impl EventSink {
    /// Starts the writing task.
    pub(crate) fn start(client: Client, tasks: &TaskTracker, cancel: CancellationToken) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE_BOUND);
        let writer = Writer { client, remembered: BTreeMap::new(), uses: 0 };
        tasks.spawn(async move {
            // Cancel-safe: events not written yet are lost with the process, as they may be at any time.
            tokio::select! {
                () = cancel.cancelled() => {}
                () = writer.run(receiver) => {}
            }
        });
        EventSink { sender, dropped: Arc::default() }
    }

    /// Publishes an event about an object.
    pub(crate) fn publish(
        &self,
        involved: ObjectReference,
        severity: Severity,
        reason: &'static str,
        message: String,
        controller: Controller,
    ) {
        let component = controller.name();
        let at = Timestamp::now();
        let occurrence = Occurrence { involved, severity, reason, message, component, at };
        if self.sender.try_send(occurrence).is_err() {
            let dropped = self.dropped.fetch_add(1, Ordering::Relaxed) + 1;
            if dropped.is_power_of_two() {
                tracing::warn!(dropped, "events come faster than they can be written");
            }
        }
    }
}

/// A reference to an object, for events.
pub(crate) fn reference(api_version: &str, kind: &str, meta: &ObjectMeta) -> ObjectReference {
    ObjectReference {
        api_version: Some(api_version.into()),
        kind: Some(kind.into()),
        name: meta.name.clone(),
        namespace: meta.namespace.clone(),
        uid: meta.uid.clone(),
        resource_version: meta.resource_version.clone(),
        field_path: None,
    }
}

/// What makes two occurrences the same event.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Identity {
    uid: String,
    name: String,
    severity: Severity,
    reason: &'static str,
    component: &'static str,
    message: String,
}

struct Remembered {
    event: Key,
    count: i32,
    last: Timestamp,
    used: u64,
}

struct Writer {
    client: Client,
    remembered: BTreeMap<Identity, Remembered>,
    uses: u64,
}

impl Writer {
    async fn run(mut self, mut receiver: mpsc::Receiver<Occurrence>) {
        while let Some(occurrence) = receiver.recv().await {
            if let Err(error) = self.write(&occurrence).await {
                tracing::debug!(reason = occurrence.reason, error = %chain(&error), "event not written");
            }
        }
    }

    async fn write(&mut self, occurrence: &Occurrence) -> Result<(), WriteError> {
        self.uses += 1;
        let involved = &occurrence.involved;
        let identity = Identity {
            uid: involved.uid.clone().unwrap_or_default(),
            name: involved.name.clone().unwrap_or_default(),
            severity: occurrence.severity,
            reason: occurrence.reason,
            component: occurrence.component,
            message: occurrence.message.clone(),
        };
        let namespace = involved.namespace.clone().unwrap_or_else(|| "default".to_owned());
        let api: Api<Event> = Api::namespaced(self.client.clone(), &namespace);
        if self.count_up(&api, &identity, occurrence).await? {
            return Ok(());
        }
        let event = event_of(occurrence, &namespace);
        let key = Key::of(&event.metadata);
        call(|| format!("create Event {key}"), api.create(&PostParams::default(), &event)).await?;
        self.remember(identity, Remembered { event: key, count: 1, last: occurrence.at, used: self.uses });
        Ok(())
    }

    /// Counts a remembered event up. False when there is none, or it is gone from the server.
    async fn count_up(
        &mut self,
        api: &Api<Event>,
        identity: &Identity,
        occurrence: &Occurrence,
    ) -> Result<bool, WriteError> {
        let Some(known) = self.remembered.get_mut(identity) else { return Ok(false) };
        let window = jiff::SignedDuration::try_from(REPEAT_WINDOW).unwrap_or(jiff::SignedDuration::MAX);
        if occurrence.at.duration_since(known.last) > window {
            return Ok(false);
        }
        let count = known.count.saturating_add(1);
        let patch = json!({"count": count, "lastTimestamp": Time(occurrence.at)});
        match merge_patch(api, "Event", &known.event, &patch).await {
            Ok(_) => {
                (known.count, known.last, known.used) = (count, occurrence.at, self.uses);
                Ok(true)
            }
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn remember(&mut self, identity: Identity, event: Remembered) {
        if self.remembered.len() >= REMEMBERED_BOUND {
            let oldest = self.remembered.iter().min_by_key(|(_, known)| known.used);
            if let Some(oldest) = oldest.map(|(identity, _)| identity.clone()) {
                self.remembered.remove(&oldest);
            }
        }
        self.remembered.insert(identity, event);
    }
}

fn event_of(occurrence: &Occurrence, namespace: &str) -> Event {
    let involved = occurrence.involved.clone();
    // Upstream names events after the object and the nanosecond, which keeps them unique and sorted.
    let name =
        format!("{}.{:x}", involved.name.as_deref().unwrap_or_default(), occurrence.at.as_nanosecond());
    Event {
        metadata: ObjectMeta {
            name: Some(name),
            namespace: Some(namespace.to_owned()),
            ..ObjectMeta::default()
        },
        involved_object: involved,
        type_: Some(occurrence.severity.as_str().into()),
        reason: Some(occurrence.reason.into()),
        message: Some(occurrence.message.clone()),
        count: Some(1),
        first_timestamp: Some(Time(occurrence.at)),
        last_timestamp: Some(Time(occurrence.at)),
        source: Some(EventSource { component: Some(occurrence.component.into()), host: None }),
        reporting_component: Some(occurrence.component.into()),
        ..Event::default()
    }
}
