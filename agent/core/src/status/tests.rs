//! Statuses as kubectl shows them.

use std::fmt::Write as _;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::*;
use crate::model::{ObservedContainer, ObservedSandbox, ProbeResults, RunState};
use crate::plan::{PlanInput, PlanSettings, plan};

struct Case {
    pod: Value,
    observed: ObservedPod,
    memory: PodMemory,
    fate: Fate,
}

fn now() -> Timestamp {
    Timestamp::from_second(1_000_000).expect("in range")
}

fn case(spec: &Value) -> Case {
    Case {
        pod: json!({"metadata": {"name": "p", "namespace": "ns", "uid": "u", "generation": 3}, "spec": spec}),
        observed: ObservedPod {
            sandboxes: vec![ObservedSandbox {
                id: "s".to_owned(),
                attempt: 0,
                ready: true,
                created_at: now(),
                ips: vec!["10.244.0.9".to_owned()],
            }],
            containers: Vec::new(),
        },
        memory: PodMemory::default(),
        fate: Fate::Run,
    }
}

impl Case {
    fn with(mut self, name: &str, attempt: u32, state: RunState, exit_code: i32) -> Self {
        self.observed.containers.push(ObservedContainer {
            id: format!("{name}{attempt}"),
            name: name.to_owned(),
            attempt,
            hash: String::new(),
            sandbox_id: "s".to_owned(),
            state,
            image: "docker.io/library/i:1".to_owned(),
            image_id: "sha256:1".to_owned(),
            created_at: now(),
            started_at: Some(now()),
            finished_at: (state == RunState::Exited).then(now),
            exit_code,
            reason: String::new(),
            message: String::new(),
            log_path: String::new(),
            user: None,
        });
        self
    }

    fn derive(&self) -> PodStatus {
        let pod: Pod = serde_json::from_value(self.pod.clone()).expect("a pod");
        let previous = pod.status.clone().unwrap_or_default();
        let desired = DesiredPod::new(Arc::new(pod), self.fate.clone());
        let mut observed = self.observed.clone();
        observed.sort();
        let settings = PlanSettings::default();
        let plan = plan(PlanInput {
            desired: &desired,
            observed: &observed,
            memory: &self.memory,
            now: now(),
            settings,
        });
        derive(StatusInput {
            desired: &desired,
            observed: &observed,
            memory: &self.memory,
            plan: &plan,
            previous: &previous,
            node: &NodeIdentity { host_ip: "10.0.0.1".to_owned(), runtime_name: "containerd".to_owned() },
            now: now(),
        })
    }

    /// Phase, then each condition as `Type=Status(reason)`, PodScheduled left out.
    #[track_caller]
    fn check(&self, expected: &str) -> PodStatus {
        let status = self.derive();
        let conditions =
            status.conditions.iter().flatten().filter(|condition| condition.type_ != "PodScheduled");
        let mut text = status.phase.clone().unwrap_or_default();
        for condition in conditions {
            let reason = condition.reason.as_ref().map(|reason| format!("({reason})")).unwrap_or_default();
            let short: String = condition.type_.chars().filter(char::is_ascii_uppercase).collect();
            write!(text, " {short}={}{reason}", condition.status).expect("writing to a String cannot fail");
        }
        assert_eq!(text, expected);
        status
    }
}

#[test]
fn a_pod_from_creation_to_ready() {
    let spec = json!({"containers": [{"name": "a", "image": "i:1"}]});
    let mut fresh = case(&spec);
    fresh.observed.sandboxes.clear();
    let status =
        fresh.check("Pending PRTSC=False I=True R=False(ContainersNotReady) CR=False(ContainersNotReady)");
    let waiting =
        status.container_statuses.expect("statuses")[0].state.clone().and_then(|state| state.waiting);
    assert_eq!(waiting.and_then(|waiting| waiting.reason).as_deref(), Some("ContainerCreating"));
    let running = case(&spec).with("a", 0, RunState::Running, 0);
    let status = running.check("Running PRTSC=True I=True R=True CR=True");
    let container = &status.container_statuses.as_ref().expect("statuses")[0];
    assert_eq!((container.ready, container.started), (true, Some(true)));
    assert_eq!(container.container_id.as_deref(), Some("containerd://a0"));
    assert_eq!((status.pod_ip.as_deref(), status.observed_generation), (Some("10.244.0.9"), Some(3)));
    assert_eq!(status.qos_class.as_deref(), Some("BestEffort"));
}

