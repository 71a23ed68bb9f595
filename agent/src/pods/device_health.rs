//! Wakes pods when devices that they have are otherwise than they were: their statuses show it.
//!
//! Inputs: changes that plugins and drivers tell, and the times when what they told is too old. Output: wakes.

use std::collections::BTreeMap;
use std::sync::Arc;

use agent_core::claims;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, ResourceStatus};
use tokio_util::sync::CancellationToken;

use super::context::PodContext;
use super::directory::PodDirectory;
use crate::runtime::events::Waker as _;

impl PodContext {
    /// What the statuses of the pod's containers say of their devices, by the containers' names.
    pub(super) fn device_health(&self, pod: &Pod, now: Timestamp) -> BTreeMap<String, Vec<ResourceStatus>> {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let has_some = self.devices.has(uid) || claims::has_any(pod);
        if !has_some || !self.config.is_enabled("ResourceHealthStatus") {
            return BTreeMap::new();
        }
        let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
        let health = containers.map(|container| {
            let mut all = self.devices.health(uid, &container.name);
            all.extend(self.claims.health(pod, container, now));
            (container.name.clone(), all)
        });
        health.filter(|(_, all)| !all.is_empty()).collect()
    }
}

/// Wakes pods until `cancel`.
pub async fn run(context: Arc<PodContext>, pods: PodDirectory, cancel: CancellationToken) {
    let (mut of_plugins, mut of_drivers) =
        (context.devices.health_changes(), context.claims.health_changes());
    loop {
        let too_old = context.claims.next_health_timeout(Timestamp::now());
        // Each arm is cancel-safe: watches and a timer. Their senders live as long as the context does.
        tokio::select! {
            () = cancel.cancelled() => return,
            Ok(()) = of_plugins.changed() => {}
            Ok(()) = of_drivers.changed() => {}
            () = sleep_until(too_old) => {
                if !too_old.is_some_and(|at| context.claims.health_ends_at(at)) {
                    continue;
                }
            }
        }
        let mut holders = context.devices.holders();
        holders.extend(context.claims.pods().into_keys());
        for uid in &holders {
            pods.wake(uid);
        }
    }
}

async fn sleep_until(at: Option<Timestamp>) {
    match at {
        None => std::future::pending().await,
        Some(at) => {
            let pause = at.duration_since(Timestamp::now());
            tokio::time::sleep(pause.try_into().unwrap_or_default()).await;
        }
    }
}
