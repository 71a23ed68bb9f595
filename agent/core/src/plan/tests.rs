//! Scenarios: pods from start to end in a simulated world, as the list of what the loop does.
//!
//! The world carries every action out at once (or fails it, where a scenario says so) and moves time to the next wake-up;
//! a scenario's expectation is the log of actions. The property at the end runs random pods through random accidents.

mod claims;

mod lost;

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::model::{ImageState, ObservedContainer, ObservedSandbox, Step};

/// The world around one pod.
struct World {
    desired: DesiredPod,
    observed: ObservedPod,
    memory: PodMemory,
    now: Timestamp,
    log: Vec<String>,
    ids: u32,
    exit_on_start: BTreeMap<String, i32>,
    last: PodPlan,
}

impl World {
    fn new(spec: &Value) -> Self {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "ns", "uid": "u"}, "spec": spec}))
        .expect("a pod");
        Self {
            desired: DesiredPod::new(Arc::new(pod), Fate::Run),
            observed: ObservedPod::default(),
            memory: PodMemory { services_synced: true, ..PodMemory::default() },
            now: Timestamp::from_second(1_000_000).expect("in range"),
            log: Vec::new(),
            ids: 0,
            exit_on_start: BTreeMap::new(),
            last: PodPlan::default(),
        }
    }

    fn plan(&self) -> PodPlan {
        plan(PlanInput {
            desired: &self.desired,
            observed: &self.observed,
            memory: &self.memory,
            now: self.now,
            settings: PlanSettings::default(),
        })
    }

    /// Acts until nothing is left to do now.
    #[track_caller]
    fn settle(&mut self) -> &mut Self {
        for _ in 0..100 {
            let plan = self.plan();
            self.last = plan.clone();
            if plan.actions.is_empty() {
                return self;
            }
            for action in plan.actions {
                self.memory.dispatched(&action, self.now, PlanSettings::default());
                self.act(&action);
                self.memory.finished(&action);
            }
            self.observed.sort();
        }
        panic!("storm: {:?}", self.log.iter().rev().take(10).collect::<Vec<_>>());
    }

    /// Lets time pass to the next wake-up, `times` times, settling after each.
    fn wait(&mut self, times: usize) -> &mut Self {
        for _ in 0..times {
            self.settle();
            if let Some(at) = self.last.wake_at {
                assert!(at > self.now, "a wake-up in the past is a busy loop");
                self.now = at;
            }
        }
        self.settle()
    }

    fn act(&mut self, action: &PodAction) {
        let text = match action {
            PodAction::EnsureCgroup => {
                self.memory.cgroup = Step::Done;
                "cgroup".to_owned()
            }
            PodAction::MountVolumes => {
                self.memory.volumes = Step::Done;
                "volumes".to_owned()
            }
            PodAction::PrepareClaims => self.prepare_claims(),
            PodAction::ReleaseClaims => self.release_claims(),
            PodAction::CreateSandbox { attempt } => {
                self.memory.sandbox = Step::Done;
                self.ids += 1;
                self.observed.sandboxes.insert(
                    0,
                    ObservedSandbox {
                        id: format!("s{}", self.ids),
                        attempt: *attempt,
                        ready: true,
                        created_at: self.now,
                        ips: vec!["10.244.0.9".to_owned()],
                    },
                );
                format!("sandbox {attempt}")
            }
            PodAction::StopSandbox { id } => {
                for sandbox in self.observed.sandboxes.iter_mut().filter(|sandbox| sandbox.id == *id) {
                    sandbox.ready = false;
                }
                let now = self.now;
                for instance in
                    self.observed.containers.iter_mut().filter(|c| c.sandbox_id == *id && c.is_alive())
                {
                    end(instance, 137, now);
                }
                self.memory.stopped_sandboxes.insert(id.clone());
                "stop sandbox".to_owned()
            }
            PodAction::RemoveSandbox { id } => {
                self.observed.sandboxes.retain(|sandbox| sandbox.id != *id);
                self.observed.containers.retain(|instance| instance.sandbox_id != *id);
                "remove sandbox".to_owned()
            }
            PodAction::EnsureImage { container } => {
                let memory = self.memory.containers.entry(container.clone()).or_default();
                memory.image = ImageState::Present { image_ref: "sha256:1".to_owned() };
                format!("image {container}")
            }
            PodAction::StartContainer { container, attempt, sandbox_id, .. } => {
                self.start(container, *attempt, sandbox_id);
                format!("start {container} {attempt}")
            }
            PodAction::KillContainer { id, container, grace, .. } => {
                self.exit_id(id, 137);
                format!("kill {container} {grace}")
            }
            PodAction::ResizeContainer { container, applied, .. } => {
                self.memory.containers.entry(container.clone()).or_default().applied =
                    Some(Applied::clone(applied));
                format!("resize {container}")
            }
            PodAction::RemoveContainer { id, .. } => {
                self.observed.containers.retain(|instance| instance.id != *id);
                "remove container".to_owned()
            }
            PodAction::TearDownVolumes => {
                self.memory.released.volumes = true;
                "teardown".to_owned()
            }
            PodAction::RemoveCgroup => {
                self.memory.released.cgroup = true;
                "remove cgroup".to_owned()
            }
            PodAction::DeleteFromApi => {
                self.memory.released.api = true;
                "delete".to_owned()
            }
        };
        self.log.push(text);
    }

    fn start(&mut self, name: &str, attempt: u32, sandbox: &str) {
        assert!(
            self.observed.instances(name).all(|instance| !instance.is_alive()),
            "{name} would run twice: {:?}",
            self.log
        );
        self.ids += 1;
        let spec = self.desired.spec().clone();
        let container = &crate::model::find_container(&spec, name).expect("in spec");
        let mut instance = ObservedContainer {
            id: format!("c{}", self.ids),
            name: name.to_owned(),
            attempt,
            hash: crate::hash::container_hash(container),
            sandbox_id: sandbox.to_owned(),
            state: RunState::Running,
            image: String::new(),
            image_id: String::new(),
            created_at: self.now,
            started_at: Some(self.now),
            finished_at: None,
            exit_code: 0,
            reason: String::new(),
            message: String::new(),
            log_path: String::new(),
            user: None,
        };
        if let Some(code) = self.exit_on_start.get(name) {
            end(&mut instance, *code, self.now);
        }
        self.observed.containers.push(instance);
        self.memory.containers.entry(name.to_owned()).or_default().image = ImageState::Unknown;
    }

    fn exit(&mut self, name: &str, code: i32) -> &mut Self {
        let id = self.observed.instances(name).next().map(|instance| instance.id.clone()).expect("ran");
        self.exit_id(&id, code);
        self
    }

    fn exit_id(&mut self, id: &str, code: i32) {
        let now = self.now;
        self.observed
            .containers
            .iter_mut()
            .filter(|instance| instance.id == id)
            .for_each(|c| end(c, code, now));
    }

    fn fate(&mut self, fate: Fate) -> &mut Self {
        self.desired.fate = fate;
        self
    }

    /// Takes the log and compares it with a comma-separated list.
    #[track_caller]
    fn expect(&mut self, expected: &str) -> &mut Self {
        assert_eq!(std::mem::take(&mut self.log).join(", "), expected);
        self
    }
}

