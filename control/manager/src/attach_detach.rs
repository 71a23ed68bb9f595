//! Attaches volumes of drivers to the nodes of their pods, and detaches them again: carries out `control_decide::attachments`.
//!
//! An attachment is an object that the driver's external-attacher acts on. What a node's status says is attached is taken back
//! before an attachment goes, and the answer to that write says what the node has in use: a node that has just begun to use
//! the volume is seen. One worker, so that two nodes never race for a volume. Remembered is only since when something is not
//! needed, and who was told what.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use control_decide::{
    attachments::{self, Detach, Disk, Known, MANAGED, OUT_OF_SERVICE, Unneeded, is_in_use, is_managed},
    object::{annotation, name, node_condition, node_taints, pod_node, uid},
    volumes::{claims_of, volume_of},
};
use k8s_openapi::api::{
    core::v1::{Node, PersistentVolume, PersistentVolumeClaim, Pod},
    storage::v1::{CSIDriver, VolumeAttachment},
};
use kube::{
    Api,
    api::{DeleteParams, PostParams},
};
use serde_json::json;

use crate::{
    config::Controller,
    context::{Context, now, wait},
    events::{Severity, reference},
    informer::{Change, Key},
    queue::Queue,
    write::{WriteError, call, delete, list_or_null, merge_patch_status},
};

/// What is to be looked at, by name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Work {
    /// A PersistentVolume.
    Volume(String),
    /// What a node's status says.
    Node(String),
    /// News of an attachment.
    News(String),
}

/// What happened to an attachment.
#[derive(Clone, Debug, PartialEq, Eq)]
enum News {
    Attached,
    Failed(String),
}

/// What is remembered between two looks.
#[derive(Default)]
struct Memory {
    unneeded: Unneeded,
    /// Uids of pods that were told that they cannot have a volume, by volume.
    refused: BTreeMap<String, BTreeSet<String>>,
    /// What is still to be told, by attachment.
    news: BTreeMap<String, News>,
}

