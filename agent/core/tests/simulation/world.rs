//! The world of one seed: a queue of events in virtual time around one node. [`World::run`] lets pods come and go among
//! accidents, then lets the accidents stop, and looks whether everything is as it should be.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use agent_core::model::{ObservedPod, RunState};
use agent_core::probe::{ProbeKind, ProbeReport, ProbeSettings, ProbeState};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Pod, Probe};

use crate::agent::{Agent, Loop, Outcome, Probing};
use crate::api::Api;
use crate::check::Truth;
use crate::random::Random;
use crate::runtime::Runtime;
use crate::steps::{Job, Stage};

/// Milliseconds.
pub(crate) type Millis = i64;

/// How long accidents happen.
const TROUBLED: Millis = 8 * 60_000;
/// How long it may take until all is well again: the longest back-off, and what may come before it.
const HEALING: Millis = 25 * 60_000;
/// Rounds of one pass; more would be a plan that never settles.
const ROUNDS: usize = 16;
/// Lines that are told after a failure.
const TRACE: usize = 50;
/// Another number of them.
const TRACE_VARIABLE: &str = "KEELSON_TRACE";
const AUDIT: Millis = 30_000;

/// What happens.
#[derive(Debug)]
pub(crate) enum Event {
    Accident,
    AgentStarts(u64),
    /// The watch delivers, unless it was begun anew since.
    Watch(u64, Told),
    Relist(u64),
    Audit(u64),
    /// The runtime says that something of a pod changed.
    Cri(u64, String),
    /// A loop has something to take in.
    Turn(u64),
    Timer(u64, u64),
    Observed(u64, Option<ObservedPod>),
    Step(Job, Stage),
    Exit {
        id: String,
        code: i32,
    },
    Probe {
        loop_id: u64,
        container: String,
        id: String,
        kind: ProbeKind,
    },
}

/// What the API server tells.
#[derive(Debug)]
pub(crate) enum Told {
    Apply(Arc<Pod>),
    Delete(Arc<Pod>),
    List(Vec<Arc<Pod>>),
}

