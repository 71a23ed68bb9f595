//! Device plugins: registers them, follows what devices they have, and gives devices to containers.
//!
//! Inputs: plugins on `<rootDir>/device-plugins/kubelet.sock` (API v1beta1), containers about to start. Outputs: variables,
//! mounts, device nodes and annotations for these, counts for the node's status, and the pod-resources API on
//! `<rootDir>/pod-resources/kubelet.sock`. What a container was given is on disk before it starts, so that neither a restart
//! of the agent nor of the plugin changes it. Who gets what is decided by [`agent_core::devices`].

mod checkpoint;
mod pod_resources;
mod server;
mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_core::devices::{Device, Grant, Holder, Ledger, Offer, TooFew};
use agent_core::health;
use agent_core::numa::{Hints, Nodes};
use anyhow::Context as _;
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, ResourceStatus};
use prost::Message as _;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::transport::Channel;
use tracing::{info, warn};

use self::wire::{
    AllocateRequest, AllocateResponse, ContainerAnswer, DeviceIds, DeviceList, Empty, Options,
    PreferredContainer, PreferredRequest, PreferredResponse, RegisterRequest,
};
use crate::contracts::PodLookup;
use crate::dra::Dra;
use crate::numa::Numa;

/// Deadline of a call to a plugin.
const DEADLINE: Duration = Duration::from_secs(10);
/// Deadline of calls that may prepare a device.
const PREPARE_DEADLINE: Duration = Duration::from_secs(30);
/// How long the devices of a plugin that went are still counted, as upstream.
const REMEMBERED: Duration = Duration::from_secs(300);
/// Plugins at most; nobody has so many.
const MAX_PLUGINS: usize = 256;

/// Devices of every resource: how many there are, and how many can be given away.
pub type Counts = BTreeMap<String, (u64, u64)>;

/// What a container needs for its devices.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Allocation {
    /// Environment variables.
    pub variables: BTreeMap<String, String>,
    /// Path in the container, path on the node, read-only.
    pub mounts: Vec<(String, String, bool)>,
    /// Path in the container, path on the node, permissions.
    pub devices: Vec<(String, String, String)>,
    /// Annotations of the container at the runtime.
    pub annotations: BTreeMap<String, String>,
    /// Fully qualified names of CDI devices.
    pub cdi_devices: Vec<String>,
}

/// The device manager. Clones share it.
#[derive(Clone)]
pub struct Devices(Arc<Inner>);

struct Inner {
    directory: PathBuf,
    state: Mutex<State>,
    counts: watch::Sender<Counts>,
    /// Counts what plugins told of their devices.
    health_changes: watch::Sender<u64>,
    /// One allocation at a time: a plugin is asked between the look at what is free and the grant.
    choosing: tokio::sync::Mutex<()>,
    /// One writer of the file at a time, so that the last to come writes the last state.
    saving: tokio::sync::Mutex<()>,
    cancel: CancellationToken,
}

#[derive(Default)]
struct State {
    ledger: Ledger,
    plugins: BTreeMap<String, Plugin>,
}

struct Plugin {
    channel: Channel,
    options: Options,
    /// Ends the task that follows its devices.
    follow: CancellationToken,
}

impl Devices {
    /// The manager of the devices of `<root_dir>`, with what earlier ones gave away. `cancel` ends what follows plugins.
    pub fn load(root_dir: &Path, cancel: CancellationToken) -> Self {
        let directory = root_dir.join("device-plugins");
        let ledger = checkpoint::load(&directory, root_dir);
        let counts = watch::Sender::new(ledger.counts());
        let state = Mutex::new(State { ledger, plugins: BTreeMap::new() });
        let (choosing, saving) = (tokio::sync::Mutex::default(), tokio::sync::Mutex::default());
        let health_changes = watch::Sender::default();
        Self(Arc::new(Inner { directory, state, counts, health_changes, choosing, saving, cancel }))
    }

    /// Devices of every resource, as they change.
    pub fn counts(&self) -> watch::Receiver<Counts> {
        self.0.counts.subscribe()
    }

    /// Changes when plugins tell of their devices.
    pub fn health_changes(&self) -> watch::Receiver<u64> {
        self.0.health_changes.subscribe()
    }

