//! What befalls the node, what users do, and how the agent's manager takes what it is told of pods.

use std::sync::Arc;

use agent_core::admission::Rejection;
use agent_core::fate::{DEFAULT_GRACE, Verdict, fate_of, fate_of_gone};
use agent_core::model::{DesiredPod, Fate};
use agent_core::plan::PodAction;
use agent_core::pod_loop::StepEnd;
use agent_core::status::sync::version;
use jiff::SignedDuration;
use k8s_openapi::api::core::v1::{Container, EphemeralContainer, Pod, PodSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};

use crate::agent::{Loop, Outcome};
use crate::shapes;
use crate::world::{Event, Told, World};

/// Pods that there may be at a time, by name.
const NAMES: [&str; 3] = ["p0", "p1", "p2"];

impl World {
    /// One accident, or one thing that a user does.
    pub(crate) fn accident(&mut self) {
        match self.random.between(0, 36) {
            0..3 => self.some_container_ends(),
            3 => self.some_sandbox_dies(),
            4 => self.some_container_is_lost(),
            5 => self.some_sandbox_is_lost(),
            6..9 if self.agent.is_some() => self.kill_agent(),
            9 if self.random.chance(30) => self.reboot(),
            10 => self.api_goes_away(),
            11 | 12 => {
                self.log("-- the watch is begun anew");
                self.relist();
            }
            13 | 14 => self.runtime_restarts(),
            15 => {
                let by = self.random.between(-7_200_000, 7_200_000);
                self.log(&format!("-- the clock is set by {} s", by / 1000));
                self.set += by;
            }
            16 | 17 => self.something_old_is_told(),
            18 => {
                self.disk_full_until = self.time + self.random.between(1000, 120_000);
                self.log("-- the disk is full");
            }
            19..24 => self.user_creates(),
            24..29 => self.user_deletes(),
            29..32 => self.user_changes_an_image(),
            32 | 33 => self.user_looks_into_a_pod(),
            34 | 35 => self.node_evicts(),
            _ => {}
        }
    }

    fn some_container_ends(&mut self) {
        let alive: Vec<String> = self
            .runtime
            .instances
            .values()
            .filter(|instance| instance.truth.is_alive())
            .map(|instance| instance.truth.id.clone())
            .collect();
        if !alive.is_empty() {
            let (id, code) = (self.random.pick(&alive), self.random.pick(&[0, 1, 3, 42, 137]));
            let late = self.random.between(0, 1000);
            self.end(&id, code, late);
        }
    }

    fn some_sandbox(&mut self) -> Option<(String, String)> {
        let all: Vec<(String, String)> =
            self.runtime.sandboxes.iter().map(|(id, sandbox)| (id.clone(), sandbox.uid.clone())).collect();
        (!all.is_empty()).then(|| self.random.pick(&all))
    }

    fn some_sandbox_dies(&mut self) {
        if let Some((id, uid)) = self.some_sandbox() {
            self.log(&format!("-- sandbox {id} dies"));
            self.sandbox_dies(&id);
            self.announce(&uid);
        }
    }

    fn some_container_is_lost(&mut self) {
        let all: Vec<String> = self.runtime.instances.keys().cloned().collect();
        if all.is_empty() {
            return;
        }
        let id = self.random.pick(&all);
        self.log(&format!("-- the runtime loses {id}"));
        self.end(&id, 137, 0);
        if let Some(lost) = self.runtime.instances.remove(&id) {
            self.runtime.lossy.insert(lost.uid);
        }
    }

    fn some_sandbox_is_lost(&mut self) {
        if let Some((id, uid)) = self.some_sandbox() {
            self.log(&format!("-- the runtime loses sandbox {id}"));
            self.sandbox_dies(&id);
            self.runtime.remove_sandbox(&id);
            self.runtime.lossy.insert(uid);
        }
    }

    fn reboot(&mut self) {
        self.log("-- the machine is reset");
        let sandboxes: Vec<String> = self.runtime.sandboxes.keys().cloned().collect();
        for id in &sandboxes {
            self.sandbox_dies(id);
        }
        self.runtime.volumes.clear();
        self.runtime.cgroups.clear();
        if self.agent.is_some() {
            self.kill_agent();
        }
    }

    fn api_goes_away(&mut self) {
        let longest = if self.random.chance(10) { 3_600_000 } else { 120_000 };
        self.api_down_until = self.time + self.random.between(1000, longest);
        self.log(&format!("-- no API server until {} s", self.api_down_until / 1000));
        self.relist();
    }

