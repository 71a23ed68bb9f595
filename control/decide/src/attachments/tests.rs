//! One volume, two nodes and their pods, as tables of JSON.

use serde_json::{Value, json};

use super::*;

fn made<T: k8s_openapi::serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).expect("is an object")
}

struct World {
    volume: PersistentVolume,
    claim: PersistentVolumeClaim,
    driver: Option<CSIDriver>,
    pods: Vec<Arc<Pod>>,
    attachments: Vec<Arc<VolumeAttachment>>,
    nodes: Vec<Arc<Node>>,
    unneeded: Unneeded,
}

const UNIQUE: &str = "kubernetes.io/csi/d.example^h";

fn node(name: &str, ready: &str, in_use: &[&str]) -> Arc<Node> {
    Arc::new(made(json!({
        "metadata": {"name": name, "annotations": {MANAGED: "true"}},
        "status": {"volumesInUse": in_use, "conditions": [{"type": "Ready", "status": ready}]},
    })))
}

fn pod(name: &str, node: &str, created: &str) -> Arc<Pod> {
    Arc::new(made(json!({
        "metadata": {"name": name, "namespace": "ns", "uid": name, "creationTimestamp": created},
        "spec": {"containers": [], "nodeName": node,
            "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "data"}}]},
        "status": {"phase": "Pending"},
    })))
}

const EARLY: &str = "2026-01-01T00:00:00Z";
const LATE: &str = "2026-01-02T00:00:00Z";

impl World {
    fn new(mode: &str) -> Self {
        World {
            volume: made(json!({"metadata": {"name": "pv"}, "spec": {"accessModes": [mode],
                "claimRef": {"namespace": "ns", "name": "data", "uid": "c"},
                "csi": {"driver": "d.example", "volumeHandle": "h"}}})),
            claim: made(json!({"metadata": {"name": "data", "namespace": "ns", "uid": "c"},
                "spec": {"volumeName": "pv"}})),
            driver: None,
            pods: Vec::new(),
            attachments: Vec::new(),
            nodes: vec![node("a", "True", &[]), node("b", "True", &[])],
            unneeded: Unneeded::default(),
        }
    }

    fn known(&self) -> Known<'_> {
        Known {
            volume: &self.volume,
            claim: Some(&self.claim),
            driver: self.driver.as_ref(),
            pods: &self.pods,
            attachments: &self.attachments,
            nodes: &self.nodes,
        }
    }

    fn attach(&mut self, node: &str) {
        let mut attachment = Disk::of(&self.volume).expect("is a driver's").attachment(node);
        attachment.metadata.uid = Some(format!("uid-{node}"));
        attachment.status = Some(made(json!({"attached": true})));
        self.attachments.push(Arc::new(attachment));
    }

    fn plan_at(&mut self, minutes: i64) -> Plan {
        let mut unneeded = std::mem::take(&mut self.unneeded);
        let plan = unneeded.plan(self.known(), Timestamp::UNIX_EPOCH + SignedDuration::from_mins(minutes));
        self.unneeded = unneeded;
        plan
    }

    /// Nodes that lose it, with an exclamation mark where by force.
    fn detached_at(&mut self, minutes: i64) -> Vec<String> {
        let plan = self.plan_at(minutes);
        let mark = |is_forced| if is_forced { "!" } else { "" };
        plan.detach.iter().map(|detach| format!("{}{}", detach.node, mark(detach.is_forced))).collect()
    }
}

