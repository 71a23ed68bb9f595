//! The one thread that writes: group commit, compaction, and recovery from IO errors.
//!
//! Input: a bounded queue of [`Request`]s. Output: an answer to each, after the commit that contains it, and then the events for the watchers.
//! It never answers `Ok` before the data is durable, and never lets one request's failed condition touch another's.

use std::{collections::BTreeSet, sync::Arc};

use bytes::Bytes;
use redb::{ReadableTable as _, Table, WriteTransaction};
use tokio::sync::{broadcast, mpsc, oneshot};

use super::{
    engine::{CURRENT, Engine, LOG, META},
    watch::Batch,
};
use crate::{Event, EventKind, Expect, KeyValue, Op, Revision, StoreError, Txn, codec};

/// At most so many requests share a commit, so that the first one does not wait for ever.
const BATCH: usize = 512;

/// What the writer is asked to do, each with the place its answer goes to.
pub(super) enum Request {
    /// Commit a transaction.
    Txn(Txn, oneshot::Sender<Result<Revision, StoreError>>),
    /// Forget history.
    Compact(Revision, oneshot::Sender<Result<(), StoreError>>),
}

/// An answer that is held back until the commit has succeeded.
enum Answer {
    Txn(oneshot::Sender<Result<Revision, StoreError>>, Result<Revision, StoreError>),
    Compact(oneshot::Sender<Result<(), StoreError>>),
}

/// State of the writer thread.
pub(super) struct Writer {
    engine: Arc<Engine>,
    queue: mpsc::Receiver<Request>,
    live: broadcast::Sender<Batch>,
    /// The database handle is unusable and must be replaced before the next batch.
    broken: bool,
    /// The last commit failed, and the log says so.
    failing: bool,
}

/// What a batch has done to the open transaction so far.
struct Progress {
    revision: Revision,
    compacted: Revision,
    events: Vec<Event>,
}

impl Writer {
    pub(super) fn new(
        engine: Arc<Engine>,
        queue: mpsc::Receiver<Request>,
        live: broadcast::Sender<Batch>,
    ) -> Self {
        Self { engine, queue, live, broken: false, failing: false }
    }

    /// Serve the queue until every sender is gone.
    pub(super) fn run(mut self) {
        let mut batch = Vec::new();
        while let Some(first) = self.queue.blocking_recv() {
            batch.push(first);
            while batch.len() < BATCH {
                let Ok(next) = self.queue.try_recv() else { break };
                batch.push(next);
            }
            self.serve(&mut batch);
        }
    }

    fn serve(&mut self, batch: &mut Vec<Request>) {
        if self.broken {
            if let Err(error) = self.engine.reopen() {
                refuse(batch.drain(..), &self.engine.unavailable("written", &chain(&error)));
                return;
            }
            self.broken = false;
        }
        let mut answers = Vec::with_capacity(batch.len());
        match self.commit(batch, &mut answers) {
            Ok(progress) => {
                self.engine.publish(progress.revision, progress.compacted);
                if std::mem::take(&mut self.failing) {
                    tracing::info!("the store accepts writes again");
                }
                if !progress.events.is_empty() {
                    let batch: Batch = (progress.events.into(), progress.revision);
                    // No receiver means that nobody watches.
                    drop(self.live.send(batch));
                }
                answers.into_iter().for_each(Answer::deliver);
            }
            Err(error) => {
                self.broken = true;
                // Said once per outage: callers hear of each refusal themselves.
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::error!(%error, "store commit failed; nothing of it was kept");
                }
                for answer in answers {
                    answer.fail(&error);
                }
                refuse(batch.drain(..), &error);
            }
        }
    }

    /// Apply the whole batch in one redb transaction. Requests move from `batch` to `answers` as they are applied.
    fn commit(&self, batch: &mut Vec<Request>, answers: &mut Vec<Answer>) -> Result<Progress, StoreError> {
        let (revision, compacted) = (self.engine.revision(), self.engine.compacted());
        let mut progress = Progress { revision, compacted, events: Vec::new() };
        self.engine.with_database("written", |database| {
            let write = database.begin_write()?;
            for request in batch.drain(..) {
                match request {
                    Request::Txn(txn, answer) => match apply(&write, &txn, &mut progress) {
                        Ok(outcome) => answers.push(Answer::Txn(answer, outcome)),
                        Err(error) => {
                            // Put back as an answer so that the caller hears of the failure too.
                            answers.push(Answer::Txn(answer, Err(StoreError::Closed)));
                            return Err(error);
                        }
                    },
                    Request::Compact(upto, answer) => {
                        answers.push(Answer::Compact(answer));
                        compact(&write, upto, &mut progress)?;
                    }
                }
            }
            if progress.revision == revision && progress.compacted == compacted {
                write.abort()?;
            } else {
                let mut meta = write.open_table(META)?;
                meta.insert("revision", progress.revision.0)?;
                meta.insert("compacted", progress.compacted.0)?;
                drop(meta);
                write.commit()?;
            }
            Ok(())
        })?;
        Ok(progress)
    }
}