    /// What the container's status says of its devices.
    pub fn health(&self, pod_uid: &str, container: &str) -> Vec<ResourceStatus> {
        let holder: Holder = (pod_uid.to_owned(), container.to_owned());
        health::of_plugins(&self.state().ledger, &holder)
    }

    /// Uids of pods that have devices.
    pub fn holders(&self) -> BTreeSet<String> {
        self.state().ledger.grants().map(|(holder, ..)| holder.0.clone()).collect()
    }

    /// Serves registration and the pod-resources API until `cancel`.
    pub async fn run(
        self,
        root_dir: PathBuf,
        pods: Arc<dyn PodLookup>,
        (numa, claims): (Numa, Dra),
        cancel: CancellationToken,
    ) -> anyhow::Result<()> {
        let directory = self.0.directory.clone();
        // Sockets of plugins that registered with an earlier agent: they make theirs anew when ours is made anew.
        tokio::task::spawn_blocking(move || checkpoint::remove_sockets(&directory))
            .await?
            .with_context(|| format!("cannot clear {}", self.0.directory.display()))?;
        let plugins = self.0.directory.join("kubelet.sock");
        let resources = root_dir.join("pod-resources/kubelet.sock");
        let registration = server::Registration(self.clone());
        let lister = server::PodResourcesLister { devices: self, pods, numa, claims };
        tokio::try_join!(
            server::serve(&plugins, registration, cancel.clone()),
            server::serve(&resources, lister, cancel),
        )?;
        Ok(())
    }

    /// What the container needs, after choosing and reserving where this has not happened before.
    pub async fn allocate(&self, pod: &Pod, container: &Container) -> Result<Allocation, String> {
        let wanted = self.state().ledger.wanted(container);
        if wanted.is_empty() {
            return Ok(Allocation::default());
        }
        let holder: Holder = (pod.metadata.uid.clone().unwrap_or_default(), container.name.clone());
        let choosing = self.0.choosing.lock().await;
        for (resource, count) in &wanted {
            let known = self.state().ledger.granted(&holder).any(|(name, _)| name == resource);
            if !known {
                self.choose(pod, &holder, resource, *count).await?;
                if let Err(problem) = self.save().await {
                    // Else the next try would take it for one that is on disk.
                    self.state().ledger.revoke(&holder, resource);
                    return Err(problem);
                }
            }
        }
        drop(choosing);
        self.prepare(&holder).await?;
        let mut allocation = Allocation::default();
        let ledger = self.ledger();
        for (_, grant) in ledger.granted(&holder) {
            let answer = ContainerAnswer::decode(grant.answer.as_slice()).unwrap_or_default();
            allocation.add(answer);
        }
        Ok(allocation)
    }

    /// The pod is over: its devices are free.
    pub async fn release(&self, pod_uid: &str) {
        let had_some = self.state().ledger.release(pod_uid);
        if had_some && let Err(problem) = self.save().await {
            warn!("{problem}");
        }
    }