/// Shared by handlers and worker.
#[derive(Default)]
struct Shared(Mutex<Memory>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Memory> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Registers the controller.
pub(crate) fn start(context: &Arc<Context>) {
    let (queue, memory) = (Queue::new(), Arc::new(Shared::default()));
    watch_users(context, &queue);
    watch_nodes(context, &queue);
    watch_attachments(context, &queue, &memory);
    let ready = {
        let context = Arc::clone(context);
        async move {
            context.pods.wait_until_synced().await;
            context.nodes.wait_until_synced().await;
            context.claims.wait_until_synced().await;
            context.volumes.wait_until_synced().await;
            context.attachments.wait_until_synced().await;
            context.drivers.wait_until_synced().await;
        }
    };
    let shared = Arc::clone(context);
    context.work(Controller::AttachDetach, &queue, 1, ready, move |work| {
        let (context, memory) = (Arc::clone(&shared), Arc::clone(&memory));
        async move {
            match work {
                Work::Volume(volume) => reconcile(&context, &memory, &volume).await,
                Work::Node(node) => report(&context, &node, None).await.map(|_| None),
                Work::News(attachment) => {
                    tell(&context, &memory, &attachment);
                    Ok(None)
                }
            }
        }
    });
}

/// Pods, their claims, the claims' volumes, and the drivers of these.
fn watch_users(context: &Context, queue: &Arc<Queue<Work>>) {
    {
        let (queue, claims) = (Arc::clone(queue), Arc::clone(&context.claims));
        context.pods.on_change(move |change| {
            let namespace = change.key().namespace;
            for pod in change.states().filter(|pod| pod_node(pod).is_some()) {
                let claims = claims_of(pod).filter_map(|name| claims.get(&Key::new(&namespace, &name)));
                let volumes: Vec<_> =
                    claims.filter_map(|claim| volume_of(&claim).map(str::to_owned)).collect();
                queue.add_all(volumes.into_iter().map(Work::Volume));
            }
        });
    }
    {
        let queue = Arc::clone(queue);
        context.claims.on_change(move |change| {
            let volumes = change.states().filter_map(|claim| volume_of(claim));
            queue.add_all(volumes.map(|volume| Work::Volume(volume.to_owned())));
        });
    }
    {
        let queue = Arc::clone(queue);
        context.volumes.on_change(move |change| queue.add(Work::Volume(change.key().name)));
    }
    let (queue, volumes) = (Arc::clone(queue), Arc::clone(&context.volumes));
    context.drivers.on_change(move |change| {
        let driver = change.key().name;
        let is_its = |volume: &PersistentVolume| Disk::of(volume).is_some_and(|disk| disk.driver == driver);
        let its = volumes.all().into_iter().filter(|volume| is_its(volume));
        queue.add_all(its.map(|volume| Work::Volume(name(&volume.metadata).to_owned())));
    });
}

/// What of a node counts here: whether the controller attaches for it, whether it answers, and what it has in use.
fn of_node(node: &Node) -> (bool, bool, bool, Option<&[String]>) {
    let in_use = node.status.as_ref().and_then(|status| status.volumes_in_use.as_deref());
    (
        annotation(&node.metadata, MANAGED).is_some(),
        node_condition(node, "Ready") == Some("True"),
        node_taints(node).iter().any(|taint| taint.key == OUT_OF_SERVICE),
        in_use,
    )
}

fn watch_nodes(context: &Context, queue: &Arc<Queue<Work>>) {
    let (queue, attachments) = (Arc::clone(queue), Arc::clone(&context.attachments));
    let (pods, claims) = (Arc::clone(&context.pods), Arc::clone(&context.claims));
    context.nodes.on_change(move |change: &Change<Node>| {
        let node = change.key().name;
        let told = |node: &Option<Arc<Node>>| {
            let status = node.as_ref().and_then(|node| node.status.as_ref());
            status.and_then(|status| status.volumes_attached.clone()).unwrap_or_default()
        };
        if change.old.is_none() || told(&change.old) != told(&change.new) {
            queue.add(Work::Node(node.clone()));
        }
        if change.old.as_deref().map(of_node) == change.new.as_deref().map(of_node) {
            return;
        }
        let here = attachments.all().into_iter().filter(|attachment| attachment.spec.node_name == node);
        queue.add_all(
            here.filter_map(|one| attachments::volume_of(&one).map(|name| Work::Volume(name.to_owned()))),
        );
        if change.old.as_deref().map(is_managed) == change.new.as_deref().map(is_managed) {
            return;
        }
        for pod in pods.all().into_iter().filter(|pod| pod_node(pod) == Some(&node)) {
            let namespace = Key::of(&pod.metadata).namespace;
            let claims = claims_of(&pod).filter_map(|name| claims.get(&Key::new(&namespace, &name)));
            let volumes: Vec<_> = claims.filter_map(|claim| volume_of(&claim).map(str::to_owned)).collect();
            queue.add_all(volumes.into_iter().map(Work::Volume));
        }
    });
}

fn watch_attachments(context: &Context, queue: &Arc<Queue<Work>>, memory: &Arc<Shared>) {
    let (queue, memory) = (Arc::clone(queue), Arc::clone(memory));
    context.attachments.on_change(move |change| {
        let name = change.key().name;
        if let Some(news) = news(change) {
            memory.lock().news.insert(name.clone(), news);
            queue.add(Work::News(name));
        }
        for attachment in change.states() {
            queue.add(Work::Node(attachment.spec.node_name.clone()));
            if let Some(volume) = attachments::volume_of(attachment) {
                queue.add(Work::Volume(volume.to_owned()));
            }
        }
    });
}

/// What pods are told of a change. Of one that was found at the start nothing: it was told before.
fn news(change: &Change<VolumeAttachment>) -> Option<News> {
    let (old, new) = (change.old.as_ref()?.status.as_ref(), change.new.as_ref()?.status.as_ref()?);
    let was_attached = old.is_some_and(|old| old.attached);
    if new.attached {
        return (!was_attached).then_some(News::Attached);
    }
    let message = new.attach_error.as_ref()?.message.clone().unwrap_or_default();
    let before = old.and_then(|old| old.attach_error.as_ref()).and_then(|error| error.message.as_ref());
    (before != Some(&message)).then_some(News::Failed(message))
}

/// The caches' view of a volume, as far as it belongs to one driver.
struct View {
    volume: Arc<PersistentVolume>,
    claim: Option<Arc<PersistentVolumeClaim>>,
    driver: Option<Arc<CSIDriver>>,
    pods: Vec<Arc<Pod>>,
    attachments: Vec<Arc<VolumeAttachment>>,
    nodes: Vec<Arc<Node>>,
}

impl View {
    fn of(context: &Context, volume: &str) -> Option<Self> {
        let volume = context.volumes.get(&Key::new("", volume))?;
        let driver = Disk::of(&volume)?.driver.to_owned();
        let reserved = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref());
        let claim =
            reserved.and_then(|claim| Some(Key::new(claim.namespace.as_deref()?, claim.name.as_deref()?)));
        let mut attachments = context.attachments.all();
        attachments.retain(|attachment| attachments::volume_of(attachment) == Some(name(&volume.metadata)));
        Some(View {
            claim: claim.as_ref().and_then(|key| context.claims.get(key)),
            driver: context.drivers.get(&Key::new("", &driver)),
            pods: claim.map(|key| context.pods.in_namespace(&key.namespace)).unwrap_or_default(),
            attachments,
            nodes: context.nodes.all(),
            volume,
        })
    }

    fn known(&self) -> Known<'_> {
        Known {
            volume: &self.volume,
            claim: self.claim.as_deref(),
            driver: self.driver.as_deref(),
            pods: &self.pods,
            attachments: &self.attachments,
            nodes: &self.nodes,
        }
    }
}