/// Everything.
pub(crate) struct World {
    pub(crate) random: Random,
    /// Since the beginning; goes on whatever the clock shows.
    pub(crate) time: Millis,
    /// What the clock shows beside that.
    pub(crate) set: Millis,
    queue: BTreeMap<(Millis, u64), Event>,
    numbers: u64,
    pub(crate) runtime: Runtime,
    pub(crate) api: Api,
    pub(crate) agent: Option<Agent>,
    pub(crate) generation: u64,
    /// The watch, counted anew with each beginning, and when it delivers next at the earliest.
    pub(crate) watch: u64,
    watch_free_at: Millis,
    /// The watch waits for its list.
    listing: bool,
    pub(crate) faults: bool,
    pub(crate) api_down_until: Millis,
    pub(crate) runtime_down_until: Millis,
    pub(crate) disk_full_until: Millis,
    pub(crate) truth: Truth,
    steps: u64,
    trace: VecDeque<String>,
    traced: usize,
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            random: Random::new(seed),
            time: 0,
            set: 0,
            queue: BTreeMap::new(),
            numbers: 0,
            runtime: Runtime::default(),
            api: Api::default(),
            agent: None,
            generation: 0,
            watch: 0,
            watch_free_at: 0,
            listing: false,
            faults: true,
            api_down_until: 0,
            runtime_down_until: 0,
            disk_full_until: 0,
            truth: Truth::default(),
            steps: 0,
            trace: VecDeque::new(),
            traced: std::env::var(TRACE_VARIABLE).ok().and_then(|text| text.parse().ok()).unwrap_or(TRACE),
        }
    }

    /// From the first pod to the end; panics at the first broken rule.
    pub(crate) fn run(&mut self) {
        self.start_agent();
        self.user_creates();
        self.schedule(5_000, Event::Accident);
        self.run_until(TROUBLED);
        self.end_of_trouble();
        let end = self.time + HEALING;
        self.run_until(end);
        self.check_converged();
    }

    fn run_until(&mut self, end: Millis) {
        while let Some(entry) = self.queue.first_entry() {
            let (at, _) = *entry.key();
            if at > end {
                break;
            }
            let event = entry.remove();
            self.time = at;
            self.steps += 1;
            self.happens(event);
            self.check_always();
        }
        self.time = end;
    }

    /// Everything works from now on.
    fn end_of_trouble(&mut self) {
        self.log("-- the accidents are over");
        self.faults = false;
        (self.api_down_until, self.runtime_down_until, self.disk_full_until) = (0, 0, 0);
        if self.agent.is_none() {
            self.start_agent();
        }
        self.relist();
    }

    /// What led to a failure.
    pub(crate) fn story(&self) -> String {
        let lines: Vec<&str> = self.trace.iter().map(String::as_str).collect();
        format!("step {}, {} s:\n{}", self.steps, self.time / 1000, lines.join("\n"))
    }

    pub(crate) fn log(&mut self, line: &str) {
        if self.trace.len() == self.traced {
            self.trace.pop_front();
        }
        self.trace.push_back(format!("{:>9.3} {line}", SignedDuration::from_millis(self.time).as_secs_f64()));
    }

    pub(crate) fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    pub(crate) fn schedule(&mut self, after: Millis, event: Event) {
        let number = self.number();
        self.queue.insert((self.time + after.max(0), number), event);
    }

    /// What the clock shows.
    pub(crate) fn wall(&self) -> Timestamp {
        Timestamp::from_millisecond(1_800_000_000_000 + self.time + self.set).expect("in range")
    }

    fn happens(&mut self, event: Event) {
        match event {
            Event::Accident => {
                if self.faults {
                    self.accident();
                    let pause = self.random.between(200, 12_000);
                    self.schedule(pause, Event::Accident);
                }
            }
            Event::AgentStarts(generation) => {
                if self.agent.is_none() && generation == self.generation {
                    self.start_agent();
                }
            }
            Event::Watch(watch, told) => {
                if watch == self.watch {
                    self.told(told);
                }
            }
            Event::Relist(watch) => {
                if watch == self.watch {
                    self.list();
                }
            }
            Event::Audit(generation) => self.audit(generation),
            Event::Cri(generation, uid) => {
                if generation == self.generation {
                    self.wake(&uid);
                }
            }
            Event::Turn(id) => self.with_loop(id, World::turn),
            Event::Timer(id, timer) => self.with_loop(id, |world, pod_loop| {
                if pod_loop.timer == timer && !pod_loop.observing {
                    let now = world.wall();
                    pod_loop.state.timer(now);
                    world.pass(pod_loop);
                }
            }),
            Event::Observed(id, observed) => self.with_loop(id, |world, pod_loop| {
                world.observed(pod_loop, observed);
            }),
            Event::Step(job, stage) => self.stage(job, stage),
            Event::Exit { id, code } => {
                if self.runtime.is_alive(&id) {
                    let late = if self.faults { self.random.between(0, 1000) } else { 0 };
                    self.end(&id, code, late);
                }
            }
            Event::Probe { loop_id, container, id, kind } => self.probe(loop_id, container, id, kind),
        }
    }

    pub(crate) fn start_agent(&mut self) {
        self.generation += 1;
        self.log(&format!("-- agent {} starts", self.generation));
        let agent = Agent {
            generation: self.generation,
            loops: BTreeMap::new(),
            synced: false,
            seen: BTreeMap::new(),
        };
        self.agent = Some(agent);
        self.schedule(50, Event::Audit(self.generation));
        self.relist();
    }

    /// As kill -9: nothing of its memory is left.
    pub(crate) fn kill_agent(&mut self) {
        self.agent = None;
        self.watch += 1;
        let pause = self.random.between(50, 15_000);
        self.log("-- the agent dies");
        self.schedule(pause, Event::AgentStarts(self.generation));
    }

    pub(crate) fn loop_of(&mut self, id: u64) -> Option<&mut Loop> {
        self.agent.as_mut()?.loops.get_mut(&id)
    }

    fn with_loop(&mut self, id: u64, act: impl FnOnce(&mut Self, &mut Loop)) {
        let Some(mut pod_loop) = self.agent.as_mut().and_then(|agent| agent.loops.remove(&id)) else {
            return;
        };
        act(self, &mut pod_loop);
        if let Some(agent) = self.agent.as_mut().filter(|_| !pod_loop.ended()) {
            agent.loops.insert(id, pod_loop);
        }
    }

    pub(crate) fn is_live(&mut self, job: &Job) -> bool {
        self.loop_of(job.loop_id).is_some_and(|found| {
            found.tasks.contains_key(&job.task) && found.outcomes.iter().all(|(task, _)| *task != job.task)
        })
    }

    /// The answer of a step arrives, if anybody waits for it.
    pub(crate) fn finish(&mut self, job: &Job, outcome: Outcome) {
        if !self.is_live(job) {
            return;
        }
        if let Some(pod_loop) = self.loop_of(job.loop_id) {
            pod_loop.outcomes.push((job.task, outcome));
        }
        self.schedule(0, Event::Turn(job.loop_id));
    }

    /// A loop takes one input, and looks what follows.
    fn turn(&mut self, pod_loop: &mut Loop) {
        if pod_loop.observing || !pod_loop.has_input() {
            return;
        }
        let now = self.wall();
        match self.random.between(0, 4) {
            0 if pod_loop.told_news => pod_loop.take_told(),
            1 if pod_loop.signalled => {
                pod_loop.signalled = false;
                pod_loop.state.take_signal(false);
            }
            2 if !pod_loop.outcomes.is_empty() => {
                let (task, outcome) = pod_loop.outcomes.remove(self.random.index(pod_loop.outcomes.len()));
                pod_loop.absorb(task, outcome, now);
            }
            3 if !pod_loop.reports.is_empty() => {
                let report = pod_loop.reports.remove(0);
                pod_loop.state.absorb_probe(&report);
            }
            _ => return self.schedule(0, Event::Turn(pod_loop.id)),
        }
        self.pass(pod_loop);
    }

    /// Looks at the runtime if needed, and plans.
    pub(crate) fn pass(&mut self, pod_loop: &mut Loop) {
        self.check_pass(&pod_loop.uid);
        if !pod_loop.state.stale {
            return self.rounds(pod_loop);
        }
        pod_loop.observing = true;
        let fails = self.time < self.runtime_down_until || (self.faults && self.random.chance(4));
        let listed = (!fails).then(|| self.runtime.list(&pod_loop.uid, self.time));
        let slow = self.faults && self.random.chance(10);
        let takes = self.random.between(1, if slow { 3000 } else { 15 });
        self.schedule(takes, Event::Observed(pod_loop.id, listed));
    }

    fn observed(&mut self, pod_loop: &mut Loop, observed: Option<ObservedPod>) {
        pod_loop.observing = false;
        let Some(observed) = observed else {
            pod_loop.state.look_failed(self.wall());
            return self.rest(pod_loop);
        };
        pod_loop.state.saw(observed);
        self.rounds(pod_loop);
    }

    fn rounds(&mut self, pod_loop: &mut Loop) {
        for _ in 0..ROUNDS {
            let now = self.wall();
            let (plan, wishes, again) = pod_loop.round(now);
            if plan.done {
                self.log(&format!("{} is gone", pod_loop.uid));
                self.check_done(&pod_loop.uid);
                pod_loop.end();
                return;
            }
            for wish in wishes {
                self.begin(pod_loop, wish);
            }
            self.sync_probes(pod_loop);
            if !again {
                return self.rest(pod_loop);
            }
        }
        World::violated(&format!("the plan of {} does not settle", pod_loop.uid));
    }

    /// Until something happens, or it is time.
    fn rest(&mut self, pod_loop: &mut Loop) {
        if pod_loop.has_input() {
            self.schedule(0, Event::Turn(pod_loop.id));
        }
        pod_loop.timer = self.number();
        if let Some(at) = pod_loop.state.next_wake() {
            let pause = at.duration_since(self.wall()).as_millis();
            // A millisecond is lost to rounding.
            let pause = i64::try_from(pause).expect("not that far").max(0) + 1;
            self.schedule(pause, Event::Timer(pod_loop.id, pod_loop.timer));
        }
    }

    /// Makes the probes those that should run.
    fn sync_probes(&mut self, pod_loop: &mut Loop) {
        let wanted = pod_loop.wanted_probes();
        pod_loop.probes.retain(|(name, kind), probing| {
            wanted.iter().any(|(n, id, k)| n == name && k == kind && *id == probing.container_id)
        });
        for (container, id, kind) in wanted {
            if pod_loop.probes.contains_key(&(container.clone(), kind)) {
                continue;
            }
            let Some(probe) = probe_of(&pod_loop.state.desired.pod, &container, kind) else { continue };
            let settings = ProbeSettings::of(&probe);
            let state = ProbeState::new(kind, settings, false);
            let probing = Probing { container_id: id.clone(), state };
            pod_loop.probes.insert((container.clone(), kind), probing);
            let delay = i64::try_from(settings.initial_delay.as_millis()).expect("short");
            self.schedule(delay, Event::Probe { loop_id: pod_loop.id, container, id, kind });
        }
    }

    fn probe(&mut self, loop_id: u64, container: String, id: String, kind: ProbeKind) {
        let fails = self.faults && self.random.chance(if kind == ProbeKind::Readiness { 30 } else { 15 });
        let success = self.runtime.is_alive(&id) && !fails;
        let Some(pod_loop) = self.loop_of(loop_id) else { return };
        let grace = probe_of(&pod_loop.state.desired.pod, &container, kind)
            .and_then(|probe| probe.termination_grace_period_seconds);
        let probing = pod_loop.probes.get_mut(&(container.clone(), kind));
        let Some(probing) = probing.filter(|probing| probing.container_id == id) else { return };
        let step = probing.state.on_result(success);
        if let Some(healthy) = step.verdict {
            let (container, container_id) = (container.clone(), id.clone());
            pod_loop.reports.push(ProbeReport { container, container_id, kind, healthy, grace });
            self.schedule(0, Event::Turn(loop_id));
        }
        if let Some(pause) = step.next {
            let pause = i64::try_from(pause.as_millis()).expect("short");
            self.schedule(pause, Event::Probe { loop_id, container, id, kind });
        }
    }

    /// A container's processes end.
    pub(crate) fn end(&mut self, id: &str, code: i32, late: Millis) {
        let (now, shown_at) = (self.wall(), self.time + late);
        let Some(uid) = self.runtime.instances.get(id).map(|instance| instance.uid.clone()) else { return };
        self.log(&format!("  {id} ends with {code}"));
        for job in self.runtime.end(id, code, now, shown_at) {
            // Who waited for its end has seen it.
            if let Some(instance) = self.runtime.instances.get_mut(id) {
                instance.end_shown_at = 0;
            }
            self.stopped(&job, &Ok(()));
        }
        self.announce_after(&uid, late);
    }

    /// A sandbox is no more, and nothing in it.
    pub(crate) fn sandbox_dies(&mut self, id: &str) {
        for alive in self.runtime.alive_in(id) {
            self.end(&alive, 137, 0);
        }
        if let Some(sandbox) = self.runtime.sandboxes.get_mut(id) {
            sandbox.truth.ready = false;
        }
    }

    pub(crate) fn announce(&mut self, uid: &str) {
        self.announce_after(uid, 0);
    }

    /// The runtime's event: may be late, lost, or told twice.
    fn announce_after(&mut self, uid: &str, late: Millis) {
        let times = match self.random.between(0, 10) {
            0 | 1 if self.faults => 0,
            2 if self.faults => 2,
            _ => 1,
        };
        for _ in 0..times {
            let delay = late + self.random.between(0, if self.faults { 400 } else { 20 });
            self.schedule(delay, Event::Cri(self.generation, uid.to_owned()));
        }
    }

    fn wake(&mut self, uid: &str) {
        let Some(agent) = &mut self.agent else { return };
        let Some(pod_loop) = agent.loops.values_mut().find(|pod_loop| pod_loop.uid == uid) else { return };
        pod_loop.signalled = true;
        let id = pod_loop.id;
        self.schedule(0, Event::Turn(id));
    }

    /// Lists everything: whoever changed without an event is woken, and orphans are found.
    fn audit(&mut self, generation: u64) {
        if self.agent.as_ref().is_none_or(|agent| agent.generation != generation) {
            return;
        }
        self.schedule(AUDIT, Event::Audit(generation));
        if self.time < self.runtime_down_until {
            return;
        }
        let mut now: BTreeMap<String, BTreeMap<String, RunState>> = BTreeMap::new();
        for uid in self.runtime.traces() {
            let listed = self.runtime.list(&uid, self.time);
            now.insert(uid, states(&listed));
        }
        let Some(agent) = &mut self.agent else { return };
        let seen = std::mem::replace(&mut agent.seen, now.clone());
        let changed = now.iter().filter(|(uid, state)| seen.get(*uid) != Some(state)).map(|(uid, _)| uid);
        let gone = seen.keys().filter(|uid| !now.contains_key(*uid));
        // And whoever has seen something else than what is there.
        let others = agent.loops.values().filter(|pod_loop| {
            states(&pod_loop.state.observed) != now.get(&pod_loop.uid).cloned().unwrap_or_default()
        });
        let others: Vec<String> = others.map(|pod_loop| pod_loop.uid.clone()).collect();
        for uid in changed.chain(gone).chain(&others) {
            self.wake(uid);
        }
        self.end_orphans();
    }

    /// The watch tells what happened to an object: in order, some time.
    pub(crate) fn notify(&mut self, gone: bool, pod: &Arc<Pod>) {
        let pod = Arc::clone(pod);
        self.deliver(if gone { Told::Delete(pod) } else { Told::Apply(pod) });
    }

    pub(crate) fn deliver(&mut self, told: Told) {
        if self.listing {
            // It will be in the list.
            return;
        }
        let slow = self.faults && self.random.chance(10);
        let lag = self.random.between(1, if slow { 8000 } else { 60 });
        self.watch_free_at = self.watch_free_at.max(self.time + lag);
        let (after, watch) = (self.watch_free_at - self.time, self.watch);
        self.schedule(after, Event::Watch(watch, told));
    }

    /// The watch begins anew, with a list.
    pub(crate) fn relist(&mut self) {
        self.watch += 1;
        self.watch_free_at = self.time;
        self.listing = true;
        let pause = self.random.between(10, 1500);
        self.schedule(pause, Event::Relist(self.watch));
    }

    fn list(&mut self) {
        if self.time < self.api_down_until || (self.faults && self.random.chance(20)) {
            let pause = self.random.between(500, 10_000);
            return self.schedule(pause, Event::Relist(self.watch));
        }
        self.listing = false;
        let pods = self.api.pods.values().cloned().collect();
        self.deliver(Told::List(pods));
    }

    pub(crate) fn remove_object(&mut self, name: &str) {
        if let Some(gone) = self.api.remove(name) {
            self.notify(true, &gone);
        }
    }
}

impl Loop {
    /// The loop is over.
    pub(crate) fn end(&mut self) {
        self.id = 0;
    }

    pub(crate) fn ended(&self) -> bool {
        self.id == 0
    }
}

/// States of everything that is listed of a pod.
fn states(listed: &ObservedPod) -> BTreeMap<String, RunState> {
    let state = |ready| if ready { RunState::Running } else { RunState::Exited };
    let sandboxes = listed.sandboxes.iter().map(|sandbox| (sandbox.id.clone(), state(sandbox.ready)));
    let containers = listed.containers.iter().map(|container| (container.id.clone(), container.state));
    sandboxes.chain(containers).collect()
}

fn probe_of(pod: &Pod, container: &str, kind: ProbeKind) -> Option<Probe> {
    let found = agent_core::model::find_container(pod.spec.as_ref()?, container)?;
    match kind {
        ProbeKind::Startup => found.startup_probe,
        ProbeKind::Liveness => found.liveness_probe,
        ProbeKind::Readiness => found.readiness_probe,
    }
}
