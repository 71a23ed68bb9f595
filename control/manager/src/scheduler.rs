//! The scheduler: binds pods without a node, as `control_decide::scheduler` decides.
//!
//! One task owns the cluster's state and the queue and schedules pods one after the other, in microseconds
//! each; a chosen node is accounted for at once and bound in the background, so that the next pod need not
//! wait for the API server and cannot overcommit the node either.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use control_decide::{
    object::{is_being_deleted, is_pod_terminal, pod_condition, pod_node, uid},
    scheduler::{is_gated, queue::SchedulingQueue, schedule, state::ClusterState},
};
use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{Binding, Node, ObjectReference, Pod},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Status, Time},
};
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::json;
use tokio::sync::{Notify, Semaphore};

use crate::{
    config::Controller,
    context::{Context, now, wait},
    events::{Severity, reference},
    informer::{Change, Key},
    write::{WriteError, call, chain},
};

const NAME: &str = "default-scheduler";
/// Bindings and status writes in flight at once.
const PARALLEL_WRITES: usize = 32;

#[derive(Default)]
struct State {
    cluster: ClusterState,
    queue: SchedulingQueue,
}

struct Scheduler {
    context: Arc<Context>,
    state: Mutex<State>,
    wake: Notify,
    writes: Arc<Semaphore>,
}

/// Registers the scheduler.
pub(crate) fn start(context: &Arc<Context>) {
    let scheduler = Arc::new(Scheduler {
        context: Arc::clone(context),
        state: Mutex::default(),
        wake: Notify::new(),
        writes: Arc::new(Semaphore::new(PARALLEL_WRITES)),
    });
    {
        let scheduler = Arc::clone(&scheduler);
        context.nodes.on_change(move |change| scheduler.observe_node(change));
    }
    {
        let scheduler = Arc::clone(&scheduler);
        context.pods.on_change(move |change| scheduler.observe_pod(change));
    }
    context.spawn(async move { scheduler.run().await });
}

/// True for pods that are ours to place.
fn is_pending(pod: &Pod) -> bool {
    let scheduler = pod.spec.as_ref().and_then(|spec| spec.scheduler_name.as_deref());
    pod_node(pod).is_none()
        && !is_pod_terminal(pod)
        && !is_being_deleted(&pod.metadata)
        && scheduler.unwrap_or(NAME) == NAME
}

/// True when the change of a node can make a pod fit that did not before.
fn may_help(old: Option<&Node>, new: &Node) -> bool {
    let Some(old) = old else { return true };
    let allocatable = |node: &Node| node.status.as_ref().and_then(|status| status.allocatable.clone());
    old.metadata.labels != new.metadata.labels || old.spec != new.spec || allocatable(old) != allocatable(new)
}

impl Scheduler {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn observe_node(&self, change: &Change<Node>) {
        let mut state = self.lock();
        match &change.new {
            Some(node) => {
                state.cluster.set_node(Arc::clone(node));
                if may_help(change.old.as_deref(), node) {
                    state.queue.cluster_changed(now());
                    self.wake.notify_one();
                }
            }
            None => state.cluster.remove_node(&change.key().name),
        }
    }

    fn observe_pod(&self, change: &Change<Pod>) {
        let mut state = self.lock();
        let freed = match (&change.new, &change.old) {
            (Some(pod), _) if is_pending(pod) => {
                state.queue.observe(Arc::clone(pod));
                self.wake.notify_one();
                false
            }
            (Some(pod), _) => {
                state.queue.remove(uid(&pod.metadata));
                state.cluster.observe_pod(pod)
            }
            (None, Some(pod)) => {
                state.queue.remove(uid(&pod.metadata));
                state.cluster.remove_pod(uid(&pod.metadata))
            }
            (None, None) => false,
        };
        if freed {
            state.queue.cluster_changed(now());
            self.wake.notify_one();
        }
    }

    async fn run(self: Arc<Self>) {
        self.context.nodes.wait_until_synced().await;
        self.context.pods.wait_until_synced().await;
        loop {
            // A permit first: what is popped can then be acted on without delay.
            let Ok(permit) = Arc::clone(&self.writes).acquire_owned().await else { return };
            let Some(attempt) = self.next_attempt() else {
                drop(permit);
                self.sleep().await;
                continue;
            };
            let scheduler = Arc::clone(&self);
            self.context.spawn(async move {
                scheduler.finish(attempt).await;
                drop(permit);
            });
        }
    }

    async fn sleep(&self) {
        let next_wake = self.lock().queue.next_wake();
        // Both arms are cancel-safe: the queue is looked at anew either way.
        match next_wake {
            Some(at) => tokio::select! {
                () = self.wake.notified() => {}
                () = tokio::time::sleep(wait(at.duration_since(now()))) => {}
            },
            None => self.wake.notified().await,
        }
    }

