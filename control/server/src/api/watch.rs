//! `watch`: a stream of changes, made from the change ring at the pace at which the client reads.
//!
//! A watcher owns no queue. It remembers a position and asks the ring for what came after it whenever the connection can take more; when the
//! ring has moved past that position, the client is told that its resourceVersion expired and starts over.

use std::{sync::Arc, time::Duration};

use bytes::{BufMut as _, Bytes, BytesMut};
use control_api::{
    kinds::ResourceInfo,
    status::{ApiError, FieldError},
};
use control_store::{EventKind, Revision};
use http::StatusCode;
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    Api,
    options::{self, Freshness, Selection},
    render,
};
use crate::{
    cache::{Change, Object, ResourceCache, WatchCache},
    http::{
        body::{self, Reply},
        negotiate::Form,
        query::Query,
    },
    metrics::Gauge,
};

/// How often a watcher that asked for bookmarks hears of progress.
const BOOKMARK_EVERY: Duration = Duration::from_secs(60);
/// A watch without `timeoutSeconds` ends after this to twice this.
const LEAST_LIFE: u64 = 1800;
/// No watch lives longer, whatever it asks for.
const MOST_LIFE: u64 = 24 * 3600;
/// Events are sent in pieces of about this size.
const CHUNK: usize = 64 << 10;

/// Where a watch begins.
enum Start {
    /// After a revision.
    After(Revision),
    /// With the present objects; `mark_end` sends the bookmark that ends them.
    Initial { mark_end: bool },
}

/// A running watch.
#[allow(
    clippy::struct_excessive_bools,
    reason = "four independent facts of a stream, none of which is a state"
)]
struct Watcher {
    info: &'static ResourceInfo,
    all: Arc<WatchCache>,
    cache: Arc<ResourceCache>,
    selection: Selection,
    form: Form,
    bookmarks: bool,
    position: Revision,
    changed: tokio::sync::watch::Receiver<Revision>,
    /// Objects of the initial state that are still to be sent, last first.
    initial: Vec<Arc<Object>>,
    mark_end: bool,
    columns_sent: bool,
    end: Instant,
    next_bookmark: Instant,
    shutdown: CancellationToken,
    finished: bool,
    _open: Gauge,
}

impl Api {
    /// Answer a watch.
    pub(crate) async fn watch(
        &self,
        info: &'static ResourceInfo,
        namespace: Option<&str>,
        name: Option<&str>,
        query: &Query,
        form: Form,
    ) -> Result<Reply, ApiError> {
        let selection = Selection::parse(info, namespace, name, query)?;
        let cache = Arc::clone(self.cache.resource(info).ok_or_else(ApiError::unknown_path)?);
        let (start, freshness) = start(info, query)?;
        let timeout = match options::number(query, "timeoutSeconds")? {
            Some(seconds) if seconds > 0 => seconds.min(MOST_LIFE),
            _ => LEAST_LIFE + self.random.below(LEAST_LIFE),
        };
        // Subscribed before the state is read, so that no change goes unnoticed.
        let changed = cache.subscribe();
        let fresh = self.wait(freshness).await?;
        let (position, initial, mark_end) = match start {
            Start::After(revision) => (revision, Vec::new(), false),
            Start::Initial { mark_end } => {
                let mut snapshot =
                    cache.snapshot(selection.namespace.as_deref(), |object| selection.matches(object));
                snapshot.objects.reverse();
                (fresh.max(snapshot.newest), snapshot.objects, mark_end)
            }
        };
        let now = Instant::now();
        let watcher = Watcher {
            info,
            all: Arc::clone(&self.cache),
            cache,
            selection,
            form,
            bookmarks: query.flag("allowWatchBookmarks"),
            position,
            changed,
            initial,
            mark_end,
            columns_sent: false,
            end: now + Duration::from_secs(timeout),
            next_bookmark: now + BOOKMARK_EVERY,
            shutdown: self.shutdown.clone(),
            finished: false,
            _open: self.metrics.watch_opened(info.plural),
        };
        let events = futures::stream::unfold(watcher, |mut watcher| async move {
            let chunk = watcher.next_chunk().await?;
            Some((chunk, watcher))
        });
        Ok(body::reply(StatusCode::OK, "application/json", body::stream(events)))
    }
}

/// Where the watch starts and how fresh the cache must be for that.
fn start(info: &ResourceInfo, query: &Query) -> Result<(Start, Freshness), ApiError> {
    let matching = query.get("resourceVersionMatch");
    let refuse = |error: FieldError| Err(ApiError::invalid(info, "", &[error]));
    if query.get("sendInitialEvents").is_empty() && !matching.is_empty() {
        let why = "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided";
        return refuse(FieldError::forbidden("resourceVersionMatch", why));
    }
    if query.flag("sendInitialEvents") {
        if matching != "NotOlderThan" {
            let why = "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan";
            return refuse(FieldError::forbidden("resourceVersionMatch", why));
        }
        return Ok((
            Start::Initial { mark_end: query.flag("allowWatchBookmarks") },
            options::freshness(info, query)?,
        ));
    }
    let present = query.get("sendInitialEvents").is_empty();
    match options::freshness(info, query)? {
        freshness @ (Freshness::Latest | Freshness::Any) if present => {
            Ok((Start::Initial { mark_end: false }, freshness))
        }
        Freshness::AtLeast(revision) | Freshness::Exact(revision) if revision.0 > 0 => {
            Ok((Start::After(revision), Freshness::AtLeast(revision)))
        }
        // sendInitialEvents=false without a revision: from now on.
        _ => Ok((Start::After(Revision(u64::MAX)), Freshness::Latest)),
    }
}

