//! Regular upkeep: history is compacted after five minutes, events are removed after an hour.
//!
//! Time is tied to revisions by a note taken every minute; so an event's age is counted from its last write (or from the server's start).

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::Bytes;
use control_api::kinds;
use control_store::{Revision, StoreError, Txn};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::api::Api;

const PERIOD: Duration = Duration::from_secs(60);
/// How long watches and continued lists can look back.
const HISTORY: Duration = Duration::from_secs(5 * 60);
/// At most so many revisions of history, however young.
const MOST_REVISIONS: u64 = 50_000;
/// Life of an event after its last write.
const EVENT_LIFE: Duration = Duration::from_secs(60 * 60);
/// So many expired events are removed at a time, each batch in few commits.
const EVENT_BATCH: usize = 256;

/// Run until cancelled.
pub(crate) async fn run(api: Arc<Api>, cancel: CancellationToken) {
    let mut notes: VecDeque<(Instant, Revision)> = VecDeque::new();
    let mut ticks = tokio::time::interval(PERIOD);
    loop {
        // Cancel safe: a tick carries nothing.
        tokio::select! {
            () = cancel.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let now = Instant::now();
        let newest = api.cache.revision();
        notes.push_back((now, newest));
        while notes.get(1).is_some_and(|(at, _)| now.duration_since(*at) >= EVENT_LIFE) {
            notes.pop_front();
        }
        let as_of = |age: Duration| {
            notes.iter().rev().find(|(at, _)| now.duration_since(*at) >= age).map(|(_, revision)| *revision)
        };
        let floor = Revision(newest.0.saturating_sub(MOST_REVISIONS));
        let compact_to = as_of(HISTORY).unwrap_or_default().max(floor);
        if compact_to > Revision(1)
            && let Err(error) = api.store.compact(compact_to).await
        {
            tracing::warn!(%error, "compaction failed; it is tried again in a minute");
        }
        if let Some(expired) = as_of(EVENT_LIFE) {
            remove_events(&api, expired).await;
        }
    }
}

/// Remove events last written at or before a revision.
async fn remove_events(api: &Api, expired: Revision) {
    let Some(info) = kinds::find("", "v1", "events") else { return };
    let Some(cache) = api.cache.resource(info) else { return };
    let old = cache.snapshot(None, |event| event.revision <= expired).objects;
    for batch in old.chunks(EVENT_BATCH) {
        let removals = batch.iter().map(|event| {
            let key = Bytes::from(info.object_key(Some(event.namespace()), event.name()));
            api.store.txn(Txn::delete(key, event.revision))
        });
        for outcome in futures::future::join_all(removals).await {
            match outcome {
                // Written again in between: it lives on.
                Ok(_) | Err(StoreError::Conflict { .. }) => {}
                Err(error) => {
                    tracing::warn!(%error, "expired events could not be removed; tried again in a minute");
                    return;
                }
            }
        }
    }
}
