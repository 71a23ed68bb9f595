//! Volumes on servers: directories of NFS servers, and disks of iSCSI targets.
//!
//! Input: what a pod or a PersistentVolume asks for, secrets. Output: mounts at upstream's paths:
//!
//! | path below `<rootDir>` | what |
//! |---|---|
//! | `pods/<uid>/volumes/kubernetes.io~nfs/<name>` | a server's directory |
//! | `pods/<uid>/volumes/kubernetes.io~iscsi/<name>` | a pod's view of a disk: a bind mount of the next |
//! | `plugins/kubernetes.io/iscsi/iface-<iface>/<portal>-<iqn>-lun-<lun>` | a disk's file system on the node |
//!
//! A server may be gone at any moment, and whoever asks its file system then waits for ever. So: tools mount and unmount as
//! children with a deadline ([`tools`]); what is mounted is read from the mount table and never asked of a path ([`mounts`]);
//! what must look into a volume does so by way of [`crate::host::asked`]. Nothing is remembered that the mount table does not say, so an
//! agent goes on with what an earlier one mounted.
//!
//! Reading order: [`source`], [`tools`], [`mounts`], `iscsi` (names and commands), `format`, `disk`, then this.

mod disk;
mod format;
mod iscsi;
mod mounts;
mod source;
mod tools;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::OwnedMutexGuard;
use tracing::{info, warn};

use self::iscsi::Target;
use self::mounts::{Places, real};
pub(super) use self::source::NetworkVolume;
use self::source::Source;
use self::source::{check_server, join_options, mount_arguments, nfs_source};
use super::ownership::Ownership;
use crate::contracts::{ObjectSource, VolumeError, VolumeStep};

/// Directories of these plugins below a pod's `volumes` are file systems of servers, and may never answer.
const PLUGINS: [&str; 2] = ["kubernetes.io~nfs", "kubernetes.io~iscsi"];
/// How long until a disk that did not let itself be taken away is tried again.
const AGAIN: Duration = Duration::from_secs(30);

/// Whether a directory of a pod's `volumes` has file systems that may never answer.
pub(crate) fn is_remote(plugin: &std::ffi::OsStr) -> bool {
    PLUGINS.iter().any(|known| plugin == *known)
}

/// Volumes on servers. Clones share them.
#[derive(Clone)]
pub(super) struct Remote(Arc<Inner>);

struct Inner {
    root: PathBuf,
    places: Places,
    objects: Arc<dyn ObjectSource>,
    state: Mutex<State>,
}

/// What goes on at the moment.
#[derive(Default)]
struct State {
    /// Pods that have or get a disk, by its directory.
    users: BTreeMap<PathBuf, BTreeSet<String>>,
    /// One for each target that somebody is at.
    locks: BTreeMap<String, Weak<tokio::sync::Mutex<()>>>,
    /// Disks that no pod has are being taken away; whether to look once more.
    sweeping: Option<bool>,
    /// Why disks stay that should go, as it was told last.
    told: BTreeMap<PathBuf, String>,
}

/// The group that gets a disk's files.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Group {
    pub(super) ownership: Ownership,
    /// At each start of a pod, not only where the root has another one.
    pub(super) always: bool,
}

impl Remote {
    /// Volumes below this kubelet root directory.
    pub(super) fn new(root: &Path, objects: Arc<dyn ObjectSource>) -> Self {
        Self::at(root, objects, Places::system())
    }

