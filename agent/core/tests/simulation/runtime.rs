//! The container runtime and the host: what is there in truth, whatever the agent believes. It keeps names reserved, as
//! containerd does, and remembers what it has removed, so that rules can be checked.

use std::collections::{BTreeMap, BTreeSet};

use agent_core::hash::container_hash;
use agent_core::model::{ObservedContainer, ObservedPod, ObservedSandbox, RunState};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Container;

use crate::steps::Job;
use crate::world::Millis;

/// A container, and what only the simulation knows of it.
#[derive(Debug)]
pub(crate) struct Instance {
    pub(crate) uid: String,
    pub(crate) truth: ObservedContainer,
    /// Its start was asked for by an agent that is no more.
    pub(crate) ghost: bool,
    /// Lists show its end from then on.
    pub(crate) end_shown_at: Millis,
    /// Grace period annotated on it.
    pub(crate) grace: Option<i64>,
    /// Steps that wait for its end.
    pub(crate) stoppers: Vec<Job>,
}

/// A sandbox, and whose it is.
#[derive(Debug)]
pub(crate) struct Sandbox {
    pub(crate) uid: String,
    pub(crate) truth: ObservedSandbox,
}

/// Runtime and host.
#[derive(Debug, Default)]
pub(crate) struct Runtime {
    pub(crate) sandboxes: BTreeMap<String, Sandbox>,
    pub(crate) instances: BTreeMap<String, Instance>,
    /// Pods that volumes are mounted for.
    pub(crate) volumes: BTreeSet<String>,
    /// Pods with a cgroup.
    pub(crate) cgroups: BTreeSet<String>,
    /// Sandbox and name of every container that ever ran.
    pub(crate) ran: BTreeSet<(String, String)>,
    /// Sandbox and name of every container that ever ended with 0.
    pub(crate) succeeded: BTreeSet<(String, String)>,
    /// What each container of each pod ended with at last; nothing while it runs.
    pub(crate) last_exit: BTreeMap<(String, String), i32>,
    /// Pods that the runtime lost something of.
    pub(crate) lossy: BTreeSet<String>,
    made: u64,
}

impl Runtime {
    fn id(&mut self, letter: char) -> String {
        self.made += 1;
        format!("{letter}{:05}", self.made)
    }

    pub(crate) fn run_sandbox(
        &mut self,
        uid: &str,
        attempt: u32,
        with_address: bool,
        now: Timestamp,
    ) -> Result<String, String> {
        if self.sandboxes.values().any(|other| other.uid == uid && other.truth.attempt == attempt) {
            return Err(format!("sandbox name {uid}_{attempt} is reserved"));
        }
        if !self.cgroups.contains(uid) {
            return Err("no parent cgroup".to_owned());
        }
        let id = self.id('s');
        let ips = if with_address { vec!["10.244.0.7".to_owned()] } else { Vec::new() };
        let truth = ObservedSandbox { id: id.clone(), attempt, ready: true, created_at: now, ips };
        self.sandboxes.insert(id.clone(), Sandbox { uid: uid.to_owned(), truth });
        Ok(id)
    }

    pub(crate) fn create(
        &mut self,
        (uid, sandbox, grace): (&str, &str, Option<i64>),
        container: &Container,
        attempt: u32,
        now: Timestamp,
    ) -> Result<String, String> {
        let name = container.name.clone();
        let mut others = self.instances.values().filter(|other| other.uid == uid && other.truth.name == name);
        if others.any(|other| other.truth.attempt == attempt) {
            return Err(format!("name {name}_{attempt} is reserved"));
        }
        if !self.sandboxes.get(sandbox).is_some_and(|sandbox| sandbox.truth.ready) {
            return Err(format!("sandbox {sandbox} is not ready"));
        }
        let id = self.id('c');
        let truth = ObservedContainer {
            id: id.clone(),
            name,
            attempt,
            hash: container_hash(container),
            sandbox_id: sandbox.to_owned(),
            state: RunState::Created,
            image: container.image.clone().unwrap_or_default(),
            image_id: "sha256:1".to_owned(),
            created_at: now,
            started_at: None,
            finished_at: None,
            exit_code: 0,
            reason: String::new(),
            message: String::new(),
            log_path: String::new(),
            user: None,
        };
        let uid = uid.to_owned();
        let made = Instance { uid, truth, ghost: false, end_shown_at: 0, grace, stoppers: Vec::new() };
        self.instances.insert(id.clone(), made);
        Ok(id)
    }

