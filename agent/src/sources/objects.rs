//! ConfigMaps and Secrets that pods use: one watch per object while a pod is interested in it.
//!
//! A pod's loop registers what its spec names and is woken when one of them changes. Reads are answered from the watch
//! once it has spoken, and wait for it (with a deadline) before that.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tracing::debug;

use super::Reconnect;
use crate::contracts::{ObjectSource, SourceError};

/// How long a read waits for the first answer.
const READ_DEADLINE: Duration = Duration::from_secs(10);

/// What names an object: `configmap` or `secret`, namespace, name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ObjectKey {
    kind: Kind,
    namespace: String,
    name: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    ConfigMap,
    Secret,
}

/// Woken when an object that the pod uses changed. Must not block.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// The objects in use.
#[derive(Clone)]
pub struct Objects {
    client: Client,
    entries: Arc<Mutex<BTreeMap<ObjectKey, Entry>>>,
}

struct Entry {
    state: watch::Receiver<State>,
    interested: Arc<Mutex<BTreeMap<String, Wake>>>,
    task: AbortHandle,
}

/// Where a watched object stands.
#[derive(Debug, Clone, Default)]
enum State {
    /// The watch has not spoken; the last error, if any.
    #[default]
    Unknown,
    Failed(String),
    Missing,
    ConfigMap(Arc<ConfigMap>),
    Secret(Arc<Secret>),
}

impl Objects {
    /// An empty set.
    pub fn new(client: Client) -> Self {
        Self { client, entries: Arc::default() }
    }

    /// Declares all objects that the pod `uid` uses now; watches start and stop accordingly.
    pub fn register(&self, uid: &str, keys: &BTreeSet<ObjectKey>, wake: &Wake) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        for key in keys {
            let entry = entries.entry(key.clone()).or_insert_with(|| self.start(key));
            let mut interested = entry.interested.lock().unwrap_or_else(PoisonError::into_inner);
            interested.insert(uid.to_owned(), Arc::clone(wake));
        }
        entries.retain(|key, entry| {
            let mut interested = entry.interested.lock().unwrap_or_else(PoisonError::into_inner);
            if !keys.contains(key) {
                interested.remove(uid);
            }
            if interested.is_empty() {
                entry.task.abort();
            }
            !interested.is_empty()
        });
    }

    /// The pod is gone.
    pub fn release(&self, uid: &str) {
        let wake: Wake = Arc::new(|| ());
        self.register(uid, &BTreeSet::new(), &wake);
    }

    fn start(&self, key: &ObjectKey) -> Entry {
        let (sender, state) = watch::channel(State::Unknown);
        let interested: Arc<Mutex<BTreeMap<String, Wake>>> = Arc::default();
        let namespace = key.namespace.clone();
        let name = key.name.clone();
        let client = self.client.clone();
        let users = Arc::clone(&interested);
        let task = match key.kind {
            Kind::ConfigMap => tokio::spawn(follow::<ConfigMap>(
                Api::namespaced(client, &namespace),
                name,
                sender,
                users,
                State::ConfigMap,
            )),
            Kind::Secret => tokio::spawn(follow::<Secret>(
                Api::namespaced(client, &namespace),
                name,
                sender,
                users,
                State::Secret,
            )),
        };
        Entry { state, interested, task: task.abort_handle() }
    }

    async fn read(&self, key: ObjectKey) -> Result<State, SourceError> {
        let error = |message: String| SourceError {
            kind: match key.kind {
                Kind::ConfigMap => "configmap",
                Kind::Secret => "secret",
            },
            namespace: key.namespace.clone(),
            name: key.name.clone(),
            message,
        };
        let watched = {
            let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
            entries.get(&key).map(|entry| entry.state.clone())
        };
        let Some(mut state) = watched else {
            return tokio::time::timeout(READ_DEADLINE, self.read_once(&key))
                .await
                .map_err(|_elapsed| error("no answer within 10 s".to_owned()))?
                .map_err(|cause| error(cause.to_string()));
        };
        let known = |state: &State| !matches!(state, State::Unknown | State::Failed(_));
        let answered = match tokio::time::timeout(READ_DEADLINE, state.wait_for(known)).await {
            Ok(Ok(state)) => Ok(state.clone()),
            Ok(Err(_closed)) => Err("the watch ended"),
            Err(_elapsed) => Err("no answer within 10 s"),
        };
        let last = match answered {
            Ok(state) => return Ok(state),
            Err(last) => last,
        };
        let message = match &*state.borrow() {
            State::Failed(message) => message.clone(),
            _ => last.to_owned(),
        };
        Err(error(message))
    }

    async fn read_once(&self, key: &ObjectKey) -> Result<State, kube::Error> {
        Ok(match key.kind {
            Kind::ConfigMap => {
                let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), &key.namespace);
                api.get_opt(&key.name)
                    .await?
                    .map_or(State::Missing, |found| State::ConfigMap(Arc::new(found)))
            }
            Kind::Secret => {
                let api: Api<Secret> = Api::namespaced(self.client.clone(), &key.namespace);
                api.get_opt(&key.name).await?.map_or(State::Missing, |found| State::Secret(Arc::new(found)))
            }
        })
    }
}

