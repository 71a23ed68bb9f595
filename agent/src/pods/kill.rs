//! Ends a container: preStop within the grace period, then StopContainer with what is left of it.

use std::time::Duration;

use k8s_openapi::api::core::v1::LifecycleHandler;
use tokio::time::Instant;

use super::start::check_target;
use super::steps::{StepError, StepInput, find};
use crate::events::EventType;
use crate::probes::check::{Checked, run_hook};

/// A process gets this long after its stop signal even when preStop used up the grace period.
const SHORTEST_GRACE: Duration = Duration::from_secs(2);

/// Ends the instance `id` of `container`.
pub(super) async fn kill(
    input: &StepInput,
    id: &str,
    container: &str,
    grace: i64,
    message: &str,
) -> Result<(), StepError> {
    input.context.events.pod(&input.pod, Some(container), EventType::Normal, "Killing", message);
    let grace = Duration::from_secs(u64::try_from(grace).unwrap_or(0));
    let began = Instant::now();
    let hook = find(&input.pod, container).and_then(|container| container.lifecycle?.pre_stop);
    if let Some(hook) = hook.filter(|_| !grace.is_zero()) {
        pre_stop(input, id, container, &hook, grace).await;
    }
    let left = grace.saturating_sub(began.elapsed()).max(SHORTEST_GRACE);
    input.context.cri.stop_container(id, left).await.map_err(Into::into)
}

async fn pre_stop(input: &StepInput, id: &str, container: &str, hook: &LifecycleHandler, grace: Duration) {
    let Some(target) = check_target(input, container, id) else { return };
    let outcome = match tokio::time::timeout(grace, run_hook(&input.context.cri, hook, &target, grace)).await
    {
        Ok(Checked::Success(_) | Checked::Warning(_)) => return,
        Ok(Checked::Failure(problem) | Checked::Unknown(problem)) => problem,
        Err(_elapsed) => format!("not finished within the grace period of {}s", grace.as_secs()),
    };
    tracing::warn!(container, problem = %outcome, "preStop hook failed");
    input.context.events.pod(
        &input.pod,
        Some(container),
        EventType::Warning,
        "FailedPreStopHook",
        "PreStopHook failed",
    );
}