    fn at(root: &Path, objects: Arc<dyn ObjectSource>, places: Places) -> Self {
        Self(Arc::new(Inner { root: root.to_owned(), places, objects, state: Mutex::default() }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody else logs in to or out of the target.
    async fn lock(&self, iqn: &str) -> OwnedMutexGuard<()> {
        self.lock_of(iqn).lock_owned().await
    }

    fn lock_of(&self, iqn: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut state = self.state();
        state.locks.retain(|_, lock| lock.strong_count() > 0);
        let entry = state.locks.entry(iqn.to_owned()).or_default();
        entry.upgrade().unwrap_or_else(|| {
            let lock = Arc::default();
            *entry = Arc::downgrade(&lock);
            lock
        })
    }

    /// Mounts the volume for the pod, or finds it mounted.
    pub(super) async fn set_up(
        &self,
        uid: &str,
        volume: &NetworkVolume,
        group: Group,
    ) -> Result<PathBuf, VolumeError> {
        let failed =
            |step, message| VolumeError { volume: volume.spec_name.clone(), step, message, waits: false };
        if !super::is_file_name(&volume.spec_name) {
            return Err(failed(VolumeStep::SetUp, "invalid volume name".to_owned()));
        }
        let plugin = format!("kubernetes.io~{}", volume.plugin());
        let dir = self.0.root.join("pods").join(uid).join("volumes").join(plugin).join(&volume.spec_name);
        let is_there = self.0.places.is_mounted(&dir);
        if is_there.map_err(|problem| failed(VolumeStep::SetUp, problem))? {
            return Ok(dir);
        }
        match &volume.source {
            Source::Nfs { server, path } => {
                let done = self.mount_nfs(volume, (server, path), &dir).await;
                done.map_err(|problem| failed(VolumeStep::SetUp, problem))?;
            }
            Source::Iscsi(target) => {
                let done = self.mount_disk((uid, group), volume, target, &dir).await;
                done.map_err(|(step, problem)| failed(step, problem))?;
            }
        }
        info!(pod = %uid, volume = %volume.spec_name, kind = volume.plugin(), "mounted");
        Ok(dir)
    }

    async fn mount_nfs(
        &self,
        volume: &NetworkVolume,
        (server, path): (&str, &str),
        dir: &Path,
    ) -> Result<(), String> {
        let places = &self.0.places;
        // Without its helper `mount` says something about bad options, which helps nobody.
        if places.tools.find("mount.nfs").is_none() {
            return Err("mount failed: this node has no /sbin/mount.nfs, which mounts of type nfs need; install the package \
                        that has it (Debian: nfs-common)"
                .to_owned());
        }
        check_server(server)?;
        let more: &[&str] = if volume.read_only { &["ro"] } else { &[] };
        let options = join_options(&volume.mount_options, more);
        let source = &nfs_source(server, path);
        let arguments = mount_arguments(Some("nfs"), &options, source, &dir.to_string_lossy());
        places.mount(dir, &arguments, places.mount).await
    }

    /// The disk on the node, and of it what the pod sees.
    async fn mount_disk(
        &self,
        (uid, group): (&str, Group),
        volume: &NetworkVolume,
        target: &Target,
        dir: &Path,
    ) -> Result<(), (VolumeStep, String)> {
        let places = &self.0.places;
        let at = |step: VolumeStep| move |problem: String| (step, problem);
        target.check().map_err(at(VolumeStep::WaitForAttach))?;
        let global = target.global_dir(&self.0.root);
        let alone = self.lock(&target.iqn).await;
        self.state().users.entry(global.clone()).or_default().insert(uid.to_owned());
        if places.is_mounted(&global).map_err(at(VolumeStep::MountDevice))? {
            drop(alone);
        } else {
            let (this, volume, target, global) =
                (self.clone(), volume.clone(), target.clone(), global.clone());
            // By itself: a pod that is deleted meanwhile shall not end a tool that writes to the disk.
            let mounting = tokio::spawn(async move {
                let done = this.mount_whole(&volume, &target, &global).await;
                drop(alone);
                if !this.state().users.contains_key(&global) {
                    // That pod has gone, and the sweep after it may have found nothing yet.
                    this.start_sweep();
                }
                done
            });
            mounting.await.map_err(|error| (VolumeStep::MountDevice, error.to_string()))??;
        }
        // Before the pod's mount, whose being there says that all is done.
        self.change_owner(volume, group, &global).await.map_err(at(VolumeStep::SetUp))?;
        let options = if volume.read_only { "bind,ro" } else { "bind" };
        let arguments = mount_arguments(None, options, &global.to_string_lossy(), &dir.to_string_lossy());
        places.mount(dir, &arguments, places.mount).await.map_err(at(VolumeStep::SetUp))
    }

    /// Logs in, makes a file system where the disk is empty, and mounts it for the node.
    async fn mount_whole(
        &self,
        volume: &NetworkVolume,
        target: &Target,
        global: &Path,
    ) -> Result<(), (VolumeStep, String)> {
        let places = &self.0.places;
        let at = |step: VolumeStep| move |problem: String| (step, problem);
        let secret = self.secret(target).await.map_err(at(VolumeStep::WaitForAttach))?;
        let device = places.attach(target, &secret).await.map_err(at(VolumeStep::WaitForAttach))?;
        disk::write(global, target).map_err(at(VolumeStep::MountDevice))?;
        let wish = (target.fs_type.as_str(), volume.mount_options.as_slice(), volume.read_only);
        places.format_and_mount(&device, global, wish).await.map_err(at(VolumeStep::MountDevice))
    }

    /// What the secret says, where the login needs one.
    async fn secret(&self, target: &Target) -> Result<BTreeMap<String, String>, String> {
        let chap = &target.chap;
        let Some((namespace, name)) = chap.secret.as_ref().filter(|_| chap.discovery || chap.session) else {
            return Ok(BTreeMap::new());
        };
        let found = self.0.objects.secret(namespace, name).await;
        let found = found.map_err(|error| error.to_string())?.ok_or_else(|| {
            format!("failed to get secret from [{namespace:?}/{name:?}]: secrets {name:?} not found")
        })?;
        let texts = found.data.iter().flatten().filter_map(|(key, value)| {
            Some((key.clone(), std::str::from_utf8(&value.0).ok()?.trim_end_matches('\n').to_owned()))
        });
        Ok(texts.collect())
    }

    async fn change_owner(&self, volume: &NetworkVolume, group: Group, dir: &Path) -> Result<(), String> {
        if volume.read_only || group.ownership.group.is_none() {
            return Ok(());
        }
        let (ownership, dir) = (group.ownership, dir.to_owned());
        let changing = tokio::task::spawn_blocking(move || {
            if group.always { ownership.claim_all(&dir) } else { ownership.claim(&dir) }
        });
        let changed = changing.await.map_err(std::io::Error::other).and_then(|done| done);
        changed.map_err(|error| format!("applyFSGroup failed for vol {}: {error}", volume.spec_name))
    }

    /// Unmounts what the pod has. Idempotent; an error means: again later. Disks that nobody else has follow by themselves: the
    /// pod does not wait for their targets.
    pub(super) async fn tear_down(&self, uid: &str) -> Result<(), VolumeError> {
        let volumes = self.0.root.join("pods").join(uid).join("volumes");
        let failed = |path: &Path, message| VolumeError {
            volume: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            step: VolumeStep::TearDown,
            message,
            waits: false,
        };
        for plugin in PLUGINS {
            // Names only: an entry that is asked what it is may not answer.
            for name in names(&volumes.join(plugin)) {
                let path = volumes.join(plugin).join(name);
                let done = if plugin == "kubernetes.io~nfs" {
                    self.0.places.unmount_anyhow(&path).await
                } else {
                    // Out of sight it would still be in use when its disk goes.
                    self.0.places.unmount(&path, self.0.places.unmount).await
                };
                done.map_err(|problem| failed(&path, problem))?;
                if let Err(error) = std::fs::remove_dir(&path) {
                    warn!(path = %path.display(), %error, "a directory of a volume stays until its pod's goes");
                }
            }
        }
        self.state().users.retain(|_, users| {
            users.remove(uid);
            !users.is_empty()
        });
        self.start_sweep();
        Ok(())
    }

    /// Takes disks from the node that no pod has, in the background, until that is done.
    fn start_sweep(&self) {
        if !iscsi::plugin_dir(&self.0.root).is_dir() {
            return;
        }
        {
            let mut state = self.state();
            if let Some(once_more) = state.sweeping.as_mut() {
                *once_more = true;
                return;
            }
            state.sweeping = Some(false);
        }
        let this = self.clone();
        tokio::spawn(async move {
            loop {
                let is_done = this.sweep().await;
                {
                    let mut state = this.state();
                    let sweeping = state.sweeping;
                    match sweeping {
                        Some(true) => state.sweeping = Some(false),
                        _ if is_done => {
                            state.sweeping = None;
                            return;
                        }
                        _ => {}
                    }
                }
                if !is_done {
                    tokio::time::sleep(AGAIN).await;
                }
            }
        });
    }

    /// Takes every disk away that no pod has; false where one stays that should go.
    async fn sweep(&self) -> bool {
        let mut is_done = true;
        for dir in self.disks() {
            let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let Some(target) = iscsi::target_part(&name) else { continue };
            let iqn = ["-iqn.", "-eui.", "-naa."].iter().find_map(|mark| target.find(mark));
            // A disk that is being checked, maybe for hours, holds up no other.
            let Ok(_alone) = self.lock_of(iqn.map_or(target, |at| &target[at + 1..])).try_lock_owned() else {
                is_done = false;
                continue;
            };
            let done = match self.is_used(&dir) {
                Ok(true) => {
                    self.state().told.remove(&dir);
                    continue;
                }
                Ok(false) => self.0.places.detach(&dir, is_last(&dir, target)).await,
                Err(problem) => Err(problem),
            };
            match done {
                Ok(()) => {
                    self.state().told.remove(&dir);
                }
                Err(problem) => {
                    self.tell(&dir, &problem);
                    is_done = false;
                }
            }
        }
        is_done
    }

    /// Says why a disk stays, once.
    fn tell(&self, dir: &Path, problem: &str) {
        let before = self.state().told.insert(dir.to_owned(), problem.to_owned());
        if before.as_deref() != Some(problem) {
            warn!(disk = %dir.display(), problem, "a disk that no pod has stays on the node for now");
        }
    }

    /// Directories of disks.
    fn disks(&self) -> Vec<PathBuf> {
        let plugin = iscsi::plugin_dir(&self.0.root);
        let of = |iface: String| {
            let dir = plugin.join(iface);
            let disks = names(&dir);
            disks.into_iter().map(move |name| dir.join(name))
        };
        names(&plugin).into_iter().filter(|name| name.starts_with("iface-")).flat_map(of).collect()
    }

    /// Whether a pod has the disk or gets it.
    fn is_used(&self, dir: &Path) -> Result<bool, String> {
        if self.state().users.contains_key(dir) {
            return Ok(true);
        }
        let (mounts, dir, pods) = (self.0.places.mounts()?, real(dir), real(&self.0.root.join("pods")));
        let Some(own) = mounts.iter().find(|mount| mount.point == dir) else { return Ok(false) };
        Ok(mounts.iter().any(|mount| mount.device == own.device && mount.point.starts_with(&pods)))
    }
}

/// Whether no other disk of the target is on the node.
fn is_last(dir: &Path, target: &str) -> bool {
    let own = dir.file_name().unwrap_or_default();
    let others = names(dir.parent().unwrap_or(dir)).into_iter().filter(|name| own != name.as_str());
    !others.into_iter().any(|name| iscsi::target_part(&name) == Some(target))
}

/// Names in a directory. Nothing is asked of what they name.
fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests;
