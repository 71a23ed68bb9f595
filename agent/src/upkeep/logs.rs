//! Rotation of container logs.
//!
//! A log that has grown past its limit is renamed, and the runtime asked to go on in a new file; older ones are
//! compressed, the oldest removed. The rename precedes the request: a crash in between leaves a container that writes to
//! the renamed file, which the next look finds by the missing path and mends. No line is lost in any order.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use agent_core::logs::{compressed_names, rotated_name, tidy};
use flate2::Compression;
use flate2::write::GzEncoder;
use futures::StreamExt as _;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::config::LogRotationConfig;
use crate::files::remove;
use crate::pods::directory::PodDirectory;
use crate::runtime::cri::{Cri, CriError};

/// A running container's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunningLog {
    /// CRI id.
    pub id: String,
    /// Its log file.
    pub path: PathBuf,
}

/// Why a log was not rotated.
#[derive(Debug, thiserror::Error)]
pub enum RotateError {
    /// The file could not be moved.
    #[error("cannot move the log {path}")]
    Move {
        /// Log file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The runtime did not begin a new file; the old one is back at its place.
    #[error("the runtime did not reopen the log {path}")]
    Reopen {
        /// Log file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: CriError,
    },
}

/// Looks at all logs every so often until `cancel`: sizes are no event that anybody sends at a bearable rate.
pub async fn run(cri: Cri, pods: PodDirectory, config: LogRotationConfig, cancel: CancellationToken) {
    loop {
        // Cancel-safe: a token and a timer.
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(config.interval) => {}
        }
        let logs = pods.running_logs();
        let limit = config.max_size;
        let due = tokio::task::spawn_blocking(move || due(logs, limit)).await.unwrap_or_default();
        let rotations = futures::stream::iter(due).map(|log| {
            let cri = cri.clone();
            async move {
                let reopened = cri.reopen_log(&log.id);
                if let Err(error) = rotate(&log.path, config.max_files, reopened).await {
                    let cause =
                        std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                    warn!(%error, cause, container = %log.id, "log not rotated");
                }
            }
        });
        let all = rotations.buffer_unordered(config.workers).collect::<()>();
        // A rotation that is cut off is mended by the next look, of this agent or the next.
        tokio::select! {
            () = cancel.cancelled() => return,
            () = all => {}
        }
    }
}

/// The logs to rotate: those that reached the limit, and those that a rotation left without a file.
fn due(logs: Vec<RunningLog>, limit: u64) -> Vec<RunningLog> {
    let is_due = |log: &RunningLog| match std::fs::metadata(&log.path) {
        Ok(metadata) => metadata.len() >= limit,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    };
    logs.into_iter().filter(|log| !log.path.as_os_str().is_empty() && is_due(log)).collect()
}

/// Rotates one log; `reopen` asks the runtime to begin a new file.
pub async fn rotate(
    path: &Path,
    max_files: usize,
    reopen: impl Future<Output = Result<(), CriError>>,
) -> Result<(), RotateError> {
    let target = path.to_owned();
    let moved = tokio::task::spawn_blocking(move || set_aside(&target, max_files)).await;
    let moved = moved.map_err(io::Error::other).and_then(|moved| moved);
    let aside = moved.map_err(|source| RotateError::Move { path: path.to_owned(), source })?;
    let Err(source) = reopen.await else {
        debug!(path = %path.display(), "log rotated");
        return Ok(());
    };
    let target = path.to_owned();
    let back = tokio::task::spawn_blocking(move || match aside {
        // The runtime may have made the new file and failed afterwards.
        Some(aside) if !target.exists() => std::fs::rename(aside, target),
        _ => Ok(()),
    });
    match back.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => warn!(path = %path.display(), %error, "the old log cannot be put back"),
        Err(error) => warn!(path = %path.display(), %error, "the old log cannot be put back"),
    }
    Err(RotateError::Reopen { path: path.to_owned(), source })
}

