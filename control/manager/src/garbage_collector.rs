//! Garbage collection: follows the metadata of every served kind and carries out
//! `control_decide::garbage` decisions.
//!
//! Kinds that other controllers watch are followed through their informers; all others get a watch of their
//! own for metadata only. Discovery is repeated, so that kinds which appear later are followed too.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use control_decide::{
    garbage::{
        Decision, FOREGROUND, Graph, Identity, ORPHAN, OwnerState, Propagation, TypeName, Work, decide,
    },
    object::{has_finalizer, is_being_deleted},
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::{
    Api,
    api::{DeleteParams, DynamicObject, Preconditions},
    core::Resource,
};
use serde_json::{Map, Value, json};

use crate::{
    config::Controller,
    context::Context,
    informer::{Cached, Informer, Key, MetadataSource},
    queue::{Backoff, Queue},
    resources::Served,
    write::{WriteError, call, chain, delete, guarded, list_or_null, merge_patch},
};

const WORKERS: usize = 4;
/// How often to look for kinds that have appeared.
const DISCOVERY_INTERVAL: Duration = Duration::from_secs(30);
/// Too many and too short-lived to be owned; upstream ignores them too.
const IGNORED_KINDS: [&str; 1] = ["Event"];

/// The graph and the work it asks for.
struct Collector {
    graph: Mutex<Graph>,
    queue: Arc<Queue<Work>>,
}

