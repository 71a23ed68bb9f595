//! CheckpointContainer: CRIU's images of a running container, its specification and what it changed in its root, in one file.
//!
//! CRIU does the work where it is installed, driven by containerd's runc shim or, for containers of our own shim, from here;
//! everywhere else the answer is `Unimplemented` with the reason.
//! The file is a tar: `checkpoint/` (CRIU's images), `spec.dump`, `config.dump`, `rootfs-diff.tar`.

use std::convert::Infallible;
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use containerd_client::types::Mount;
use cri_shim_api::v1::CheckpointContainerRequest;
use cri_shim_core::record::{ContainerPhase, ContainerRecord};
use serde_json::json;
use tracing::Instrument;

use crate::containerd::containers::RUNC_SHIM;
use crate::error::{RuntimeError, chain};
use crate::host::{blocking, criu, files, process};
use crate::runtime::Runtime;
use crate::state::Container;

const WHAT: &str = "a checkpoint";
/// How long CRIU may look at the kernel: it tries everything, and a busy machine is slow.
const CHECK_PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks for the program of a checkpoint that is to end.
const GIVE_UP_PAUSE: Duration = Duration::from_millis(100);
/// How long one may take when the client says nothing.
const DEFAULT_PATIENCE: Duration = Duration::from_secs(300);

impl Runtime {
    /// Writes a checkpoint of a running container to the file that the client names. The container goes on. A caller that
    /// goes away does not stop it; stopping or removing the container does, by taking away what is looked at.
    pub async fn checkpoint(
        self: &Arc<Self>,
        request: CheckpointContainerRequest,
    ) -> Result<(), RuntimeError> {
        let location = PathBuf::from(&request.location);
        if !location.is_absolute() || location.file_name().is_none() {
            let problem = format!("{:?} is not the absolute path of a file", request.location);
            return Err(RuntimeError::Invalid { field: "location", problem });
        }
        let container = self.running_container(&request.container_id)?;
        let stored = self.client.container(&container.id).await?;
        let stored =
            stored.ok_or_else(|| RuntimeError::NotFound { kind: "container", id: container.id.clone() })?;
        let by_shim = stored.runtime.is_some_and(|runtime| runtime.name == RUNC_SHIM);
        criu_works().await?;
        let patience = u64::try_from(request.timeout).ok().filter(|seconds| *seconds > 0);
        let patience = patience.map_or(DEFAULT_PATIENCE, Duration::from_secs);
        let spec = stored.spec.map(|spec| spec.value).unwrap_or_default();
        // On its own: CRIU cannot be called back half-way, and its files must go.
        let runtime = Arc::clone(self);
        let work =
            async move { runtime.write_checkpoint(&container, location, spec, by_shim, patience).await };
        let work = tokio::spawn(work.in_current_span());
        work.await.unwrap_or(Err(RuntimeError::Interrupted("the checkpoint")))
    }

    async fn write_checkpoint(
        &self,
        container: &Container,
        location: PathBuf,
        spec: Vec<u8>,
        by_shim: bool,
        patience: Duration,
    ) -> Result<(), RuntimeError> {
        // Not the container's operation: whoever wants to stop it need not wait for CRIU, see `give_checkpoint_up`.
        let _one_at_a_time = container.checkpoint.lock().await;
        container.must_be(ContainerPhase::Running)?;
        container.must_not_be_signalled()?;
        // On the disk: the images are as large as the container's memory.
        let work = self.paths.checkpoints().join(&container.id);
        let (images, part) = (work.join("checkpoint"), part_of(&location));
        let (made, intent, named) = (images.clone(), work.join(INTENT), part.clone());
        blocking(move || {
            std::fs::create_dir_all(&made).map_err(RuntimeError::host("make", &made))?;
            // So that a half-written file is found after a crash.
            std::fs::write(&intent, named.as_os_str().as_bytes())
                .map_err(RuntimeError::host("write", &intent))
        })
        .await?;
        let result = async {
            let made = if by_shim {
                let made = self.client.checkpoint_task(&container.id, &images, &work, patience).await;
                made.map_err(RuntimeError::from)
            } else {
                self.dump(container, &spec, &images, &work, patience).await
            };
            made.map_err(|error| explained(error, &work))?;
            let mounts = self.client.snapshot_mounts(&container.id).await?;
            let (record, work) = (container.record.get(), work.clone());
            let runtime = if by_shim { "runc" } else { "keelson" };
            blocking(move || {
                pack(
                    &location,
                    &part,
                    &Parts { work: &work, spec: &spec, record: &record, mounts: &mounts, runtime },
                )
            })
            .await
        }
        .await;
        blocking(move || clear(&work)).await?;
        result
    }