#[test]
fn readiness_waits_for_the_probe_and_the_gates() {
    let probe = json!({"tcpSocket": {"port": 80}});
    let mut with_probe = case(&json!({"containers": [{"name": "a", "readinessProbe": probe}]})).with(
        "a",
        0,
        RunState::Running,
        0,
    );
    with_probe.check("Running PRTSC=True I=True R=False(ContainersNotReady) CR=False(ContainersNotReady)");
    with_probe.memory.containers.entry("a".to_owned()).or_default().probes =
        ProbeResults { container_id: "a0".to_owned(), ready: true, ..ProbeResults::default() };
    with_probe.check("Running PRTSC=True I=True R=True CR=True");
    let gated = case(&json!({"containers": [{"name": "a"}], "readinessGates": [{"conditionType": "x/y"}]}))
        .with("a", 0, RunState::Running, 0);
    gated.check("Running PRTSC=True I=True R=False(ReadinessGatesNotReady) CR=True");
}

#[test]
fn a_completed_job_and_a_failed_one() {
    let spec = json!({"restartPolicy": "Never", "containers": [{"name": "a"}]});
    let done = case(&spec).with("a", 0, RunState::Exited, 0);
    let status =
        done.check("Succeeded PRTSC=True I=True(PodCompleted) R=False(PodCompleted) CR=False(PodCompleted)");
    let ended = status.container_statuses.expect("statuses")[0].state.clone().and_then(|s| s.terminated);
    assert_eq!(ended.and_then(|ended| ended.reason).as_deref(), Some("Completed"));
    let failed = case(&spec).with("a", 0, RunState::Exited, 3);
    failed.check("Failed PRTSC=True I=True R=False(PodFailed) CR=False(PodFailed)");
}

#[test]
fn a_crash_loop_shows_the_last_end() {
    let mut looping = case(&json!({"containers": [{"name": "a"}]})).with("a", 0, RunState::Exited, 1).with(
        "a",
        1,
        RunState::Exited,
        1,
    );
    let hash =
        crate::hash::container_hash(&serde_json::from_value(json!({"name": "a"})).expect("a container"));
    looping.observed.containers.iter_mut().for_each(|instance| instance.hash.clone_from(&hash));
    let backoff = &mut looping.memory.containers.entry("a".to_owned()).or_default().restart_backoff;
    backoff.advance(now(), now(), crate::backoff::MAX);
    let status =
        looping.check("Running PRTSC=True I=True R=False(ContainersNotReady) CR=False(ContainersNotReady)");
    let container = &status.container_statuses.expect("statuses")[0];
    assert_eq!(container.restart_count, 1);
    let waiting = container.state.as_ref().and_then(|state| state.waiting.as_ref());
    assert_eq!(waiting.and_then(|waiting| waiting.reason.as_deref()), Some("CrashLoopBackOff"));
    let last = container.last_state.as_ref().and_then(|last| last.terminated.as_ref()).expect("an end");
    assert_eq!((last.exit_code, last.reason.as_deref()), (1, Some("Error")));
}

