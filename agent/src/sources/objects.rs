//! Objects that pods use: one watch per object while a pod is interested in it.
//!
//! A pod's loop registers what its spec names and is woken when one of them changes. Reads of ConfigMaps and Secrets are
//! answered from the watch once it has spoken, and wait for it (with a deadline) before that. Of claims, volumes, attachments
//! and CSIDrivers, which a volume turns out to depend on, only changes are told: whoever is woken reads anew. An API server
//! that does not let a node watch these tells nothing; then the pod's own retries find out.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _};
use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolume, PersistentVolumeClaim, Pod, Secret};
use k8s_openapi::api::storage::v1::{CSIDriver, VolumeAttachment};
use kube::runtime::watcher;
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tracing::debug;

use crate::contracts::{Dependency, ObjectSource, SourceError};

/// How long a read waits for the first answer.
const READ_DEADLINE: Duration = Duration::from_secs(10);

/// Pause before a watch is tried again that the API server does not allow.
const FORBIDDEN_PAUSE: Duration = Duration::from_secs(600);

/// What names an object: kind, namespace (empty for none), name.
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
    Claim,
    Volume,
    Attachment,
    Driver,
    /// No object: a driver on this node.
    Plugin,
}

impl Kind {
    fn word(self) -> &'static str {
        match self {
            Self::ConfigMap => "configmap",
            Self::Secret => "secret",
            Self::Claim => "persistentvolumeclaim",
            Self::Volume => "persistentvolume",
            Self::Attachment => "volumeattachment",
            Self::Driver => "csidriver",
            Self::Plugin => "csi driver",
        }
    }
}

/// Woken when an object that the pod uses changed. Must not block.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// The objects in use.
#[derive(Clone)]
pub struct Objects {
    client: Client,
    entries: Arc<Mutex<BTreeMap<ObjectKey, Entry>>>,
    pods: Arc<Mutex<BTreeMap<String, Interest>>>,
}

/// A pod that is interested in objects.
struct Interest {
    wake: Wake,
    /// What it turned out to depend on, beside what its spec names.
    beside: BTreeSet<ObjectKey>,
}

struct Entry {
    state: watch::Receiver<State>,
    interested: Interested,
    /// `None` where nothing is watched.
    task: Option<AbortHandle>,
}

type Interested = Arc<Mutex<BTreeMap<String, Wake>>>;

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
    /// It is there; what it says is read by whoever is woken.
    Seen,
}

impl Objects {
    /// An empty set.
    pub fn new(client: Client) -> Self {
        Self { client, entries: Arc::default(), pods: Arc::default() }
    }

    /// Declares all objects that the spec of the pod `uid` names now; watches start and stop accordingly.
    pub fn register(&self, uid: &str, keys: &BTreeSet<ObjectKey>, wake: &Wake) {
        let all = {
            let mut pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
            let interest = pods
                .entry(uid.to_owned())
                .or_insert_with(|| Interest { wake: Arc::clone(wake), beside: BTreeSet::new() });
            interest.wake = Arc::clone(wake);
            keys.union(&interest.beside).cloned().collect()
        };
        self.watch_only(uid, &all, wake);
    }

    /// The pod is gone.
    pub fn release(&self, uid: &str) {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
        let wake: Wake = Arc::new(|| ());
        self.watch_only(uid, &BTreeSet::new(), &wake);
    }