fn end(instance: &mut ObservedContainer, code: i32, now: Timestamp) {
    instance.state = RunState::Exited;
    instance.exit_code = code;
    instance.finished_at = Some(now);
}

fn one(policy: &str) -> World {
    World::new(&json!({"restartPolicy": policy, "terminationGracePeriodSeconds": 7,
        "containers": [{"name": "a", "image": "i"}]}))
}

#[test]
fn a_pod_starts_with_images_beside_the_sandbox_and_containers_in_order() {
    let mut world = World::new(&json!({"containers": [{"name": "a"}, {"name": "b"}]}));
    world.settle().expect("cgroup, volumes, image a, image b, sandbox 0, start a 0, start b 0");
    world.settle().expect("");
}

#[test]
fn init_containers_run_one_after_the_other() {
    let mut world =
        World::new(&json!({"initContainers": [{"name": "i"}, {"name": "j"}], "containers": [{"name": "a"}]}));
    world.settle().expect("cgroup, volumes, image i, sandbox 0, start i 0");
    world.exit("i", 0).settle().expect("image j, start j 0");
    world.exit("j", 0).settle().expect("image a, start a 0");
}

#[test]
fn a_failing_init_container_is_retried_or_fails_the_pod() {
    let spec = |policy: &str| json!({"restartPolicy": policy, "initContainers": [{"name": "i"}], "containers": [{"name": "a"}]});
    let mut world = World::new(&spec("Never"));
    world.settle().log.clear();
    world.exit("i", 1).settle().expect("stop sandbox, teardown, remove cgroup");
    assert!(world.last.finished);
    let mut world = World::new(&spec("OnFailure"));
    world.settle().log.clear();
    world.exit("i", 1).settle().expect("image i, start i 1");
}

