//! Figures of drivers' volumes, for `/stats/summary`.
//!
//! A driver is asked for a pod's volumes at most once a minute, only while somebody wants to know, and not again before it has
//! answered; whoever wants to know waits for [`PATIENCE`] and then takes what is known.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::contracts::{VolumeFigures, VolumeManager};

/// Older figures are asked for anew.
const AGE: Duration = Duration::from_secs(60);
/// How long a request waits for drivers.
const PATIENCE: Duration = Duration::from_secs(2);

/// Whom to ask, and what was answered. Clones share it.
#[derive(Clone, Default)]
pub struct DriverVolumes {
    manager: Option<Arc<dyn VolumeManager>>,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    known: BTreeMap<String, (Instant, Vec<VolumeFigures>)>,
    /// Pods whose volumes are asked about.
    busy: BTreeSet<String>,
}

impl fmt::Debug for DriverVolumes {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("DriverVolumes").finish_non_exhaustive()
    }
}

impl DriverVolumes {
    /// Those of a volume manager.
    pub fn new(manager: Arc<dyn VolumeManager>) -> Self {
        Self { manager: Some(manager), state: Arc::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Figures by uid, as far as they are known in time.
    pub(super) async fn of(&self, pods: &[Arc<Pod>]) -> BTreeMap<String, Vec<VolumeFigures>> {
        let Some(manager) = &self.manager else { return BTreeMap::new() };
        let uids: BTreeSet<String> =
            pods.iter().filter(|pod| may_have_some(pod)).filter_map(|pod| pod.metadata.uid.clone()).collect();
        let wanted: Vec<String> = {
            let mut state = self.state();
            state.known.retain(|uid, _| uids.contains(uid));
            let is_old = |uid: &&String| state.known.get(*uid).is_none_or(|(at, _)| at.elapsed() >= AGE);
            let wanted: Vec<String> =
                uids.iter().filter(is_old).filter(|uid| !state.busy.contains(*uid)).cloned().collect();
            state.busy.extend(wanted.iter().cloned());
            wanted
        };
        let mut asked = JoinSet::new();
        for uid in wanted {
            let (manager, volumes) = (Arc::clone(manager), self.clone());
            asked.spawn(async move {
                let figures = manager.figures(&uid).await;
                let mut state = volumes.state();
                state.busy.remove(&uid);
                state.known.insert(uid, (Instant::now(), figures));
            });
        }
        let late = tokio::time::timeout(PATIENCE, async { while asked.join_next().await.is_some() {} }).await;
        if late.is_err() {
            // They go on, and the next request sees what they find.
            asked.detach_all();
        }
        let state = self.state();
        state.known.iter().map(|(uid, (_, figures))| (uid.clone(), figures.clone())).collect()
    }
}

fn may_have_some(pod: &Pod) -> bool {
    pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()).any(|volume| {
        volume.csi.is_some() || volume.persistent_volume_claim.is_some() || volume.ephemeral.is_some()
    })
}

/// One volume as the endpoint shows it.
pub(super) fn summary(volume: &VolumeFigures, now: Timestamp) -> Value {
    let mut summary = json!({"time": now, "name": volume.name});
    let mut add = |names: [&str; 3], figures: Option<(i64, i64, i64)>| {
        if let Some((all, left, used)) = figures {
            for (name, value) in names.into_iter().zip([all, left, used]) {
                summary[name] = value.max(0).into();
            }
        }
    };
    add(["capacityBytes", "availableBytes", "usedBytes"], volume.bytes);
    add(["inodes", "inodesFree", "inodesUsed"], volume.inodes);
    if let Some((namespace, name)) = &volume.claim {
        summary["pvcRef"] = json!({"name": name, "namespace": namespace});
    }
    if let Some((abnormal, _)) = &volume.abnormal {
        summary["volumeHealthStats"] = json!({"abnormal": abnormal});
    }
    summary
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_reads_as_upstreams() {
        let volume = VolumeFigures {
            name: "data".to_owned(),
            claim: Some(("ns".to_owned(), "c".to_owned())),
            bytes: Some((100, 60, 40)),
            inodes: None,
            abnormal: Some((true, "broken".to_owned())),
        };
        let shown = summary(&volume, Timestamp::UNIX_EPOCH);
        assert_eq!(
            shown,
            json!({"time": Timestamp::UNIX_EPOCH, "name": "data", "capacityBytes": 100, "availableBytes": 60,
                "usedBytes": 40, "pvcRef": {"name": "c", "namespace": "ns"}, "volumeHealthStats": {"abnormal": true}})
        );
    }
}
