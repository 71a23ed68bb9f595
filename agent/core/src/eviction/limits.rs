//! Limits of a pod's own disk use: `emptyDir.sizeLimit` and limits of `ephemeral-storage`. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{EmptyDirVolumeSource, Pod, PodSpec, Volume};

use super::PodUse;
use crate::resources::{Side, amount, pod_limit, whole};

/// Whether somebody has to look at what the pod uses of the disk.
pub fn has_disk_limits(pod: &Pod) -> bool {
    let Some(spec) = &pod.spec else { return false };
    limited_volumes(spec).next().is_some()
        || spec
            .containers
            .iter()
            .any(|container| amount(container.resources.as_ref(), Side::Limits, STORAGE).is_some())
}

/// Names of the pod's emptyDirs on the node's disk that have a limit.
pub fn limited_volumes(spec: &PodSpec) -> impl Iterator<Item = &str> {
    on_disk(spec).filter(|(_, source)| source.size_limit.is_some()).map(|(volume, _)| volume.name.as_str())
}

const STORAGE: &str = "ephemeral-storage";

fn on_disk(spec: &PodSpec) -> impl Iterator<Item = (&Volume, &EmptyDirVolumeSource)> {
    let sources =
        spec.volumes.iter().flatten().filter_map(|volume| Some((volume, volume.empty_dir.as_ref()?)));
    sources.filter(|(_, source)| source.medium.as_deref().unwrap_or_default().is_empty())
}

/// The limit that the pod is over, in upstream's words. `volumes` are bytes of its emptyDirs.
pub fn over_limit(used: &PodUse, volumes: &BTreeMap<String, u64>) -> Option<String> {
    let spec = used.pod.spec.as_ref()?;
    for (volume, source) in on_disk(spec) {
        let Some(quantity) = &source.size_limit else { continue };
        let limit = whole(quantity).and_then(|limit| u64::try_from(limit).ok()).filter(|limit| *limit > 0);
        let bytes = volumes.get(&volume.name).copied().unwrap_or_default();
        if limit.is_some_and(|limit| bytes > limit) {
            return Some(format!(
                "Usage of EmptyDir volume {:?} exceeds the limit {:?}. ",
                volume.name, quantity.0
            ));
        }
    }
    for container in &spec.containers {
        let limit = amount(container.resources.as_ref(), Side::Limits, STORAGE);
        let bytes = used.containers.get(&container.name).map_or(0, |container| container.disk);
        if limit.is_some_and(|limit| u64::try_from(limit).is_ok_and(|limit| bytes > limit)) {
            let limits = container.resources.as_ref().and_then(|resources| resources.limits.as_ref());
            let shown = limits
                .and_then(|limits| limits.get(STORAGE))
                .map(|limit| limit.0.clone())
                .unwrap_or_default();
            return Some(format!(
                "Container {} exceeded its local ephemeral storage limit {shown:?}. ",
                container.name
            ));
        }
    }
    let total = pod_limit(spec, STORAGE).and_then(|limit| u64::try_from(limit).ok())?;
    let bytes =
        used.containers.values().map(|container| container.disk).sum::<u64>().saturating_add(used.volumes);
    (bytes > total).then(|| {
        format!(
            "Pod ephemeral local storage usage exceeds the total limit of containers {}. ",
            super::rank::binary(total)
        )
    })
}