impl ObjectSource for Objects {
    fn config_map<'a>(
        &'a self,
        namespace: &'a str,
        name: &'a str,
    ) -> BoxFuture<'a, Result<Option<Arc<ConfigMap>>, SourceError>> {
        async move {
            match self.read(key(Kind::ConfigMap, namespace, name)).await? {
                State::ConfigMap(found) => Ok(Some(found)),
                _ => Ok(None),
            }
        }
        .boxed()
    }

    fn secret<'a>(
        &'a self,
        namespace: &'a str,
        name: &'a str,
    ) -> BoxFuture<'a, Result<Option<Arc<Secret>>, SourceError>> {
        async move {
            match self.read(key(Kind::Secret, namespace, name)).await? {
                State::Secret(found) => Ok(Some(found)),
                _ => Ok(None),
            }
        }
        .boxed()
    }
}

fn key(kind: Kind, namespace: &str, name: &str) -> ObjectKey {
    ObjectKey { kind, namespace: namespace.to_owned(), name: name.to_owned() }
}

/// Follows one object; wakes the interested pods at each change after the first state.
async fn follow<K>(
    api: Api<K>,
    name: String,
    state: watch::Sender<State>,
    interested: Arc<Mutex<BTreeMap<String, Wake>>>,
    wrap: fn(Arc<K>) -> State,
) where
    K: Resource<Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned + Send + 'static,
    K::DynamicType: Default,
{
    let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let mut stream = std::pin::pin!(watcher(api, config).backoff(Reconnect::default()));
    let mut listed = None;
    while let Some(event) = stream.next().await {
        let next = match event {
            Ok(watcher::Event::Init) => {
                listed = None;
                continue;
            }
            Ok(watcher::Event::InitApply(object)) => {
                listed = Some(object);
                continue;
            }
            Ok(watcher::Event::InitDone) => {
                listed.take().map_or(State::Missing, |object| wrap(Arc::new(object)))
            }
            Ok(watcher::Event::Apply(object)) => wrap(Arc::new(object)),
            Ok(watcher::Event::Delete(_)) => State::Missing,
            Err(error) => {
                debug!(%name, %error, "watch of an object interrupted");
                state.send_if_modified(|known| {
                    let first = matches!(known, State::Unknown | State::Failed(_));
                    if first {
                        *known = State::Failed(error.to_string());
                    }
                    first
                });
                continue;
            }
        };
        let first = matches!(state.send_replace(next), State::Unknown);
        if !first {
            let interested = interested.lock().unwrap_or_else(PoisonError::into_inner);
            interested.values().for_each(|wake| wake());
        }
    }
}

/// Every ConfigMap and Secret that the pod's variables, volumes and pulls name.
pub fn keys_of(pod: &Pod) -> BTreeSet<ObjectKey> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let mut keys = BTreeSet::new();
    let mut add = |kind, name: Option<&str>| {
        if let Some(name) = name.filter(|name| !name.is_empty()) {
            keys.insert(key(kind, namespace, name));
        }
    };
    let Some(spec) = &pod.spec else { return keys };
    let ephemeral = agent_core::model::ephemeral_containers(spec);
    let entries = agent_core::model::containers(spec).map(|entry| entry.container);
    for container in entries.chain(ephemeral.iter().map(|ephemeral| &ephemeral.container)) {
        let references = agent_core::env::references(container);
        references.config_maps.iter().for_each(|name| add(Kind::ConfigMap, Some(name)));
        references.secrets.iter().for_each(|name| add(Kind::Secret, Some(name)));
    }
    for secret in spec.image_pull_secrets.iter().flatten() {
        add(Kind::Secret, Some(&secret.name));
    }
    for volume in spec.volumes.iter().flatten() {
        add(Kind::ConfigMap, volume.config_map.as_ref().map(|source| source.name.as_str()));
        add(Kind::Secret, volume.secret.as_ref().and_then(|source| source.secret_name.as_deref()));
        let projected = volume.projected.iter().flat_map(|projected| projected.sources.iter().flatten());
        for source in projected {
            add(Kind::ConfigMap, source.config_map.as_ref().map(|source| source.name.as_str()));
            add(Kind::Secret, source.secret.as_ref().map(|source| source.name.as_str()));
        }
    }
    keys
}
