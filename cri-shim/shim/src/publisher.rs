//! Events on their way to containerd: kept in order, sent one by one, tried again while containerd is away.
//!
//! A thread runs only while there is something to send. At most [`MOST`] events wait; beyond that the oldest is lost, which
//! containerd makes good by asking for states when it comes back.

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use prost_types::Any;

use crate::proto::events::{Envelope, Event, FORWARD, ForwardRequest};
use crate::{proto, threads, ttrpc};

/// Most events that wait.
const MOST: usize = 2048;
/// How long containerd may take for one event.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pauses between tries grow from the first to the last.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// How long the thread waits for more before it ends.
const LINGER: Duration = Duration::from_millis(200);

/// Sends events. Clones share one queue.
#[derive(Clone, Debug)]
pub struct Publisher(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    socket: Option<PathBuf>,
    namespace: String,
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    events: VecDeque<ForwardRequest>,
    running: bool,
}

impl Publisher {
    /// Sends to containerd's ttrpc socket; without one events are dropped.
    pub fn new(socket: Option<PathBuf>, namespace: &str) -> Self {
        let namespace = namespace.to_owned();
        Self(Arc::new(Shared { socket, namespace, queue: Mutex::default(), changed: Condvar::new() }))
    }

    /// Queues an event.
    pub fn publish<E: Event>(&self, event: &E) {
        if self.0.socket.is_none() {
            return;
        }
        let envelope = Envelope {
            timestamp: Some(proto::timestamp(SystemTime::now())),
            namespace: self.0.namespace.clone(),
            topic: E::TOPIC.to_owned(),
            event: Some(Any { type_url: E::TYPE.to_owned(), value: event.encode_to_vec() }),
        };
        let mut queue = self.0.lock();
        if queue.events.len() >= MOST {
            queue.events.pop_front();
        }
        queue.events.push_back(ForwardRequest { envelope: Some(envelope) });
        if queue.running {
            self.0.changed.notify_all();
            return;
        }
        queue.running = true;
        drop(queue);
        let shared = Arc::clone(&self.0);
        if threads::spawn("events", move || shared.run()).is_err() {
            // Tried again with the next event.
            self.0.lock().running = false;
        }
    }

    /// Waits until every event is with containerd, at most `patience`.
    pub fn flush(&self, patience: Duration) {
        let end = Instant::now() + patience;
        let mut queue = self.0.lock();
        while queue.running && !queue.events.is_empty() {
            let Some(left) = end.checked_duration_since(Instant::now()) else { return };
            queue = self.0.wait(queue, left);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, queue: MutexGuard<'a, Queue>, patience: Duration) -> MutexGuard<'a, Queue> {
        self.changed.wait_timeout(queue, patience).unwrap_or_else(PoisonError::into_inner).0
    }

    fn run(&self) {
        let mut connection: Option<(UnixStream, u32)> = None;
        let mut pause = PAUSES.0;
        let mut queue = self.lock();
        loop {
            let Some(event) = queue.events.front().cloned() else {
                queue = self.wait(queue, LINGER);
                if queue.events.is_empty() {
                    queue.running = false;
                    return;
                }
                continue;
            };
            drop(queue);
            let sent = self.send(&mut connection, &event);
            queue = self.lock();
            match sent {
                Ok(()) => {
                    pause = PAUSES.0;
                    // Not so when it was dropped as the oldest meanwhile.
                    if queue.events.front() == Some(&event) {
                        queue.events.pop_front();
                    }
                    if queue.events.is_empty() {
                        self.changed.notify_all();
                    }
                }
                Err(_away) => {
                    connection = None;
                    let until = Instant::now() + pause;
                    // New events wake the wait; they wait for their turn.
                    while let Some(left) = until.checked_duration_since(Instant::now()) {
                        queue = self.wait(queue, left);
                    }
                    pause = (pause * 2).min(PAUSES.1);
                }
            }
        }
    }

    fn send(
        &self,
        connection: &mut Option<(UnixStream, u32)>,
        event: &ForwardRequest,
    ) -> std::io::Result<()> {
        let (stream, calls) = if let Some(open) = connection {
            open
        } else {
            let path = self.socket.as_ref().ok_or(std::io::ErrorKind::NotFound)?;
            let stream = UnixStream::connect(path)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            connection.insert((stream, 0))
        };
        ttrpc::call(stream, *calls, FORWARD, event)?;
        *calls += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use prost::Message;

    use super::*;
    use crate::proto::events::TaskOom;
    use crate::ttrpc::{Connection, Incoming};

    fn oom(id: &str) -> TaskOom {
        TaskOom { container_id: id.to_owned() }
    }

    #[test]
    fn events_wait_for_containerd_and_come_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("containerd.sock.ttrpc");
        let publisher = Publisher::new(Some(path.clone()), "ns");
        for id in ["a", "b", "c"] {
            publisher.publish(&oom(id));
        }
        let listener = UnixListener::bind(&path).unwrap();
        let connection = Arc::new(Connection::new(listener.accept().unwrap().0).unwrap());
        let (mut incoming, mut seen) = (Incoming::default(), Vec::new());
        while seen.len() < 3 {
            let mut requests = Vec::new();
            assert!(incoming.read(&connection, &mut requests).unwrap());
            for (request, responder) in requests {
                assert_eq!((request.service.as_str(), request.method.as_str()), FORWARD);
                let envelope = ForwardRequest::decode(request.payload.as_slice()).unwrap().envelope.unwrap();
                assert_eq!((envelope.namespace.as_str(), envelope.topic.as_str()), ("ns", "/tasks/oom"));
                let event = envelope.event.unwrap();
                assert_eq!(event.type_url, "containerd.events.TaskOOM");
                seen.push(TaskOom::decode(event.value.as_slice()).unwrap().container_id);
                responder.answer(Ok(Vec::new()));
            }
        }
        assert_eq!(seen, ["a", "b", "c"]);
        publisher.flush(Duration::from_secs(10));
        assert!(publisher.0.lock().events.is_empty());
    }
}
