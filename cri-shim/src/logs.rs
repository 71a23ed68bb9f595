//! From a container's pipes to its log file (CRI format), and to whoever is attached.
//!
//! One task per running container. It never holds the container up: when the file cannot be written, output is dropped and
//! that is said once. Bytes are written as soon as they are read; only an unfinished line waits in memory, so a killed
//! server loses at most that. The shim keeps the pipes open, so a new server goes on where the old one stopped.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use cri_shim_core::log_line::{LineSplitter, LogStream};
use tokio::net::unix::pipe;
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use crate::containerd::tasks::Stdio;
use crate::error::RuntimeError;
use crate::host::blocking;

/// Most bytes read before they are written.
const BATCH: usize = 64 * 1024;
/// Pieces of output kept for an attached client that reads slowly; more are dropped for it.
const ATTACH_PIECES: usize = 256;

/// A handle to the task that reads one container's output. Clones share it.
#[derive(Clone, Debug)]
pub struct LogPump {
    commands: mpsc::Sender<Command>,
    output: broadcast::Sender<(LogStream, Bytes)>,
    ended: watch::Receiver<bool>,
}

#[derive(Debug)]
enum Command {
    Reopen(oneshot::Sender<Result<(), RuntimeError>>),
    Stop,
}

impl LogPump {
    /// Opens the pipes and the log file (`None` drops the output) and starts reading.
    pub async fn start(stdio: &Stdio, log_path: Option<PathBuf>) -> Result<Self, RuntimeError> {
        let mut sources = Vec::new();
        for (stream, path) in [(LogStream::Stdout, &stdio.stdout), (LogStream::Stderr, &stdio.stderr)] {
            if !path.is_empty() {
                sources.push(Source::open(stream, Path::new(path))?);
            }
        }
        let log = Log::open(log_path).await?;
        let (commands, requests) = mpsc::channel(4);
        let (output, _) = broadcast::channel(ATTACH_PIECES);
        let (ending, ended) = watch::channel(false);
        let task = Task { sources, log, requests, output: output.clone() };
        tokio::spawn(async move {
            task.run().await;
            ending.send_replace(true);
        });
        Ok(Self { commands, output, ended })
    }

    /// Writes to a new file of the same name from now on, after the old one was renamed.
    pub async fn reopen(&self) -> Result<(), RuntimeError> {
        let (answer, result) = oneshot::channel();
        let gone = RuntimeError::Interrupted("reopening the log");
        if self.commands.send(Command::Reopen(answer)).await.is_err() {
            return Err(gone);
        }
        result.await.unwrap_or(Err(gone))
    }

    /// A copy of everything that is read from now on, in pieces.
    pub fn attach(&self) -> broadcast::Receiver<(LogStream, Bytes)> {
        self.output.subscribe()
    }

    /// Waits until both streams have ended and everything is in the file, at most `patience`; says whether they have.
    pub async fn drained(&self, patience: Duration) -> bool {
        let mut ended = self.ended.clone();
        tokio::time::timeout(patience, ended.wait_for(|ended| *ended)).await.is_ok_and(|ended| ended.is_ok())
    }

    /// Stops reading, also when somebody still holds the pipes open.
    pub async fn stop(&self) {
        // An error says that it has stopped already.
        drop(self.commands.send(Command::Stop).await);
        self.drained(Duration::from_secs(5)).await;
    }
}

/// One stream.
struct Source {
    pipe: pipe::Receiver,
    stream: LogStream,
    lines: LineSplitter,
}

impl Source {
    fn open(stream: LogStream, path: &Path) -> Result<Self, RuntimeError> {
        let pipe =
            pipe::OpenOptions::new().open_receiver(path).map_err(RuntimeError::host("open pipe", path))?;
        Ok(Self { pipe, stream, lines: LineSplitter::new(stream) })
    }

