//! What wakes the pod loops: CRI events at once, and a slow relist that only audits.
//!
//! Output: uids whose pods changed, through a [`Waker`]. Nothing is taken from an event's content: the loop reads the
//! pod itself, so a late, doubled or lost event can do no harm. A runtime without events is relisted every second.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures::StreamExt as _;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tracing::{debug, info, warn};

use super::cri::{Cri, CriError};
use super::labels;

/// The relist while it is open whether the runtime sends events.
const WHILE_OPENING: Duration = Duration::from_secs(5);
/// The relist of one that does not.
const RELIST: Duration = Duration::from_secs(1);
/// Pauses between connection attempts.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Told which pods to look at again. Must not block.
pub trait Waker: Send + Sync {
    /// The pod changed in the CRI. Pods that nobody runs are reported by [`Waker::found`] instead.
    fn wake(&self, uid: &str);

    /// The audit saw these pods in the CRI.
    fn found(&self, pods: Vec<FoundPod>);

    /// Pods that were last seen otherwise than they are `listed`: what came and went between two audits, its events lost, is in
    /// neither of them.
    fn mistaken(&self, listed: &BTreeMap<String, Fingerprint>) -> Vec<String>;
}

/// A pod that the CRI has, as far as its labels tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundPod {
    /// Uid.
    pub uid: String,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Container names seen.
    pub containers: BTreeSet<String>,
    /// Grace period annotated on its containers.
    pub grace: Option<i64>,
}

/// State of everything the CRI lists of one pod, to tell whether something changed.
pub type Fingerprint = BTreeMap<String, i32>;

/// Follows the event stream until `cancel`, with reconnects; everything is looked at again after `audit`.
pub async fn follow(cri: Cri, waker: impl Waker, audit: Duration, cancel: CancellationToken) {
    let mut pause = FIRST_PAUSE;
    let mut seen: BTreeMap<String, Fingerprint> = BTreeMap::new();
    loop {
        // Whatever happened while no stream was open is found by a relist: it precedes the stream's first event.
        // Cancel-safe: dropping the stream or a list loses nothing that the next relist does not find.
        let ended = tokio::select! {
            () = cancel.cancelled() => return,
            ended = stream(&cri, &waker, &mut seen, (&mut pause, audit)) => ended,
        };
        let wait = match ended {
            Err(error) if error.code == Code::Unimplemented => {
                if let Err(error) = relist(&cri, &waker, &mut seen).await {
                    debug!(%error, "relist failed");
                }
                RELIST
            }
            Err(error) => {
                info!(%error, pause = ?pause, "CRI event stream ended");
                pause
            }
            Ok(()) => pause,
        };
        pause = pause.saturating_mul(2).min(LONGEST_PAUSE);
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
    }
}

async fn stream(
    cri: &Cri,
    waker: &impl Waker,
    seen: &mut BTreeMap<String, Fingerprint>,
    (pause, audit): (&mut Duration, Duration),
) -> Result<(), CriError> {
    let mut opening = std::pin::pin!(cri.events());
    let mut opening_relist = tokio::time::interval(WHILE_OPENING);
    // Go servers answer only with their first event: until then the stream may be open or not, nobody can tell.
    // Cancel-safe: the call goes on while the list is read.
    let mut events = loop {
        tokio::select! {
            events = &mut opening => break events?,
            _ = opening_relist.tick() => relist(cri, waker, seen).await?,
        }
    };
    relist(cri, waker, seen).await?;
    debug!("CRI events are flowing");
    *pause = FIRST_PAUSE;
    let mut audit = tokio::time::interval(audit.max(RELIST));
    audit.reset();
    loop {
        // Both arms are cancel-safe: a tonic stream and an interval keep their state.
        tokio::select! {
            event = events.next() => match event {
                None => return Ok(()),
                Some(Err(status)) => {
                    warn!(code = ?status.code(), message = status.message(), "CRI event stream broke");
                    return Ok(());
                }
                Some(Ok(event)) => {
                    let sandbox = event.pod_sandbox_status.as_ref();
                    let uid = sandbox.and_then(|sandbox| {
                        sandbox.labels.get(labels::POD_UID).or(sandbox.metadata.as_ref().map(|m| &m.uid))
                    });
                    match uid {
                        Some(uid) => waker.wake(uid),
                        // Nothing tells whose it was: look at everything.
                        None => relist(cri, waker, seen).await?,
                    }
                }
            },
            _ = audit.tick() => relist(cri, waker, seen).await?,
        }
    }
}

/// Lists everything and wakes the pods whose listing differs from the last one.
async fn relist(
    cri: &Cri,
    waker: &impl Waker,
    seen: &mut BTreeMap<String, Fingerprint>,
) -> Result<(), CriError> {
    let (sandboxes, containers) = tokio::try_join!(cri.list_sandboxes(None), cri.list_containers(None))?;
    let mut now: BTreeMap<String, Fingerprint> = BTreeMap::new();
    let mut pods: BTreeMap<String, FoundPod> = BTreeMap::new();
    for sandbox in sandboxes {
        let Some(pod) = found_pod(&mut pods, &sandbox.labels) else { continue };
        now.entry(pod.uid.clone()).or_default().insert(sandbox.id, sandbox.state);
    }
    for container in containers {
        let Some(pod) = found_pod(&mut pods, &container.labels) else { continue };
        pod.containers.extend(container.labels.get(labels::CONTAINER_NAME).cloned());
        pod.grace =
            container.annotations.get(labels::GRACE).and_then(|grace| grace.parse().ok()).or(pod.grace);
        now.entry(pod.uid.clone()).or_default().insert(container.id, container.state);
    }
    let gone: Vec<&String> = seen.keys().filter(|uid| !now.contains_key(*uid)).collect();
    let changed = now.iter().filter(|(uid, state)| seen.get(*uid) != Some(state)).map(|(uid, _)| uid);
    for uid in changed.chain(gone).chain(&waker.mistaken(&now)) {
        waker.wake(uid);
    }
    waker.found(pods.into_values().collect());
    *seen = now;
    Ok(())
}

fn found_pod<'a>(
    pods: &'a mut BTreeMap<String, FoundPod>,
    labels: &BTreeMap<String, String>,
) -> Option<&'a mut FoundPod> {
    let label = |key: &str| labels.get(key).cloned().unwrap_or_default();
    let uid = label(labels::POD_UID);
    if uid.is_empty() {
        return None;
    }
    Some(pods.entry(uid.clone()).or_insert_with(|| FoundPod {
        uid,
        namespace: label(labels::POD_NAMESPACE),
        name: label(labels::POD_NAME),
        containers: BTreeSet::new(),
        grace: None,
    }))
}
