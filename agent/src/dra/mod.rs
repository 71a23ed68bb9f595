//! Dynamic resource allocation: ResourceClaims of pods, which drivers on this node make ready.
//!
//! Inputs: drivers that register ([`crate::plugins`], type `DRAPlugin`), pods about to get a sandbox, pods that are over.
//! Outputs: calls of drivers, names of CDI devices for containers, and `<rootDir>/dra_manager_state`. A claim and its pod go on
//! disk before a driver is asked, and leave it after the driver has undone its part: what a killed agent left is found there.
//! Every call has a deadline; calls about one claim come one after the other, and nothing waits for another claim. What is to
//! be done is decided by [`agent_core::claims`]. Upstream's behaviour: `pkg/kubelet/cm/dra`.
//!
//! Reading order: [`wire`] (messages), `drivers`, this, `checkpoint` (the disk), `slices` (drivers that have gone), `health` (of
//! devices).

mod checkpoint;
mod drivers;
mod health;
mod slices;
pub mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use agent_core::claims::{self, ClaimError, ClaimKey, ClaimRef, Ledger, Named, Usable};
use agent_core::health::HealthBook;
use futures::FutureExt as _;
use futures::future::{BoxFuture, join_all, try_join_all};
use k8s_openapi::api::core::v1::{Container, Pod};
use k8s_openapi::api::resource::v1::ResourceClaim;
use kube::{Api, Client};
use tokio::sync::{OwnedMutexGuard, watch};

use self::drivers::Drivers;
use self::wire::{Claims, Method, Prepared, Unprepared};
use crate::contracts::{Dependency, ObjectSource};
use crate::plugins::{Plugin, PluginHandler};

/// Deadline of a request to the API server.
const API_DEADLINE: Duration = Duration::from_secs(10);

/// Where the agent is, and how patient it is.
#[derive(Debug, Clone)]
pub struct DraSettings {
    /// The kubelet's root directory.
    pub root_dir: PathBuf,
    /// This node.
    pub node_name: String,
    /// Deadline of a call.
    pub call_deadline: Duration,
    /// How long a driver may be away before its ResourceSlices are removed.
    pub patience: Duration,
}

impl DraSettings {
    /// With upstream's deadlines.
    pub fn new(root_dir: &Path, node_name: &str) -> Self {
        Self {
            root_dir: root_dir.to_owned(),
            node_name: node_name.to_owned(),
            call_deadline: Duration::from_secs(45),
            patience: Duration::from_secs(30),
        }
    }
}

/// ResourceClaims of this node's pods. Clones share them.
#[derive(Clone)]
pub struct Dra(Arc<Inner>);

struct Inner {
    settings: DraSettings,
    client: Client,
    objects: Arc<dyn ObjectSource>,
    drivers: Drivers,
    state: Mutex<State>,
    /// One for each claim that somebody is at.
    locks: Mutex<BTreeMap<ClaimKey, Weak<tokio::sync::Mutex<()>>>>,
    /// One writer of the file at a time, so that the last to come writes the last state.
    saving: tokio::sync::Mutex<()>,
    /// Counts changes of devices' health.
    health_changes: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    ledger: Ledger,
    health: HealthBook,
    /// Streams of health that each driver has.
    streams: BTreeMap<String, u32>,
    /// Counts changes of it.
    changes: u64,
    /// Of these are on disk.
    saved: u64,
}

/// What of a claim a container has, for whoever watches the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldClaim {
    /// Namespace of the claim.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Driver and device.
    pub devices: Vec<(String, claims::Device)>,
}

impl Dra {
    /// Claims below the settings' root directory, with what earlier agents left there. `objects` wakes pods.
    pub fn load(settings: DraSettings, objects: Arc<dyn ObjectSource>, client: Client) -> Self {
        let ledger = checkpoint::load(&checkpoint::path(&settings.root_dir));
        Self(Arc::new(Inner {
            settings,
            client,
            objects,
            drivers: Drivers::default(),
            state: Mutex::new(State { ledger, ..State::default() }),
            locks: Mutex::default(),
            saving: tokio::sync::Mutex::default(),
            health_changes: watch::Sender::default(),
        }))
    }

    /// Makes every claim of the pod ready, as far as that has not happened. Idempotent.
    pub async fn prepare(&self, pod: &Pod) -> Result<(), String> {
        let prepared = self.try_prepare(pod).await;
        prepared.map_err(|problem| format!("prepare dynamic resources: {problem}"))
    }

    /// The pod's containers have ended: undoes its claims that no other pod here uses. Idempotent.
    pub async fn release(&self, pod_uid: &str) -> Result<(), String> {
        let released = self.try_release(pod_uid).await;
        released.map_err(|problem| format!("unprepare dynamic resources: {problem}"))
    }

