//! The loop's outward side: status, waiting events, probes to run, the view for lookups.

use std::sync::Arc;

use agent_core::model::{Fate, RunState, containers};
use agent_core::plan::PodPlan;
use agent_core::status::{self, StatusInput};
use jiff::Timestamp;

use super::directory::PodView;
use super::start::address;
use super::steps::Step;
use super::worker::Worker;
use crate::events::EventType;
use crate::probes::ProbeTarget;

impl Worker {
    /// Derives the status, starts its write, keeps probes and view in step. True when the plan depends on a change
    /// made here.
    pub(super) fn report(&mut self, plan: &PodPlan, now: Timestamp) -> bool {
        let ending = matches!(self.desired.fate, Fate::Terminate { .. });
        self.tell_waiting(plan);
        self.sync_probes(ending);
        // Once the last status of an ending pod is told, what the CRI forgets afterwards is no news.
        if !self.memory.status_written {
            self.derive(plan, now);
        }
        self.publish();
        if matches!(self.desired.fate, Fate::Terminate { gone: true, .. }) {
            return false;
        }
        if let Some(patch) = self.sync.next(self.desired.uid(), &self.status, now) {
            self.spawn(Step::WriteStatus(patch));
        }
        let last_word = ending && plan.finished && self.sync.in_sync(self.desired.uid(), &self.status);
        let news = last_word && !self.memory.status_written;
        self.memory.status_written |= last_word;
        news
    }

    /// Records an event about the pod.
    pub(super) fn event(&self, container: Option<&str>, kind: EventType, reason: &str, message: &str) {
        if !matches!(self.desired.fate, Fate::Terminate { gone: true, .. }) {
            self.context.events.pod(&self.desired.pod, container, kind, reason, message);
        }
    }

    fn derive(&mut self, plan: &PodPlan, now: Timestamp) {
        let identity = self.context.identity();
        let derived = status::derive(StatusInput {
            desired: &self.desired,
            observed: &self.observed,
            memory: &self.memory,
            plan,
            previous: &self.status,
            node: &identity,
            now,
        });
        self.status = Arc::new(derived);
    }

    fn publish(&self) {
        let changed = |view: &PodView| {
            !Arc::ptr_eq(&view.pod, &self.desired.pod)
                || !Arc::ptr_eq(&view.observed, &self.observed)
                || view.status != self.status
        };
        self.view.send_if_modified(|view| {
            if !changed(view) {
                return false;
            }
            *view = PodView {
                pod: Arc::clone(&self.desired.pod),
                status: Arc::clone(&self.status),
                observed: Arc::clone(&self.observed),
            };
            true
        });
    }

    /// Events for containers that begin to wait for a back-off.
    fn tell_waiting(&mut self, plan: &PodPlan) {
        for (name, waiting) in &plan.waiting {
            if self.waiting.get(name).is_some_and(|known| known == waiting) {
                continue;
            }
            match waiting.reason.as_str() {
                "CrashLoopBackOff" => {
                    let message = format!(
                        "Back-off restarting failed container {name} in pod {}",
                        self.desired.described()
                    );
                    self.event(Some(name), EventType::Warning, "BackOff", &message);
                }
                "ImagePullBackOff" => {
                    let image = self
                        .desired
                        .entries()
                        .find(|entry| entry.container.name == *name)
                        .and_then(|entry| entry.container.image.clone())
                        .unwrap_or_default();
                    let message = format!("Back-off pulling image \"{image}\"");
                    self.event(Some(name), EventType::Normal, "BackOff", &message);
                    self.event(Some(name), EventType::Warning, "Failed", "Error: ImagePullBackOff");
                }
                _ => {}
            }
        }
        self.waiting.clone_from(&plan.waiting);
    }

    fn sync_probes(&mut self, ending: bool) {
        let pod_ips = self.pod_ips();
        let address = address(&self.desired.pod, &pod_ips, self.context.config.keelson.node_ip);
        let mut targets = Vec::new();
        for entry in containers(self.desired.spec()) {
            let name = &entry.container.name;
            let running = self.observed.newest(name, &self.memory).filter(|instance| {
                instance.state == RunState::Running && !self.memory.starting.contains_key(name)
            });
            let Some(instance) = running else { continue };
            let results = self.memory.container(name).probes_of(instance);
            if results.failed.is_some() {
                continue;
            }
            targets.push(ProbeTarget {
                pod: &self.desired.pod,
                container: entry.container,
                container_id: &instance.id,
                started_at: instance.started_at.unwrap_or(instance.created_at),
                address,
                started: entry.container.startup_probe.is_none() || results.started,
                ready: results.ready,
                ending,
            });
        }
        self.probes.sync(&targets);
    }
}