impl Collector {
    fn with_graph<T>(&self, look: impl FnOnce(&mut Graph) -> T) -> T {
        look(&mut self.graph.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn observe(&self, type_name: &Arc<TypeName>, meta: &ObjectMeta) {
        let work = self.with_graph(|graph| graph.observe(type_name, meta));
        self.queue.add_all(work);
    }

    fn forget(&self, uid: &str) {
        let work = self.with_graph(|graph| graph.forget(uid));
        self.queue.add_all(work);
    }

    /// Feeds the graph from an informer.
    fn follow<K: Cached>(self: &Arc<Self>, informer: &Informer<K>, type_name: Arc<TypeName>) {
        let collector = Arc::clone(self);
        informer.on_change(move |change| match (&change.new, &change.old) {
            (Some(object), _) => collector.observe(&type_name, object.meta()),
            (None, Some(object)) => {
                collector.forget(object.meta().uid.as_deref().unwrap_or_default());
            }
            (None, None) => {}
        });
    }
}

/// Registers the controller.
pub(crate) fn start(context: &Arc<Context>) {
    let collector = Arc::new(Collector { graph: Mutex::default(), queue: Queue::new() });
    let mut followed = BTreeSet::new();
    follow_shared(&collector, &context.pods, &mut followed);
    follow_shared(&collector, &context.nodes, &mut followed);
    follow_shared(&collector, &context.deployments, &mut followed);
    follow_shared(&collector, &context.replica_sets, &mut followed);
    follow_shared(&collector, &context.services, &mut followed);
    follow_shared(&collector, &context.endpoint_slices, &mut followed);
    follow_shared(&collector, &context.endpoints, &mut followed);
    follow_shared(&collector, &context.namespaces, &mut followed);
    follow_shared(&collector, &context.service_accounts, &mut followed);
    follow_shared(&collector, &context.leases, &mut followed);
    let first_look = tokio::sync::watch::Sender::new(false);
    let mut looked = first_look.subscribe();
    let (shared, followed_collector) = (Arc::clone(context), Arc::clone(&collector));
    context.spawn(async move { follow_served(&shared, &followed_collector, followed, &first_look).await });

    let queue = Arc::clone(&collector.queue);
    let ready = async move {
        // The sender lives as long as the discovery loop, which only ends with the process.
        let _closed = looked.wait_for(|done| *done).await;
    };
    let shared = Arc::clone(context);
    context.work(Controller::GarbageCollector, &queue, WORKERS, ready, move |work| {
        let (context, collector) = (Arc::clone(&shared), Arc::clone(&collector));
        async move {
            match work {
                Work::Check(identity) => check(&context, &collector, &identity).await?,
                Work::Orphan(identity) => orphan(&context, &collector, &identity).await?,
            }
            Ok(None)
        }
    });
}

/// (group, kind)
type GroupKind = (String, String);

fn follow_shared<K: Cached + Resource<DynamicType = ()>>(
    collector: &Arc<Collector>,
    informer: &Informer<K>,
    followed: &mut BTreeSet<GroupKind>,
) {
    let type_name = TypeName { api_version: K::api_version(&()).into(), kind: K::kind(&()).into() };
    followed.insert((K::group(&()).into(), type_name.kind.clone()));
    collector.follow(informer, Arc::new(type_name));
}

/// Starts a metadata watch for every collectable kind nobody follows yet, again and again. Says so once all
/// that is served at the start has been listed.
async fn follow_served(
    context: &Arc<Context>,
    collector: &Arc<Collector>,
    mut followed: BTreeSet<GroupKind>,
    first_look: &tokio::sync::watch::Sender<bool>,
) {
    let mut backoff = Backoff::new(Duration::from_millis(200), DISCOVERY_INTERVAL);
    loop {
        match context.resources.refresh().await {
            Ok(served) => {
                backoff.reset();
                let mut started = Vec::new();
                for served in served.iter().filter(|served| served.is_collectable()) {
                    let (group, kind) = (served.resource.group.clone(), served.resource.kind.clone());
                    if !IGNORED_KINDS.contains(&kind.as_str()) && followed.insert((group, kind)) {
                        started.push(follow_kind(context, collector, served));
                    }
                }
                if !*first_look.borrow() {
                    wait_for_lists(context, &started).await;
                    first_look.send_replace(true);
                }
                tokio::time::sleep(DISCOVERY_INTERVAL).await;
            }
            Err(error) => {
                tracing::warn!(error = %chain(&error), "the served kinds are not known");
                tokio::time::sleep(backoff.next_wait()).await;
            }
        }
    }
}

fn follow_kind(
    context: &Context,
    collector: &Arc<Collector>,
    served: &Served,
) -> Arc<Informer<crate::informer::MetadataOnly>> {
    let informer = Informer::new(&served.resource.kind);
    collector.follow(&informer, served.type_name());
    let source = MetadataSource(served.api_everywhere(&context.client));
    context.tasks.spawn(Arc::clone(&informer).run(source, context.cancel.clone()));
    informer
}

/// Deciding on a half-known world would only cost live reads; a kind that cannot be listed does not hold
/// the others up for ever.
async fn wait_for_lists(context: &Context, started: &[Arc<Informer<crate::informer::MetadataOnly>>]) {
    let all = async {
        context.pods.wait_until_synced().await;
        context.replica_sets.wait_until_synced().await;
        context.deployments.wait_until_synced().await;
        context.services.wait_until_synced().await;
        for informer in started {
            informer.wait_until_synced().await;
        }
    };
    if tokio::time::timeout(DISCOVERY_INTERVAL, all).await.is_err() {
        tracing::warn!("some kinds could not be listed yet; collecting without them");
    }
}

/// One object found through the API.
struct Found {
    api: Api<DynamicObject>,
    key: Key,
    meta: ObjectMeta,
}

impl Found {
    async fn patch_metadata(&self, kind: &str, fields: Value) -> Result<(), WriteError> {
        let patch = Map::from_iter([("metadata".to_owned(), fields)]);
        let patch = guarded(self.meta.resource_version.as_deref(), patch);
        merge_patch(&self.api, kind, &self.key, &patch).await.map(|_| ())
    }

    async fn remove_finalizer(&self, kind: &str, finalizer: &str) -> Result<(), WriteError> {
        let held = self.meta.finalizers.iter().flatten();
        let rest: Vec<_> = held.filter(|held| *held != finalizer).collect();
        self.patch_metadata(kind, json!({"finalizers": list_or_null(&rest)})).await
    }

    /// Writes the owner references that `keep` keeps, changed as it likes.
    async fn rewrite_owners(
        &self,
        kind: &str,
        keep: impl Fn(&OwnerReference) -> Option<OwnerReference>,
    ) -> Result<(), WriteError> {
        let owners: Vec<_> = self.meta.owner_references.iter().flatten().filter_map(keep).collect();
        self.patch_metadata(kind, json!({"ownerReferences": list_or_null(&owners)})).await
    }
}

/// Reads an object's metadata. `None`: it is gone, or another one has its name.
async fn find(context: &Context, identity: &Identity) -> Result<Option<Found>, WriteError> {
    let served = context.resources.find(&identity.type_name)?;
    let namespace = if served.namespaced { identity.namespace.as_str() } else { "" };
    let key = Key::new(namespace, &identity.name);
    let api = served.api(&context.client, namespace);
    let action = || format!("get {} {key}", identity.type_name.kind);
    let live = call(action, api.get_metadata_opt(&identity.name)).await?;
    Ok(live
        .map(|live| live.metadata)
        .filter(|meta| meta.uid.as_deref() == Some(&identity.uid))
        .map(|meta| Found { api, key, meta }))
}

async fn check(context: &Context, collector: &Collector, identity: &Identity) -> Result<(), WriteError> {
    if !collector.with_graph(|graph| graph.needs_check(&identity.uid)) {
        return Ok(());
    }
    let Some(found) = find(context, identity).await? else {
        collector.forget(&identity.uid);
        return Ok(());
    };
    if !collector.with_graph(|graph| graph.is_observed(&identity.uid)) {
        // Known from references only, and it exists: its own watch will tell of it, if its kind has one.
        return Ok(());
    }
    let owners = owner_states(context, identity, &found.meta).await?;
    let decision = collector.with_graph(|graph| decide(graph, &found.meta, &owners));
    let kind = identity.type_name.kind.as_str();
    match decision {
        Decision::Nothing => Ok(()),
        Decision::RemoveForegroundFinalizer => found.remove_finalizer(kind, FOREGROUND).await,
        Decision::CheckDependents(dependents) => {
            collector.queue.add_all(dependents.into_iter().map(Work::Check));
            Ok(())
        }
        Decision::DropOwners(uids) => {
            found.rewrite_owners(kind, |owner| (!uids.contains(&owner.uid)).then(|| owner.clone())).await
        }
        Decision::Delete { propagation, unblock_owners } => {
            if unblock_owners {
                let unblocked = |owner: &OwnerReference| OwnerReference {
                    block_owner_deletion: Some(false),
                    ..owner.clone()
                };
                return found.rewrite_owners(kind, |owner| Some(unblocked(owner))).await;
            }
            remove(&found, kind, &identity.uid, propagation).await
        }
    }
}

async fn remove(found: &Found, kind: &str, uid: &str, propagation: Propagation) -> Result<(), WriteError> {
    let params = match propagation {
        Propagation::Background => DeleteParams::background(),
        Propagation::Foreground => DeleteParams::foreground(),
        Propagation::Orphan => DeleteParams::orphan(),
    };
    // Valid only for what was decided about: an owner added meanwhile must save the object.
    let params = params.preconditions(Preconditions {
        uid: Some(uid.to_owned()),
        resource_version: found.meta.resource_version.clone(),
    });
    tracing::debug!(kind, object = %found.key, ?propagation, "collecting");
    delete(&found.api, kind, &found.key, uid, params).await.map(|_| ())
}

/// The live state of each owner, by uid.
async fn owner_states(
    context: &Context,
    dependent: &Identity,
    meta: &ObjectMeta,
) -> Result<BTreeMap<String, OwnerState>, WriteError> {
    let mut states = BTreeMap::new();
    for owner in meta.owner_references.iter().flatten() {
        let type_name = TypeName { api_version: owner.api_version.clone(), kind: owner.kind.clone() };
        let served = context.resources.find(&type_name)?;
        // A cluster-scoped object cannot name a namespaced owner; what cannot be resolved is kept.
        if served.namespaced && dependent.namespace.is_empty() {
            states.insert(owner.uid.clone(), OwnerState::Solid);
            continue;
        }
        let identity = Identity {
            type_name: Arc::new(type_name),
            namespace: dependent.namespace.clone(),
            name: owner.name.clone(),
            uid: owner.uid.clone(),
        };
        let state = match find(context, &identity).await? {
            None => OwnerState::Absent,
            Some(found) if is_being_deleted(&found.meta) && has_finalizer(&found.meta, FOREGROUND) => {
                OwnerState::WaitsForDependents
            }
            Some(_) => OwnerState::Solid,
        };
        states.insert(owner.uid.clone(), state);
    }
    Ok(states)
}

/// Cuts the dependents off, then lets the owner go.
async fn orphan(context: &Context, collector: &Collector, identity: &Identity) -> Result<(), WriteError> {
    for dependent in collector.with_graph(|graph| graph.dependents(&identity.uid)) {
        let Some(found) = find(context, &dependent).await? else { continue };
        let kind = dependent.type_name.kind.as_str();
        found.rewrite_owners(kind, |owner| (owner.uid != identity.uid).then(|| owner.clone())).await?;
    }
    match find(context, identity).await? {
        Some(found) if has_finalizer(&found.meta, ORPHAN) => {
            found.remove_finalizer(&identity.type_name.kind, ORPHAN).await
        }
        _ => Ok(()),
    }
}
