//! The steps of a plan, carried out on the fake runtime, host and API server: each call takes its time, may fail before or after
//! it has done its work, and may reach the runtime though the agent that made it is no more.

use std::sync::Arc;

use agent_core::model::find_container;
use agent_core::plan::PodAction;
use agent_core::pod_loop::StepEnd;
use agent_core::status::sync::Written;
use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;

use crate::agent::{Loop, Outcome, Trouble, Wish};
use crate::shapes::{has_hook, life};
use crate::world::{Event, Millis, World};

/// A process gets this long after its stop signal even when preStop used up the grace period.
const SHORTEST_GRACE: Millis = 2000;

/// A step that runs.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) loop_id: u64,
    pub(crate) task: u64,
    pub(crate) uid: String,
    pub(crate) pod: Arc<Pod>,
    /// Nothing for a status write.
    pub(crate) action: Option<PodAction>,
    /// When it began, or its kill did.
    pub(crate) began: Millis,
}

/// How far a step has come: what happens next.
#[derive(Debug, Clone)]
pub(crate) enum Stage {
    Host,
    Sandbox,
    Remove,
    Create,
    Start(String),
    PostStart(String),
    Stop(String),
    StopOver(String),
    Write(Value),
    Delete,
}

/// What becomes of a call.
enum Luck {
    Works,
    NeverArrives,
    AnswerLost,
    Refused,
}

impl Job {
    fn name(&self) -> &str {
        self.pod.metadata.name.as_deref().unwrap_or_default()
    }

    /// Seconds that its kill may take.
    pub(crate) fn grace(&self) -> i64 {
        if let Some(PodAction::KillContainer { grace, .. }) = &self.action {
            return *grace;
        }
        let spec = self.pod.spec.as_ref();
        spec.and_then(|spec| spec.termination_grace_period_seconds).unwrap_or(30)
    }
}

impl World {
    /// Starts what a pass wants done.
    pub(crate) fn begin(&mut self, pod_loop: &mut Loop, wish: Wish) {
        let task = self.number();
        let (action, stage, delay) = match wish {
            Wish::Write(patch) => {
                self.log(&format!("{} writes {patch}", pod_loop.uid));
                (None, Stage::Write(patch), self.random.between(1, 80))
            }
            Wish::Act(action) => {
                self.log(&format!("{} does {action:?}", pod_loop.uid));
                self.check_action(pod_loop, &action);
                let (stage, delay) = self.first_stage(pod_loop, &action);
                (Some(action), stage, delay)
            }
        };
        pod_loop.tasks.insert(task, action.clone());
        let pod = Arc::clone(&pod_loop.state.desired.pod);
        let (loop_id, uid, began) = (pod_loop.id, pod_loop.uid.clone(), self.time);
        self.schedule(delay, Event::Step(Job { loop_id, task, uid, pod, action, began }, stage));
    }

    fn first_stage(&mut self, pod_loop: &Loop, action: &PodAction) -> (Stage, Millis) {
        let random = &mut self.random;
        match action {
            PodAction::EnsureImage { .. } => (Stage::Host, random.between(5, 2000)),
            PodAction::CreateSandbox { .. }
            | PodAction::StopSandbox { .. }
            | PodAction::RemoveSandbox { .. } => (Stage::Sandbox, self.latency(800)),
            PodAction::RemoveContainer { .. } => (Stage::Remove, self.latency(100)),
            PodAction::StartContainer { .. } => (Stage::Create, self.latency(200)),
            PodAction::KillContainer { id, container, grace, .. } => {
                let found = find_container(pod_loop.state.desired.spec(), container);
                let hook = *grace > 0 && found.is_some_and(|found| has_hook(&found, true));
                let takes = if hook { random.between(0, 12_000).min(grace * 1000) } else { 1 };
                (Stage::Stop(id.clone()), takes)
            }
            PodAction::DeleteFromApi => (Stage::Delete, random.between(1, 80)),
            _ => (Stage::Host, random.between(1, 50)),
        }
    }

