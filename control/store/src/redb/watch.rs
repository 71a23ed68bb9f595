//! A watch: first the log, then live events, and the log again whenever it fell behind.
//!
//! Invariant: `seen` is the revision up to which every event has been returned; whatever source delivers next, older events are dropped.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::broadcast::{self, error::RecvError};

use super::engine::Engine;
use crate::{BoxFuture, Event, Revision, StoreError, Watch};

/// Events of one commit and the revision it reached.
pub(super) type Batch = (Arc<[Event]>, Revision);

/// A [`Watch`] over the redb log.
pub(super) struct LogWatch {
    engine: Arc<Engine>,
    live: broadcast::Receiver<Batch>,
    prefix: Bytes,
    seen: Revision,
    /// The log may hold events after `seen` that the live channel will not bring.
    behind: bool,
}

impl LogWatch {
    pub(super) fn new(
        engine: Arc<Engine>,
        live: broadcast::Receiver<Batch>,
        prefix: Bytes,
        after: Revision,
    ) -> Self {
        Self { engine, live, prefix, seen: after, behind: true }
    }

    async fn step(&mut self) -> Result<Vec<Event>, StoreError> {
        if self.behind {
            let (engine, seen) = (Arc::clone(&self.engine), self.seen);
            let read = tokio::task::spawn_blocking(move || engine.log_after(seen)).await;
            let (events, upto) = read.map_err(|_cancelled| StoreError::Closed)??;
            // A full step leaves `behind` set: there may be more. Live duplicates are dropped below.
            self.behind = !events.is_empty();
            self.seen = upto.max(self.seen);
            return Ok(events);
        }
        match self.live.recv().await {
            Ok((events, upto)) => {
                let seen = self.seen;
                self.seen = upto.max(seen);
                Ok(events.iter().filter(|event| event.revision > seen).cloned().collect())
            }
            Err(RecvError::Lagged(_)) => {
                self.behind = true;
                Ok(Vec::new())
            }
            Err(RecvError::Closed) => Err(StoreError::Closed),
        }
    }
}

impl Watch for LogWatch {
    fn next(&mut self) -> BoxFuture<'_, Result<(Vec<Event>, Revision), StoreError>> {
        Box::pin(async move {
            loop {
                // Cancel safe: `seen` moves only in the same poll that returns the events to the loop.
                let mut events = self.step().await?;
                events.retain(|event| event.key.starts_with(&self.prefix));
                if !events.is_empty() {
                    return Ok((events, self.seen));
                }
            }
        })
    }
}