impl Watcher {
    /// The next piece of the stream; `None` ends it.
    async fn next_chunk(&mut self) -> Option<Bytes> {
        if self.finished {
            return None;
        }
        if self.position == Revision(u64::MAX) {
            self.position = self.all.revision();
        }
        if let Some(chunk) = self.initial_chunk() {
            return Some(chunk);
        }
        loop {
            // Marked as seen before the ring is read, so that a later change wakes us.
            self.changed.borrow_and_update();
            // Read before the ring: everything up to here is in the ring already.
            let progress = self.all.revision();
            match self.cache.changes_after(self.position) {
                Err(too_old) => return Some(self.expire(too_old.floor)),
                Ok(changes) => {
                    if let Some(chunk) = self.encode(&changes) {
                        return Some(chunk);
                    }
                }
            }
            let now = Instant::now();
            if now >= self.end || self.shutdown.is_cancelled() {
                self.finished = true;
                return self.bookmarks.then(|| self.bookmark(progress, false));
            }
            if self.bookmarks && now >= self.next_bookmark {
                self.next_bookmark = now + BOOKMARK_EVERY;
                return Some(self.bookmark(progress, false));
            }
            // Cancel safe: all three only wait.
            tokio::select! {
                changed = self.changed.changed() => if changed.is_err() { self.finished = true; return None },
                () = tokio::time::sleep_until(self.end.min(self.next_bookmark)) => {
                    if !self.bookmarks {
                        self.next_bookmark = self.end;
                    }
                }
                () = self.shutdown.cancelled() => {}
            }
        }
    }

    fn initial_chunk(&mut self) -> Option<Bytes> {
        let mut out = BytesMut::new();
        while out.len() < CHUNK
            && let Some(object) = self.initial.pop()
        {
            self.push(&mut out, "ADDED", &object);
        }
        if self.initial.is_empty() && std::mem::take(&mut self.mark_end) {
            out.extend_from_slice(&self.bookmark(self.position, true));
        }
        (!out.is_empty()).then(|| out.freeze())
    }

    /// The selected changes as text; moves the position over all that were looked at.
    fn encode(&mut self, changes: &[Arc<Change>]) -> Option<Bytes> {
        let mut out = BytesMut::new();
        for change in changes {
            if out.len() >= CHUNK {
                break;
            }
            self.position = change.object.revision;
            let before = change.previous.as_ref().filter(|object| self.selection.matches(object));
            let is = change.kind != EventKind::Deleted && self.selection.matches(&change.object);
            match (before, is) {
                (None, true) => self.push(&mut out, "ADDED", &change.object),
                (Some(_), true) => self.push(&mut out, "MODIFIED", &change.object),
                (Some(_), false) if change.kind == EventKind::Deleted => {
                    self.push(&mut out, "DELETED", &change.object);
                }
                // It left the selection: its last selected state, as of this change.
                (Some(before), false) => self.push_left(&mut out, before, change.object.revision),
                (None, false) => {}
            }
        }
        (!out.is_empty()).then(|| out.freeze())
    }

    fn push(&mut self, out: &mut BytesMut, kind: &str, object: &Object) {
        let encoded = if matches!(self.form, Form::Table(_)) {
            render::stored(object).map(|value| self.table_event(value))
        } else {
            render::one(self.info, object, self.form)
        };
        match encoded {
            Ok(encoded) => frame(out, kind, &encoded),
            Err(error) => tracing::error!(key = %object.key, %error, "an object cannot be watched"),
        }
    }

    fn push_left(&mut self, out: &mut BytesMut, before: &Object, revision: Revision) {
        let Ok(mut value) = render::stored(before) else { return };
        value["metadata"]["resourceVersion"] = json!(revision.to_string());
        let encoded = if matches!(self.form, Form::Table(_)) {
            self.table_event(value)
        } else {
            Bytes::from(render::shape(self.info, value, self.form).to_string())
        };
        frame(out, "DELETED", &encoded);
    }

    /// A table of one row; only the first of a stream says what the columns are.
    fn table_event(&mut self, value: Value) -> Bytes {
        let mut table = render::shape(self.info, value, self.form);
        if std::mem::replace(&mut self.columns_sent, true) {
            table["columnDefinitions"] = Value::Null;
        }
        Bytes::from(table.to_string())
    }

    fn bookmark(&mut self, revision: Revision, initial_end: bool) -> Bytes {
        self.position = self.position.max(revision);
        let mut out = BytesMut::new();
        let object = render::bookmark(self.info, revision.max(self.position), initial_end, self.form);
        frame(&mut out, "BOOKMARK", object.to_string().as_bytes());
        out.freeze()
    }

    fn expire(&mut self, floor: Revision) -> Bytes {
        self.finished = true;
        let error = ApiError::expired(format!("too old resource version: {} ({floor})", self.position));
        let mut out = BytesMut::new();
        frame(&mut out, "ERROR", error.to_status().to_string().as_bytes());
        out.freeze()
    }
}

fn frame(out: &mut BytesMut, kind: &str, object: &[u8]) {
    out.reserve(object.len() + kind.len() + 24);
    out.put_slice(b"{\"type\":\"");
    out.put_slice(kind.as_bytes());
    out.put_slice(b"\",\"object\":");
    out.put_slice(object);
    out.put_slice(b"}\n");
}