    /// One stage of a step is over.
    pub(crate) fn stage(&mut self, mut job: Job, stage: Stage) {
        let live = self.is_live(&job);
        let with_the_agent = matches!(stage, Stage::Host | Stage::PostStart(_) | Stage::Stop(_));
        if !live && (with_the_agent || self.random.chance(50)) {
            return;
        }
        match stage {
            Stage::Host => self.host_step(&job),
            Stage::Sandbox => self.sandbox_step(&job),
            Stage::Remove => self.remove_step(&job),
            Stage::Create => self.create_step(job, live),
            Stage::Start(id) => self.start_step(job, id, live),
            Stage::PostStart(id) => {
                if self.faults && self.random.chance(20) {
                    job.began = self.time;
                    self.log(&format!("postStart hook of {id} fails"));
                    self.stop_step(job, id);
                } else {
                    self.finish(&job, Outcome::Step(StepEnd::Done));
                }
            }
            Stage::Stop(id) => self.stop_step(job, id),
            Stage::StopOver(id) => {
                if self.runtime.is_alive(&id) {
                    self.check_sigkill(&job, &id);
                    self.end(&id, 137, 0);
                }
            }
            Stage::Write(patch) => self.write_step(&job, &patch),
            Stage::Delete => self.delete_step(&job),
        }
    }

    fn latency(&mut self, usual: Millis) -> Millis {
        let slow = self.faults && self.random.chance(6);
        self.random.between(1, if slow { 20_000 } else { usual })
    }

    fn luck(&mut self) -> Luck {
        if self.time < self.runtime_down_until {
            return Luck::NeverArrives;
        }
        match self.random.between(0, 100) {
            0..3 if self.faults => Luck::NeverArrives,
            3..6 if self.faults => Luck::AnswerLost,
            6..9 if self.faults => Luck::Refused,
            _ => Luck::Works,
        }
    }

    /// A call to the runtime.
    fn call<T>(&mut self, effect: impl FnOnce(&mut Self) -> Result<T, String>) -> Result<T, Trouble> {
        let result = match self.luck() {
            Luck::Works => effect(self).map_err(Trouble::Refused),
            Luck::NeverArrives => Err(Trouble::Away),
            Luck::Refused => Err(Trouble::Refused("the runtime says no".to_owned())),
            Luck::AnswerLost => {
                effect(self).ok();
                Err(Trouble::Away)
            }
        };
        if let Err(trouble) = &result {
            self.log(&format!("  the runtime: {trouble:?}"));
        }
        result
    }

    fn host_step(&mut self, job: &Job) {
        let fails = self.time < self.disk_full_until || (self.faults && self.random.chance(5));
        let uid = job.uid.clone();
        let end = match &job.action {
            Some(PodAction::EnsureImage { .. }) => self.image_step(),
            Some(PodAction::MountVolumes) if fails => StepEnd::Failed,
            Some(PodAction::MountVolumes) => {
                self.runtime.volumes.insert(uid);
                StepEnd::Mounted { refresh_at: None }
            }
            Some(PodAction::EnsureCgroup) => {
                self.runtime.cgroups.insert(uid);
                StepEnd::Done
            }
            Some(PodAction::TearDownVolumes) => {
                self.check_nothing_runs(&uid, "volumes are torn down");
                if fails {
                    StepEnd::Failed
                } else {
                    self.runtime.volumes.remove(&uid);
                    StepEnd::Done
                }
            }
            Some(PodAction::RemoveCgroup) => {
                self.check_nothing_runs(&uid, "the cgroup is removed");
                self.runtime.cgroups.remove(&uid);
                StepEnd::Done
            }
            _ => StepEnd::Done,
        };
        self.finish(job, Outcome::Step(end));
    }

    fn image_step(&mut self) -> StepEnd {
        let reason = self.random.pick(&["ErrImagePull", "ErrImageNeverPull"]);
        match self.call(|_| Ok(())) {
            Ok(()) => StepEnd::ImageReady { image_ref: "sha256:1".to_owned() },
            Err(trouble) => trouble.told_as(reason),
        }
    }

