//! The rules. Each is checked against the truth of runtime, host and API server, never against what the agent believes.

use std::collections::{BTreeMap, BTreeSet};

use agent_core::model::{ContainerKind, Fate, RunState, containers, is_sidecar};
use agent_core::plan::PodAction;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodStatus};

use crate::agent::Loop;
use crate::runtime::Instance;
use crate::steps::Job;
use crate::world::{Millis, World};

/// Steps that a pod's loop may start in a minute; more is a storm.
const STORM: usize = 300;
/// Passes of a loop in a minute; more is a loop that wakes itself.
const SPIN: usize = 1500;

/// What the rules remember.
#[derive(Debug, Default)]
pub(crate) struct Truth {
    pub(crate) evicted: BTreeSet<String>,
    /// The minute, and the steps begun in it, of each pod.
    steps: BTreeMap<String, (Millis, usize)>,
    /// The same of its loop's passes.
    passes: BTreeMap<String, (Millis, usize)>,
}

fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or("Pending")
}

fn is_final(phase: &str) -> bool {
    matches!(phase, "Succeeded" | "Failed")
}

fn statuses(status: &PodStatus) -> impl Iterator<Item = &ContainerStatus> {
    let init = status.init_container_statuses.iter().flatten();
    init.chain(status.container_statuses.iter().flatten())
}

fn count_in_minute(counts: &mut BTreeMap<String, (Millis, usize)>, uid: &str, time: Millis) -> usize {
    let (minute, count) = counts.entry(uid.to_owned()).or_default();
    *count = if *minute == time / 60_000 { *count + 1 } else { 1 };
    *minute = time / 60_000;
    *count
}

impl World {
    #[track_caller]
    pub(crate) fn violated(rule: &str) -> ! {
        panic!("{rule}")
    }

    #[track_caller]
    fn must(holds: bool, rule: impl FnOnce() -> String) {
        if !holds {
            Self::violated(&rule());
        }
    }

    /// What runs of a pod, but for containers that only a dead agent knew to start.
    fn running<'a>(&'a self, uid: &'a str) -> impl Iterator<Item = &'a Instance> {
        self.runtime.alive_of(uid).filter(|instance| !instance.ghost)
    }

    /// After each step.
    pub(crate) fn check_always(&self) {
        let mut seen = BTreeSet::new();
        for instance in self.runtime.instances.values().filter(|instance| instance.truth.is_alive()) {
            let name = (&instance.uid, &instance.truth.name);
            Self::must(seen.insert(name), || format!("{name:?} runs twice"));
        }
    }

    /// Before a loop plans.
    pub(crate) fn check_pass(&mut self, uid: &str) {
        let count = count_in_minute(&mut self.truth.passes, uid, self.time);
        Self::must(count < SPIN, || format!("the loop of {uid} wakes itself"));
    }

    /// Before the agent does something.
    pub(crate) fn check_action(&mut self, pod_loop: &Loop, action: &PodAction) {
        let count = count_in_minute(&mut self.truth.steps, &pod_loop.uid, self.time);
        Self::must(count < STORM, || format!("a storm of steps: {action:?}"));
        let starts = matches!(
            action,
            PodAction::CreateSandbox { .. }
                | PodAction::EnsureImage { .. }
                | PodAction::StartContainer { .. }
        );
        if !starts {
            return;
        }
        let fate = &pod_loop.state.desired.fate;
        Self::must(*fate == Fate::Run, || format!("{action:?} in spite of {fate:?}"));
        let told = self.api.by_uid(&pod_loop.uid).map_or("", |pod| phase(pod));
        Self::must(!is_final(told), || format!("{action:?} of a pod that is {told}"));
    }

    /// Before the runtime makes a container.
    pub(crate) fn check_start(&self, job: &Job, name: &str, sandbox: &str) {
        let uid = job.uid.as_str();
        Self::must(self.runtime.volumes.contains(uid), || format!("{name} is started without volumes"));
        Self::must(self.runtime.cgroups.contains(uid), || format!("{name} is started without a cgroup"));
        let again = self.running(uid).any(|instance| instance.truth.name == name);
        Self::must(!again, || format!("{name} is started while it runs"));
        let spec = job.pod.spec.as_ref().expect("a spec");
        let key = |name: &str| (sandbox.to_owned(), name.to_owned());
        if name.starts_with("look") {
            let before = self.runtime.ran.iter().any(|(_, ran)| ran == name);
            Self::must(!before || self.runtime.lossy.contains(uid), || format!("{name} is started again"));
            return;
        }
        for entry in containers(spec) {
            let other = entry.container.name.as_str();
            if other == name || entry.kind == ContainerKind::Main {
                break;
            }
            if entry.kind == ContainerKind::Init {
                let over = self.runtime.succeeded.contains(&key(other));
                Self::must(over, || format!("{name} is started before {other} has succeeded"));
            } else {
                let ran = self.runtime.ran.contains(&key(other));
                Self::must(ran, || format!("{name} is started before {other} ran"));
            }
        }
    }