    /// Whoever waits for an answer gets none.
    fn runtime_restarts(&mut self) {
        self.runtime_down_until = self.time + self.random.between(50, 20_000);
        self.log("-- the runtime is restarted");
        let Some(agent) = &mut self.agent else { return };
        let mut woken = Vec::new();
        for pod_loop in agent.loops.values_mut() {
            let waiting: Vec<(u64, Outcome)> = pod_loop
                .tasks
                .iter()
                .filter(|(task, _)| pod_loop.outcomes.iter().all(|(other, _)| other != *task))
                .filter_map(|(task, action)| Some((*task, broken(action.as_ref()?)?)))
                .collect();
            pod_loop.outcomes.extend(waiting);
            woken.push(pod_loop.id);
        }
        for id in woken {
            self.schedule(0, Event::Turn(id));
        }
    }

    fn something_old_is_told(&mut self) {
        let all: Vec<Arc<Pod>> = self.api.before.values().flatten().cloned().collect();
        if !all.is_empty() {
            let old = self.random.pick(&all);
            self.log(&format!("-- an older state of {:?} is told", old.metadata.uid));
            self.deliver(Told::Apply(old));
        }
    }

    pub(crate) fn user_creates(&mut self) {
        let free: Vec<&str> = NAMES.into_iter().filter(|name| !self.api.pods.contains_key(*name)).collect();
        if free.is_empty() {
            return;
        }
        let name = self.random.pick(&free);
        let uid = format!("u{}", self.number());
        let pod = shapes::pod(&mut self.random, name, &uid);
        let spec = serde_json::to_string(&pod.spec).expect("a spec");
        self.log(&format!("-- {uid} is created as {name}: {spec}"));
        let pod = self.api.put(pod);
        self.notify(false, &pod);
    }

    fn some_pod(&mut self) -> Option<Pod> {
        let names: Vec<String> = self.api.pods.keys().cloned().collect();
        if names.is_empty() {
            return None;
        }
        let name = self.random.pick(&names);
        self.api.pods.get(&name).map(|pod| Pod::clone(pod))
    }

    fn put(&mut self, pod: Pod) {
        let pod = self.api.put(pod);
        self.notify(false, &pod);
    }

