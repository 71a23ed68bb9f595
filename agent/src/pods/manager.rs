//! The set of pods on this node: admits new ones, runs one loop per pod, ends what nobody wants.
//!
//! Inputs: pod events from the API and the static sources, the node object, evictions, the CRI audit's findings. Output:
//! loops in the [`PodDirectory`], and what is to be mirrored. Decides only which pods there are; what happens to each is its
//! loop's.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use agent_core::admission::{Rejection, admit};
use agent_core::eviction;
use agent_core::fate::{Verdict, fate_of, fate_of_gone, fate_of_removed, holds_resources, needs_admission};
use agent_core::model::{DesiredPod, Fate, is_static};
use agent_core::resize::{Blocked, check, grows, holding, pending};
use agent_core::shutdown;
use agent_core::status::sync::version;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::context::PodContext;
use super::directory::{Entry, PodDirectory, PodView, Signals};
use super::orphans::{orphan, traces};
use super::worker::{self, WorkerInput};
use crate::events::EventType;
use crate::runtime::events::FoundPod;
use crate::sources::mirrors::{Mirrors, PodKey, key, mirror_of};
use crate::sources::pods::{PodEvent, StaticSource};

/// A pod that has to go because the node needs what it uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Eviction {
    /// Which pod.
    pub uid: String,
    /// `Evicted` or `Preempting`.
    pub reason: &'static str,
    /// Why, for its status and event.
    pub message: String,
    /// Seconds for its containers to end.
    pub grace: i64,
}

/// What the manager listens to.
pub struct Inbox {
    /// From the API server and the static sources.
    pub events: mpsc::Receiver<PodEvent>,
    /// From whoever watches over the node.
    pub evictions: mpsc::Receiver<Eviction>,
    /// Where static pods are expected from: nothing is an orphan before all of these were read.
    pub expects_static: BTreeSet<StaticSource>,
    /// Told which static pods the API has to show.
    pub mirrors: watch::Sender<Mirrors>,
}