    fn sandbox_step(&mut self, job: &Job) {
        let (uid, now) = (job.uid.clone(), self.wall());
        let end = match &job.action {
            Some(PodAction::CreateSandbox { attempt }) => {
                let with_address = !(self.faults && self.random.chance(5));
                let made = self.call(|world| {
                    let made = world.runtime.run_sandbox(&uid, *attempt, with_address, now)?;
                    world.log(&format!("  sandbox {made} runs"));
                    Ok(())
                });
                match made {
                    Ok(()) => StepEnd::Done,
                    Err(Trouble::Away) => StepEnd::Away,
                    Err(Trouble::Refused(_)) => StepEnd::Failed,
                }
            }
            Some(PodAction::StopSandbox { id }) => plain(&self.call(|world| {
                world.check_stop_sandbox(id);
                world.sandbox_dies(id);
                Ok(())
            })),
            Some(PodAction::RemoveSandbox { id }) => plain(&self.call(|world| {
                for alive in world.runtime.alive_in(id) {
                    world.check_removal(&alive);
                    world.end(&alive, 137, 0);
                }
                world.runtime.remove_sandbox(id);
                Ok(())
            })),
            _ => StepEnd::Done,
        };
        self.announce(&uid);
        self.finish(job, Outcome::Step(end));
    }

    fn remove_step(&mut self, job: &Job) {
        let Some(PodAction::RemoveContainer { id, .. }) = &job.action else { return };
        let removed = self.call(|world| {
            if world.runtime.is_alive(id) {
                world.check_removal(id);
                world.end(id, 137, 0);
            }
            world.runtime.instances.remove(id);
            Ok(())
        });
        self.announce(&job.uid);
        self.finish(job, Outcome::Step(plain(&removed)));
    }

    fn create_step(&mut self, job: Job, live: bool) {
        let Some(PodAction::StartContainer { container, attempt, sandbox_id, .. }) = job.action.clone()
        else {
            return;
        };
        let spec = job.pod.spec.clone().unwrap_or_default();
        let Some(found) = find_container(&spec, &container) else {
            let no = Trouble::Refused("the pod has no such container".to_owned());
            return self.finish(&job, Outcome::Step(no.told_as("CreateContainerConfigError")));
        };
        let now = self.wall();
        let made = self.call(|world| {
            if live {
                world.check_start(&job, &container, &sandbox_id);
            }
            let place = (job.uid.as_str(), sandbox_id.as_str(), spec.termination_grace_period_seconds);
            world.runtime.create(place, &found, attempt, now)
        });
        match made {
            Ok(id) => {
                self.log(&format!("  {id} is {container} {attempt} of {}", job.uid));
                // Whoever does not hear that it is made does not ask for its start.
                if live {
                    let delay = self.latency(200);
                    self.schedule(delay, Event::Step(job, Stage::Start(id)));
                }
            }
            Err(trouble) => self.finish(&job, Outcome::Step(trouble.told_as("CreateContainerError"))),
        }
    }

    fn start_step(&mut self, job: Job, id: String, live: bool) {
        let Some(PodAction::StartContainer { container, .. }) = &job.action else { return };
        let (name, now) = (container.clone(), self.wall());
        let fails = self.faults && self.random.chance(3);
        let started = self.call(|world| {
            world.runtime.start(&id, fails, now)?;
            world.log(&format!("  {id} runs{}", if live { "" } else { ", nobody waits for it" }));
            if let Some(instance) = world.runtime.instances.get_mut(&id) {
                instance.ghost = !live;
            }
            world.live_on(&id, &name);
            Ok(())
        });
        self.announce(&job.uid);
        let hook = find_container(job.pod.spec.as_ref().expect("a spec"), &name)
            .is_some_and(|container| has_hook(&container, false));
        match started {
            Ok(()) if hook && live => {
                let takes = self.random.between(1, 8000);
                if let Some(pod_loop) = self.loop_of(job.loop_id) {
                    pod_loop.hooks.insert(job.task);
                }
                self.schedule(takes, Event::Step(job, Stage::PostStart(id)));
            }
            Ok(()) => self.finish(&job, Outcome::Step(StepEnd::Done)),
            Err(trouble) => self.finish(&job, Outcome::Step(trouble.told_as("RunContainerError"))),
        }
    }

