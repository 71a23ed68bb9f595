//! All that the cases wait for, as watches tell it: one watch for each resource serves every case.
//!
//! Versions of an object are kept in their order, so that a case can also ask what was true in between.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::TryStreamExt as _;
use hyper::Request;
use kube::api::WatchEvent;
use serde_json::Value;
use tokio::sync::watch;

use super::api::Api;

/// How long a watch that failed waits before it begins anew.
const PAUSE: Duration = Duration::from_millis(200);

/// What is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// Pods of this run.
    Pod,
    /// Events of all namespaces.
    Event,
    /// Default service accounts, without which no pod can be made.
    Account,
    /// Certificates of the API server for pods.
    RootCertificate,
    /// Namespaces of this run.
    Namespace,
}

impl Kind {
    /// All of them.
    const ALL: [Self; 5] = [Self::Pod, Self::Event, Self::Account, Self::RootCertificate, Self::Namespace];

    /// Path and selector.
    fn query(self, run: &str) -> (&'static str, String) {
        let labelled = format!("labelSelector={}", super::api::encode(&format!("{}={run}", super::LABEL)));
        match self {
            Self::Pod => ("/api/v1/pods", labelled),
            Self::Event => ("/api/v1/events", String::new()),
            Self::Account => ("/api/v1/serviceaccounts", "fieldSelector=metadata.name%3Ddefault".to_owned()),
            Self::RootCertificate => {
                ("/api/v1/configmaps", "fieldSelector=metadata.name%3Dkube-root-ca.crt".to_owned())
            }
            Self::Namespace => ("/api/v1/namespaces", labelled),
        }
    }
}

type Key = (Kind, String, String);

/// One object's life.
#[derive(Debug, Clone, Default)]
pub(crate) struct Life {
    /// Its versions, the last one last.
    pub(crate) versions: Vec<Value>,
    /// It was deleted.
    pub(crate) gone: bool,
}

impl Life {
    /// As it is, or was last.
    pub(crate) fn last(&self) -> Option<&Value> {
        self.versions.last()
    }
}

/// Everything that was seen.
#[derive(Debug, Default)]
pub(crate) struct Seen(BTreeMap<Key, Life>);

impl Seen {
    /// One object.
    pub(crate) fn life(&self, kind: Kind, namespace: &str, name: &str) -> Option<&Life> {
        self.0.get(&(kind, namespace.to_owned(), name.to_owned()))
    }

    /// The newest versions of all of a namespace that are there.
    pub(crate) fn all<'a>(&'a self, kind: Kind, namespace: &'a str) -> impl Iterator<Item = &'a Value> {
        let of = move |(key, _): &(&Key, &Life)| key.0 == kind && key.1 == namespace;
        self.0.iter().filter(of).filter(|(_, life)| !life.gone).filter_map(|(_, life)| life.last())
    }

    fn put(&mut self, kind: Kind, object: Value) {
        let life = self.0.entry(key(kind, &object)).or_default();
        let version = |object: &Value| object["metadata"]["resourceVersion"].as_str().map(str::to_owned);
        let uid = |object: &Value| object["metadata"]["uid"].as_str().map(str::to_owned);
        if life.last().is_some_and(|last| uid(last) != uid(&object)) {
            *life = Life::default();
        }
        life.gone = false;
        if life.last().is_none_or(|last| version(last) != version(&object)) {
            life.versions.push(object);
        }
    }

    fn take(&mut self, kind: Kind, object: &Value) {
        if let Some(life) = self.0.get_mut(&key(kind, object)) {
            life.gone = true;
        }
    }

    /// Only these are there.
    fn replace(&mut self, kind: Kind, objects: Vec<Value>) {
        let there: Vec<Key> = objects.iter().map(|object| key(kind, object)).collect();
        for (key, life) in &mut self.0 {
            if key.0 == kind && !there.contains(key) {
                life.gone = true;
            }
        }
        for object in objects {
            self.put(kind, object);
        }
    }
}