#[test]
fn a_sidecar_lets_the_next_start_and_stops_last() {
    let mut world = World::new(&json!({"restartPolicy": "Never", "terminationGracePeriodSeconds": 7,
        "initContainers": [{"name": "s", "restartPolicy": "Always"}, {"name": "t", "restartPolicy": "Always"}],
        "containers": [{"name": "a"}]}));
    world
        .settle()
        .expect("cgroup, volumes, image s, sandbox 0, start s 0, image t, start t 0, image a, start a 0");
    world.exit("s", 1).settle().expect("image s, start s 1");
    world.exit("a", 0).settle().expect("kill t 7, kill s 7, stop sandbox, teardown, remove cgroup");
}

#[test]
fn restart_policies_decide() {
    for (policy, code, expected) in [
        ("Always", 0, "image a, start a 1"),
        ("OnFailure", 1, "image a, start a 1"),
        ("OnFailure", 0, "stop sandbox, teardown, remove cgroup"),
        ("Never", 1, "stop sandbox, teardown, remove cgroup"),
    ] {
        let mut world = one(policy);
        world.settle().log.clear();
        world.exit("a", code).settle().expect(expected);
    }
}

#[test]
fn a_crash_loop_backs_off_and_says_so() {
    let mut world = one("Always");
    world.exit_on_start.insert("a".to_owned(), 1);
    let begin = world.now;
    world.settle().expect("cgroup, volumes, image a, sandbox 0, start a 0, image a, start a 1");
    assert_eq!(world.last.waiting["a"].reason, "CrashLoopBackOff");
    assert_eq!(world.last.waiting["a"].message, "back-off 10s restarting failed container=a pod=p_ns(u)");
    world.wait(3).expect("image a, start a 2, remove container, image a, start a 3, remove container, image a, start a 4, remove container");
    assert_eq!(world.now.duration_since(begin).as_secs(), 10 + 20 + 40);
    assert!(world.last.waiting["a"].message.starts_with("back-off 1m20s"), "{:?}", world.last.waiting);
}

#[test]
fn a_failed_liveness_probe_kills_with_its_grace_and_restarts() {
    let mut world = one("Always");
    world.settle().log.clear();
    let id = world.observed.containers[0].id.clone();
    world.memory.containers.entry("a".to_owned()).or_default().probes = crate::model::ProbeResults {
        container_id: id,
        failed: Some(crate::model::ProbeFailure { probe: "liveness", grace: Some(3) }),
        ..Default::default()
    };
    let PodAction::KillContainer { message, .. } = &world.plan().actions[0] else { panic!("kill first") };
    assert_eq!(message, "Container a failed liveness probe, will be restarted");
    world.settle().expect("kill a 3, image a, start a 1");
}

