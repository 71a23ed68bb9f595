//! Removes events that nobody has repeated for an hour.
//!
//! Stock API servers let their store expire events; ours has no leases, so they are swept every few minutes,
//! page by page and without a cache.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Event;
use kube::{
    Api,
    api::{DeleteParams, ListParams},
};

use crate::{
    context::{Context, now},
    informer::Key,
    write::{WriteError, call, chain, delete},
};

const PERIOD: Duration = Duration::from_secs(300);
const PAGE: u32 = 500;

/// Registers the controller.
pub(crate) fn start(context: &Arc<Context>) {
    let shared = Arc::clone(context);
    context.spawn(async move {
        let mut ticks = tokio::time::interval(PERIOD);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // The first tick is immediate; at the start there is more urgent work.
        ticks.tick().await;
        loop {
            ticks.tick().await;
            if let Err(error) = sweep(&shared).await {
                tracing::warn!(error = %chain(&error), "old events not removed, trying again later");
            }
        }
    });
}

async fn sweep(context: &Context) -> Result<(), WriteError> {
    let ttl = jiff::SignedDuration::try_from(context.config.event_ttl).unwrap_or(jiff::SignedDuration::MAX);
    let everywhere: Api<Event> = Api::all(context.client.clone());
    let mut continue_token = None;
    loop {
        let params =
            ListParams { limit: Some(PAGE), continue_token: continue_token.take(), ..ListParams::default() };
        let page = call(|| "list events".to_owned(), everywhere.list(&params)).await?;
        let deadline = now();
        for event in page.items.iter().filter(|event| deadline.duration_since(last_seen(event)) > ttl) {
            let key = Key::of(&event.metadata);
            let uid = event.metadata.uid.as_deref().unwrap_or_default();
            let api = context.api::<Event>(&key.namespace);
            delete(&api, "Event", &key, uid, DeleteParams::default()).await?;
        }
        continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
        if continue_token.is_none() {
            return Ok(());
        }
    }
}

/// When the event last occurred, by whichever of its times is there.
fn last_seen(event: &Event) -> Timestamp {
    let created = event.metadata.creation_timestamp.as_ref().map(|time| time.0);
    let repeated = event.series.as_ref().and_then(|series| series.last_observed_time.as_ref());
    let times = [
        event.last_timestamp.as_ref().map(|time| time.0),
        event.event_time.as_ref().map(|time| time.0),
        repeated.map(|time| time.0),
        created,
    ];
    times.into_iter().flatten().max().unwrap_or(Timestamp::UNIX_EPOCH)
}