    /// Names of CDI devices for the container.
    pub async fn cdi_ids(&self, pod: &Pod, container: &Container) -> Result<Vec<String>, String> {
        let known = self.state().ledger.cdi_ids(pod, container);
        match known {
            // Somebody took away what was on disk.
            Err(ClaimError::Unknown { .. }) => self.prepare(pod).await?,
            known => return known.map_err(|error| error.to_string()),
        }
        let known = self.state().ledger.cdi_ids(pod, container);
        known.map_err(|error| error.to_string())
    }

    /// Whether the pod has claims that are to be undone.
    pub fn holds(&self, pod_uid: &str) -> bool {
        self.state().ledger.holds(pod_uid)
    }

    /// Pods that have claims, by uid, with their namespace.
    pub fn pods(&self) -> BTreeMap<String, String> {
        self.state().ledger.pods()
    }

    /// What the container has of claims.
    pub fn of_container(&self, pod: &Pod, container: &Container) -> Vec<HeldClaim> {
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        let state = self.state();
        let held = state.ledger.of_container(pod, container).into_iter();
        held.map(|held| HeldClaim {
            namespace: namespace.clone(),
            name: held.claim.to_owned(),
            devices: held
                .devices
                .into_iter()
                .map(|(driver, device)| (driver.to_owned(), device.clone()))
                .collect(),
        })
        .collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut Ledger) -> T) -> T {
        let mut state = self.state();
        state.changes += 1;
        change(&mut state.ledger)
    }

    async fn try_prepare(&self, pod: &Pod) -> Result<(), String> {
        let named = claims::named(pod).map_err(|error| error.to_string())?;
        if named.is_empty() {
            return Ok(());
        }
        // Nothing is noted of a pod that cannot go on: it can be deleted without its drivers.
        let usable = try_join_all(named.iter().map(|named| self.look_up(pod, named))).await?;
        let drivers: BTreeSet<&String> = usable.iter().flat_map(|usable| &usable.drivers).collect();
        let pod_uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let on: Vec<Dependency> = drivers.iter().map(|&driver| Dependency::Plugin(driver.clone())).collect();
        self.0.objects.depend(pod_uid, &on);
        for driver in drivers {
            self.0.drivers.check(driver)?;
        }
        let keys: BTreeSet<ClaimKey> = usable.iter().map(|usable| usable.key.clone()).collect();
        let _alone = self.lock(&keys).await;
        self.change(|ledger| ledger.reserve(pod_uid, &usable)).map_err(|error| error.to_string())?;
        self.save().await?;
        let orders = self.state().ledger.to_prepare(&keys);
        let calls = orders.iter().map(|(driver, claims)| self.prepare_with(driver, claims));
        let outcomes = join_all(calls).await;
        self.save().await?;
        outcomes.into_iter().collect()
    }

    /// The claim, if the pod may use it.
    async fn look_up(&self, pod: &Pod, named: &Named) -> Result<Usable, String> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let claims: Api<ResourceClaim> = Api::namespaced(self.0.client.clone(), namespace);
        let claim = ask(claims.get(&named.name)).await;
        let claim = claim.map_err(|problem| format!("fetch ResourceClaim {}: {problem}", named.name))?;
        claims::check(pod, named, &claim).map_err(|error| error.to_string())
    }

    async fn prepare_with(&self, driver: &str, claims: &[ClaimRef]) -> Result<(), String> {
        let (method, deadline) = (Method::Prepare, self.0.settings.call_deadline);
        let answer: Prepared = self.0.drivers.call(driver, method, request(claims), deadline).await?;
        take_answer(
            method,
            claims,
            answer.claims,
            |result| &result.error,
            |claim, result| {
                let devices = result.devices.into_iter().map(device).collect();
                self.change(|ledger| ledger.prepared(&claim.key, driver, devices));
            },
        )
    }

    async fn try_release(&self, pod_uid: &str) -> Result<(), String> {
        let keys = self.state().ledger.claims_of(pod_uid);
        if keys.is_empty() {
            return Ok(());
        }
        let _alone = self.lock(&keys).await;
        self.change(|ledger| ledger.leave_shared(pod_uid));
        let orders = self.state().ledger.to_unprepare(pod_uid);
        let calls = orders.iter().map(|(driver, claims)| self.unprepare_with(driver, claims));
        let outcomes = join_all(calls).await;
        self.change(|ledger| ledger.forget_undone(pod_uid));
        self.save().await?;
        outcomes.into_iter().collect()
    }

    async fn unprepare_with(&self, driver: &str, claims: &[ClaimRef]) -> Result<(), String> {
        let (method, deadline) = (Method::Unprepare, self.0.settings.call_deadline);
        let answer: Unprepared = self.0.drivers.call(driver, method, request(claims), deadline).await?;
        take_answer(
            method,
            claims,
            answer.claims,
            |result| &result.error,
            |claim, _| {
                self.change(|ledger| ledger.unprepared(&claim.key, driver));
            },
        )
    }

    /// Waits until nobody else is at these claims. Always in the same order: no two wait for each other.
    async fn lock(&self, keys: &BTreeSet<ClaimKey>) -> Vec<OwnedMutexGuard<()>> {
        let locks: Vec<Arc<tokio::sync::Mutex<()>>> = {
            let mut known = self.0.locks.lock().unwrap_or_else(PoisonError::into_inner);
            known.retain(|_, lock| lock.strong_count() > 0);
            let lock = |key: &ClaimKey| {
                let entry = known.entry(key.clone()).or_default();
                entry.upgrade().unwrap_or_else(|| {
                    let lock = Arc::default();
                    *entry = Arc::downgrade(&lock);
                    lock
                })
            };
            keys.iter().map(lock).collect()
        };
        let mut held = Vec::with_capacity(locks.len());
        for lock in locks {
            held.push(lock.lock_owned().await);
        }
        held
    }

    /// Writes down what has changed.
    async fn save(&self) -> Result<(), String> {
        let _alone = self.0.saving.lock().await;
        let (ledger, changes) = {
            let state = self.state();
            if state.changes == state.saved {
                return Ok(());
            }
            (state.ledger.clone(), state.changes)
        };
        let path = checkpoint::path(&self.0.settings.root_dir);
        let saved = tokio::task::spawn_blocking(move || checkpoint::save(&path, &ledger)).await;
        saved
            .map_err(std::io::Error::other)
            .and_then(|saved| saved)
            .map_err(|error| format!("checkpoint ResourceClaim state: {error}"))?;
        self.state().saved = changes;
        Ok(())
    }
}