#[test]
fn a_new_image_restarts_in_place_whatever_the_policy() {
    let mut world = one("Never");
    world.settle().log.clear();
    let mut pod = Arc::unwrap_or_clone(Arc::clone(&world.desired.pod));
    pod.spec.as_mut().expect("spec").containers[0].image = Some("other".to_owned());
    world.desired.pod = Arc::new(pod);
    let PodAction::KillContainer { message, .. } = &world.plan().actions[0] else { panic!("kill first") };
    assert_eq!(message, "Container a definition changed, will be restarted");
    world.settle().expect("kill a 7, image a, start a 1");
}

#[test]
fn a_dead_sandbox_is_replaced_and_init_runs_again() {
    let mut world = World::new(&json!({"initContainers": [{"name": "i"}], "containers": [{"name": "a"}]}));
    world.exit_on_start.insert("i".to_owned(), 0);
    world.settle().log.clear();
    world.observed.sandboxes[0].ready = false;
    world.exit("a", 137).settle();
    world.expect("stop sandbox, image i, sandbox 1, start i 1, image a, start a 1");
}

#[test]
fn a_deleted_pod_reports_before_anything_is_removed() {
    let mut world = one("Always");
    world.settle().log.clear();
    world.fate(Fate::Terminate { grace: 4, gone: false }).settle().expect("kill a 4, stop sandbox");
    world.memory.status_written = true;
    world.settle().expect("teardown, remove cgroup, remove sandbox, delete");
    assert!(world.last.done);
}

#[test]
fn a_pod_that_the_api_lost_leaves_nothing() {
    let mut world = one("Always");
    world.settle().log.clear();
    world.fate(Fate::Terminate { grace: 1, gone: true }).settle();
    world.expect("kill a 1, stop sandbox, teardown, remove cgroup, remove sandbox");
    assert!(world.last.done);
}

#[test]
fn a_restarted_agent_touches_no_running_container() {
    let mut world = one("Always");
    world.settle().log.clear();
    world.memory = PodMemory { services_synced: true, ..PodMemory::default() };
    world.settle().expect("cgroup, volumes");
}

#[test]
fn containers_wait_for_services_volumes_and_the_sandbox() {
    let mut world = one("Always");
    world.memory.services_synced = false;
    world.settle().expect("cgroup, volumes, image a, sandbox 0");
    world.memory.services_synced = true;
    world.settle().expect("start a 0");
}

#[test]
fn an_image_error_becomes_back_off_and_is_retried() {
    let mut world = one("Always");
    world.memory.services_synced = false;
    world.settle().log.clear();
    let (now, memory) = (world.now, world.memory.containers.entry("a".to_owned()).or_default());
    memory.image =
        ImageState::Failed { reason: "ErrImagePull".to_owned(), message: "no such".to_owned(), at: now };
    memory.pull_backoff.advance(now, now, backoff::MAX);
    world.settle().expect("");
    assert_eq!(world.last.waiting["a"].reason, "ErrImagePull");
    world.now = world.last.wake_at.expect("a time");
    world.settle();
    assert_eq!(world.last.waiting["a"].reason, "ImagePullBackOff");
    assert_eq!(world.last.waiting["a"].message, "Back-off pulling image \"i\": ErrImagePull: no such");
    world.wait(1).expect("image a");
    // Of what is no ErrImagePull nothing else is shown later: only the next try wakes the loop.
    let (now, memory) = (world.now, world.memory.containers.entry("a".to_owned()).or_default());
    let (reason, message) = ("ErrImageNeverPull".to_owned(), String::new());
    memory.image = ImageState::Failed { reason, message, at: now };
    world.now = now + SignedDuration::from_secs(5);
    assert!(world.plan().wake_at.is_some_and(|at| at > world.now));
}

