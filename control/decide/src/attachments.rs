//! Which volumes of drivers are attached to which nodes, and what may be detached.
//!
//! Input: one volume with the caches' view of its claim, driver, pods, attachments and nodes, and the time. Output: the
//! attachments to make and to delete, the pods that cannot have theirs, and when to look again. What nobody needs any more is
//! remembered since when: from nodes that do not answer it is taken by force only after [`PATIENCE`]. Attaches nothing itself:
//! that is the business of the driver's external-attacher, which an attachment tells what to do.
//!
//! Upstream's rules: `pkg/controller/volume/attachdetach`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    sync::Arc,
};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::{
    core::v1::{AttachedVolume, Node, PersistentVolume, PersistentVolumeClaim, Pod},
    storage::v1::{CSIDriver, VolumeAttachment, VolumeAttachmentSource, VolumeAttachmentSpec},
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use sha2::{Digest as _, Sha256};

use crate::{object, volumes};

/// Nodes with this annotation leave attaching to the controller; the kubelet of another one does it itself.
pub const MANAGED: &str = "volumes.kubernetes.io/controller-managed-attach-detach";
/// A node with this taint is off: what is attached to it is free at once.
pub const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";
/// How long a node that does not answer may keep what no pod of it needs.
pub const PATIENCE: SignedDuration = SignedDuration::from_mins(6);

/// A volume of a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disk<'a> {
    /// Name of the PersistentVolume.
    pub volume: &'a str,
    /// The driver.
    pub driver: &'a str,
    /// How the driver calls the volume.
    pub handle: &'a str,
}

impl<'a> Disk<'a> {
    /// Of a PersistentVolume; `None` where it is not a driver's.
    pub fn of(volume: &'a PersistentVolume) -> Option<Self> {
        let source = volume.spec.as_ref()?.csi.as_ref()?;
        Some(Disk {
            volume: object::name(&volume.metadata),
            driver: &source.driver,
            handle: &source.volume_handle,
        })
    }

    /// Name of the volume in a node's status.
    pub fn unique_name(self) -> String {
        format!("kubernetes.io/csi/{}^{}", self.driver, self.handle)
    }

    /// Name of its attachment to a node, which the node computes as well.
    pub fn attachment_name(self, node: &str) -> String {
        let digest = [self.handle, self.driver, node].into_iter().fold(Sha256::new(), Sha256::chain_update);
        digest.finalize().iter().fold("csi-".to_owned(), |mut name, byte| {
            // Writing to a string cannot fail.
            write!(name, "{byte:02x}").ok();
            name
        })
    }

    /// Its attachment to a node, as it is created.
    pub fn attachment(self, node: &str) -> VolumeAttachment {
        VolumeAttachment {
            metadata: ObjectMeta { name: Some(self.attachment_name(node)), ..ObjectMeta::default() },
            spec: VolumeAttachmentSpec {
                attacher: self.driver.to_owned(),
                node_name: node.to_owned(),
                source: VolumeAttachmentSource {
                    persistent_volume_name: Some(self.volume.to_owned()),
                    inline_volume_spec: None,
                },
            },
            status: None,
        }
    }

    /// Whether the attachment is the one of this volume to its node, and not somebody else's.
    fn has(self, attachment: &VolumeAttachment) -> bool {
        attachment.spec.attacher == self.driver
            && object::name(&attachment.metadata) == self.attachment_name(&attachment.spec.node_name)
    }
}

/// The volume that an attachment is of.
pub fn volume_of(attachment: &VolumeAttachment) -> Option<&str> {
    attachment.spec.source.persistent_volume_name.as_deref()
}

/// What the caches know of a volume.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// The volume.
    pub volume: &'a PersistentVolume,
    /// The claim that it is reserved for.
    pub claim: Option<&'a PersistentVolumeClaim>,
    /// The object of its driver.
    pub driver: Option<&'a CSIDriver>,
    /// Pods of the claim's namespace.
    pub pods: &'a [Arc<Pod>],
    /// Attachments of the volume.
    pub attachments: &'a [Arc<VolumeAttachment>],
    /// All nodes.
    pub nodes: &'a [Arc<Node>],
}

/// What to do about a volume.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Nodes to attach it to.
    pub attach: Vec<String>,
    /// Pods that cannot have it on their node now, and what they are told.
    pub refuse: Vec<(Arc<Pod>, String)>,
    /// Attachments to delete.
    pub detach: Vec<Detach>,
    /// When to look again, even if nothing changes.
    pub again: Option<SignedDuration>,
}

