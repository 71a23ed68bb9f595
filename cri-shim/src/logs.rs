//! From a container's pipes to its log file (CRI format), and to whoever is attached.
//!
//! One task per running container. When the file cannot be written, output is dropped and that is said once; when its disk is
//! slow, that container waits and no other: files are opened and written on threads that nothing else uses, at most one per
//! log. Bytes are written as soon as they are read; only an unfinished line waits in memory, so a killed server loses at most
//! that. The keeper keeps the pipes open, so a new server goes on where the old one stopped.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::Bytes;
use cri_shim_core::log_line::{LineSplitter, LogStream};
use nix::fcntl::{FcntlArg, fcntl};
use tokio::net::unix::pipe;
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use crate::containerd::tasks::Stdio;
use crate::error::{RuntimeError, chain};

/// Most bytes read before they are written.
const BATCH: usize = 64 * 1024;
/// Pieces of output kept for an attached client that reads slowly; more are dropped for it.
const ATTACH_PIECES: usize = 256;

/// What a pipe is made to hold: how much a container can write while we are away. The most that the kernel gives by default;
/// it takes no memory before it is needed.
const PIPE: i32 = 1 << 20;
/// Most batches that are written of a stream that has been told to stop: a full pipe of short lines makes some hundreds.
const MOST_BATCHES: usize = 1024;
/// How long opening a log may take.
const LOG_PATIENCE: Duration = Duration::from_secs(30);
/// How long the last output may take to be written when reading is stopped.
const STOP_PATIENCE: Duration = Duration::from_secs(5);
/// Most logs that are written at the same moment. A disk that hangs holds one thread for each of its logs.
const THREADS: usize = 4096;

/// Threads for log files. They end as soon as there is nothing to write.
static DISKS: LazyLock<std::io::Result<tokio::runtime::Runtime>> = LazyLock::new(|| {
    tokio::runtime::Builder::new_current_thread()
        .max_blocking_threads(THREADS)
        .thread_keep_alive(Duration::from_secs(1))
        .thread_stack_size(64 << 10)
        .thread_name("log")
        .build()
});

/// Runs what works on a log file, which may take for ever.
async fn on_disk<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RuntimeError> + Send + 'static,
) -> Result<T, RuntimeError> {
    let Ok(disks) = &*DISKS else { return crate::host::blocking(work).await };
    disks.spawn_blocking(work).await.unwrap_or(Err(RuntimeError::Interrupted("work on a log file")))
}

/// Makes the file of a log that nobody writes any more, as who rotates it expects.
pub async fn make(path: Option<PathBuf>) -> Result<(), RuntimeError> {
    open_in_time(path).await.map(drop)
}

/// A handle to the task that reads one container's output. Clones share it.
#[derive(Clone, Debug)]
pub struct LogPump {
    path: Option<PathBuf>,
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
        let file = open_in_time(log_path.clone()).await?;
        Self::run(stdio, Log { path: log_path, file, failing: false })
    }

    /// The same for a container that runs already: its log is opened behind the answer.
    pub fn resume(stdio: &Stdio, log_path: Option<PathBuf>) -> Result<Self, RuntimeError> {
        Self::run(stdio, Log { path: log_path, file: None, failing: false })
    }

    fn run(stdio: &Stdio, log: Log) -> Result<Self, RuntimeError> {
        let mut sources = Vec::new();
        for (stream, path) in [(LogStream::Stdout, &stdio.stdout), (LogStream::Stderr, &stdio.stderr)] {
            if !path.is_empty() {
                sources.push(Source::open(stream, Path::new(path))?);
            }
        }
        let path = log.path.clone();
        let (commands, requests) = mpsc::channel(4);
        let (output, _) = broadcast::channel(ATTACH_PIECES);
        let (ending, ended) = watch::channel(false);
        let task = Task { sources, log, requests, output: output.clone() };
        tokio::spawn(async move {
            task.run().await;
            ending.send_replace(true);
        });
        Ok(Self { path, commands, output, ended })
    }

    /// Writes to a new file of the same name from now on, after the old one was renamed.
    pub async fn reopen(&self) -> Result<(), RuntimeError> {
        let (answer, result) = oneshot::channel();
        let reopened = async {
            if self.commands.send(Command::Reopen(answer)).await.is_ok()
                && let Ok(result) = result.await
            {
                return result;
            }
            // All is written; who rotates still expects the file.
            make(self.path.clone()).await
        };
        tokio::time::timeout(LOG_PATIENCE, reopened).await.unwrap_or_else(|_| Err(late("reopening the log")))
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
        let stopped = async {
            // An error says that it has stopped already.
            drop(self.commands.send(Command::Stop).await);
            self.drained(STOP_PATIENCE).await;
        };
        // What cannot be written by then is written when its disk lets it.
        drop(tokio::time::timeout(STOP_PATIENCE, stopped).await);
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
        // A host that does not give as much leaves it as it is.
        fcntl(&pipe, FcntlArg::F_SETPIPE_SZ(PIPE)).ok();
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
        self.move_output().await;
        // Who asked meanwhile gets an answer, too.
        self.requests.close();
        while let Some(request) = self.requests.recv().await {
            if let Command::Reopen(answer) = request {
                drop(answer.send(self.log.reopen().await));
            }
        }
    }

    async fn move_output(&mut self) {
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
                    Some(Command::Stop) | None => return self.take_the_rest().await,
                },
            }
        }
    }
}