/// The pod with other resources for its first container.
fn resized(world: &World, cpu: &str, memory: &str) -> DesiredPod {
    let mut pod = Arc::unwrap_or_clone(Arc::clone(&world.desired.pod));
    let resources = json!({"requests": {"cpu": cpu, "memory": memory}});
    let container = &mut pod.spec.as_mut().expect("a spec").containers[0];
    container.resources = Some(serde_json::from_value(resources).expect("resources"));
    DesiredPod::new(Arc::new(pod), Fate::Run)
}

#[test]
fn other_resources_are_applied_in_place_or_by_a_restart() {
    let mut world = World::new(&json!({"terminationGracePeriodSeconds": 7, "containers": [{"name": "a",
        "resizePolicy": [{"resourceName": "memory", "restartPolicy": "RestartContainer"}]}]}));
    world.desired = resized(&world, "1", "1Gi");
    world.settle().log.clear();
    let applied = Applied::of(&world.desired.spec().containers[0], 0);
    world.memory.containers.entry("a".to_owned()).or_default().applied = Some(applied);
    world.settle().expect("");
    world.desired = resized(&world, "2", "1Gi");
    world.desired.resize_blocked =
        Some(crate::resize::Blocked { reason: "Deferred", message: String::new() });
    world.settle().expect("");
    world.desired.resize_blocked = None;
    world.settle().expect("resize a");
    world.desired = resized(&world, "2", "2Gi");
    world.settle().expect("kill a 7, image a, start a 1");
}

/// What may happen to a pod from outside.
#[derive(Debug, Clone)]
enum Accident {
    Exit(u8, i32),
    SandboxDies,
    AgentRestarts,
    ContainerLost(u8),
    Wait,
}

fn accidents() -> impl Strategy<Value = Vec<Accident>> {
    let accident = prop_oneof![
        (0_u8..3, 0..2_i32).prop_map(|(index, code)| Accident::Exit(index, code)),
        Just(Accident::SandboxDies),
        Just(Accident::AgentRestarts),
        (0_u8..3).prop_map(Accident::ContainerLost),
        Just(Accident::Wait),
    ];
    proptest::collection::vec(accident, 0..12)
}

impl World {
    fn suffer(&mut self, accident: &Accident) {
        let running = |index: u8, world: &Self| {
            let alive: Vec<String> = world.observed.alive().map(|instance| instance.id.clone()).collect();
            alive.get(usize::from(index)).cloned()
        };
        match accident {
            Accident::Exit(index, code) => {
                if let Some(id) = running(*index, self) {
                    self.exit_id(&id, *code);
                }
            }
            Accident::SandboxDies => {
                if let Some(sandbox) = self.observed.sandboxes.first_mut() {
                    sandbox.ready = false;
                    let (id, now) = (sandbox.id.clone(), self.now);
                    self.observed
                        .containers
                        .iter_mut()
                        .filter(|instance| instance.sandbox_id == id && instance.is_alive())
                        .for_each(|instance| end(instance, 137, now));
                }
            }
            Accident::AgentRestarts => {
                self.memory = PodMemory { services_synced: true, ..PodMemory::default() };
            }
            Accident::ContainerLost(index) => {
                if let Some(id) = running(*index, self) {
                    self.observed.containers.retain(|instance| instance.id != id);
                }
            }
            Accident::Wait => {
                self.wait(1);
            }
        }
    }
}