/// Runs the pods until `cancel`; the pods themselves go on.
pub async fn run(context: Arc<PodContext>, directory: PodDirectory, inbox: Inbox, cancel: CancellationToken) {
    let Inbox { mut events, mut evictions, expects_static, mirrors } = inbox;
    let mut found = directory.found();
    let mut node = context.node.clone();
    let mut services = context.services.synced.clone();
    let mut manager = Manager {
        context,
        directory,
        pods: BTreeMap::new(),
        loops: JoinSet::new(),
        waiting_for_node: BTreeMap::new(),
        waiting_statics: Vec::new(),
        mirrors,
        synced: false,
        lists: 0,
        statics: BTreeMap::new(),
        expects_static,
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
            Some(eviction) = evictions.recv() => manager.evict(&eviction),
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
    /// Static pods whose predecessors of the same name have not ended.
    waiting_statics: Vec<Arc<Pod>>,
    mirrors: watch::Sender<Mirrors>,
    synced: bool,
    /// Lists of the API so far.
    lists: u64,
    /// What each source of static pods said last.
    statics: BTreeMap<StaticSource, Vec<Arc<Pod>>>,
    /// Sources that have not said anything.
    expects_static: BTreeSet<StaticSource>,
    cancel: CancellationToken,
}

struct Running {
    pod: Arc<Pod>,
    /// The pod as the node last let it through: what counts for others while a resize of it waits.
    held: Arc<Pod>,
    verdict: Option<Verdict>,
    /// Why it cannot grow now.
    blocked: Option<Blocked>,
    desired: watch::Sender<DesiredPod>,
}

impl Running {
    /// Whether its object has gone: it ends, whatever else happens.
    fn is_gone(&self) -> bool {
        matches!(self.desired.borrow().fate, Fate::Terminate { gone: true, .. })
    }
}

impl Manager {
    async fn take(&mut self, event: PodEvent) {
        match event {
            PodEvent::Apply(pod) if mirror_of(&pod).is_some() => self.show(pod),
            PodEvent::Delete(pod) if mirror_of(&pod).is_some() => self.unshow(&pod),
            PodEvent::Apply(pod) => self.apply(pod),
            PodEvent::Delete(pod) => self.delete(&pod),
            PodEvent::Synced(pods) => {
                self.lists += 1;
                let (shown, pods): (Vec<_>, Vec<_>) =
                    pods.into_iter().partition(|pod| mirror_of(pod).is_some());
                let listed: Vec<String> = pods.iter().filter_map(|pod| pod.metadata.uid.clone()).collect();
                let missing: Vec<Arc<Pod>> = self
                    .pods
                    .iter()
                    .filter(|(uid, running)| !listed.contains(uid) && !is_static(&running.pod))
                    .map(|(_, running)| Arc::clone(&running.pod))
                    .collect();
                for pod in pods {
                    self.apply(pod);
                }
                for pod in &missing {
                    self.delete(pod);
                }
                let shown = shown.into_iter().map(|pod| (key(&pod), pod)).collect();
                let no_statics = self.expects_static.is_empty();
                self.mirrors.send_modify(|state| {
                    state.shown = Some(shown);
                    if no_statics {
                        state.statics.get_or_insert_default();
                    }
                });
                self.hand_out_mirrors();
                self.synced = true;
                self.end_orphans_now().await;
            }
            PodEvent::Static(source, pods) => {
                self.statics.insert(source, pods);
                self.expects_static.remove(&source);
                self.take_statics();
                self.end_orphans_now().await;
            }
        }
    }

    fn apply(&mut self, pod: Arc<Pod>) {
        let Some(uid) = pod.metadata.uid.clone() else { return };
        if self.pods.contains_key(&uid) {
            self.change(&uid, pod);
            return;
        }
        if needs_admission(&pod) && self.context.node.borrow().is_none() {
            self.waiting_for_node.insert(uid, pod);
            return;
        }
        self.waiting_for_node.remove(&uid);
        let rejection = if needs_admission(&pod) { self.reject(&pod) } else { None };
        let verdict = rejection.map(|rejection| Verdict { rejection, grace: None });
        let fate = fate_of(&pod, verdict.as_ref());
        self.start(uid, DesiredPod::new(pod, fate), verdict);
    }

    /// A pod with a loop is another one now.
    fn change(&mut self, uid: &str, pod: Arc<Pod>) {
        let others = self.holders_beside(uid);
        let node = self.context.node.borrow().clone();
        let Some(running) = self.pods.get_mut(uid) else { return };
        let is_deleted = |pod: &Pod| pod.metadata.deletion_timestamp.is_some();
        let is_told_to_end = is_deleted(&pod) && !is_deleted(&running.pod);
        // What a list says is so: where its versions are lower, the database was restored. A deletion is new in any case.
        let is_listed = running.desired.borrow().list != self.lists;
        if version(&pod) < version(&running.pod) && !is_told_to_end && !is_listed {
            // A server that is behind tells of a pod that was: nothing of that is to happen again.
            debug!(%uid, "an older state of a pod is ignored");
            return;
        }
        if let (Some(new), Some(old)) = (&pod.spec, &running.pod.spec) {
            let asks = running.blocked.is_some() || grows(new, old);
            match node {
                Some(node) if asks => running.blocked = check(&pod, &node, &others),
                // Nobody can say yet; what waits goes on waiting.
                _ => {}
            }
        }
        if running.blocked.is_none() {
            running.held = Arc::clone(&pod);
        }
        running.pod = Arc::clone(&pod);
        let mut desired = DesiredPod::new(pod, fate_of(&running.pod, running.verdict.as_ref()));
        desired.resize_blocked.clone_from(&running.blocked);
        desired.list = self.lists;
        running.desired.send_replace(desired);
    }

    /// A pod has gone: there may be room for another to grow.
    fn unblock(&mut self) {
        let waits = |running: &Running| running.blocked.is_some() && !running.is_gone();
        let blocked = self.pods.iter().filter(|(_, running)| waits(running));
        let blocked: Vec<(String, Arc<Pod>)> =
            blocked.map(|(uid, running)| (uid.clone(), Arc::clone(&running.pod))).collect();
        for (uid, pod) in blocked {
            self.change(&uid, pod);
        }
    }

    fn reject(&mut self, pod: &Pod) -> Option<Rejection> {
        let rejection = self.refusal(pod)?;
        let events = &self.context.events;
        events.pod(pod, None, EventType::Warning, &rejection.reason, rejection.message.clone());
        Some(rejection)
    }

    fn refusal(&mut self, pod: &Pod) -> Option<Rejection> {
        let pressures = self.context.pressures.borrow().clone();
        if *self.context.going_down.borrow() {
            return Some(Rejection {
                reason: shutdown::REJECTED.to_owned(),
                message: shutdown::REJECTED_MESSAGE.to_owned(),
            });
        }
        if let Err(rejection) = eviction::admit(pod, &pressures) {
            return Some(rejection);
        }
        let node = self.context.node.borrow().clone()?;
        let others = self.holders();
        let admitted = admit(pod, &node, &others, &self.context.config.allowed_unsafe_sysctls);
        if let Err(rejection) = admitted {
            // Those that go for it hold what it needs a moment longer.
            let makes_room = eviction::is_critical(pod) && self.preempt(pod, &node, &others);
            return (!makes_room).then_some(rejection);
        }
        // The last check: what it promises is held until the pod is over.
        self.context.numa.admit(pod).err()
    }

    /// Pods that hold resources.
    fn holders(&self) -> Vec<Arc<Pod>> {
        self.holders_beside("")
    }

    fn holders_beside(&self, uid: &str) -> Vec<Arc<Pod>> {
        self.pods
            .iter()
            .filter(|(other, running)| {
                *other != uid && running.verdict.is_none() && holds_resources(&running.pod)
            })
            .map(|(_, running)| Arc::clone(&running.held))
            .collect()
    }

    /// Makes room for a pod that the node cannot do without. False when that is not possible.
    fn preempt(&mut self, pod: &Pod, node: &k8s_openapi::api::core::v1::Node, others: &[Arc<Pod>]) -> bool {
        let sysctls = &self.context.config.allowed_unsafe_sysctls;
        let Some(victims) = agent_core::admission::victims(pod, node, others, sysctls) else { return false };
        for uid in victims {
            self.evict(&Eviction {
                uid,
                reason: "Preempting",
                message: "Preempted in order to admit critical pod".to_owned(),
                grace: 1,
            });
        }
        true
    }

    fn evict(&mut self, eviction: &Eviction) {
        let Some(running) = self.pods.get_mut(&eviction.uid) else { return };
        let ending = running.is_gone() || fate_of(&running.pod, running.verdict.as_ref()) != Fate::Run;
        if ending {
            return;
        }
        let metadata = &running.pod.metadata;
        info!(namespace = ?metadata.namespace, pod = ?metadata.name, message = %eviction.message, "pod evicted");
        let events = &self.context.events;
        events.pod(&running.pod, None, EventType::Warning, eviction.reason, eviction.message.clone());
        let rejection = Rejection { reason: eviction.reason.to_owned(), message: eviction.message.clone() };
        running.verdict = Some(Verdict { rejection, grace: Some(eviction.grace) });
        let fate = fate_of(&running.pod, running.verdict.as_ref());
        running.desired.send_modify(|desired| desired.fate = fate);
    }

    fn delete(&mut self, pod: &Arc<Pod>) {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        self.waiting_for_node.remove(&uid);
        if let Some(running) = self.pods.get_mut(&uid) {
            let mut desired = DesiredPod::new(Arc::clone(pod), fate_of_gone(pod));
            desired.list = self.lists;
            running.desired.send_replace(desired);
        }
    }

    /// The static pods are those of all sources and no others.
    fn take_statics(&mut self) {
        let mut by_name = BTreeMap::new();
        for pod in self.statics.values().flatten() {
            by_name.entry(key(pod)).or_insert_with(|| Arc::clone(pod));
        }
        let pods: Vec<Arc<Pod>> = by_name.values().cloned().collect();
        let all_known = self.expects_static.is_empty();
        let wanted = |uid: &str| pods.iter().any(|pod| pod.metadata.uid.as_deref() == Some(uid));
        for (uid, running) in &self.pods {
            if all_known && is_static(&running.pod) && !wanted(uid) {
                let fate = fate_of_removed(&running.pod);
                running.desired.send_modify(|desired| desired.fate = fate);
            }
        }
        self.mirrors.send_modify(|state| {
            if all_known {
                state.statics = Some(by_name);
            }
        });
        self.waiting_statics = pods;
        self.start_statics();
    }

    /// Starts static pods that wait, but for those whose predecessor of the same name has not ended.
    fn start_statics(&mut self) {
        let mut waiting = Vec::new();
        for pod in std::mem::take(&mut self.waiting_statics) {
            let uid = pod.metadata.uid.clone().unwrap_or_default();
            if let Some(running) = self.pods.get(&uid) {
                // One that was removed and put back starts anew when its end is over.
                if running.is_gone() {
                    waiting.push(pod);
                }
                continue;
            }
            let name = key(&pod);
            if self.pods.values().any(|running| is_static(&running.pod) && key(&running.pod) == name) {
                waiting.push(pod);
                continue;
            }
            info!(namespace = %name.0, pod = %name.1, "static pod");
            let known_node = self.context.node.borrow().clone();
            // What runs already was admitted before the agent was restarted.
            let runs = self.directory.found().borrow().iter().any(|found| found.uid == uid);
            let rejection = known_node.filter(|_| !runs).and_then(|_| self.reject(&pod));
            let verdict = rejection.map(|rejection| Verdict { rejection, grace: None });
            let mut desired = DesiredPod::new(Arc::clone(&pod), fate_of(&pod, verdict.as_ref()));
            desired.mirror = self.mirror_for(&pod);
            self.start(uid, desired, verdict);
        }
        self.waiting_statics = waiting;
    }

    /// The API's object that shows this very static pod.
    fn mirror_for(&self, pod: &Pod) -> Option<Arc<Pod>> {
        let state = self.mirrors.borrow();
        let mirror = state.shown.as_ref()?.get(&key(pod))?;
        (mirror_of(mirror) == pod.metadata.uid.as_deref()).then(|| Arc::clone(mirror))
    }

    fn show(&mut self, mirror: Arc<Pod>) {
        let name = key(&mirror);
        self.mirrors.send_modify(|state| {
            if let Some(shown) = &mut state.shown {
                shown.insert(name.clone(), mirror);
            }
        });
        self.hand_out_mirror(&name);
    }

    fn unshow(&mut self, mirror: &Pod) {
        let name = key(mirror);
        self.mirrors.send_modify(|state| {
            if let Some(shown) = &mut state.shown
                && shown.get(&name).is_some_and(|known| known.metadata.uid == mirror.metadata.uid)
            {
                shown.remove(&name);
            }
        });
        self.hand_out_mirror(&name);
    }

    fn hand_out_mirrors(&self) {
        let names: Vec<PodKey> = self
            .pods
            .values()
            .filter(|running| is_static(&running.pod))
            .map(|running| key(&running.pod))
            .collect();
        for name in &names {
            self.hand_out_mirror(name);
        }
    }

    /// Tells static pods of that name what shows them.
    fn hand_out_mirror(&self, name: &PodKey) {
        for running in
            self.pods.values().filter(|running| is_static(&running.pod) && key(&running.pod) == *name)
        {
            let mirror = self.mirror_for(&running.pod);
            running.desired.send_modify(|desired| (desired.mirror, desired.list) = (mirror, self.lists));
        }
    }

    fn admit_waiting(&mut self) {
        for pod in std::mem::take(&mut self.waiting_for_node).into_values() {
            self.apply(pod);
        }
    }

    async fn end_orphans_now(&mut self) {
        let found = self.directory.found().borrow().clone();
        self.end_orphans(&found).await;
    }

    /// Ends pods that left traces here and nobody wants. Only after every source has told: before, every pod would be one.
    async fn end_orphans(&mut self, found: &[FoundPod]) {
        if !self.synced || !self.expects_static.is_empty() {
            return;
        }
        for trace in traces(&self.context, found).await {
            let is_known = self.pods.contains_key(&trace.uid)
                || self.waiting_for_node.contains_key(&trace.uid)
                || self.waiting_statics.iter().any(|pod| pod.metadata.uid.as_ref() == Some(&trace.uid));
            if is_known {
                continue;
            }
            info!(namespace = %trace.namespace, pod = %trace.name, uid = %trace.uid, "ending a pod that nobody wants");
            let (pod, fate) = orphan(&trace);
            self.start(trace.uid, DesiredPod::new(Arc::new(pod), fate), None);
        }
    }

    fn start(&mut self, uid: String, mut first: DesiredPod, verdict: Option<Verdict>) {
        let pod = Arc::clone(&first.pod);
        // What an agent before this one refused is not done because of a restart.
        let blocked = pending(&pod);
        first.resize_blocked.clone_from(&blocked);
        first.list = self.lists;
        let (desired, inbox) = watch::channel(first);
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
        let held = holding(&pod);
        self.pods.insert(uid, Running { pod, held, verdict, blocked, desired });
    }

    fn forget(&mut self, uid: &str) {
        self.pods.remove(uid);
        self.directory.remove(uid);
        self.start_statics();
        self.unblock();
    }
}
