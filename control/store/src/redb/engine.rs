//! The open database file: opening and reopening it, snapshot reads, and the newest and oldest revision.
//!
//! Reads run on the caller's (blocking) thread inside a redb snapshot and never wait for a commit. After an IO error redb refuses further
//! work on its handle; [`Engine::reopen`] then replaces it, so that a full disk is an error answer and not the end of the process.

use std::{
    collections::BTreeMap,
    fmt,
    fs::OpenOptions,
    ops::Bound,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{
        PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use redb::{Database, ReadTransaction, ReadableDatabase as _, TableDefinition};

use crate::{Event, KeyValue, Range, RangePage, RedbOptions, Revision, StoreError, codec};

/// Key → current record.
pub(super) const CURRENT: TableDefinition<'static, &[u8], &[u8]> = TableDefinition::new("current");
/// (revision, position in the transaction) → log record.
pub(super) const LOG: TableDefinition<'static, (u64, u32), &[u8]> = TableDefinition::new("log");
/// Counters: `revision`, `compacted`, `format`.
pub(super) const META: TableDefinition<'static, &str, u64> = TableDefinition::new("meta");

/// How many log entries a watch reads per step.
const LOG_STEP: usize = 512;

type OpenBackend = Box<dyn Fn() -> Result<Database, redb::Error> + Send + Sync>;

/// The open file and its revisions.
pub(super) struct Engine {
    path: PathBuf,
    open: OpenBackend,
    database: RwLock<Option<Database>>,
    revision: AtomicU64,
    compacted: AtomicU64,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Engine {
    /// Open or create the file named in the options.
    pub(super) fn open(options: &RedbOptions) -> Result<Self, StoreError> {
        if let Some(parent) = options.path.parent() {
            std::fs::create_dir_all(parent)
                .map_err(|source| StoreError::Directory { path: parent.to_owned(), source })?;
        }
        let (path, cache) = (options.path.clone(), options.cache_bytes);
        Self::with_backend(options.path.clone(), Box::new(move || open_file(&path, cache)))
    }

    /// Open through a function that yields the database; tests put faults below it.
    pub(super) fn with_backend(path: PathBuf, open: OpenBackend) -> Result<Self, StoreError> {
        let database = open().map_err(|source| open_error(&path, source))?;
        let (format, revision, compacted) =
            initialise(&database).map_err(|source| open_error(&path, source))?;
        if format != codec::FORMAT {
            return Err(StoreError::Format { path, found: format, known: codec::FORMAT });
        }
        Ok(Self {
            path,
            open,
            database: RwLock::new(Some(database)),
            revision: AtomicU64::new(revision),
            compacted: AtomicU64::new(compacted),
        })
    }

    /// The newest committed revision.
    pub(super) fn revision(&self) -> Revision {
        Revision(self.revision.load(Ordering::Acquire))
    }

    /// The oldest revision after which history is complete.
    pub(super) fn compacted(&self) -> Revision {
        Revision(self.compacted.load(Ordering::Acquire))
    }

    /// Called by the writer after each commit.
    pub(super) fn publish(&self, revision: Revision, compacted: Revision) {
        self.revision.store(revision.0, Ordering::Release);
        self.compacted.store(compacted.0, Ordering::Release);
    }

    /// Fails where the history after `revision` is not complete or `revision` is not committed yet.
    pub(super) fn check_retained(&self, revision: Revision) -> Result<(), StoreError> {
        let (oldest, newest) = (self.compacted(), self.revision());
        if revision < oldest {
            return Err(StoreError::Compacted { asked: revision, oldest });
        }
        if revision > newest {
            return Err(StoreError::Future { asked: revision, newest });
        }
        Ok(())
    }

    /// Run `work` on the open database.
    pub(super) fn with_database<T>(
        &self,
        action: &'static str,
        work: impl FnOnce(&Database) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        let guard = self.database.read().unwrap_or_else(PoisonError::into_inner);
        let database = guard.as_ref().ok_or_else(|| self.unavailable(action, &"closed after an IO error"))?;
        work(database).map_err(|error| self.unavailable(action, &error))
    }

    /// Drop the database handle and open the file again, after an IO error.
    pub(super) fn reopen(&self) -> Result<(), StoreError> {
        let mut guard = self.database.write().unwrap_or_else(PoisonError::into_inner);
        drop(guard.take());
        let opened = (self.open)().and_then(|database| initialise(&database).map(|meta| (database, meta)));
        let (database, (_, revision, compacted)) = opened.map_err(|source| open_error(&self.path, source))?;
        self.publish(Revision(revision), Revision(compacted));
        *guard = Some(database);
        Ok(())
    }

    /// Read one key.
    pub(super) fn get(&self, key: &[u8]) -> Result<Option<KeyValue>, StoreError> {
        let record = self.with_database("read", |database| {
            let table = database.begin_read()?.open_table(CURRENT)?;
            Ok(table.get(key)?.map(|record| record.value().to_vec()))
        })?;
        record
            .map(|record| codec::decode_current(key, &record).ok_or_else(|| self.damaged("current")))
            .transpose()
    }

    /// List a page, at an older revision where asked.
    pub(super) fn range(&self, range: &Range) -> Result<RangePage, StoreError> {
        if let Some(at) = range.at {
            self.check_retained(at)?;
        }
        self.with_database("read", |database| {
            let snapshot = database.begin_read()?;
            let newest = Revision(read_meta(&snapshot, "revision")?);
            let at = range.at.unwrap_or(newest);
            let changed =
                if at < newest { state_before(&snapshot, at, &range.prefix)? } else { BTreeMap::new() };
            collect_page(&snapshot, range, at, changed)
        })
    }

    /// Log entries after `revision`, a bounded number, and the revision up to which they are complete.
    pub(super) fn log_after(&self, revision: Revision) -> Result<(Vec<Event>, Revision), StoreError> {
        let (events, seen) = self.with_database("read", |database| {
            let snapshot = database.begin_read()?;
            let newest = read_meta(&snapshot, "revision")?;
            let compacted = read_meta(&snapshot, "compacted")?;
            if revision.0 < compacted {
                return Ok((None, Revision(compacted)));
            }
            let log = snapshot.open_table(LOG)?;
            let mut events: Vec<Event> = Vec::new();
            for entry in log.range((revision.0 + 1, 0)..)? {
                let (key, record) = entry?;
                let at = Revision(key.value().0);
                if events.len() >= LOG_STEP && events.last().is_some_and(|last| last.revision != at) {
                    let seen = events.last().map_or(revision, |last| last.revision);
                    return Ok((Some(events), seen));
                }
                events.push(codec::decode_event(at, record.value()).ok_or_else(damaged_log)?);
            }
            Ok((Some(events), Revision(newest)))
        })?;
        match events {
            Some(events) => Ok((events, seen)),
            None => Err(StoreError::Compacted { asked: revision, oldest: seen }),
        }
    }

    /// An error that says that the file cannot be read or written now.
    pub(super) fn unavailable(&self, action: &'static str, reason: &dyn fmt::Display) -> StoreError {
        StoreError::Unavailable { path: self.path.clone(), action, reason: reason.to_string() }
    }

    /// An error that says that a record does not decode.
    pub(super) fn damaged(&self, what: &'static str) -> StoreError {
        StoreError::Damaged { path: self.path.clone(), what }
    }
}

fn open_file(path: &Path, cache_bytes: usize) -> Result<Database, redb::Error> {
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    Ok(Database::builder().set_cache_size(cache_bytes).create_file(file)?)
}

fn open_error(path: &Path, source: redb::Error) -> StoreError {
    match source {
        redb::Error::DatabaseAlreadyOpen => StoreError::InUse { path: path.to_owned() },
        source => StoreError::Open { path: path.to_owned(), source: Box::new(source) },
    }
}

fn damaged_log() -> redb::Error {
    redb::Error::Corrupted("log record does not decode".to_owned())
}

/// Make the tables where they are missing; returns format, newest and compacted revision.
fn initialise(database: &Database) -> Result<(u64, u64, u64), redb::Error> {
    {
        let snapshot = database.begin_read()?;
        match snapshot.open_table(META) {
            Ok(meta) => {
                let number = |name| Ok::<_, redb::Error>(meta.get(name)?.map_or(0, |value| value.value()));
                return Ok((number("format")?, number("revision")?, number("compacted")?));
            }
            Err(redb::TableError::TableDoesNotExist(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let write = database.begin_write()?;
    write.open_table(CURRENT)?;
    write.open_table(LOG)?;
    {
        let mut meta = write.open_table(META)?;
        meta.insert("format", codec::FORMAT)?;
        // Kubernetes reads resource version 0 as "any", so that the first state is 1.
        meta.insert("revision", 1)?;
        meta.insert("compacted", 1)?;
    }
    write.commit()?;
    Ok((codec::FORMAT, 1, 1))
}

fn read_meta(snapshot: &ReadTransaction, name: &str) -> Result<u64, redb::Error> {
    Ok(snapshot.open_table(META)?.get(name)?.map_or(0, |value| value.value()))
}

/// What the keys below `prefix` that changed after `at` held at `at`.
fn state_before(
    snapshot: &ReadTransaction,
    at: Revision,
    prefix: &[u8],
) -> Result<BTreeMap<Bytes, Option<KeyValue>>, redb::Error> {
    let mut before = BTreeMap::new();
    for entry in snapshot.open_table(LOG)?.range((at.0 + 1, 0)..)? {
        let (key, record) = entry?;
        let event = codec::decode_event(Revision(key.value().0), record.value()).ok_or_else(damaged_log)?;
        if event.key.starts_with(prefix) {
            let Event { key, previous, created, .. } = event;
            before.entry(key.clone()).or_insert_with(|| {
                previous.map(|(value, modified)| KeyValue { key, value, created, modified })
            });
        }
    }
    Ok(before)
}

/// Merge the current table with `changed` (older states win) into a page.
fn collect_page(
    snapshot: &ReadTransaction,
    range: &Range,
    at: Revision,
    changed: BTreeMap<Bytes, Option<KeyValue>>,
) -> Result<RangePage, redb::Error> {
    let start = range.after.as_deref().map_or(Bound::Included(range.prefix.as_ref()), Bound::Excluded);
    let past = |key: &[u8]| match start {
        Bound::Excluded(after) => key > after,
        _ => true,
    };
    let mut page = RangePage { revision: at, ..RangePage::default() };
    let mut push = |pair: KeyValue| {
        if range.limit == 0 || page.items.len() < range.limit {
            page.items.push(pair);
        } else {
            page.remaining += 1;
        }
    };
    let mut older = changed.into_iter().filter(|(key, _)| past(key)).peekable();
    let current = snapshot.open_table(CURRENT)?;
    for entry in current.range::<&[u8]>((start, Bound::Unbounded))? {
        let (key, record) = entry?;
        let key = key.value();
        if !key.starts_with(&range.prefix) {
            break;
        }
        while let Some((_, before)) = older.next_if(|(other, _)| other.as_ref() < key) {
            before.into_iter().for_each(&mut push);
        }
        match older.next_if(|(other, _)| other.as_ref() == key) {
            Some((_, before)) => before.into_iter().for_each(&mut push),
            None => push(
                codec::decode_current(key, record.value())
                    .ok_or_else(|| redb::Error::Corrupted("current record does not decode".to_owned()))?,
            ),
        }
    }
    older.filter_map(|(_, before)| before).for_each(push);
    Ok(page)
}
