//! Finds pods by name or uid, for the kubelet API, and wakes their loops, for CRI events.
//!
//! The manager writes it, everybody reads it; a lock is held for single map operations only.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use agent_core::model::{ObservedContainer, ObservedPod, RunState};
use cri_shim_api::v1::{ContainerState, PodSandboxState};
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use tokio::sync::watch;

use crate::contracts::{ContainerRef, LookupError, PodLookup};
use crate::runtime::events::{Fingerprint, FoundPod, Waker};
use crate::upkeep::logs::RunningLog;

/// Counters that a loop compares with those it has seen: a signal is never lost and never counted twice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Signals {
    /// The CRI said something about the pod.
    pub cri: u64,
    /// A ConfigMap or Secret that it uses changed.
    pub objects: u64,
    /// Something general (services synced, runtime back).
    pub general: u64,
}

/// What a pod's loop last saw and said.
#[derive(Debug, Clone, Default)]
pub struct PodView {
    /// API object.
    pub pod: Arc<Pod>,
    /// Newest status.
    pub status: Arc<PodStatus>,
    /// Newest observation.
    pub observed: Arc<ObservedPod>,
}

/// A pod's entry.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Wakes the loop.
    pub signals: watch::Sender<Signals>,
    /// Published by the loop.
    pub view: watch::Receiver<PodView>,
}

/// All pods with a loop, by uid.
#[derive(Debug, Clone)]
pub struct PodDirectory {
    entries: Arc<RwLock<BTreeMap<String, Entry>>>,
    found: watch::Sender<Vec<FoundPod>>,
}

impl Default for PodDirectory {
    fn default() -> Self {
        Self { entries: Arc::default(), found: watch::Sender::new(Vec::new()) }
    }
}

impl PodDirectory {
    /// Adds or replaces an entry.
    pub fn insert(&self, uid: &str, entry: Entry) {
        self.entries.write().unwrap_or_else(PoisonError::into_inner).insert(uid.to_owned(), entry);
    }

    /// Removes an entry.
    pub fn remove(&self, uid: &str) {
        self.entries.write().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }

    /// Wakes every loop.
    pub fn wake_all(&self) {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        entries.values().for_each(|entry| entry.signals.send_modify(|signals| signals.general += 1));
    }

    /// Pods that the CRI has, by the last audit.
    pub fn found(&self) -> watch::Receiver<Vec<FoundPod>> {
        self.found.subscribe()
    }

    /// Logs of the containers that run.
    pub fn running_logs(&self) -> Vec<RunningLog> {
        let running = |view: &PodView| -> Vec<RunningLog> {
            let alive =
                view.observed.containers.iter().filter(|instance| instance.state == RunState::Running);
            alive
                .map(|instance| RunningLog {
                    id: instance.id.clone(),
                    path: PathBuf::from(&instance.log_path),
                })
                .collect()
        };
        self.views().iter().flat_map(running).collect()
    }

    /// Images of the pods that have not ended, those of image volumes among them, by the names that the pods give them.
    pub fn images(&self) -> BTreeSet<String> {
        let ended = |view: &PodView| matches!(view.status.phase.as_deref(), Some("Succeeded" | "Failed"));
        let mut images = BTreeSet::new();
        for view in self.views().into_iter().filter(|view| !ended(view)) {
            let Some(spec) = &view.pod.spec else { continue };
            images.extend(
                agent_core::model::containers(spec).filter_map(|entry| entry.container.image.clone()),
            );
            let volumes = spec.volumes.iter().flatten().filter_map(|volume| volume.image.as_ref());
            images.extend(volumes.filter_map(|source| source.reference.clone()));
        }
        images
    }

    /// What every pod's loop last saw and said.
    pub fn views(&self) -> Vec<PodView> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        entries.values().map(|entry| entry.view.borrow().clone()).collect()
    }

    /// Of two pods with one name (a deleted one and its successor) the newer.
    fn view(&self, namespace: &str, name: &str, uid: Option<&str>) -> Result<PodView, LookupError> {
        self.views()
            .into_iter()
            .filter(|view| {
                let metadata = &view.pod.metadata;
                metadata.namespace.as_deref() == Some(namespace)
                    && metadata.name.as_deref() == Some(name)
                    && uid.is_none_or(|uid| metadata.uid.as_deref() == Some(uid))
            })
            .max_by_key(|view| view.pod.metadata.creation_timestamp.as_ref().map(|time| time.0))
            .ok_or_else(|| LookupError::PodNotFound { namespace: namespace.to_owned(), pod: name.to_owned() })
    }

    fn instance(
        &self,
        (namespace, pod, uid): (&str, &str, Option<&str>),
        container: &str,
        age: usize,
    ) -> Result<ContainerRef, LookupError> {
        let view = self.view(namespace, pod, uid)?;
        let spec = view.pod.spec.clone().unwrap_or_default();
        let name = if container.is_empty() {
            spec.containers.first().map(|first| first.name.clone()).unwrap_or_default()
        } else {
            container.to_owned()
        };
        if agent_core::model::find_container(&spec, &name).is_none() {
            return Err(LookupError::ContainerNotFound { pod: pod.to_owned(), container: name });
        }
        let mut started =
            view.observed.instances(&name).filter(|instance| instance.state != RunState::Created);
        let instance = started.nth(age);
        drop(started);
        match (instance, age) {
            (Some(instance), _) => Ok(container_ref(&view.pod, instance)),
            (None, 0) => {
                let reason = waiting_reason(&view.status, &name);
                Err(LookupError::NotStarted { pod: pod.to_owned(), container: name, reason })
            }
            (None, _) => Err(LookupError::NoPrevious { pod: pod.to_owned(), container: name }),
        }
    }
}

