//! Whether the CRI answers and its network is ready: [`RuntimeHealth`] for the node's conditions.
//!
//! CRI has no event for this: asked every few seconds, more often while something is not ready, and at once on
//! request.

use std::sync::Arc;
use std::time::Duration;

use cri_shim_api::v1;
use k8s_openapi::api::core::v1::{NodeFeatures, NodeRuntimeHandler, NodeRuntimeHandlerFeatures};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::cri::Cri;
use crate::contracts::RuntimeHealth;

const WHEN_READY: Duration = Duration::from_secs(5);
const WHEN_NOT: Duration = Duration::from_millis(250);

/// Keeps `health` up to date until `cancel`.
pub async fn run(
    cri: Cri,
    health: watch::Sender<RuntimeHealth>,
    recheck: Arc<Notify>,
    cancel: CancellationToken,
) {
    loop {
        // Cancel-safe: a check only reads.
        let checked = tokio::select! {
            () = cancel.cancelled() => return,
            checked = check(&cri, health.borrow().clone()) => checked,
        };
        let ready = matches!(checked, RuntimeHealth { runtime: Some(Ok(())), network: Some(Ok(())), .. });
        health.send_if_modified(|known| {
            if *known == checked {
                return false;
            }
            report(&checked);
            *known = checked;
            true
        });
        tokio::select! {
            () = cancel.cancelled() => return,
            () = recheck.notified() => {}
            () = tokio::time::sleep(if ready { WHEN_READY } else { WHEN_NOT }) => {}
        }
    }
}

fn report(health: &RuntimeHealth) {
    match (&health.runtime, &health.network) {
        (Some(Ok(())), Some(Ok(()))) => info!(version = %health.version, "container runtime is ready"),
        (Some(Err(message)), _) => warn!(problem = %message, "container runtime is not ready"),
        (_, Some(Err(message))) => info!(problem = %message, "container network is not ready"),
        _ => {}
    }
}

/// As the node's status tells them; the default one has an empty name.
fn handlers(told: &[v1::RuntimeHandler]) -> Vec<NodeRuntimeHandler> {
    let mut handlers: Vec<NodeRuntimeHandler> = told
        .iter()
        .map(|handler| NodeRuntimeHandler {
            name: Some(handler.name.clone()),
            features: handler.features.map(|features| NodeRuntimeHandlerFeatures {
                recursive_read_only_mounts: Some(features.recursive_read_only_mounts),
                user_namespaces: Some(features.user_namespaces),
            }),
        })
        .collect();
    // The CRI promises no order, and a changed order would be written.
    handlers.sort_by(|one, other| one.name.cmp(&other.name));
    handlers
}

async fn check(cri: &Cri, known: RuntimeHealth) -> RuntimeHealth {
    let mut health = known;
    let (version, status) = tokio::join!(cri.version(), cri.status());
    if let Ok(version) = version {
        health.version = format!("{}://{}", version.runtime_name, version.runtime_version);
        health.runtime_name = version.runtime_name;
    }
    match status {
        Err(error) => {
            health.runtime = Some(Err(format!("container runtime is down: {error}")));
        }
        Ok(status) => {
            health.handlers = handlers(&status.runtime_handlers);
            health.features = status.features.map(|features| NodeFeatures {
                supplemental_groups_policy: Some(features.supplemental_groups_policy),
            });
            let conditions = status.status.unwrap_or_default().conditions;
            health.runtime = Some(condition(&conditions, "RuntimeReady", "not ready"));
            health.network = Some(condition(&conditions, "NetworkReady", "network not ready"));
        }
    }
    health
}

/// Whether the runtime says that it is so; `otherwise`: what it is else.
fn condition(told: &[v1::RuntimeCondition], kind: &str, otherwise: &str) -> Result<(), String> {
    match told.iter().find(|condition| condition.r#type == kind) {
        Some(condition) if condition.status => Ok(()),
        Some(condition) => Err(format!(
            "container runtime {otherwise}: {kind}=false reason:{} message:{}",
            condition.reason, condition.message
        )),
        None => Err(format!("container runtime does not report {kind}")),
    }
}