    /// Has CRIU write images of a container of our own shim.
    async fn dump(
        &self,
        container: &Container,
        spec: &[u8],
        images: &Path,
        work: &Path,
        patience: Duration,
    ) -> Result<(), RuntimeError> {
        let task = self.client.task(&container.id).await?;
        let pid = task.map(|task| task.pid).filter(|pid| *pid > 0);
        let pid = pid
            .ok_or_else(|| RuntimeError::NotFound { kind: "task of container", id: container.id.clone() })?;
        let spec = serde_json::from_slice(spec).map_err(|error| {
            RuntimeError::host("read the specification of", &work.join(&container.id))(std::io::Error::other(
                error,
            ))
        })?;
        let (images, work) = (images.to_owned(), work.to_owned());
        blocking(move || criu::dump(&criu::Dump { pid, spec: &spec, images: &images, work: &work }, patience))
            .await
    }

    /// Ends the checkpoint of a container that is to stop, if one is under way: until then its shim does nothing else. Says
    /// whether there was one.
    pub(crate) async fn give_checkpoint_up(&self, container: &Container) -> Result<bool, RuntimeError> {
        if container.checkpoint.try_lock().is_ok() {
            return Ok(false);
        }
        let work = self.paths.checkpoints().join(&container.id);
        blocking(move || process::kill_imaging(&work)).await?;
        Ok(true)
    }

    /// Goes on doing so: one that is under way may not have begun its program yet. Never comes back.
    pub(crate) async fn keep_checkpoints_down(&self, container: &Container) -> Infallible {
        loop {
            // Nobody tells of a program that the shim starts; this only goes on while the shim does not answer a signal.
            tokio::time::sleep(GIVE_UP_PAUSE).await;
            if let Err(error) = self.give_checkpoint_up(container).await {
                tracing::warn!(container = container.id, error = %chain(&error), "its checkpoint is not ended yet");
            }
        }
    }

    /// Ends checkpoints that a crash of ours cut off, and takes away what they left.
    pub(crate) async fn clear_checkpoints(&self) -> Result<(), RuntimeError> {
        // Where they were before.
        let old = self.paths.state_dir.join("checkpoints");
        let all = [self.paths.checkpoints(), old];
        blocking(move || {
            for directory in &all {
                for name in files::names_in(directory)? {
                    clear(&directory.join(name))?;
                }
            }
            Ok(())
        })
        .await
    }
}

/// The file in a checkpoint's directory that names the file that is being written.
const INTENT: &str = "writes";

/// What is written before it gets its name.
fn part_of(location: &Path) -> PathBuf {
    let mut name = location.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    location.with_file_name(name)
}

/// Ends who still writes there, removes a checkpoint's directory and the file that it was writing, if that is there.
fn clear(work: &Path) -> Result<(), RuntimeError> {
    process::kill_imaging(work)?;
    let intent = work.join(INTENT);
    if let Ok(named) = std::fs::read(&intent) {
        files::remove_file(Path::new(OsStr::from_bytes(&named)))?;
    }
    files::remove_tree(work)
}

/// What went wrong in words of the program that did: CRIU's own are in a log that goes with the container's bundle.
fn explained(error: RuntimeError, work: &Path) -> RuntimeError {
    let words = chain(&error);
    // crun without CRIU, as Debian has it, does not know the word.
    if words.contains("unknown command checkpoint") {
        return unable("the handler's program was built without support for CRIU".to_owned());
    }
    let named = words.split_whitespace().map(|word| word.trim_end_matches(':'));
    let named = named.filter(|word| word.ends_with("criu-dump.log")).map(PathBuf::from);
    for log in named.chain([work.join(criu::LOG)]) {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        let complaints: Vec<&str> =
            text.lines().filter(|line| line.contains("Error")).map(str::trim).collect();
        if !complaints.is_empty() {
            return RuntimeError::host("have CRIU write a checkpoint", &log)(std::io::Error::other(
                complaints.join("; "),
            ));
        }
    }
    error
}

fn unable(reason: String) -> RuntimeError {
    RuntimeError::Unimplemented { what: WHAT, reason }
}

/// Has CRIU look whether it can work on this kernel.
async fn criu_works() -> Result<(), RuntimeError> {
    let output = tokio::process::Command::new("criu").arg("check").kill_on_drop(true).output();
    match tokio::time::timeout(CHECK_PATIENCE, output).await {
        Ok(Ok(output)) if output.status.success() => Ok(()),
        Ok(Ok(output)) => {
            let words = String::from_utf8_lossy(&output.stderr).into_owned();
            let first = words.lines().find(|line| !line.trim().is_empty()).unwrap_or("it gives no reason");
            Err(unable(format!("criu cannot work on this kernel: {}", first.trim())))
        }
        Ok(Err(error)) => Err(unable(format!("criu cannot be run ({error}); install it on this node"))),
        Err(_) => Err(unable("criu check does not end".to_owned())),
    }
}

/// What the file is made of.
struct Parts<'a> {
    /// Where CRIU worked.
    work: &'a Path,
    spec: &'a [u8],
    record: &'a ContainerRecord,
    mounts: &'a [Mount],
    /// The program that ran it.
    runtime: &'static str,
}

/// Puts everything into the file: written beside it first, so that a half-written one never has its name.
fn pack(location: &Path, part: &Path, parts: &Parts) -> Result<(), RuntimeError> {
    let written = write_tar(part, parts);
    let written = written.and_then(|()| std::fs::rename(part, location));
    written.map_err(|error| {
        drop(std::fs::remove_file(part));
        RuntimeError::host("write checkpoint", location)(error)
    })
}