    /// What the container will do.
    fn live_on(&mut self, id: &str, name: &str) {
        let disturbed = self.faults && self.random.chance(40);
        let life = if disturbed {
            Some((self.random.between(0, 60_000), self.random.pick(&[0, 1, 3, 42, 137])))
        } else {
            life(&mut self.random, name)
        };
        if let Some((after, code)) = life {
            self.schedule(after, Event::Exit { id: id.to_owned(), code });
        }
    }

    /// The stop signal; the kill follows when the grace period is over.
    fn stop_step(&mut self, job: Job, id: String) {
        if let Some(pod_loop) = self.loop_of(job.loop_id) {
            pod_loop.hooks.remove(&job.task);
        }
        let luck = self.luck();
        if matches!(luck, Luck::NeverArrives | Luck::Refused) {
            return self.stopped(&job, &Err(Trouble::Away));
        }
        if !self.runtime.is_alive(&id) {
            return self.stopped(&job, &Ok(()));
        }
        self.check_stop_order(&job, &id);
        match self.random.between(0, 10) {
            0 => {}
            1 | 2 => {
                let takes = self.random.between(0, 60_000);
                self.schedule(takes, Event::Exit { id: id.clone(), code: 143 });
            }
            _ => {
                let takes = self.random.between(0, 2000);
                self.schedule(takes, Event::Exit { id: id.clone(), code: 143 });
            }
        }
        if matches!(luck, Luck::AnswerLost) {
            return self.stopped(&job, &Err(Trouble::Away));
        }
        let left = (job.grace() * 1000 - (self.time - job.began)).max(SHORTEST_GRACE);
        if let Some(instance) = self.runtime.instances.get_mut(&id) {
            instance.stoppers.push(job.clone());
        }
        // Whole seconds, rounded up.
        self.schedule((left + 999) / 1000 * 1000, Event::Step(job, Stage::StopOver(id)));
    }

    /// A kill, or the kill after a failed hook, is over.
    pub(crate) fn stopped(&mut self, job: &Job, result: &Result<(), Trouble>) {
        let end = if matches!(job.action, Some(PodAction::StartContainer { .. })) {
            Trouble::Refused("the hook failed".to_owned()).told_as("PostStartHookError")
        } else {
            plain(result)
        };
        self.finish(job, Outcome::Step(end));
    }

    fn write_step(&mut self, job: &Job, patch: &Value) {
        let failed = |why: &str| Outcome::Status(Written::Failed(why.to_owned()));
        let luck = self.api_luck();
        if matches!(luck, Luck::NeverArrives) {
            return self.finish(job, failed("429, 500 or no answer"));
        }
        let written = match self.api.patched(job.name(), patch) {
            Err(404) => Outcome::Status(Written::Gone),
            Err(code) => failed(&code.to_string()),
            Ok(pod) => {
                self.check_written(&pod);
                let pod = self.api.put(pod);
                self.notify(false, &pod);
                Outcome::Status(Written::Pod(Box::new(Pod::clone(&pod))))
            }
        };
        let lost = matches!(luck, Luck::AnswerLost);
        self.finish(job, if lost { failed("the answer was lost") } else { written });
    }

    fn delete_step(&mut self, job: &Job) {
        let luck = self.api_luck();
        if matches!(luck, Luck::NeverArrives) {
            return self.finish(job, Outcome::Step(StepEnd::Failed));
        }
        let is_this = self.api.by_uid(&job.uid).is_some();
        if is_this {
            self.check_deletion(&job.uid);
            self.remove_object(job.name());
        }
        let lost = matches!(luck, Luck::AnswerLost);
        self.finish(job, Outcome::Step(if lost { StepEnd::Failed } else { StepEnd::Done }));
    }

    fn api_luck(&mut self) -> Luck {
        if self.time < self.api_down_until {
            return Luck::NeverArrives;
        }
        match self.random.between(0, 100) {
            0..6 if self.faults => Luck::NeverArrives,
            6..10 if self.faults => Luck::AnswerLost,
            _ => Luck::Works,
        }
    }
}

/// A step that is only done or not.
fn plain(result: &Result<(), Trouble>) -> StepEnd {
    if result.is_ok() { StepEnd::Done } else { StepEnd::Failed }
}
