//! What a pod's volumes hold, and whether they are well, as their drivers tell.

use std::path::PathBuf;
use std::time::Duration;

use super::mount::text;
use super::wire::{self, CallError, StatsRequest, StatsResponse, Unit, Usage};
use super::{Csi, Published};
use crate::contracts::VolumeFigures;

/// Deadline of a call: figures are not worth more.
const DEADLINE: Duration = Duration::from_secs(10);

impl Csi {
    /// Figures of the pod's volumes, of those whose drivers tell.
    pub async fn stats(&self, uid: &str) -> Vec<VolumeFigures> {
        let volumes: Vec<(PathBuf, Published)> = {
            let state = self.state();
            let of_pod = state.published.iter().filter(|(_, published)| published.uid == uid);
            of_pod.map(|(path, published)| (path.clone(), published.clone())).collect()
        };
        let mut figures = Vec::new();
        for (path, volume) in volumes {
            match self.figures(&path, &volume).await {
                Ok(Some(found)) => figures.push(found),
                Ok(None) => {}
                Err(problem) => tracing::debug!(volume = %volume.handle, %problem, "no figures of a volume"),
            }
        }
        figures
    }

    async fn figures(
        &self,
        path: &std::path::Path,
        volume: &Published,
    ) -> Result<Option<VolumeFigures>, String> {
        let driver = self.0.drivers.get(&volume.driver)?;
        let capabilities = driver.capabilities(DEADLINE).await.map_err(|error| error.to_string())?;
        if !capabilities.stats {
            return Ok(None);
        }
        let request = StatsRequest {
            volume_id: volume.handle.clone(),
            volume_path: text(path),
            staging_target_path: volume.staging.as_deref().map(text).unwrap_or_default(),
        };
        let answer: Result<StatsResponse, CallError> =
            wire::call(&driver.channel, wire::STATS, request, DEADLINE).await;
        let answer = answer.map_err(|error| error.to_string())?;
        let of = |unit: Unit| answer.usage.iter().find(|usage| usage.unit() == unit).copied();
        let figures = |usage: Option<Usage>| usage.map(|usage| (usage.total, usage.available, usage.used));
        let condition = answer.condition.clone().filter(|_| capabilities.condition);
        Ok(Some(VolumeFigures {
            name: volume.name.clone(),
            claim: volume.claim.clone(),
            bytes: figures(of(Unit::Bytes)),
            inodes: figures(of(Unit::Inodes)),
            abnormal: condition.map(|condition| (condition.abnormal, condition.message)),
        }))
    }
}
