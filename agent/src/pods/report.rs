//! The loop's outward side: status, waiting events, probes to run, the view for lookups.

use std::sync::Arc;

use agent_core::plan::PodPlan;
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
        self.tell_waiting(plan);
        self.sync_probes();
        self.state.memory.device_health = self.context.device_health(&self.state.desired.pod, now);
        self.state.derive_status(plan, &self.context.identity(), now);
        self.publish();
        let (patch, news) = self.state.tell(plan, now);
        if let Some(patch) = patch {
            self.spawn(Step::WriteStatus(patch));
        }
        news
    }

    /// Records an event about the pod.
    pub(super) fn event(&self, container: Option<&str>, kind: EventType, reason: &str, message: &str) {
        if !self.state.is_gone() {
            self.context.events.pod(&self.state.desired.pod, container, kind, reason, message);
        }
    }

    fn publish(&self) {
        let now = &self.state;
        self.view.send_if_modified(|view| {
            let is_same = Arc::ptr_eq(&view.pod, &now.desired.pod)
                && Arc::ptr_eq(&view.observed, &now.observed)
                && view.status == now.status;
            if is_same {
                return false;
            }
            *view = PodView {
                pod: Arc::clone(&now.desired.pod),
                status: Arc::clone(&now.status),
                observed: Arc::clone(&now.observed),
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
                        self.state.desired.described()
                    );
                    self.event(Some(name), EventType::Warning, "BackOff", &message);
                }
                "ImagePullBackOff" => {
                    let image = self
                        .state
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

    fn sync_probes(&mut self) {
        let pod_ips = self.pod_ips();
        let pod = &self.state.desired.pod;
        let address = address(pod, &pod_ips, self.context.config.keelson.node_ip);
        let ending = self.state.is_ending();
        let mut targets = Vec::new();
        for (container, instance, results) in self.state.probed() {
            targets.push(ProbeTarget {
                pod,
                container,
                container_id: &instance.id,
                started_at: instance.started_at.unwrap_or(instance.created_at),
                address,
                started: results.started,
                ready: results.ready,
                ending,
            });
        }
        self.probes.sync(&targets);
    }
}