    /// Reads what is there, as log lines into `out`; says whether the stream goes on.
    fn read(&mut self, out: &mut Vec<u8>, output: &broadcast::Sender<(LogStream, Bytes)>) -> bool {
        let mut buffer = [0_u8; 16 * 1024];
        while out.len() < BATCH {
            match self.pipe.try_read(&mut buffer) {
                Ok(0) => {
                    self.lines.finish(jiff::Timestamp::now(), out);
                    return false;
                }
                Ok(count) => {
                    self.lines.feed(&buffer[..count], jiff::Timestamp::now(), out);
                    if output.receiver_count() > 0 {
                        // An error only says that the last client has just left.
                        drop(output.send((self.stream, Bytes::copy_from_slice(&buffer[..count]))));
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return true,
                Err(error) => {
                    tracing::warn!(%error, "a container's pipe cannot be read; its output ends here");
                    return false;
                }
            }
        }
        true
    }
}

struct Task {
    sources: Vec<Source>,
    log: Log,
    requests: mpsc::Receiver<Command>,
    output: broadcast::Sender<(LogStream, Bytes)>,
}

impl Task {
    async fn run(mut self) {
        while !self.sources.is_empty() {
            // Cancel-safe: readiness is kept by the pipe, a command by the channel.
            tokio::select! {
                index = readable(&self.sources) => {
                    let mut out = Vec::new();
                    if !self.sources[index].read(&mut out, &self.output) {
                        drop(self.sources.remove(index));
                    }
                    self.log.write(out).await;
                }
                command = self.requests.recv() => match command {
                    Some(Command::Reopen(answer)) => {
                        let result = self.log.reopen().await;
                        // An error says that the caller has gone.
                        drop(answer.send(result));
                    }
                    Some(Command::Stop) | None => {
                        let mut out = Vec::new();
                        for source in &mut self.sources {
                            source.read(&mut out, &self.output);
                            source.lines.finish(jiff::Timestamp::now(), &mut out);
                        }
                        self.log.write(out).await;
                        return;
                    }
                },
            }
        }
    }
}

/// The index of a source that has something to read, or has ended.
async fn readable(sources: &[Source]) -> usize {
    let waits = sources.iter().map(|source| Box::pin(source.pipe.readable()));
    let (_, index, _) = futures::future::select_all(waits).await;
    index
}

/// The log file.
struct Log {
    path: Option<PathBuf>,
    file: Option<Arc<File>>,
    failing: bool,
}

impl Log {
    async fn open(path: Option<PathBuf>) -> Result<Self, RuntimeError> {
        let mut log = Self { path, file: None, failing: false };
        log.reopen().await?;
        Ok(log)
    }

    async fn reopen(&mut self) -> Result<(), RuntimeError> {
        if let Some(path) = self.path.clone() {
            self.file = Some(Arc::new(blocking(move || open_log(&path)).await?));
        }
        Ok(())
    }

    async fn write(&mut self, lines: Vec<u8>) {
        let (Some(file), Some(path), false) = (&self.file, &self.path, lines.is_empty()) else { return };
        let (file, place) = (Arc::clone(file), path.clone());
        let written =
            blocking(move || (&*file).write_all(&lines).map_err(RuntimeError::host("write", &place)));
        match written.await {
            Ok(()) => self.failing = false,
            Err(error) if !self.failing => {
                self.failing = true;
                tracing::error!(error = %crate::error::chain(&error), "container output is lost");
            }
            Err(_) => {}
        }
    }
}

fn open_log(path: &Path) -> Result<File, RuntimeError> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).map_err(RuntimeError::host("make", directory))?;
    }
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o640)
        .open(path)
        .map_err(RuntimeError::host("open log", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::fifo::{self, Pipes};

    async fn started(directory: &Path) -> (LogPump, Stdio, PathBuf) {
        let stdio = fifo::make(directory, "c1", Pipes::default()).unwrap();
        let log = directory.join("pod/web/0.log");
        (LogPump::start(&stdio, Some(log.clone())).await.unwrap(), stdio, log)
    }

    fn writer(path: &str) -> File {
        OpenOptions::new().write(true).open(path).unwrap()
    }

    #[tokio::test]
    async fn both_streams_reach_the_file_and_the_attached_client() {
        let directory = tempfile::tempdir().unwrap();
        let (pump, stdio, log) = started(directory.path()).await;
        let mut attached = pump.attach();
        let (mut out, mut err) = (writer(&stdio.stdout), writer(&stdio.stderr));
        out.write_all(b"one\ntw").unwrap();
        err.write_all(b"oops\n").unwrap();
        drop((out, err));
        assert!(pump.drained(Duration::from_secs(10)).await);
        let text = std::fs::read_to_string(log).unwrap();
        for end in [" stdout F one\n", " stdout P tw\n", " stderr F oops\n"] {
            assert!(text.contains(end), "{end:?} is not in {text:?}");
        }
        assert!(attached.recv().await.is_ok());
    }

    #[tokio::test]
    async fn a_reopened_log_goes_on_in_a_new_file() {
        let directory = tempfile::tempdir().unwrap();
        let (pump, stdio, log) = started(directory.path()).await;
        let (mut out, err) = (writer(&stdio.stdout), writer(&stdio.stderr));
        let mut attached = pump.attach();
        out.write_all(b"old\n").unwrap();
        attached.recv().await.unwrap();
        let rotated = log.with_extension("1");
        std::fs::rename(&log, &rotated).unwrap();
        pump.reopen().await.unwrap();
        out.write_all(b"new\n").unwrap();
        drop((out, err));
        assert!(pump.drained(Duration::from_secs(10)).await);
        assert!(std::fs::read_to_string(rotated).unwrap().ends_with("F old\n"));
        assert!(std::fs::read_to_string(log).unwrap().ends_with("F new\n"));
    }
}