impl PluginHandler for Dra {
    fn kind(&self) -> &'static str {
        "DRAPlugin"
    }

    fn register<'a>(&'a self, plugin: &'a Plugin) -> BoxFuture<'a, Result<(), String>> {
        async move {
            let (channel, gone) = self.0.drivers.register(plugin)?;
            tokio::spawn(self.clone().follow_health(plugin.name.clone(), channel, gone));
            self.0.objects.tell(&Dependency::Plugin(plugin.name.clone()));
            Ok(())
        }
        .boxed()
    }

    fn deregister<'a>(&'a self, plugin: &'a Plugin) -> BoxFuture<'a, ()> {
        async move { self.0.drivers.deregister(plugin) }.boxed()
    }
}

/// Gives `done` each claim that the driver saw to, with what it said; the first thing that is wrong with the answer, if any.
fn take_answer<R>(
    method: Method,
    asked: &[ClaimRef],
    answer: BTreeMap<String, R>,
    error_of: fn(&R) -> &str,
    mut done: impl FnMut(&ClaimRef, R),
) -> Result<(), String> {
    let (mut problem, mut answered, name) = (None, 0, method.name());
    for (uid, result) in answer {
        let Some(claim) = asked.iter().find(|claim| claim.uid == uid) else {
            problem.get_or_insert(format!("{name} returned result for unknown claim UID {uid}"));
            continue;
        };
        answered += 1;
        let error = error_of(&result);
        if error.is_empty() {
            done(claim, result);
        } else {
            problem.get_or_insert(format!("{name} failed for ResourceClaim {}: {error}", claim.key.1));
        }
    }
    let skipped = asked.len().saturating_sub(answered);
    if skipped > 0 {
        problem.get_or_insert(format!("{name} skipped {skipped} ResourceClaims"));
    }
    problem.map_or(Ok(()), Err)
}

fn request(claims: &[ClaimRef]) -> Claims {
    let claim = |claim: &ClaimRef| wire::Claim {
        namespace: claim.key.0.clone(),
        uid: claim.uid.clone(),
        name: claim.key.1.clone(),
    };
    Claims { claims: claims.iter().map(claim).collect() }
}

fn device(told: wire::Device) -> claims::Device {
    claims::Device {
        requests: told.request_names,
        pool: told.pool_name,
        device: told.device_name,
        cdi_ids: told.cdi_device_ids,
        share_id: told.share_id,
    }
}

/// One request to the API server.
async fn ask<T>(call: impl Future<Output = kube::Result<T>>) -> Result<T, String> {
    match tokio::time::timeout(API_DEADLINE, call).await {
        Ok(Err(kube::Error::Api(status))) => Err(status.message.clone()),
        Ok(answer) => answer.map_err(|error| crate::chain::chain(&error)),
        Err(_elapsed) => Err(format!("no answer of the API server within {} s", API_DEADLINE.as_secs())),
    }
}