    /// A copy of who has what.
    fn ledger(&self) -> Ledger {
        self.state().ledger.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn save(&self) -> Result<(), String> {
        let _alone = self.0.saving.lock().await;
        let (directory, ledger) = (self.0.directory.clone(), self.ledger());
        let saved = tokio::task::spawn_blocking(move || checkpoint::save(&directory, &ledger)).await;
        saved
            .map_err(std::io::Error::other)
            .and_then(|saved| saved)
            .map_err(|error| format!("cannot write down who has which device: {error}"))
    }

    fn plugin(&self, resource: &str) -> Option<(Channel, Options)> {
        self.state().plugins.get(resource).map(|plugin| (plugin.channel.clone(), plugin.options))
    }

    /// Chooses devices, asks the plugin for them, and notes the grant in memory.
    async fn choose(&self, pod: &Pod, holder: &Holder, resource: &str, count: u64) -> Result<(), String> {
        let spec = pod.spec.clone().unwrap_or_default();
        let (channel, options) =
            self.plugin(resource).ok_or_else(|| format!("no device plugin is registered for {resource}"))?;
        let (mut ids, offer) = self.to_choose_from(resource, holder, &spec, count)?;
        if options.get_preferred_allocation_available {
            let must_include = offer.own.iter().take(usize::try_from(count).unwrap_or(usize::MAX));
            let request = PreferredRequest {
                containers: vec![PreferredContainer {
                    available: offer.available.iter().cloned().collect(),
                    must_include: must_include.cloned().collect(),
                    size: i32::try_from(count).unwrap_or(i32::MAX),
                }],
            };
            let answer: Result<PreferredResponse, Status> =
                wire::unary(&channel, wire::PREFERRED, request, DEADLINE).await;
            // A preference: without a usable one the devices chosen here are as good.
            let preferred = answer.ok().and_then(|answer| answer.containers.into_iter().next());
            let preferred = preferred.map(|preferred| preferred.ids.into_iter().collect());
            if let Some(preferred) = preferred.filter(|preferred| offer.accepts(preferred, count)) {
                ids = preferred;
            }
        }
        let request = AllocateRequest { containers: vec![DeviceIds { ids: ids.iter().cloned().collect() }] };
        let answer: AllocateResponse = wire::unary(&channel, wire::ALLOCATE, request, PREPARE_DEADLINE)
            .await
            .map_err(|status| format!("the device plugin of {resource} refused: {}", status.message()))?;
        let answer = answer.containers.into_iter().next().unwrap_or_default().encode_to_vec();
        self.state().ledger.grant(holder.clone(), resource, Grant { ids, answer });
        Ok(())
    }

    /// Devices that would do, and those that a plugin may prefer to them.
    fn to_choose_from(
        &self,
        resource: &str,
        holder: &Holder,
        spec: &PodSpec,
        count: u64,
    ) -> Result<(BTreeSet<String>, Offer), String> {
        let state = self.state();
        let offer = state.ledger.offer(resource, holder, spec);
        if let Some(promised) = state.ledger.promised(resource, holder, &offer) {
            return Ok(promised);
        }
        let available = offer.available.len();
        let too_few = || TooFew { resource: resource.to_owned(), requested: count, available }.to_string();
        Ok((offer.choose(count).ok_or_else(too_few)?, offer))
    }

    /// The NUMA nodes, of all that there are, that could give a container its devices, or, without one, all of the pod's.
    pub fn hints(&self, pod: &Pod, container: Option<&Container>, all: Nodes) -> Vec<Hints> {
        let Some(spec) = &pod.spec else { return Vec::new() };
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let state = self.state();
        match container {
            Some(container) => state.ledger.hints(&(uid, container.name.clone()), container, spec, all),
            None => state.ledger.hints_of_pod(&uid, spec, all),
        }
    }

    /// Promises a container its devices, those near some NUMA nodes before others.
    pub fn promise(&self, pod: &Pod, container: &Container, near: Option<Nodes>) -> Result<(), String> {
        let Some(spec) = &pod.spec else { return Ok(()) };
        let holder = (pod.metadata.uid.clone().unwrap_or_default(), container.name.clone());
        let promised = self.state().ledger.promise(&holder, container, spec, near);
        promised.map_err(|problem| problem.to_string())
    }

    /// The pod was not admitted: what it was promised is free.
    pub fn take_back(&self, pod_uid: &str) {
        self.state().ledger.take_back(pod_uid);
    }

    /// Whether one of the pod's containers has devices.
    pub fn has(&self, pod_uid: &str) -> bool {
        self.state().ledger.has(pod_uid)
    }

    /// Tells plugins that want to know before each start of a container.
    async fn prepare(&self, holder: &Holder) -> Result<(), String> {
        let granted: Vec<(String, Vec<String>)> = {
            let state = self.state();
            let granted = state.ledger.granted(holder);
            granted.map(|(name, grant)| (name.to_owned(), grant.ids.iter().cloned().collect())).collect()
        };
        for (resource, ids) in granted {
            let Some((channel, options)) = self.plugin(&resource) else { continue };
            if options.pre_start_required {
                let told: Result<Empty, Status> =
                    wire::unary(&channel, wire::PRE_START, DeviceIds { ids }, PREPARE_DEADLINE).await;
                told.map_err(|status| {
                    format!("device plugin PreStartContainer of {resource} failed: {}", status.message())
                })?;
            }
        }
        Ok(())
    }

    /// Takes a plugin in, in place of an earlier one of the same resource.
    fn register(&self, request: RegisterRequest) -> Result<(), Status> {
        check(&request)?;
        let RegisterRequest { resource_name: resource, endpoint, options, .. } = request;
        let channel = wire::channel(self.0.directory.join(&endpoint));
        let follow = self.0.cancel.child_token();
        {
            let mut state = self.state();
            if state.plugins.len() >= MAX_PLUGINS && !state.plugins.contains_key(&resource) {
                return Err(Status::resource_exhausted(format!("more than {MAX_PLUGINS} device plugins")));
            }
            let plugin = Plugin {
                channel: channel.clone(),
                options: options.unwrap_or_default(),
                follow: follow.clone(),
            };
            if let Some(former) = state.plugins.insert(resource.clone(), plugin) {
                former.follow.cancel();
            }
        }
        info!(%resource, %endpoint, "device plugin registered");
        let devices = self.clone();
        tokio::spawn(async move {
            // Cancel-safe: what was told is in the ledger, the rest is told again by the next plugin.
            tokio::select! {
                () = follow.cancelled() => {}
                () = devices.follow(&channel, &resource, &follow) => {}
            }
        });
        Ok(())
    }

    /// Follows a plugin's devices until it goes, and forgets these some time later.
    async fn follow(&self, channel: &Channel, resource: &str, replaced: &CancellationToken) {
        let ended =
            match wire::stream::<_, DeviceList>(channel, wire::LIST_AND_WATCH, Empty {}, DEADLINE).await {
                Ok(mut lists) => loop {
                    match lists.message().await {
                        Ok(Some(list)) => {
                            let devices = list.devices.into_iter().map(device).collect();
                            self.state().ledger.set_devices(resource, devices);
                            self.publish();
                        }
                        Ok(None) => break "it ended the list of its devices".to_owned(),
                        Err(status) => break status.message().to_owned(),
                    }
                },
                Err(status) => status.message().to_owned(),
            };
        warn!(%resource, reason = %ended, "device plugin is away");
        self.state().ledger.set_unhealthy(resource);
        self.publish();
        tokio::time::sleep(REMEMBERED).await;
        let mut state = self.state();
        // Another plugin may have come for it this very moment.
        if replaced.is_cancelled() {
            return;
        }
        state.plugins.remove(resource);
        state.ledger.clear(resource);
        drop(state);
        self.publish();
    }

    fn publish(&self) {
        let counts = self.state().ledger.counts();
        self.0.counts.send_if_modified(|known| {
            let changed = *known != counts;
            *known = counts;
            changed
        });
        self.0.health_changes.send_modify(|changes| *changes += 1);
    }
}

impl Allocation {
    fn add(&mut self, answer: ContainerAnswer) {
        self.variables.extend(answer.envs);
        let mounts = answer.mounts.into_iter();
        self.mounts.extend(mounts.map(|mount| (mount.container_path, mount.host_path, mount.read_only)));
        let devices = answer.devices.into_iter();
        self.devices
            .extend(devices.map(|device| (device.container_path, device.host_path, device.permissions)));
        self.annotations.extend(answer.annotations);
        self.cdi_devices.extend(answer.cdi_devices.into_iter().map(|device| device.name));
    }
}

fn device(told: wire::PluginDevice) -> (String, Device) {
    let nodes = told.topology.map(|topology| topology.nodes.into_iter().map(|node| node.id).collect());
    (told.id, Device { healthy: told.health == wire::HEALTHY, nodes: nodes.unwrap_or_default() })
}

/// Only plugins that can be called, for resources that nobody else has.
fn check(request: &RegisterRequest) -> Result<(), Status> {
    let name = &request.resource_name;
    if request.version != wire::VERSION {
        return Err(Status::invalid_argument(format!(
            "requested API version {:?} is not supported by kubelet. Supported versions are [{:?}]",
            request.version,
            wire::VERSION
        )));
    }
    let is_extended = name.split_once('/').is_some_and(|(domain, rest)| {
        let is_native = domain == "kubernetes.io" || domain.ends_with(".kubernetes.io");
        let good = |text: &str| {
            !text.is_empty()
                && text.len() <= 253
                && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
        };
        !is_native && !domain.starts_with("requests.") && good(domain) && good(rest)
    });
    if !is_extended {
        return Err(Status::invalid_argument(format!(
            "the ResourceName {name:?} is invalid: expected domain/name outside kubernetes.io"
        )));
    }
    let is_file =
        Path::new(&request.endpoint).file_name().is_some_and(|file| file == request.endpoint.as_str());
    if !is_file {
        return Err(Status::invalid_argument(format!(
            "the endpoint {:?} is not the name of a socket beside kubelet.sock",
            request.endpoint
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