fn key(kind: Kind, object: &Value) -> Key {
    let text = |name: &str| object["metadata"][name].as_str().unwrap_or_default().to_owned();
    (kind, text("namespace"), text("name"))
}

/// The board: what was seen, and word of every change.
pub(crate) struct Board {
    seen: Mutex<Seen>,
    changes: watch::Sender<u64>,
}

impl Board {
    /// A board that follows the cluster as long as the runtime lives; objects that are there are on it.
    pub(crate) async fn follow(api: &Api, run: &str) -> Result<Arc<Self>> {
        let board = Arc::new(Self { seen: Mutex::default(), changes: watch::Sender::new(0) });
        for kind in Kind::ALL {
            let version = board.list(api, kind, run).await?;
            let (api, board, run) = (api.clone(), Arc::clone(&board), run.to_owned());
            tokio::spawn(async move {
                let mut version = version;
                loop {
                    // A watch ends now and then; the next one goes on where it ended, or begins anew.
                    version = if let Ok(version) = board.watch(&api, kind, &run, version).await {
                        version
                    } else {
                        tokio::time::sleep(PAUSE).await;
                        board.list(&api, kind, &run).await.unwrap_or_default()
                    };
                }
            });
        }
        Ok(board)
    }

    /// What was seen until now.
    pub(crate) fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Seen)) {
        change(&mut self.seen());
        self.changes.send_modify(|count| *count += 1);
    }

    async fn list(&self, api: &Api, kind: Kind, run: &str) -> Result<String> {
        let (path, query) = kind.query(run);
        let mut list = api.get(&format!("{path}?{query}")).await?;
        let version = list["metadata"]["resourceVersion"].as_str().unwrap_or_default().to_owned();
        let items = match list["items"].take() {
            Value::Array(items) => items,
            _ => Vec::new(),
        };
        self.change(|seen| seen.replace(kind, items));
        Ok(version)
    }

    /// Follows until the watch ends; gives the version to go on from.
    async fn watch(&self, api: &Api, kind: Kind, run: &str, mut version: String) -> Result<String> {
        let (path, query) = kind.query(run);
        let uri = format!("{path}?watch=1&allowWatchBookmarks=true&resourceVersion={version}&{query}");
        let request = Request::get(uri).body(Vec::new())?;
        let events = api.client().request_events::<Value>(request).await?;
        futures::pin_mut!(events);
        while let Some(event) = events.try_next().await? {
            match event {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                    version = object["metadata"]["resourceVersion"].as_str().unwrap_or_default().to_owned();
                    self.change(|seen| seen.put(kind, object));
                }
                WatchEvent::Deleted(object) => {
                    version = object["metadata"]["resourceVersion"].as_str().unwrap_or_default().to_owned();
                    self.change(|seen| seen.take(kind, &object));
                }
                WatchEvent::Bookmark(mark) => version = mark.metadata.resource_version,
                WatchEvent::Error(status) => bail!("{}", status.message),
            }
        }
        Ok(version)
    }

    /// Waits until `look` finds what it looks for; the error tells what it said last.
    pub(crate) async fn wait<V>(
        &self,
        what: &str,
        limit: Duration,
        mut look: impl FnMut(&Seen) -> Result<V, String>,
    ) -> Result<V> {
        let mut changes = self.changes.subscribe();
        let end = tokio::time::Instant::now() + limit;
        loop {
            changes.borrow_and_update();
            let found = look(&self.seen());
            let last = match found {
                Ok(value) => return Ok(value),
                Err(last) => last,
            };
            match tokio::time::timeout_at(end, changes.changed()).await {
                Ok(changed) => changed.context("nothing is watched any more")?,
                Err(_elapsed) => bail!("{what}: not within {} s; last seen: {last}", limit.as_secs()),
            }
        }
    }
}