    /// Pops pods until one needs a write; its node is accounted for before this returns.
    fn next_attempt(&self) -> Option<Attempt> {
        let mut state = self.lock();
        let pod = state.queue.pop(now())?;
        let decision = if is_gated(&pod) {
            Err(Refusal {
                reason: "SchedulingGated",
                message: "Scheduling is blocked due to non-empty scheduling gates".into(),
            })
        } else {
            schedule(&pod, &state.cluster)
                .map_err(|refusal| Refusal { reason: "Unschedulable", message: refusal.message })
        };
        match &decision {
            Ok(node) => state.cluster.place(&pod, node),
            Err(_) => state.queue.unschedulable(uid(&pod.metadata), now()),
        }
        Some(Attempt { pod, decision })
    }

    async fn finish(&self, attempt: Attempt) {
        let Attempt { pod, decision } = attempt;
        let key = Key::of(&pod.metadata);
        match decision {
            Ok(node) => match self.bind(&pod, &key, &node).await {
                Ok(()) => self.tell_bound(&pod, &key, &node),
                Err(error) => self.unbound(&pod, &key, &error),
            },
            Err(refusal) => {
                if let Err(error) = self.report(&pod, &key, &refusal).await {
                    tracing::debug!(pod = %key, error = %chain(&error), "refusal not reported");
                }
            }
        }
    }

    async fn bind(&self, pod: &Pod, key: &Key, node: &str) -> Result<(), WriteError> {
        let binding = Binding {
            metadata: ObjectMeta {
                name: Some(key.name.clone()),
                namespace: Some(key.namespace.clone()),
                uid: pod.metadata.uid.clone(),
                ..ObjectMeta::default()
            },
            target: ObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Node".into()),
                name: Some(node.to_owned()),
                ..ObjectReference::default()
            },
        };
        let api = self.context.api::<Pod>(&key.namespace);
        let params = PostParams::default();
        let request =
            async { api.create_subresource::<_, Status>("binding", &key.name, &params, &binding).await };
        call(|| format!("bind Pod {key} to {node}"), request).await.map(|_| ())
    }

    fn tell_bound(&self, pod: &Pod, key: &Key, node: &str) {
        self.lock().queue.remove(uid(&pod.metadata));
        let message = format!("Successfully assigned {key} to {node}");
        self.tell(pod, Severity::Normal, "Scheduled", message);
    }

    fn unbound(&self, pod: &Pod, key: &Key, error: &WriteError) {
        let uid = uid(&pod.metadata);
        let mut state = self.lock();
        // The binding may have come through although its answer did not; then the cache will know.
        let bound = self.context.pods.get(key).is_some_and(|cached| pod_node(&cached).is_some());
        if !bound {
            state.cluster.remove_pod(uid);
        }
        if error.is_not_found() {
            state.queue.remove(uid);
        } else {
            state.queue.failed(uid);
        }
        drop(state);
        self.wake.notify_one();
        tracing::warn!(pod = %key, error = %chain(error), "pod not bound, trying again");
    }

    /// Tells the user why the pod stays pending; the status is written only when it says something new.
    async fn report(&self, pod: &Pod, key: &Key, refusal: &Refusal) -> Result<(), WriteError> {
        let current = pod_condition(pod, "PodScheduled");
        let known = current.is_some_and(|condition| {
            condition.reason.as_deref() == Some(refusal.reason)
                && condition.message.as_deref() == Some(refusal.message.as_str())
        });
        if refusal.reason == "Unschedulable" {
            self.tell(pod, Severity::Warning, "FailedScheduling", refusal.message.clone());
        }
        if known {
            return Ok(());
        }
        let since = match current.filter(|condition| condition.status == "False") {
            Some(condition) => condition.last_transition_time.clone(),
            None => Timestamp::from_second(now().as_second()).map(Time).ok(),
        };
        let condition = json!({
            "type": "PodScheduled",
            "status": "False",
            "reason": refusal.reason,
            "message": refusal.message,
            "lastTransitionTime": since,
        });
        let patch = json!({"metadata": {"uid": uid(&pod.metadata)}, "status": {"conditions": [condition]}});
        let api = self.context.api::<Pod>(&key.namespace);
        let request =
            async { api.patch_status(&key.name, &PatchParams::default(), &Patch::Strategic(&patch)).await };
        call(|| format!("report Pod {key} as unschedulable"), request).await.map(|_| ())
    }

    fn tell(&self, pod: &Pod, severity: Severity, reason: &'static str, message: String) {
        let involved = reference("v1", "Pod", &pod.metadata);
        self.context.events.publish(involved, severity, reason, message, Controller::Scheduler);
    }
}

/// One pod's turn: its node, or why it has none.
struct Attempt {
    pod: Arc<Pod>,
    decision: Result<String, Refusal>,
}

struct Refusal {
    reason: &'static str,
    message: String,
}