    /// Starts a container, or says why it ended at once.
    pub(crate) fn start(&mut self, id: &str, fails: bool, now: Timestamp) -> Result<(), String> {
        let Some(instance) = self.instances.get_mut(id) else { return Err(format!("no container {id}")) };
        if instance.truth.state != RunState::Created {
            return Err(format!("container {id} is not in state created"));
        }
        let ready = self.sandboxes.get(&instance.truth.sandbox_id).is_some_and(|sandbox| sandbox.truth.ready);
        instance.truth.started_at = Some(now);
        if fails || !ready {
            instance.truth.state = RunState::Exited;
            "StartError".clone_into(&mut instance.truth.reason);
            (instance.truth.exit_code, instance.truth.finished_at) = (128, Some(now));
            self.last_exit.insert((instance.uid.clone(), instance.truth.name.clone()), 128);
            return Err("cannot run its command".to_owned());
        }
        instance.truth.state = RunState::Running;
        self.last_exit.remove(&(instance.uid.clone(), instance.truth.name.clone()));
        self.ran.insert((instance.truth.sandbox_id.clone(), instance.truth.name.clone()));
        Ok(())
    }

    /// The container's processes end; the steps that waited for that.
    pub(crate) fn end(&mut self, id: &str, code: i32, now: Timestamp, shown_at: Millis) -> Vec<Job> {
        let Some(instance) = self.instances.get_mut(id).filter(|found| found.truth.is_alive()) else {
            return Vec::new();
        };
        let truth = &mut instance.truth;
        (truth.state, truth.exit_code, truth.finished_at) = (RunState::Exited, code, Some(now));
        instance.end_shown_at = shown_at;
        self.last_exit.insert((instance.uid.clone(), truth.name.clone()), code);
        if code == 0 {
            self.succeeded.insert((truth.sandbox_id.clone(), truth.name.clone()));
        }
        std::mem::take(&mut instance.stoppers)
    }

    pub(crate) fn is_alive(&self, id: &str) -> bool {
        self.instances.get(id).is_some_and(|instance| instance.truth.is_alive())
    }

    /// Ids of what runs in a sandbox.
    pub(crate) fn alive_in(&self, sandbox: &str) -> Vec<String> {
        let alive = self.instances.values().filter(|i| i.truth.sandbox_id == sandbox && i.truth.is_alive());
        alive.map(|instance| instance.truth.id.clone()).collect()
    }

    /// What of the pod runs.
    pub(crate) fn alive_of<'a>(&'a self, uid: &'a str) -> impl Iterator<Item = &'a Instance> {
        self.instances.values().filter(move |instance| instance.uid == uid && instance.truth.is_alive())
    }

    pub(crate) fn remove_sandbox(&mut self, id: &str) {
        self.sandboxes.remove(id);
        self.instances.retain(|_, instance| instance.truth.sandbox_id != id);
    }

    /// What the lists say of a pod: an end may show up late, all else is as it is.
    pub(crate) fn list(&self, uid: &str, time: Millis) -> ObservedPod {
        let mut listed = ObservedPod::default();
        let own = self.sandboxes.values().filter(|sandbox| sandbox.uid == uid);
        listed.sandboxes.extend(own.map(|sandbox| sandbox.truth.clone()));
        for instance in self.instances.values().filter(|instance| instance.uid == uid) {
            let mut shown = instance.truth.clone();
            if shown.state == RunState::Exited && instance.end_shown_at > time {
                (shown.state, shown.finished_at, shown.exit_code) = (RunState::Running, None, 0);
            }
            listed.containers.push(shown);
        }
        listed.sort();
        listed
    }

    /// Uids of all pods that left a trace on the node.
    pub(crate) fn traces(&self) -> BTreeSet<String> {
        let sandboxes = self.sandboxes.values().map(|sandbox| &sandbox.uid);
        let instances = self.instances.values().map(|instance| &instance.uid);
        sandboxes.chain(instances).chain(&self.volumes).chain(&self.cgroups).cloned().collect()
    }
}