#[test]
fn init_containers_hold_the_pod_pending() {
    let spec = json!({"initContainers": [{"name": "i"}], "containers": [{"name": "a"}]});
    let status = case(&spec)
        .with("i", 0, RunState::Running, 0)
        .check("Pending PRTSC=True I=False(ContainersNotInitialized) R=False(ContainersNotReady) CR=False(ContainersNotReady)");
    let message =
        status.conditions.iter().flatten().find(|c| c.type_ == "Initialized").and_then(|c| c.message.clone());
    assert_eq!(message.as_deref(), Some("containers with incomplete status: [i]"));
    let waiting =
        status.container_statuses.expect("statuses")[0].state.clone().and_then(|state| state.waiting);
    assert_eq!(waiting.and_then(|waiting| waiting.reason).as_deref(), Some("PodInitializing"));
}

#[test]
fn a_rejected_pod_is_failed_with_its_reason() {
    let mut rejected = case(&json!({"containers": [{"name": "a"}]}));
    rejected.observed.sandboxes.clear();
    rejected.fate = Fate::Fail { reason: "OutOfcpu".to_owned(), message: "m".to_owned(), grace: None };
    let status = rejected.check("Failed PRTSC=False I=True R=False(PodFailed) CR=False(PodFailed)");
    assert_eq!(status.reason.as_deref(), Some("OutOfcpu"));
    assert_eq!(
        status.container_statuses, None,
        "kubectl would show their waiting reason instead of the pod's"
    );
}

#[test]
fn an_evicted_pod_is_failed_when_nothing_of_it_runs() {
    let mut evicted = case(&json!({"containers": [{"name": "a"}]})).with("a", 0, RunState::Running, 0);
    evicted.fate = Fate::Fail { reason: "Evicted".to_owned(), message: "m".to_owned(), grace: Some(1) };
    let status = evicted.check("Running PRTSC=True I=True R=True CR=True");
    assert_eq!(status.reason, None);
    evicted.observed.containers[0].state = RunState::Exited;
    let status = evicted.check(
        "Failed PRTSC=True I=True R=False(PodFailed) CR=False(PodFailed) DT=True(TerminationByKubelet)",
    );
    assert_eq!(status.reason.as_deref(), Some("Evicted"));
}

#[test]
fn restarts_of_a_container_that_the_runtime_lost_are_not_forgotten() {
    let mut lost = case(&json!({"containers": [{"name": "a"}]}));
    lost.pod["status"] = json!({"phase": "Running", "containerStatuses": [{"name": "a", "image": "i",
        "imageID": "i", "ready": false, "restartCount": 4, "containerID": "containerd://a4",
        "state": {"waiting": {"reason": "CrashLoopBackOff"}},
        "lastState": {"terminated": {"exitCode": 3}}}]});
    for _ in 0..2 {
        let status = lost.derive();
        let container = status.container_statuses.clone().expect("statuses").remove(0);
        assert_eq!((container.restart_count, container.container_id), (4, None));
        let last = container.last_state.and_then(|last| last.terminated).expect("an end");
        assert_eq!(last.exit_code, 3);
        lost.pod["status"] = serde_json::to_value(status).expect("a status");
    }
    let older = lost.with("a", 3, RunState::Exited, 1).derive();
    assert_eq!(older.container_statuses.expect("statuses")[0].restart_count, 4);
}

#[test]
fn an_evicted_pod_whose_sandbox_is_lost_still_tells_of_its_containers() {
    let mut evicted = case(&json!({"containers": [{"name": "a"}]}));
    evicted.observed.sandboxes.clear();
    evicted.fate = Fate::Fail { reason: "Evicted".to_owned(), message: "m".to_owned(), grace: Some(1) };
    evicted.pod["status"] = json!({"phase": "Running", "containerStatuses": [{"name": "a", "image": "i",
        "imageID": "i", "ready": false, "restartCount": 2, "containerID": "containerd://a2",
        "state": {"terminated": {"exitCode": 143}}}]});
    let status = evicted.derive();
    assert_eq!(status.phase.as_deref(), Some("Failed"));
    assert_eq!(status.container_statuses.expect("statuses")[0].restart_count, 2);
}