impl Answer {
    fn deliver(self) {
        // A waiter that went away (deadline) is not an error: its write is durable all the same.
        match self {
            Self::Txn(sender, outcome) => drop(sender.send(outcome)),
            Self::Compact(sender) => drop(sender.send(Ok(()))),
        }
    }

    fn fail(self, error: &StoreError) {
        match self {
            Self::Txn(sender, _) => drop(sender.send(Err(copy(error)))),
            Self::Compact(sender) => drop(sender.send(Err(copy(error)))),
        }
    }
}

fn refuse(requests: impl Iterator<Item = Request>, error: &StoreError) {
    for request in requests {
        match request {
            Request::Txn(_, sender) => drop(sender.send(Err(copy(error)))),
            Request::Compact(_, sender) => drop(sender.send(Err(copy(error)))),
        }
    }
}

/// One failed commit answers many callers; the error types below are not `Clone`.
fn copy(error: &StoreError) -> StoreError {
    match error {
        StoreError::Unavailable { path, action, reason } => {
            StoreError::Unavailable { path: path.clone(), action, reason: reason.clone() }
        }
        _ => StoreError::Closed,
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        source = inner.source();
    }
    text
}

type CurrentTable<'txn> = Table<'txn, &'static [u8], &'static [u8]>;

/// Apply one transaction. The outer error aborts the whole batch, the inner one is this caller's own.
fn apply(
    write: &WriteTransaction,
    txn: &Txn,
    progress: &mut Progress,
) -> Result<Result<Revision, StoreError>, redb::Error> {
    let mut current = write.open_table(CURRENT)?;
    if let Some(conflict) = first_conflict(&current, &txn.expects)? {
        return Ok(Err(conflict));
    }
    let revision = progress.revision.next();
    let mut log = write.open_table(LOG)?;
    let mut seen = BTreeSet::new();
    let mut position = 0;
    for op in &txn.ops {
        let (key, value) = match op {
            Op::Put(key, value) => (key, Some(value)),
            Op::Delete(key) => (key, None),
        };
        if !seen.insert(key.clone()) {
            continue;
        }
        let Some(event) = change(&mut current, key, value, revision)? else { continue };
        let record = codec::encode_event(&event).ok_or(redb::Error::ValueTooLarge(event.value.len()))?;
        log.insert((revision.0, position), record.as_slice())?;
        position += 1;
        progress.events.push(event);
    }
    if position > 0 {
        progress.revision = revision;
    }
    Ok(Ok(progress.revision))
}

fn lookup(current: &CurrentTable<'_>, key: &[u8]) -> Result<Option<KeyValue>, redb::Error> {
    let Some(record) = current.get(key)? else { return Ok(None) };
    codec::decode_current(key, record.value())
        .map(Some)
        .ok_or_else(|| redb::Error::Corrupted("current record does not decode".to_owned()))
}

fn first_conflict(current: &CurrentTable<'_>, expects: &[Expect]) -> Result<Option<StoreError>, redb::Error> {
    for expect in expects {
        let found = lookup(current, expect.key())?;
        let holds = match expect {
            Expect::Absent(_) => found.is_none(),
            Expect::ModifiedAt(_, revision) => found.as_ref().is_some_and(|pair| pair.modified == *revision),
        };
        if !holds {
            let key = String::from_utf8_lossy(expect.key()).into_owned();
            return Ok(Some(StoreError::Conflict { key, current: found.map(Box::new) }));
        }
    }
    Ok(None)
}

/// Write or remove one key; `None` where there was nothing to remove.
fn change(
    current: &mut CurrentTable<'_>,
    key: &Bytes,
    value: Option<&Bytes>,
    revision: Revision,
) -> Result<Option<Event>, redb::Error> {
    let before = lookup(current, key)?;
    let created = before.as_ref().map_or(revision, |pair| pair.created);
    let (kind, value) = match (value, &before) {
        (Some(value), None) => (EventKind::Created, value.clone()),
        (Some(value), Some(_)) => (EventKind::Updated, value.clone()),
        (None, Some(pair)) => (EventKind::Deleted, pair.value.clone()),
        (None, None) => return Ok(None),
    };
    if kind == EventKind::Deleted {
        current.remove(key.as_ref())?;
    } else {
        current.insert(key.as_ref(), codec::encode_current(created, revision, &value).as_slice())?;
    }
    let previous = before.map(|pair| (pair.value, pair.modified));
    Ok(Some(Event { kind, key: key.clone(), value, previous, created, revision }))
}

fn compact(write: &WriteTransaction, upto: Revision, progress: &mut Progress) -> Result<(), redb::Error> {
    let upto = upto.min(progress.revision);
    if upto <= progress.compacted {
        return Ok(());
    }
    write.open_table(LOG)?.retain_in(..(upto.0 + 1, 0), |_, _| false)?;
    progress.compacted = upto;
    Ok(())
}