/// An attachment that nobody needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Detach {
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// The node.
    pub node: String,
    /// The node may have it in use, and is not asked.
    pub is_forced: bool,
}

/// Since when attachments are not needed, by volume and name. Bounded by the attachments that there are.
#[derive(Clone, Debug, Default)]
pub struct Unneeded(BTreeMap<String, BTreeMap<String, Timestamp>>);

impl Unneeded {
    /// Decides for this moment, and remembers what is not needed for the next.
    pub fn plan(&mut self, known: Known<'_>, now: Timestamp) -> Plan {
        let Some(disk) = Disk::of(known.volume) else { return Plan::default() };
        let users = users(known);
        let mut plan = Plan::default();
        let before = self.0.remove(disk.volume).unwrap_or_default();
        let mut since = BTreeMap::new();
        for attachment in known.attachments.iter().filter(|attachment| disk.has(attachment)) {
            let (meta, node) = (&attachment.metadata, attachment.spec.node_name.as_str());
            if object::is_being_deleted(meta) || users.contains_key(node) {
                continue;
            }
            let name = object::name(meta).to_owned();
            let began = before.get(&name).copied().unwrap_or(now);
            since.insert(name.clone(), began);
            match release(disk, node_named(known.nodes, node), now.duration_since(began)) {
                Release::Now { is_forced } => plan.detach.push(Detach {
                    name,
                    uid: object::uid(meta).to_owned(),
                    node: node.to_owned(),
                    is_forced,
                }),
                Release::In(wait) => plan.again = Some(plan.again.map_or(wait, |again| again.min(wait))),
                Release::Later => {}
            }
        }
        if !since.is_empty() {
            self.0.insert(disk.volume.to_owned(), since);
        }
        attach(disk, known, &users, &mut plan);
        plan
    }

    /// Nothing is attached of this volume any more.
    pub fn forget(&mut self, volume: &str) {
        self.0.remove(volume);
    }
}

/// Pods that need the volume, by node.
type Users = BTreeMap<String, Vec<Arc<Pod>>>;

fn users(known: Known<'_>) -> Users {
    let mut users = Users::new();
    let Some(claim) = known.claim.filter(|claim| is_bound(claim, known.volume)) else { return users };
    for pod in known.pods.iter().filter(|pod| !object::is_pod_terminal(pod) && uses(pod, claim)) {
        if let Some(node) = object::pod_node(pod) {
            users.entry(node.to_owned()).or_default().push(Arc::clone(pod));
        }
    }
    users
}

fn is_bound(claim: &PersistentVolumeClaim, volume: &PersistentVolume) -> bool {
    let reserved = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref());
    volumes::volume_of(claim) == Some(object::name(&volume.metadata))
        && reserved.is_some_and(|reserved| reserved.uid.is_some() && reserved.uid == claim.metadata.uid)
}

/// A claim that was made for one pod is nobody else's.
fn uses(pod: &Pod, claim: &PersistentVolumeClaim) -> bool {
    let name = object::name(&claim.metadata);
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    let mut named = volumes.filter_map(|volume| volume.persistent_volume_claim.as_ref());
    named.any(|source| source.claim_name == name)
        || (volumes::claims_of(pod).any(|used| used == name)
            && object::is_controlled_by(&claim.metadata, object::uid(&pod.metadata)))
}

fn node_named<'a>(nodes: &'a [Arc<Node>], name: &str) -> Option<&'a Node> {
    nodes.iter().find(|node| object::name(&node.metadata) == name).map(AsRef::as_ref)
}

/// Whether the controller attaches for this node.
pub fn is_managed(node: &Node) -> bool {
    object::annotation(&node.metadata, MANAGED).is_some()
}

/// Whether the node says that it has the volume in use.
pub fn is_in_use(node: &Node, unique_name: &str) -> bool {
    let status = node.status.as_ref();
    status.is_some_and(|status| status.volumes_in_use.iter().flatten().any(|name| name == unique_name))
}

/// When an attachment that nobody needs may go.
enum Release {
    /// At once.
    Now { is_forced: bool },
    /// When the node has kept it for so much longer.
    In(SignedDuration),
    /// When the node says something else.
    Later,
}