    /// Watches these for the pod and nothing else.
    fn watch_only(&self, uid: &str, keys: &BTreeSet<ObjectKey>, wake: &Wake) {
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
            if interested.is_empty()
                && let Some(task) = &entry.task
            {
                task.abort();
            }
            !interested.is_empty()
        });
    }

    /// Watches these for the pod too, if it is registered.
    fn watch_beside(&self, uid: &str, keys: Vec<ObjectKey>) {
        let wake = {
            let mut pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(interest) = pods.get_mut(uid) else { return };
            interest.beside.extend(keys.iter().cloned());
            Arc::clone(&interest.wake)
        };
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        for key in keys {
            let entry = entries.entry(key.clone()).or_insert_with(|| self.start(&key));
            let mut interested = entry.interested.lock().unwrap_or_else(PoisonError::into_inner);
            interested.insert(uid.to_owned(), Arc::clone(&wake));
        }
    }

    fn start(&self, key: &ObjectKey) -> Entry {
        let (sender, state) = watch::channel(State::Unknown);
        let interested: Interested = Arc::default();
        let (namespace, name) = (key.namespace.clone(), key.name.clone());
        let client = self.client.clone();
        let users = Arc::clone(&interested);
        let task = match key.kind {
            Kind::ConfigMap => {
                let api: Api<ConfigMap> = Api::namespaced(client, &namespace);
                Some(tokio::spawn(follow(api, name, sender, users, Some(State::ConfigMap))))
            }
            Kind::Secret => {
                let api: Api<Secret> = Api::namespaced(client, &namespace);
                Some(tokio::spawn(follow(api, name, sender, users, Some(State::Secret))))
            }
            Kind::Claim => {
                let api: Api<PersistentVolumeClaim> = Api::namespaced(client, &namespace);
                Some(tokio::spawn(follow(api, name, sender, users, None)))
            }
            Kind::Volume => {
                let api: Api<PersistentVolume> = Api::all(client);
                Some(tokio::spawn(follow(api, name, sender, users, None)))
            }
            Kind::Attachment => {
                let api: Api<VolumeAttachment> = Api::all(client);
                Some(tokio::spawn(follow(api, name, sender, users, None)))
            }
            Kind::Driver => {
                let api: Api<CSIDriver> = Api::all(client);
                Some(tokio::spawn(follow(api, name, sender, users, None)))
            }
            Kind::Plugin => None,
        };
        Entry { state, interested, task: task.map(|task| task.abort_handle()) }
    }

    async fn read(&self, key: ObjectKey) -> Result<State, SourceError> {
        let error = |message: String| SourceError {
            kind: key.kind.word(),
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
            // Only changes of these are told.
            Kind::Claim | Kind::Volume | Kind::Attachment | Kind::Driver | Kind::Plugin => State::Seen,
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

    fn depend(&self, pod_uid: &str, on: &[Dependency]) {
        self.watch_beside(pod_uid, on.iter().map(key_of).collect());
    }

    fn tell(&self, changed: &Dependency) {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = entries.get(&key_of(changed)) {
            let interested = entry.interested.lock().unwrap_or_else(PoisonError::into_inner);
            interested.values().for_each(|wake| wake());
        }
    }
}

fn key_of(dependency: &Dependency) -> ObjectKey {
    match dependency {
        Dependency::Claim(namespace, name) => key(Kind::Claim, namespace, name),
        Dependency::Volume(name) => key(Kind::Volume, "", name),
        Dependency::Attachment(name) => key(Kind::Attachment, "", name),
        Dependency::Driver(name) => key(Kind::Driver, "", name),
        Dependency::Plugin(name) => key(Kind::Plugin, "", name),
    }
}

fn key(kind: Kind, namespace: &str, name: &str) -> ObjectKey {
    ObjectKey { kind, namespace: namespace.to_owned(), name: name.to_owned() }
}

/// Follows one object; wakes the interested pods at each change after the first state. Where nothing is kept of the object,
/// the first state is a change too: whoever read it may have done so before.
async fn follow<K>(
    api: Api<K>,
    name: String,
    state: watch::Sender<State>,
    interested: Interested,
    keep: Option<fn(Arc<K>) -> State>,
) where
    K: Resource + Clone + Debug + DeserializeOwned + Send + 'static,
    K::DynamicType: Default,
{
    let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let mut stream = std::pin::pin!(super::follow(api, config));
    let wrap = |object: K| keep.map_or(State::Seen, |keep| keep(Arc::new(object)));
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
            Ok(watcher::Event::InitDone) => listed.take().map_or(State::Missing, wrap),
            Ok(watcher::Event::Apply(object)) => wrap(object),
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
                if keep.is_none() && is_forbidden(&error) {
                    tokio::time::sleep(FORBIDDEN_PAUSE).await;
                }
                continue;
            }
        };
        let first = matches!(state.send_replace(next), State::Unknown);
        if !first || keep.is_none() {
            let interested = interested.lock().unwrap_or_else(PoisonError::into_inner);
            interested.values().for_each(|wake| wake());
        }
    }
}

/// Whether the API server does not allow the watch: asking again soon is of no use.
fn is_forbidden(error: &watcher::Error) -> bool {
    let source = match error {
        watcher::Error::InitialListFailed(source) | watcher::Error::WatchStartFailed(source) => source,
        watcher::Error::WatchError(status) => return status.code == 403,
        watcher::Error::WatchFailed(_) | watcher::Error::NoResourceVersion => return false,
    };
    matches!(source, kube::Error::Api(status) if status.code == 403)
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
        let claim = volume.persistent_volume_claim.as_ref().map(|source| source.claim_name.clone());
        let made_for_it = volume.ephemeral.as_ref().map(|_| claim_of_ephemeral(pod, &volume.name));
        add(Kind::Claim, claim.or(made_for_it).as_deref());
        let projected = volume.projected.iter().flat_map(|projected| projected.sources.iter().flatten());
        for source in projected {
            add(Kind::ConfigMap, source.config_map.as_ref().map(|source| source.name.as_str()));
            add(Kind::Secret, source.secret.as_ref().map(|source| source.name.as_str()));
        }
    }
    keys
}

/// Name of the claim that is made for an `ephemeral` volume of the pod.
pub(crate) fn claim_of_ephemeral(pod: &Pod, volume: &str) -> String {
    format!("{}-{volume}", pod.metadata.name.as_deref().unwrap_or_default())
}