#[test]
fn names_are_upstreams() {
    // printf abc | sha256sum
    let disk = Disk { volume: "pv", driver: "b", handle: "a" };
    assert_eq!(
        disk.attachment_name("c"),
        "csi-ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    );
    assert_eq!(disk.unique_name(), "kubernetes.io/csi/b^a");
}

#[test]
fn a_node_gets_what_its_pods_need() {
    let mut world = World::new("ReadWriteOnce");
    assert_eq!(world.plan_at(0), Plan::default(), "nobody needs it");
    world.pods = vec![pod("p", "a", EARLY)];
    assert_eq!(world.plan_at(0).attach, ["a"]);
    world.attach("a");
    assert_eq!(world.plan_at(0), Plan::default(), "it is there");
    world.attachments.clear();
    world.driver = Some(made(json!({"metadata": {"name": "d.example"}, "spec": {"attachRequired": false}})));
    assert_eq!(world.plan_at(0), Plan::default(), "the driver does without");
    world.driver = Some(made(json!({"metadata": {"name": "d.example"}, "spec": {}})));
    assert_eq!(world.plan_at(0).attach, ["a"]);
    world.nodes = vec![Arc::new(made(json!({"metadata": {"name": "a"}})))];
    assert_eq!(world.plan_at(0), Plan::default(), "its kubelet attaches by itself");
}

#[test]
fn only_a_bound_claim_and_a_pod_that_lives_count() {
    let mut world = World::new("ReadWriteOnce");
    world.pods = vec![pod("p", "a", EARLY)];
    world.claim.metadata.uid = Some("another".to_owned());
    assert_eq!(world.plan_at(0), Plan::default());
    world.claim.metadata.uid = Some("c".to_owned());
    let mut ended = Pod::clone(&world.pods[0]);
    ended.status = Some(made(json!({"phase": "Succeeded"})));
    world.pods = vec![Arc::new(ended)];
    assert_eq!(world.plan_at(0), Plan::default());
    // A claim with the name of a pod's ephemeral volume, but of another pod.
    let ephemeral: Pod = made(json!({"metadata": {"name": "da", "uid": "x"}, "spec": {"containers": [],
        "nodeName": "a", "volumes": [{"name": "ta", "ephemeral": {"volumeClaimTemplate": {"spec": {}}}}]}}));
    world.claim.metadata.name = Some("da-ta".to_owned());
    world.pods = vec![Arc::new(ephemeral)];
    assert_eq!(world.plan_at(0), Plan::default());
    world.claim.metadata.owner_references = Some(vec![made(
        json!({"apiVersion": "v1", "kind": "Pod", "name": "da", "uid": "x", "controller": true}),
    )]);
    assert_eq!(world.plan_at(0).attach, ["a"]);
}

#[test]
fn one_node_alone_has_a_volume_that_only_one_may_have() {
    let mut world = World::new("ReadWriteOnce");
    world.pods = vec![pod("late", "a", LATE), pod("early", "b", EARLY)];
    let plan = world.plan_at(0);
    assert_eq!(plan.attach, ["b"], "the older pod comes first");
    let told: Vec<_> =
        plan.refuse.iter().map(|(pod, text)| (object::name(&pod.metadata), text.as_str())).collect();
    assert_eq!(
        told,
        [("late", "Multi-Attach error for volume \"pv\" Volume is already used by pod(s) early")]
    );
    world.attach("b");
    world.pods.pop();
    world.nodes[1] = node("b", "True", &[UNIQUE]);
    let plan = world.plan_at(0);
    assert_eq!(plan.attach, Vec::<String>::new());
    assert_eq!(
        plan.refuse[0].1,
        "Multi-Attach error for volume \"pv\" Volume is already exclusively attached to one node and can't be attached to another"
    );
    for mode in ["ReadWriteMany", "ReadOnlyMany"] {
        let mut world = World::new(mode);
        world.pods = vec![pod("one", "a", EARLY), pod("other", "b", EARLY)];
        assert_eq!(world.plan_at(0).attach, ["a", "b"], "{mode}");
    }
}

#[test]
fn what_nobody_needs_goes_when_its_node_has_let_go() {
    let mut world = World::new("ReadWriteOnce");
    world.attach("a");
    assert_eq!(world.detached_at(0), ["a"], "it is not in use");
    world.nodes[0] = node("a", "True", &[UNIQUE]);
    assert_eq!(world.detached_at(0), [""; 0]);
    assert_eq!(world.detached_at(60), [""; 0], "a node that answers is waited for");
    world.nodes[0] = node("a", "True", &["kubernetes.io/csi/d.example^other"]);
    assert_eq!(world.detached_at(61), ["a"]);
    world.pods = vec![pod("p", "a", EARLY)];
    assert_eq!(world.detached_at(62), [""; 0], "it is needed again");
    // Somebody else's attachment of the same volume is theirs.
    let mut world = World::new("ReadWriteOnce");
    world.attach("a");
    Arc::make_mut(&mut world.attachments[0]).metadata.name = Some("mine".to_owned());
    assert_eq!(world.detached_at(0), [""; 0]);
}

#[test]
fn a_node_that_does_not_answer_loses_it_after_a_while() {
    let mut world = World::new("ReadWriteOnce");
    world.attach("a");
    for nodes in [vec![node("a", "Unknown", &[UNIQUE])], Vec::new()] {
        world.unneeded = Unneeded::default();
        world.nodes = nodes;
        assert_eq!(world.plan_at(0).again, Some(PATIENCE));
        assert_eq!(world.plan_at(4).again, Some(SignedDuration::from_mins(2)));
        assert_eq!(world.detached_at(6), ["a!"]);
    }
    // The time counts from when it was last needed.
    world.unneeded = Unneeded::default();
    assert_eq!(world.detached_at(0), [""; 0]);
    world.pods = vec![pod("p", "a", EARLY)];
    assert_eq!(world.detached_at(5), [""; 0]);
    world.pods.clear();
    assert_eq!(world.detached_at(7), [""; 0]);
    assert_eq!(world.detached_at(13), ["a!"]);
    let mut off = Node::clone(&node("a", "True", &[UNIQUE]));
    off.spec = Some(made(json!({"taints": [{"key": OUT_OF_SERVICE, "effect": "NoExecute"}]})));
    world.unneeded = Unneeded::default();
    world.nodes = vec![Arc::new(off)];
    assert_eq!(world.detached_at(0), ["a!"], "somebody has said that it is off");
}

#[test]
fn a_node_is_told_what_its_drivers_have_attached() {
    let mut world = World::new("ReadWriteOnce");
    world.attach("a");
    let volume = Arc::new(world.volume.clone());
    let find = |name: &str| (name == "pv").then(|| Arc::clone(&volume));
    let names = |attachments: &[Arc<VolumeAttachment>], leaving: Option<&str>| -> Vec<String> {
        attached(attachments, find, leaving).into_iter().map(|volume| volume.name).collect()
    };
    assert_eq!(names(&world.attachments, None), [UNIQUE]);
    let name = object::name(&world.attachments[0].metadata).to_owned();
    assert_eq!(names(&world.attachments, Some(&name)), [""; 0]);
    Arc::make_mut(&mut world.attachments[0]).status = Some(made(json!({"attached": false})));
    assert_eq!(names(&world.attachments, None), [""; 0]);
}