async fn reconcile(context: &Context, memory: &Shared, volume: &str) -> Result<Option<Duration>, WriteError> {
    let Some(view) = View::of(context, volume) else {
        let mut memory = memory.lock();
        memory.unneeded.forget(volume);
        memory.refused.remove(volume);
        return Ok(None);
    };
    let Some(disk) = Disk::of(&view.volume) else { return Ok(None) };
    let plan = memory.lock().unneeded.plan(view.known(), now());
    for (pod, message) in newly_refused(memory, volume, &plan.refuse) {
        publish(context, pod, Severity::Warning, "FailedAttachVolume", message.clone());
    }
    for step in &plan.detach {
        detach(context, disk, step).await?;
    }
    let api: Api<VolumeAttachment> = Api::all(context.client.clone());
    for node in &plan.attach {
        let attachment = disk.attachment(node);
        let creation = async { api.create(&PostParams::default(), &attachment).await };
        let action = || format!("create VolumeAttachment {}", name(&attachment.metadata));
        match call(action, creation).await {
            Ok(_) => tracing::info!(volume, node, driver = disk.driver, "volume is to be attached"),
            // The cache shows it in a moment.
            Err(error) if error.is_already_exists() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(plan.again.map(wait))
}

/// Those of the refused that do not know it yet.
fn newly_refused<'a>(
    memory: &Shared,
    volume: &str,
    refused: &'a [(Arc<Pod>, String)],
) -> Vec<&'a (Arc<Pod>, String)> {
    let mut memory = memory.lock();
    let uids: BTreeSet<String> = refused.iter().map(|(pod, _)| uid(&pod.metadata).to_owned()).collect();
    let before = memory.refused.remove(volume).unwrap_or_default();
    if !uids.is_empty() {
        memory.refused.insert(volume.to_owned(), uids);
    }
    refused.iter().filter(|(pod, _)| !before.contains(uid(&pod.metadata))).collect()
}

/// Deletes an attachment, unless its node has begun to use the volume meanwhile.
async fn detach(context: &Context, disk: Disk<'_>, step: &Detach) -> Result<(), WriteError> {
    let node = report(context, &step.node, Some(&step.name)).await?;
    if !step.is_forced && node.is_some_and(|node| is_in_use(&node, &disk.unique_name())) {
        // Its status brings this volume up again.
        tracing::debug!(volume = disk.volume, node = step.node, "the node uses the volume again");
        return Ok(());
    }
    let api: Api<VolumeAttachment> = Api::all(context.client.clone());
    let key = Key::new("", &step.name);
    delete(&api, "VolumeAttachment", &key, &step.uid, DeleteParams::default()).await?;
    if step.is_forced {
        tracing::warn!(volume = disk.volume, node = step.node, "volume is detached by force");
    } else {
        tracing::info!(volume = disk.volume, node = step.node, "volume is to be detached");
    }
    Ok(())
}

/// Has the node's status say what is attached, without what is `leaving`; then the node as the API server has it. One that is
/// not the controller's, or is gone, says nothing.
async fn report(context: &Context, node: &str, leaving: Option<&str>) -> Result<Option<Node>, WriteError> {
    let key = Key::new("", node);
    let Some(cached) = context.nodes.get(&key).filter(|node| is_managed(node)) else { return Ok(None) };
    let mut here = context.attachments.all();
    here.retain(|attachment| attachment.spec.node_name == node);
    let find = |volume: &str| context.volumes.get(&Key::new("", volume));
    let wanted = attachments::attached(&here, find, leaving);
    let told = cached.status.as_ref().and_then(|status| status.volumes_attached.as_deref());
    // What is about to go is taken back even where the cache is not aware of it: the answer is what counts.
    if leaving.is_none() && told.unwrap_or_default() == wanted {
        return Ok(None);
    }
    let patch = json!({"status": {"volumesAttached": list_or_null(&wanted)}});
    let api: Api<Node> = Api::all(context.client.clone());
    match merge_patch_status(&api, "Node", &key, &patch).await {
        Ok(node) => Ok(Some(node)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Tells the pods that wait for an attachment how it went.
fn tell(context: &Context, memory: &Shared, attachment: &str) {
    let Some(news) = memory.lock().news.remove(attachment) else { return };
    let Some(found) = context.attachments.get(&Key::new("", attachment)) else { return };
    let Some(volume) = attachments::volume_of(&found) else { return };
    let Some(view) = View::of(context, volume) else { return };
    let (severity, reason, message) = match news {
        News::Attached => {
            let message = format!("AttachVolume.Attach succeeded for volume \"{volume}\"");
            (Severity::Normal, "SuccessfulAttachVolume", message)
        }
        News::Failed(problem) => {
            let message = format!("AttachVolume.Attach failed for volume \"{volume}\" : {problem}");
            (Severity::Warning, "FailedAttachVolume", message)
        }
    };
    for pod in attachments::pods_on(view.known(), &found.spec.node_name) {
        publish(context, &pod, severity, reason, message.clone());
    }
}

fn publish(context: &Context, pod: &Pod, severity: Severity, reason: &'static str, message: String) {
    let involved = reference("v1", "Pod", &pod.metadata);
    context.events.publish(involved, severity, reason, message, Controller::AttachDetach);
}