proptest! {
    /// Whatever happens: no storm, never two instances of a container, and in the end every container of an
    /// always-restarting pod runs in the newest sandbox; a deleted pod leaves nothing.
    #[test]
    fn every_pod_converges(accidents in accidents(), sidecar in any::<bool>(), init in any::<bool>()) {
        let mut inits = Vec::new();
        if sidecar { inits.push(json!({"name": "s", "restartPolicy": "Always"})); }
        if init { inits.push(json!({"name": "i"})); }
        let mut world = World::new(&json!({"initContainers": inits, "containers": [{"name": "a"}, {"name": "b"}]}));
        world.exit_on_start.insert("i".to_owned(), 0);
        world.settle();
        for accident in &accidents {
            world.suffer(accident);
            world.settle();
        }
        world.wait(8);
        let current = world.observed.sandboxes.first().expect("a sandbox").clone();
        prop_assert!(current.ready);
        for name in ["a", "b"].into_iter().chain(sidecar.then_some("s")) {
            let newest = world.observed.instances(name).next().expect("an instance");
            prop_assert_eq!((newest.state, &newest.sandbox_id), (RunState::Running, &current.id));
        }
        world.fate(Fate::Terminate { grace: 1, gone: false }).settle();
        world.memory.status_written = true;
        world.settle();
        prop_assert!(world.last.done && world.observed.containers.is_empty() && world.observed.sandboxes.is_empty());
    }
}

#[test]
fn an_ephemeral_container_looks_into_its_target_once() {
    let mut world = one("Always");
    world.settle().log.clear();
    let mut pod = Arc::unwrap_or_clone(Arc::clone(&world.desired.pod));
    pod.spec.as_mut().expect("spec").ephemeral_containers = Some(
        serde_json::from_value(json!([{"name": "d", "image": "i", "targetContainerName": "a"}]))
            .expect("containers"),
    );
    world.desired = DesiredPod::new(Arc::new(pod), Fate::Run);
    world.settle().expect("image d, start d 0");
    world.exit("d", 1).settle().expect("");
    world.memory = PodMemory { services_synced: true, ..PodMemory::default() };
    world.settle().expect("cgroup, volumes");
    // It neither keeps the pod alive nor fails it.
    assert!(!world.last.ended);
}

#[test]
fn an_ephemeral_container_waits_for_its_target() {
    let mut world = World::new(&json!({"containers": [{"name": "a"}],
        "ephemeralContainers": [{"name": "d", "image": "i", "targetContainerName": "a"}]}));
    world.exit_on_start.insert("a".to_owned(), 1);
    world.settle();
    assert_eq!(world.last.waiting["d"].message, "target container \"a\" is not running");
    world.exit_on_start.clear();
    world.log.clear();
    world.wait(1).expect("image a, start a 2, start d 0, remove container");
}

#[test]
fn a_containers_own_rules_decide_before_the_pods_policy() {
    let rules = json!([{"action": "Restart", "exitCodes": {"operator": "In", "values": [42]}}]);
    let spec = json!({"restartPolicy": "Always", "containers": [
        {"name": "a", "restartPolicy": "Never", "restartPolicyRules": rules}]});
    for (code, expected) in [
        (42, "image a, start a 1"),
        (0, "stop sandbox, teardown, remove cgroup"),
        (1, "stop sandbox, teardown, remove cgroup"),
    ] {
        let mut world = World::new(&spec);
        world.settle().log.clear();
        world.exit("a", code).settle().expect(expected);
    }
    let not_in = json!([{"action": "Restart", "exitCodes": {"operator": "NotIn", "values": [0, 1]}}]);
    let init = json!({"restartPolicy": "Never", "initContainers": [
        {"name": "i", "restartPolicy": "Never", "restartPolicyRules": not_in}], "containers": [{"name": "a"}]});
    for (code, expected) in [(7, "image i, start i 1"), (1, "stop sandbox, teardown, remove cgroup")] {
        let mut world = World::new(&init);
        world.settle().log.clear();
        world.exit("i", code).settle().expect(expected);
    }
}

#[test]
fn an_evicted_pod_ends_with_the_nodes_grace() {
    let mut world = one("Always");
    world.settle().log.clear();
    world.fate(Fate::Fail { reason: "Evicted".to_owned(), message: "m".to_owned(), grace: Some(1) }).settle();
    world.expect("kill a 1, stop sandbox, teardown, remove cgroup");
}