impl Task {
    /// Writes what the pipes still hold. Somebody may write on without an end: no more than a few pipes full is taken.
    async fn take_the_rest(&mut self) {
        for source in &mut self.sources {
            for _ in 0..MOST_BATCHES {
                let mut out = Vec::new();
                let open = source.read(&mut out, &self.output);
                let full = out.len() >= BATCH;
                self.log.write(out).await;
                if !(open && full) {
                    break;
                }
            }
            let mut out = Vec::new();
            source.lines.finish(jiff::Timestamp::now(), &mut out);
            self.log.write(out).await;
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
    async fn reopen(&mut self) -> Result<(), RuntimeError> {
        if let Some(path) = self.path.clone() {
            self.file = Some(Arc::new(on_disk(move || open_log(&path)).await?));
        }
        Ok(())
    }

    async fn write(&mut self, lines: Vec<u8>) {
        let written = self.try_write(lines).await;
        if let (Err(error), false) = (&written, self.failing) {
            tracing::error!(error = %chain(error), "container output is lost");
        }
        self.failing = written.is_err();
    }

    async fn try_write(&mut self, lines: Vec<u8>) -> Result<(), RuntimeError> {
        let Some(path) = self.path.clone().filter(|_| !lines.is_empty()) else { return Ok(()) };
        if self.file.is_none() {
            self.reopen().await?;
        }
        let Some(file) = self.file.clone() else { return Ok(()) };
        on_disk(move || (&*file).write_all(&lines).map_err(RuntimeError::host("write", &path))).await
    }
}

fn late(what: &str) -> RuntimeError {
    RuntimeError::Deadline { what: what.to_owned(), seconds: LOG_PATIENCE.as_secs() }
}

async fn open_in_time(path: Option<PathBuf>) -> Result<Option<Arc<File>>, RuntimeError> {
    let Some(path) = path else { return Ok(None) };
    let what = format!("opening the log {}", path.display());
    let opened = on_disk(move || open_log(&path).map(|file| Some(Arc::new(file))));
    tokio::time::timeout(LOG_PATIENCE, opened).await.unwrap_or_else(|_| Err(late(&what)))
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

    #[test]
    fn disks_that_hang_hold_up_their_own_logs_only() {
        use nix::sys::stat::Mode;
        // Less room than there are logs that hang.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .max_blocking_threads(2)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let directory = tempfile::tempdir().unwrap();
            let mut hanging = Vec::new();
            for number in 0..4 {
                let place = directory.path().join(format!("{number}"));
                std::fs::create_dir_all(place.join("pod/web")).unwrap();
                // A pipe that nobody reads is a disk that takes no more.
                let log = place.join("pod/web/0.log");
                nix::unistd::mkfifo(&log, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
                let reader = OpenOptions::new().read(true).write(true).open(&log).unwrap();
                fcntl(&reader, FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
                let (pump, stdio, _) = started(&place).await;
                let mut attached = pump.attach();
                let (mut out, err) = (writer(&stdio.stdout), writer(&stdio.stderr));
                out.write_all(&vec![b'x'; 20_000]).unwrap();
                attached.recv().await.unwrap();
                drop((out, err));
                hanging.push((pump, reader));
            }
            let deadline = Duration::from_secs(60);
            let (pump, stdio, log) = started(directory.path()).await;
            let (mut out, err) = (writer(&stdio.stdout), writer(&stdio.stderr));
            out.write_all(b"fine\n").unwrap();
            drop((out, err));
            assert!(pump.drained(deadline).await, "another log waits for the disks");
            assert!(std::fs::read_to_string(log).unwrap().ends_with("F fine\n"));
            let other = tokio::time::timeout(deadline, crate::host::blocking(|| Ok(7)));
            assert_eq!(other.await.expect("other work waits for the disks").unwrap(), 7);
            for (pump, _) in &hanging {
                assert!(!pump.drained(Duration::ZERO).await, "the disk does not hang");
            }
        });
        runtime.shutdown_background();
    }

    #[tokio::test]
    async fn a_container_can_write_a_while_without_us() {
        let directory = tempfile::tempdir().unwrap();
        let stdio = fifo::make(directory.path(), "c1", Pipes::default()).unwrap();
        // The keeper.
        let kept = OpenOptions::new().read(true).write(true).open(&stdio.stdout).unwrap();
        let pump = LogPump::start(&stdio, None).await.unwrap();
        pump.stop().await;
        let written = std::thread::spawn(move || writer(&stdio.stdout).write_all(&vec![b'x'; 1_000_000]));
        let begun = std::time::Instant::now();
        while !written.is_finished() {
            assert!(begun.elapsed() < Duration::from_secs(60), "the container has to wait for us");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        written.join().unwrap().unwrap();
        drop(kept);
    }

    #[tokio::test]
    async fn a_log_can_be_rotated_when_its_container_has_just_ended() {
        let directory = tempfile::tempdir().unwrap();
        let (pump, stdio, log) = started(directory.path()).await;
        drop((writer(&stdio.stdout), writer(&stdio.stderr)));
        assert!(pump.drained(Duration::from_secs(10)).await);
        std::fs::rename(&log, log.with_extension("1")).unwrap();
        pump.reopen().await.unwrap();
        assert!(log.exists());
        std::fs::remove_file(&log).unwrap();
        std::fs::create_dir(&log).unwrap();
        let error = pump.reopen().await.unwrap_err();
        assert!(error.to_string().contains("0.log"), "{error}");
    }
}