/// Makes room, then moves the log; where it is now, or nothing when there was none.
fn set_aside(path: &Path, max_files: usize) -> io::Result<Option<PathBuf>> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    };
    if !path.exists() {
        return Ok(None);
    }
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    let tidying = tidy(name, &names, max_files);
    for old in &tidying.remove {
        remove(&dir.join(old))?;
    }
    for plain in &tidying.compress {
        // A full disk, for example: the log is rotated all the same, as that is what makes room.
        if let Err(error) = compress(dir, plain) {
            warn!(file = %dir.join(plain).display(), %error, "rotated log not compressed");
        }
    }
    let aside = dir.join(rotated_name(name, &names, Timestamp::now()));
    std::fs::rename(path, &aside)?;
    Ok(Some(aside))
}

fn compress(dir: &Path, plain: &str) -> io::Result<()> {
    let (unfinished, finished) = compressed_names(plain);
    let (source, unfinished) = (dir.join(plain), dir.join(unfinished));
    let packed = || -> io::Result<()> {
        let mut options = OpenOptions::new();
        let target = options.write(true).create(true).truncate(true).mode(0o640).open(&unfinished)?;
        let mut packer = GzEncoder::new(target, Compression::default());
        io::copy(&mut File::open(&source)?, &mut packer)?;
        packer.finish()?;
        std::fs::rename(&unfinished, dir.join(finished))
    };
    match packed() {
        Ok(()) => remove(&source),
        Err(error) => {
            remove(&unfinished)?;
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use tonic::Code;

    use super::*;

    fn is_zipped(name: &str) -> bool {
        std::path::Path::new(name).extension().is_some_and(|extension| extension == "gz")
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    fn failure() -> CriError {
        CriError { call: "ReopenContainerLog", code: Code::NotFound, message: "gone".to_owned() }
    }

    #[tokio::test]
    async fn a_log_keeps_its_newest_files_and_every_byte_of_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        for round in 0..7 {
            std::fs::write(&path, format!("round {round}\n")).unwrap();
            rotate(&path, 4, async { Ok(()) }).await.unwrap();
        }
        std::fs::write(&path, "round 7\n").unwrap();
        let names = names(dir.path());
        assert_eq!(names.len(), 4, "{names:?}");
        let mut contents: Vec<String> = names
            .iter()
            .map(|name| {
                let mut text = String::new();
                let mut file = File::open(dir.path().join(name)).unwrap();
                if is_zipped(name) {
                    flate2::read::GzDecoder::new(file).read_to_string(&mut text).unwrap();
                } else {
                    file.read_to_string(&mut text).unwrap();
                }
                text
            })
            .collect();
        contents.sort();
        assert_eq!(contents, ["round 4\n", "round 5\n", "round 6\n", "round 7\n"]);
        assert_eq!(names.iter().filter(|name| is_zipped(name)).count(), 2, "{names:?}");
    }

    #[tokio::test]
    async fn a_runtime_that_refuses_gets_its_log_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        std::fs::write(&path, "x").unwrap();
        let refused = rotate(&path, 5, async { Err(failure()) }).await;
        assert!(matches!(refused, Err(RotateError::Reopen { .. })));
        assert_eq!(
            (names(dir.path()), std::fs::read(&path).unwrap()),
            (vec!["0.log".to_owned()], b"x".to_vec())
        );
    }

    #[tokio::test]
    async fn what_a_crash_left_behind_is_mended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        std::fs::write(dir.path().join("0.log.20260101-000000"), "x").unwrap();
        let log = RunningLog { id: "c".to_owned(), path: path.clone() };
        assert_eq!(
            due(vec![log.clone()], 10),
            std::slice::from_ref(&log),
            "a running container without a log"
        );
        let reopened = async {
            std::fs::write(&path, "").unwrap();
            Ok(())
        };
        rotate(&path, 5, reopened).await.unwrap();
        assert_eq!(names(dir.path()), ["0.log", "0.log.20260101-000000"]);
        assert!(due(vec![log], 10).is_empty());
    }
}
