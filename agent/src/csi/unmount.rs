//! Takes volumes away from a pod, and from the node when no other pod has them; and what a killed agent left behind.
//!
//! What there is to do is read from disk: the pod's `vol_data.json` stays until its driver has let go of everything.

use std::path::Path;

use tracing::{debug, info, warn};

use super::Csi;
use super::drivers::Driver;
use super::layout::{Layout, PodVolume, VolumeData};
use super::mount::text;
use super::wire::{self, CallError, Empty, UnpublishRequest, UnstageRequest};
use crate::contracts::{VolumeError, VolumeStep};
use crate::host::mount_table;

impl Csi {
    /// Takes every volume of drivers away from the pod. Idempotent; an error means: again later.
    pub async fn tear_down(&self, uid: &str) -> Result<(), VolumeError> {
        let owner = uid.to_owned();
        let volumes = self.blocking(move |layout| layout.of_pod(&owner)).await;
        let volumes = volumes.map_err(|problem| error(uid, VolumeStep::TearDown, problem))?;
        for volume in volumes {
            let Some(data) = volume.data.clone() else {
                // Not a driver's, as far as anybody can tell; mounts below the pod's directory are undone with it.
                warn!(pod = %uid, volume = %volume.spec_name, "nothing says which driver the volume is of");
                continue;
            };
            let step = if volume.block { VolumeStep::UnmapDevice } else { VolumeStep::TearDown };
            let done = self.take_away(uid, &volume, &data).await;
            done.map_err(|problem| error(&volume.spec_name, step, problem))?;
        }
        self.forget_user(uid);
        self.0.tokens.forget(uid);
        Ok(())
    }

    async fn take_away(&self, uid: &str, volume: &PodVolume, data: &VolumeData) -> Result<(), String> {
        let _alone = self.lock(&data.driver_name, &data.volume_handle).await;
        let driver = self.0.drivers.get(&data.driver_name).map_err(|problem| {
            format!("kubernetes.io/csi: Unmounter.TearDownAt failed to get CSI client: {problem}")
        })?;
        let path = self.path(uid, &volume.spec_name, volume.block);
        let deadline = self.0.settings.call_deadline;
        let request = UnpublishRequest { volume_id: data.volume_handle.clone(), target_path: text(&path) };
        let undone: Result<Empty, CallError> =
            wire::call(&driver.channel, wire::UNPUBLISH, request, deadline).await;
        undone.map_err(|error| format!("kubernetes.io/csi: Unmounter.TearDownAt failed: {error}"))?;
        self.state().published.remove(&path);
        if data.is_persistent() {
            self.unstage_last(uid, volume, data, &driver).await?;
        }
        let (uid, volume) = (uid.to_owned(), volume.clone());
        self.blocking(move |layout| {
            // A driver's duty, that not every one knows of; what is still mounted is not touched.
            if !mount_table::is_mount_point(&path)? {
                remove_target(&path)?;
            }
            layout.forget_pod(&uid, &volume)
        })
        .await
        .map_err(|problem| format!("kubernetes.io/csi: failed to clean mount dir: {problem}"))
    }

    /// Takes the volume from the node, unless another pod has it.
    async fn unstage_last(
        &self,
        uid: &str,
        volume: &PodVolume,
        data: &VolumeData,
        driver: &Driver,
    ) -> Result<(), String> {
        let (owner, known) = (uid.to_owned(), data.clone());
        let shared = self
            .blocking(move |layout| layout.is_shared(&owner, &known.driver_name, &known.volume_handle))
            .await?;
        if shared {
            return Ok(());
        }
        let capabilities = driver
            .capabilities(self.0.settings.call_deadline)
            .await
            .map_err(|error| format!("failed to check whether STAGE_UNSTAGE_VOLUME set: {error}"))?;
        let staging = if volume.block {
            self.0.layout.device_staging(&volume.spec_name)
        } else {
            self.0.layout.staging(&data.driver_name, &data.volume_handle)
        };
        if capabilities.stage {
            self.unstage(driver, data, &staging).await?;
        }
        if volume.block {
            let (uid, device) = (uid.to_owned(), volume.clone());
            return self
                .blocking(move |layout| {
                    remove_target(&layout.device(&uid, &device.spec_name))?;
                    layout.forget_device(&device.spec_name)
                })
                .await;
        }
        Ok(())
    }

    async fn unstage(&self, driver: &Driver, data: &VolumeData, staging: &Path) -> Result<(), String> {
        let request =
            UnstageRequest { volume_id: data.volume_handle.clone(), staging_target_path: text(staging) };
        let deadline = self.0.settings.call_deadline;
        let undone: Result<Empty, CallError> =
            wire::call(&driver.channel, wire::UNSTAGE, request, deadline).await;
        undone.map_err(|error| format!("kubernetes.io/csi: attacher.UnmountDevice failed: {error}"))?;
        self.state().staged.remove(staging);
        let staging = staging.to_owned();
        self.blocking(move |_| {
            if mount_table::is_mount_point(&staging)? {
                return Err(std::io::Error::other(format!("{} is still mounted", staging.display())));
            }
            if staging.ends_with("globalmount") {
                Layout::forget_staged(&staging)
            } else {
                // Of a device; its data goes with its other directories.
                remove_target(&staging)
            }
        })
        .await
    }

    /// Unstages what no pod has: left by an agent that was killed in between.
    pub(super) async fn sweep(&self, driver: &str) {
        let name = driver.to_owned();
        let staged = self.blocking(move |layout| layout.staged(&name)).await;
        let Ok(driver) = self.0.drivers.get(driver) else { return };
        for (staging, data) in staged.unwrap_or_default() {
            let _alone = self.lock(&data.driver_name, &data.volume_handle).await;
            let (known, directory) = (data.clone(), staging.clone());
            let is_left = self.blocking(move |layout| {
                // A pod that went meanwhile may have been the last with it.
                let is_there = layout.staged(&known.driver_name)?.iter().any(|(path, _)| *path == directory);
                Ok(is_there && !layout.is_shared("", &known.driver_name, &known.volume_handle)?)
            });
            if is_left.await != Ok(true) {
                continue;
            }
            match self.unstage(&driver, &data, &staging).await {
                Ok(()) => info!(volume = %data.volume_handle, "unstaged a volume that no pod has"),
                Err(problem) => {
                    debug!(volume = %data.volume_handle, %problem, "a volume that no pod has stays staged");
                }
            }
        }
    }
}

/// Removes the directory or the file at which a pod saw a volume.
fn remove_target(path: &Path) -> std::io::Result<()> {
    let removed = match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => std::fs::remove_dir(path),
        Ok(_) => std::fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn error(volume: &str, step: VolumeStep, message: String) -> VolumeError {
    VolumeError { volume: volume.to_owned(), step, message, waits: false }
}