fn container_ref(pod: &Pod, instance: &ObservedContainer) -> ContainerRef {
    ContainerRef {
        id: instance.id.clone(),
        pod_uid: pod.metadata.uid.clone().unwrap_or_default(),
        log_path: PathBuf::from(&instance.log_path),
        running: instance.state == RunState::Running,
    }
}

fn waiting_reason(status: &PodStatus, container: &str) -> String {
    let statuses = status
        .container_statuses
        .iter()
        .chain(&status.init_container_statuses)
        .chain(&status.ephemeral_container_statuses)
        .flatten();
    let waiting = statuses
        .into_iter()
        .find(|status| status.name == container)
        .and_then(|status| status.state.as_ref())
        .and_then(|state| state.waiting.as_ref());
    match waiting {
        // In upstream's words.
        Some(waiting) => match waiting.reason.as_deref() {
            Some("ErrImagePull") => "image can't be pulled".to_owned(),
            Some("ImagePullBackOff") => "trying and failing to pull image".to_owned(),
            reason => reason.unwrap_or("ContainerCreating").to_owned(),
        },
        None => "ContainerCreating".to_owned(),
    }
}

impl PodLookup for PodDirectory {
    fn pods(&self) -> Vec<Arc<Pod>> {
        let with_status = |view: PodView| {
            let mut pod = Arc::unwrap_or_clone(view.pod);
            pod.status = Some(Arc::unwrap_or_clone(view.status));
            Arc::new(pod)
        };
        self.views().into_iter().map(with_status).collect()
    }

    fn container(
        &self,
        namespace: &str,
        pod: &str,
        uid: Option<&str>,
        container: &str,
    ) -> Result<ContainerRef, LookupError> {
        self.instance((namespace, pod, uid), container, 0)
    }

    fn previous_container(
        &self,
        namespace: &str,
        pod: &str,
        uid: Option<&str>,
        container: &str,
    ) -> Result<ContainerRef, LookupError> {
        self.instance((namespace, pod, uid), container, 1)
    }

    fn sandbox(&self, namespace: &str, pod: &str, uid: Option<&str>) -> Result<String, LookupError> {
        let view = self.view(namespace, pod, uid)?;
        let ready = view.observed.sandboxes.iter().find(|sandbox| sandbox.ready);
        ready.map(|sandbox| sandbox.id.clone()).ok_or_else(|| LookupError::NotRunning { pod: pod.to_owned() })
    }
}

impl Waker for PodDirectory {
    fn wake(&self, uid: &str) {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = entries.get(uid) {
            entry.signals.send_modify(|signals| signals.cri += 1);
        }
    }

    fn found(&self, pods: Vec<FoundPod>) {
        self.found.send_replace(pods);
    }

    fn mistaken(&self, listed: &BTreeMap<String, Fingerprint>) -> Vec<String> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        let nothing = Fingerprint::new();
        let is_mistaken = |uid: &String, entry: &Entry| {
            fingerprint(&entry.view.borrow().observed) != *listed.get(uid).unwrap_or(&nothing)
        };
        let mistaken = entries.iter().filter(|(uid, entry)| is_mistaken(uid, entry));
        mistaken.map(|(uid, _)| uid.clone()).collect()
    }
}

/// What a list would say of the pod as it was seen.
fn fingerprint(observed: &ObservedPod) -> Fingerprint {
    let sandboxes = observed.sandboxes.iter().map(|sandbox| {
        let state =
            if sandbox.ready { PodSandboxState::SandboxReady } else { PodSandboxState::SandboxNotready };
        (sandbox.id.clone(), state as i32)
    });
    let containers = observed.containers.iter().map(|container| {
        let state = match container.state {
            RunState::Created => ContainerState::ContainerCreated,
            RunState::Running => ContainerState::ContainerRunning,
            RunState::Exited => ContainerState::ContainerExited,
            RunState::Unknown => ContainerState::ContainerUnknown,
        };
        (container.id.clone(), state as i32)
    });
    sandboxes.chain(containers).collect()
}

#[cfg(test)]
mod tests {
    use agent_core::model::ObservedSandbox;

    use super::*;

    #[test]
    fn a_pod_that_was_seen_otherwise_than_it_is_listed_is_mistaken() {
        let directory = PodDirectory::default();
        let sandbox = ObservedSandbox {
            id: "s".to_owned(),
            attempt: 0,
            ready: true,
            created_at: jiff::Timestamp::UNIX_EPOCH,
            ips: Vec::new(),
        };
        let observed = Arc::new(ObservedPod { sandboxes: vec![sandbox], ..ObservedPod::default() });
        let view = watch::channel(PodView { observed, ..PodView::default() }).1;
        directory.insert("u", Entry { signals: watch::Sender::new(Signals::default()), view });
        let listed = |state| BTreeMap::from([("u".to_owned(), BTreeMap::from([("s".to_owned(), state)]))]);
        assert_eq!(directory.mistaken(&listed(PodSandboxState::SandboxReady as i32)), [""; 0]);
        assert_eq!(directory.mistaken(&listed(PodSandboxState::SandboxNotready as i32)), ["u"]);
        assert_eq!(directory.mistaken(&BTreeMap::new()), ["u"]);
    }
}