    fn user_deletes(&mut self) {
        let Some(mut pod) = self.some_pod() else { return };
        let (name, now) = (pod.metadata.name.clone().unwrap_or_default(), self.wall());
        let own = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds).unwrap_or(30);
        let wanted = self.random.pick(&[own, own, own, 1, 10, 0]);
        let is_final =
            matches!(pod.status.as_ref().and_then(|s| s.phase.as_deref()), Some("Succeeded" | "Failed"));
        self.log(&format!("-- {name} is deleted with grace {wanted}"));
        if wanted == 0 || is_final {
            return self.remove_object(&name);
        }
        let known = pod.metadata.deletion_grace_period_seconds;
        pod.metadata.deletion_timestamp.get_or_insert(Time(now + SignedDuration::from_secs(wanted)));
        pod.metadata.deletion_grace_period_seconds = Some(known.map_or(wanted, |known| known.min(wanted)));
        self.put(pod);
    }

    fn user_changes_an_image(&mut self) {
        let Some(mut pod) = self.some_pod() else { return };
        let Some(spec) = &mut pod.spec else { return };
        let index = self.random.index(spec.containers.len());
        spec.containers[index].image = Some(format!("i:{}", self.random.between(1, 4)));
        self.log(&format!("-- {:?} has another image for {}", pod.metadata.uid, spec.containers[index].name));
        pod.metadata.generation = pod.metadata.generation.map(|generation| generation + 1);
        self.put(pod);
    }

    fn user_looks_into_a_pod(&mut self) {
        let Some(mut pod) = self.some_pod() else { return };
        let name = format!("look-{}", self.number());
        let added: EphemeralContainer =
            serde_json::from_value(shapes::ephemeral(&pod, &name)).expect("a container");
        self.log(&format!("-- {:?} gets {name}", pod.metadata.uid));
        if let Some(spec) = &mut pod.spec {
            spec.ephemeral_containers.get_or_insert_default().push(added);
        }
        self.put(pod);
    }

    fn node_evicts(&mut self) {
        let Some(agent) = &mut self.agent else { return };
        let Some(pod_loop) = agent.loops.values_mut().next() else { return };
        if pod_loop.is_gone() || fate_of(&pod_loop.pod, pod_loop.verdict.as_ref()) != Fate::Run {
            return;
        }
        let rejection = Rejection { reason: "Evicted".to_owned(), message: "Evicted".to_owned() };
        pod_loop.verdict = Some(Verdict { rejection, grace: Some(1) });
        let mut told = pod_loop.told.clone();
        told.fate = fate_of(&pod_loop.pod, pod_loop.verdict.as_ref());
        pod_loop.tell(told);
        let (id, uid) = (pod_loop.id, pod_loop.uid.clone());
        self.log(&format!("-- {uid} is evicted"));
        self.truth.evicted.insert(uid);
        self.schedule(0, Event::Turn(id));
    }

    /// The manager takes what the API server tells.
    pub(crate) fn told(&mut self, told: Told) {
        match told {
            Told::Apply(pod) => self.apply(pod),
            Told::Delete(pod) => self.delete(&pod),
            Told::List(pods) => {
                let listed: Vec<Option<String>> = pods.iter().map(|pod| pod.metadata.uid.clone()).collect();
                let Some(agent) = &mut self.agent else { return };
                agent.synced = true;
                let missing: Vec<Arc<Pod>> = agent
                    .loops
                    .values()
                    .filter(|pod_loop| !listed.contains(&Some(pod_loop.uid.clone())))
                    .map(|pod_loop| Arc::clone(&pod_loop.pod))
                    .collect();
                for pod in pods {
                    self.apply(pod);
                }
                for pod in &missing {
                    self.delete(pod);
                }
                self.end_orphans();
            }
        }
    }

    fn loop_named(&mut self, uid: &str) -> Option<&mut Loop> {
        self.agent.as_mut()?.loops.values_mut().find(|pod_loop| pod_loop.uid == uid)
    }

    fn apply(&mut self, pod: Arc<Pod>) {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let Some(known) = self.loop_named(&uid) else {
            let fate = fate_of(&pod, None);
            return self.start_loop(DesiredPod::new(pod, fate));
        };
        if version(&pod) < version(&known.pod) {
            return;
        }
        known.pod = Arc::clone(&pod);
        let fate = fate_of(&pod, known.verdict.as_ref());
        known.tell(DesiredPod::new(pod, fate));
        let id = known.id;
        self.schedule(0, Event::Turn(id));
    }

    fn delete(&mut self, pod: &Arc<Pod>) {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let Some(known) = self.loop_named(&uid) else { return };
        known.tell(DesiredPod::new(Arc::clone(pod), fate_of_gone(pod)));
        let id = known.id;
        self.schedule(0, Event::Turn(id));
    }

    fn start_loop(&mut self, desired: DesiredPod) {
        let id = self.number();
        let mut pod_loop = Loop::new(id, desired);
        self.pass(&mut pod_loop);
        if let Some(agent) = &mut self.agent {
            agent.loops.insert(id, pod_loop);
        }
    }

    /// Ends pods that left traces here and nobody wants.
    pub(crate) fn end_orphans(&mut self) {
        if !self.agent.as_ref().is_some_and(|agent| agent.synced) {
            return;
        }
        for uid in self.runtime.traces() {
            if self.loop_named(&uid).is_some() {
                continue;
            }
            self.log(&format!("{uid} is wanted by nobody"));
            let own = self.runtime.instances.values().filter(|instance| instance.uid == uid);
            let grace = own.clone().find_map(|instance| instance.grace).unwrap_or(DEFAULT_GRACE);
            let container = |name: &String| Container { name: name.clone(), ..Container::default() };
            let pod = Pod {
                metadata: ObjectMeta {
                    name: Some("orphan".to_owned()),
                    namespace: Some("ns".to_owned()),
                    uid: Some(uid.clone()),
                    ..ObjectMeta::default()
                },
                spec: Some(PodSpec {
                    containers: own.map(|instance| container(&instance.truth.name)).collect(),
                    ..PodSpec::default()
                }),
                status: None,
            };
            self.start_loop(DesiredPod::new(Arc::new(pod), Fate::Terminate { grace, gone: true }));
        }
    }
}

/// How a call to the runtime ends that the runtime does not survive.
fn broken(action: &PodAction) -> Option<Outcome> {
    let end = match action {
        PodAction::CreateSandbox { .. } | PodAction::StartContainer { .. } => StepEnd::Away,
        PodAction::StopSandbox { .. }
        | PodAction::RemoveSandbox { .. }
        | PodAction::RemoveContainer { .. }
        | PodAction::KillContainer { .. } => StepEnd::Failed,
        _ => return None,
    };
    Some(Outcome::Step(end))
}