    /// Before the stop signal: a sidecar of a pod that ends goes after all that may need it.
    pub(crate) fn check_stop_order(&self, job: &Job, id: &str) {
        let Some(PodAction::KillContainer { message, container, .. }) = &job.action else { return };
        let inits = job.pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten());
        let sidecars: Vec<&str> = inits.filter(|c| is_sidecar(c)).map(|c| c.name.as_str()).collect();
        let Some(place) = sidecars.iter().position(|name| name == container) else { return };
        if !message.starts_with("Stopping container") {
            return;
        }
        for other in self.running(&job.uid).filter(|other| other.truth.id != id) {
            let name = other.truth.name.as_str();
            let before = sidecars.iter().position(|sidecar| *sidecar == name).is_some_and(|at| at < place);
            Self::must(before, || format!("{container} is stopped before {name}"));
        }
    }

    /// Before processes are killed whose grace period is over.
    pub(crate) fn check_sigkill(&self, job: &Job, id: &str) {
        let Some(instance) = self.runtime.instances.get(id) else { return };
        let given = (self.time - job.began) / 1000;
        let Some(pod) = self.api.by_uid(&instance.uid) else { return };
        let spec = pod.spec.as_ref().expect("a spec");
        let mut least = vec![spec.termination_grace_period_seconds.unwrap_or(30)];
        let own = spec.containers.iter().find(|container| container.name == instance.truth.name);
        let probes = own.iter().flat_map(|c| c.liveness_probe.iter().chain(&c.startup_probe));
        least.extend(probes.filter_map(|probe| probe.termination_grace_period_seconds));
        least.extend(pod.metadata.deletion_grace_period_seconds);
        least.extend(self.truth.evicted.contains(&instance.uid).then_some(1));
        let least = least.into_iter().min().unwrap_or(30);
        Self::must(given >= least, || format!("{id} is killed after {given} s of {least}"));
    }

    /// Before a sandbox is stopped: whoever is in it has no grace period.
    pub(crate) fn check_stop_sandbox(&self, id: &str) {
        let Some(sandbox) = self.runtime.sandboxes.get(id) else { return };
        if !sandbox.truth.ready || sandbox.truth.ips.is_empty() {
            return;
        }
        let runs = self.running(&sandbox.uid).find(|instance| instance.truth.sandbox_id == id);
        if let Some(instance) = runs {
            Self::violated(&format!("{id} is stopped while {} runs in it", instance.truth.name));
        }
    }

    /// Before something is removed that runs.
    pub(crate) fn check_removal(&self, id: &str) {
        let ghost = self.runtime.instances.get(id).is_none_or(|instance| instance.ghost);
        Self::must(ghost, || format!("{id} is removed while it runs"));
    }

    pub(crate) fn check_nothing_runs(&self, uid: &str, what: &str) {
        if let Some(instance) = self.running(uid).next() {
            Self::violated(&format!("{what} while {} of {uid} runs", instance.truth.name));
        }
    }

    /// Before the API server takes a status.
    pub(crate) fn check_written(&self, new: &Pod) {
        let uid = new.metadata.uid.as_deref().unwrap_or_default();
        let Some(old) = self.api.by_uid(uid) else { return };
        let (from, to) = (phase(old), phase(new));
        // A new sandbox runs its init containers once more; of what the runtime lost nobody knows that it ran.
        let back = from == "Running" && to == "Pending" && {
            let spec = new.spec.as_ref().expect("a spec");
            spec.init_containers.is_some() || self.runtime.lossy.contains(uid)
        };
        let fine = match from {
            "Pending" => true,
            "Running" => to != "Pending" || back,
            _ => to == from,
        };
        Self::must(fine, || format!("the phase of {uid} goes from {from} to {to}"));
        let (before, after) =
            (old.status.clone().unwrap_or_default(), new.status.clone().unwrap_or_default());
        for known in statuses(&before) {
            let Some(now) = statuses(&after).find(|now| now.name == known.name) else { continue };
            let (was, is) = (known.restart_count, now.restart_count);
            Self::must(is >= was, || format!("restarts of {} of {uid} go from {was} to {is}", known.name));
        }
        if is_final(to) && !is_final(from) {
            self.check_nothing_runs(uid, "the phase is final");
            self.check_result(new, to);
        }
    }

    fn check_result(&self, pod: &Pod, phase: &str) {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        if phase != "Succeeded" || self.runtime.lossy.contains(&uid) {
            return;
        }
        for main in &pod.spec.as_ref().expect("a spec").containers {
            let code = self.runtime.last_exit.get(&(uid.clone(), main.name.clone()));
            Self::must(code == Some(&0), || {
                format!("{uid} succeeded though {} ended with {code:?}", main.name)
            });
        }
    }

    /// Before the agent lets the API object go.
    pub(crate) fn check_deletion(&self, uid: &str) {
        self.check_nothing_runs(uid, "the API object is deleted");
        let held = self.runtime.volumes.contains(uid) || self.runtime.cgroups.contains(uid);
        Self::must(!held, || format!("{uid} is deleted while the node holds something for it"));
    }

    /// Before a loop ends.
    pub(crate) fn check_done(&self, uid: &str) {
        self.check_deletion(uid);
        let left = self.api.by_uid(uid).is_some();
        Self::must(!left, || format!("the loop of {uid} ends while the API has it"));
    }

    /// Long after the last accident.
    pub(crate) fn check_converged(&self) {
        for uid in self.runtime.traces() {
            Self::must(self.api.by_uid(&uid).is_some(), || format!("{uid} has left something"));
        }
        for pod in self.api.pods.values() {
            self.check_pod(pod);
        }
    }

    fn check_pod(&self, pod: &Pod) {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        Self::must(pod.metadata.deletion_timestamp.is_none(), || format!("{uid} is not gone"));
        let agent = self.agent.as_ref().expect("it runs");
        let pod_loop = agent.loops.values().find(|pod_loop| pod_loop.uid == uid);
        let Some(pod_loop) = pod_loop else { Self::violated(&format!("{uid} has no loop")) };
        let in_sync = pod_loop.state.sync.in_sync(uid, &pod_loop.state.status);
        // A container that crashes all the time may just have done so.
        let steady = pod_loop.tasks.is_empty() && !pod_loop.observing && !pod_loop.has_input();
        Self::must(in_sync || !steady, || format!("the API does not say how {uid} is"));
        if is_final(phase(pod)) {
            self.check_nothing_runs(uid, "it is over");
            let held = self.runtime.volumes.contains(uid) || self.runtime.cgroups.contains(uid);
            Self::must(!held, || format!("{uid} is over and holds something"));
            let ready = self.runtime.sandboxes.values().any(|s| s.uid == uid && s.truth.ready);
            Self::must(!ready, || format!("{uid} is over and has a sandbox"));
            return;
        }
        Self::must(self.runtime.volumes.contains(uid), || format!("{uid} has no volumes"));
        for entry in containers(pod.spec.as_ref().expect("a spec")) {
            self.check_container(pod, &entry.container.name, steady);
        }
        let jobs = |main: &k8s_openapi::api::core::v1::Container| main.name.starts_with("job");
        let spec = pod.spec.as_ref().expect("a spec");
        let over = spec.restart_policy.as_deref() != Some("Always") && spec.containers.iter().all(jobs);
        let own_rules = spec.containers.iter().any(|main| main.restart_policy.is_some());
        Self::must(!over || own_rules, || format!("{uid} is {} with nothing left to do", phase(pod)));
    }

    /// Whatever is to go on runs, in the newest sandbox, and the API tells of that very instance.
    fn check_container(&self, pod: &Pod, name: &str, steady: bool) {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let status = pod.status.clone().unwrap_or_default();
        let told = statuses(&status).find(|status| status.name == name);
        let own = self.runtime.instances.values().filter(|i| i.uid == uid && i.truth.name == name);
        let newest = own.max_by_key(|instance| instance.truth.attempt).map(|instance| &instance.truth);
        if let (Some(told), Some(newest), true) = (told, newest, steady) {
            let attempt = i32::try_from(newest.attempt).unwrap_or_default();
            let count = told.restart_count;
            // What the runtime lost is still counted.
            let fine = count == attempt || (count > attempt && self.runtime.lossy.contains(uid));
            Self::must(fine, || format!("{count} restarts told of {name} of {uid}: {attempt}"));
        }
        let goes_on = name.starts_with("run") || name.starts_with("side");
        if !goes_on || self.ended_for_good(pod, name) {
            return;
        }
        let Some(newest) = newest else { Self::violated(&format!("{name} of {uid} does not exist")) };
        Self::must(newest.state == RunState::Running, || format!("{name} of {uid} is {:?}", newest.state));
        let sandbox = self.runtime.sandboxes.values().filter(|sandbox| sandbox.uid == uid);
        let current = sandbox.max_by_key(|sandbox| sandbox.truth.attempt).map(|sandbox| &sandbox.truth);
        let here = current.is_some_and(|current| current.ready && current.id == newest.sandbox_id);
        Self::must(here, || format!("{name} of {uid} runs in a sandbox that is not the newest"));
        let ready =
            told.is_some_and(|told| told.ready && told.state.as_ref().is_some_and(|s| s.running.is_some()));
        Self::must(ready, || format!("{name} of {uid} is not told as ready: {told:?}"));
        let outdated = pod
            .spec
            .iter()
            .flat_map(|spec| &spec.containers)
            .any(|main| main.name == name && newest.is_outdated(main));
        Self::must(!outdated, || format!("{name} of {uid} runs an old image"));
    }

    /// A container that goes on was ended by an accident that its policy takes as its end.
    fn ended_for_good(&self, pod: &Pod, name: &str) -> bool {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let spec = pod.spec.as_ref().expect("a spec");
        let code = self.runtime.last_exit.get(&(uid, name.to_owned()));
        let entry = containers(spec).find(|entry| entry.container.name == name);
        code.zip(entry).is_some_and(|(code, entry)| !agent_core::model::restarts(spec, entry, *code))
    }
}