fn release(disk: Disk<'_>, node: Option<&Node>, unneeded: SignedDuration) -> Release {
    // Who is gone cannot say what it has in use.
    let Some(node) = node else { return after_patience(unneeded) };
    if !is_managed(node) {
        return Release::Later;
    }
    if !is_in_use(node, &disk.unique_name()) {
        return Release::Now { is_forced: false };
    }
    if object::node_taints(node).iter().any(|taint| taint.key == OUT_OF_SERVICE) {
        return Release::Now { is_forced: true };
    }
    // One that answers will let go by itself.
    if object::node_condition(node, "Ready") == Some("True") {
        Release::Later
    } else {
        after_patience(unneeded)
    }
}

fn after_patience(unneeded: SignedDuration) -> Release {
    if unneeded >= PATIENCE { Release::Now { is_forced: true } } else { Release::In(PATIENCE - unneeded) }
}

/// Nodes whose pods need the volume, those with the oldest pods first.
fn attach(disk: Disk<'_>, known: Known<'_>, users: &Users, plan: &mut Plan) {
    if known.driver.is_some_and(|driver| driver.spec.attach_required == Some(false)) {
        return;
    }
    let oldest = |pods: &[Arc<Pod>]| pods.iter().map(|pod| object::created(&pod.metadata)).min();
    let mut wanted: Vec<_> = users.iter().collect();
    wanted.sort_by_key(|(node, pods)| (oldest(pods), node.as_str()));
    let exclusive = is_exclusive(known.volume);
    let mut elsewhere: BTreeSet<&str> =
        known.attachments.iter().map(|attachment| attachment.spec.node_name.as_str()).collect();
    for (node, pods) in wanted {
        let name = disk.attachment_name(node);
        let is_there = known.attachments.iter().any(|known| object::name(&known.metadata) == name);
        if is_there || !node_named(known.nodes, node).is_some_and(is_managed) {
            continue;
        }
        let others: Vec<&str> = elsewhere.iter().copied().filter(|other| *other != node.as_str()).collect();
        if exclusive && !others.is_empty() {
            let message = refusal(disk.volume, &others, users);
            plan.refuse.extend(pods.iter().map(|pod| (Arc::clone(pod), message.clone())));
        } else {
            elsewhere.insert(node);
            plan.attach.push(node.clone());
        }
    }
}

/// Whether one node alone may have the volume. Without access modes nobody knows, and the driver decides.
fn is_exclusive(volume: &PersistentVolume) -> bool {
    let modes = volume.spec.iter().flat_map(|spec| spec.access_modes.iter().flatten());
    let modes: Vec<&str> = modes.map(String::as_str).collect();
    !modes.is_empty() && !modes.iter().any(|mode| matches!(*mode, "ReadWriteMany" | "ReadOnlyMany"))
}

/// Why a node cannot have a volume. All pods that use it are of the claim's namespace: their names are no secret.
fn refusal(volume: &str, others: &[&str], users: &Users) -> String {
    let pods = others.iter().filter_map(|node| users.get(*node)).flatten();
    let names: Vec<&str> = pods.map(|pod| object::name(&pod.metadata)).collect();
    let why = if names.is_empty() {
        "Volume is already exclusively attached to one node and can't be attached to another".to_owned()
    } else {
        format!("Volume is already used by pod(s) {}", names.join(", "))
    };
    format!("Multi-Attach error for volume \"{volume}\" {why}")
}

/// What a node's status says is attached to it: what its driver has attached, and what is not about to go.
///
/// `attachments` are the node's; `volume` finds a PersistentVolume; `leaving` is the attachment that is deleted next.
pub fn attached(
    attachments: &[Arc<VolumeAttachment>],
    volume: impl Fn(&str) -> Option<Arc<PersistentVolume>>,
    leaving: Option<&str>,
) -> Vec<AttachedVolume> {
    let is_ready = |attachment: &&Arc<VolumeAttachment>| {
        attachment.status.as_ref().is_some_and(|status| status.attached)
            && !object::is_being_deleted(&attachment.metadata)
            && leaving != Some(object::name(&attachment.metadata))
    };
    let names: BTreeSet<String> = attachments
        .iter()
        .filter(is_ready)
        .filter_map(|attachment| {
            let volume = volume(volume_of(attachment)?)?;
            Disk::of(&volume).filter(|disk| disk.has(attachment)).map(Disk::unique_name)
        })
        .collect();
    names.into_iter().map(|name| AttachedVolume { name, device_path: String::new() }).collect()
}

/// Pods on a node that need a volume: those that are told of its attachment.
pub fn pods_on(known: Known<'_>, node: &str) -> Vec<Arc<Pod>> {
    users(known).remove(node).unwrap_or_default()
}

#[cfg(test)]
mod tests;