fn write_tar(part: &Path, parts: &Parts) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let &Parts { work, spec, record, mounts, runtime } = parts;
    let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(part)?;
    let mut archive = tar::Builder::new(file);
    archive.follow_symlinks(false);
    archive.append_dir_all("checkpoint", work.join("checkpoint"))?;
    let config = json!({
        "id": record.id,
        "name": record.config.metadata.as_ref().map(|metadata| metadata.name.clone()),
        "rootfsImage": record.config.image.as_ref().map(|image| image.image.clone()),
        "rootfsImageRef": record.image_ref,
        "createdTime": jiff::Timestamp::from_nanosecond(i128::from(record.created_at)).ok(),
        "runtime": runtime,
    });
    for (name, bytes) in [("spec.dump", spec), ("config.dump", config.to_string().as_bytes())] {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o600);
        archive.append_data(&mut header, name, bytes)?;
    }
    if let Some(upper) = upper_directory(mounts) {
        let diff = work.join("rootfs-diff.tar");
        let mut inner = tar::Builder::new(File::create(&diff)?);
        inner.follow_symlinks(false);
        inner.append_dir_all(".", upper)?;
        inner.finish()?;
        archive.append_path_with_name(&diff, "rootfs-diff.tar")?;
    }
    archive.into_inner()?.sync_all()
}

/// Where an overlay keeps what was changed.
fn upper_directory(mounts: &[Mount]) -> Option<PathBuf> {
    let options = mounts.iter().filter(|mount| mount.r#type == "overlay").flat_map(|mount| &mount.options);
    options.filter_map(|option| option.strip_prefix("upperdir=")).map(PathBuf::from).next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_holds_images_specification_and_changes() {
        let directory = tempfile::tempdir().unwrap();
        let (work, upper) = (directory.path().join("work"), directory.path().join("upper"));
        std::fs::create_dir_all(work.join("checkpoint")).unwrap();
        std::fs::write(work.join("checkpoint/core-1.img"), "core").unwrap();
        std::fs::create_dir_all(upper.join("etc")).unwrap();
        std::fs::write(upper.join("etc/changed"), "new").unwrap();
        std::os::unix::fs::symlink("/nowhere", upper.join("etc/link")).unwrap();
        let mount = Mount {
            r#type: "overlay".into(),
            options: vec!["index=off".into(), format!("upperdir={}", upper.display())],
            ..Mount::default()
        };
        let location = directory.path().join("checkpoint.tar");
        let part = part_of(&location);
        let record = ContainerRecord::default();
        let parts = Parts { work: &work, spec: b"{}", record: &record, mounts: &[mount], runtime: "keelson" };
        pack(&location, &part, &parts).unwrap();
        let mut archive = tar::Archive::new(File::open(&location).unwrap());
        let mut names = Vec::new();
        let mut inner = Vec::new();
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().display().to_string();
            if name == "rootfs-diff.tar" {
                std::io::Read::read_to_end(&mut entry, &mut inner).unwrap();
            }
            names.push(name);
        }
        for wanted in ["checkpoint/core-1.img", "spec.dump", "config.dump", "rootfs-diff.tar"] {
            assert!(names.iter().any(|name| name == wanted), "{wanted} is not in {names:?}");
        }
        let mut archive = tar::Archive::new(inner.as_slice());
        let inside: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap().path().unwrap().display().to_string())
            .collect();
        assert!(inside.iter().any(|name| name.ends_with("etc/changed")), "{inside:?}");
        assert!(!part.exists());
    }

    #[test]
    fn what_a_crash_cut_off_goes_with_the_file_it_was_writing() {
        let directory = tempfile::tempdir().unwrap();
        let work = directory.path().join("checkpoints/c1");
        std::fs::create_dir_all(work.join("checkpoint")).unwrap();
        std::fs::write(work.join("checkpoint/pages-1.img"), "memory").unwrap();
        let location = directory.path().join("kept/checkpoint-web.tar");
        std::fs::create_dir_all(location.parent().unwrap()).unwrap();
        let part = part_of(&location);
        std::fs::write(&part, "half").unwrap();
        std::fs::write(location.with_file_name("other.tar"), "whole").unwrap();
        std::fs::write(work.join(INTENT), part.as_os_str().as_bytes()).unwrap();
        clear(&work).unwrap();
        assert!(!work.exists() && !part.exists());
        assert!(location.with_file_name("other.tar").exists(), "nobody else's files");
        clear(&work).unwrap();
    }

    #[test]
    fn a_place_that_cannot_be_written_is_named_and_keeps_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let location = directory.path().join("missing/checkpoint.tar");
        let record = ContainerRecord::default();
        let parts =
            Parts { work: directory.path(), spec: b"{}", record: &record, mounts: &[], runtime: "keelson" };
        let error = pack(&location, &part_of(&location), &parts).unwrap_err();
        assert!(error.to_string().contains("missing/checkpoint.tar"), "{error}");
        assert!(std::fs::read_dir(directory.path()).unwrap().next().is_none());
    }
}
