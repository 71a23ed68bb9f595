//! The set of pods on this node: admits new ones, runs one loop per pod, ends what nobody wants.
//!
//! Inputs: pod events from the API, the node object, the CRI audit's findings. Output: loops in the
//! [`PodDirectory`]. Decides only which pods there are; what happens to each is its loop's.

use std::collections::BTreeMap;
use std::sync::Arc;

use agent_core::admission::{Rejection, admit};
use agent_core::model::{DesiredPod, Fate};
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::context::PodContext;
use super::directory::{Entry, PodDirectory, PodView, Signals};
use super::fate::{fate_of, fate_of_gone, holds_resources, needs_admission, orphan};
use super::orphans::traces;
use super::worker::{self, WorkerInput};
use crate::events::EventType;
use crate::runtime::events::FoundPod;
use crate::sources::pods::PodEvent;

/// Runs the pods until `cancel`; the pods themselves go on.
pub async fn run(
    context: Arc<PodContext>,
    directory: PodDirectory,
    mut events: mpsc::Receiver<PodEvent>,
    cancel: CancellationToken,
) {
    let mut found = directory.found();
    let mut node = context.node.clone();
    let mut services = context.services.synced.clone();
    let mut manager = Manager {
        context,
        directory,
        pods: BTreeMap::new(),
        loops: JoinSet::new(),
        waiting_for_node: BTreeMap::new(),
        synced: false,
        cancel: cancel.clone(),
    };
    loop {
        // Each arm is cancel-safe: channels, watches, and join_next leave what was not taken.
        tokio::select! {
            () = cancel.cancelled() => break,
            event = events.recv() => match event {
                Some(event) => manager.take(event).await,
                None => break,
            },
            Ok(()) = node.changed() => manager.admit_waiting(),
            Ok(()) = services.changed() => manager.directory.wake_all(),
            Ok(()) = found.changed() => {
                let pods = found.borrow_and_update().clone();
                manager.end_orphans(&pods).await;
            }
            Some(ended) = manager.loops.join_next(), if !manager.loops.is_empty() => match ended {
                Ok(uid) => manager.forget(&uid),
                Err(error) => warn!(%error, "a pod's loop ended unexpectedly"),
            },
        }
    }
    while manager.loops.join_next().await.is_some() {}
}

struct Manager {
    context: Arc<PodContext>,
    directory: PodDirectory,
    pods: BTreeMap<String, Running>,
    loops: JoinSet<String>,
    waiting_for_node: BTreeMap<String, Arc<Pod>>,
    synced: bool,
    cancel: CancellationToken,
}

struct Running {
    pod: Arc<Pod>,
    rejection: Option<Rejection>,
    desired: watch::Sender<DesiredPod>,
}

impl Manager {
    async fn take(&mut self, event: PodEvent) {
        match event {
            PodEvent::Apply(pod) => self.apply(pod),
            PodEvent::Delete(pod) => self.delete(&pod),
            PodEvent::Synced(pods) => {
                let listed: Vec<String> = pods.iter().filter_map(|pod| pod.metadata.uid.clone()).collect();
                let missing: Vec<Arc<Pod>> = self
                    .pods
                    .iter()
                    .filter(|(uid, _)| !listed.contains(uid))
                    .map(|(_, running)| Arc::clone(&running.pod))
                    .collect();
                for pod in pods {
                    self.apply(pod);
                }
                for pod in &missing {
                    self.delete(pod);
                }
                self.synced = true;
                let found = self.directory.found().borrow().clone();
                self.end_orphans(&found).await;
            }
        }
    }

    fn apply(&mut self, pod: Arc<Pod>) {
        let Some(uid) = pod.metadata.uid.clone() else { return };
        if let Some(running) = self.pods.get_mut(&uid) {
            running.pod = Arc::clone(&pod);
            let fate = fate_of(&pod, running.rejection.as_ref());
            running.desired.send_replace(DesiredPod { pod, fate });
            return;
        }
        if needs_admission(&pod) && self.context.node.borrow().is_none() {
            self.waiting_for_node.insert(uid, pod);
            return;
        }
        self.waiting_for_node.remove(&uid);
        let rejection = if needs_admission(&pod) { self.reject(&pod) } else { None };
        let fate = fate_of(&pod, rejection.as_ref());
        self.start(uid, pod, fate, rejection);
    }

    fn reject(&self, pod: &Pod) -> Option<Rejection> {
        let node = self.context.node.borrow().clone()?;
        let others: Vec<Arc<Pod>> = self
            .pods
            .values()
            .filter(|running| running.rejection.is_none() && holds_resources(&running.pod))
            .map(|running| Arc::clone(&running.pod))
            .collect();
        let rejection = admit(pod, &node, &others, &self.context.config.allowed_unsafe_sysctls).err()?;
        let events = &self.context.events;
        events.pod(pod, None, EventType::Warning, &rejection.reason, rejection.message.clone());
        Some(rejection)
    }

    fn delete(&mut self, pod: &Arc<Pod>) {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        self.waiting_for_node.remove(&uid);
        if let Some(running) = self.pods.get_mut(&uid) {
            let fate = fate_of_gone(pod);
            running.desired.send_replace(DesiredPod { pod: Arc::clone(pod), fate });
        }
    }

    fn admit_waiting(&mut self) {
        for pod in std::mem::take(&mut self.waiting_for_node).into_values() {
            self.apply(pod);
        }
    }

    /// Ends pods that left traces here and are not the API's. Only after its list: before, every pod would be one.
    async fn end_orphans(&mut self, found: &[FoundPod]) {
        if !self.synced {
            return;
        }
        for trace in traces(&self.context, found).await {
            if self.pods.contains_key(&trace.uid) || self.waiting_for_node.contains_key(&trace.uid) {
                continue;
            }
            info!(namespace = %trace.namespace, pod = %trace.name, uid = %trace.uid, "ending a pod that the API does not have");
            let (pod, fate) = orphan(&trace);
            self.start(trace.uid, Arc::new(pod), fate, None);
        }
    }

    fn start(&mut self, uid: String, pod: Arc<Pod>, fate: Fate, rejection: Option<Rejection>) {
        let (desired, inbox) = watch::channel(DesiredPod { pod: Arc::clone(&pod), fate });
        let view = PodView {
            pod: Arc::clone(&pod),
            status: Arc::new(pod.status.clone().unwrap_or_default()),
            ..PodView::default()
        };
        let (view_sender, view) = watch::channel(view);
        let signals = watch::Sender::new(Signals::default());
        self.directory.insert(&uid, Entry { signals: signals.clone(), view });
        let input = WorkerInput {
            context: Arc::clone(&self.context),
            desired: inbox,
            signals,
            view: view_sender,
            cancel: self.cancel.clone(),
        };
        let name = uid.clone();
        self.loops.spawn(async move {
            worker::run(input).await;
            name
        });
        self.pods.insert(uid, Running { pod, rejection, desired });
    }

    fn forget(&mut self, uid: &str) {
        self.pods.remove(uid);
        self.directory.remove(uid);
    }
}
