//! Reads a log file to its end and, when following, beyond: new lines by inotify, the next file after rotation.

mod rotated;

use std::ffi::OsString;
use std::io::{self, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use cri_shim_streaming::BodyError;
use futures::StreamExt;
use inotify::{EventStream, Inotify, WatchMask};
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::sync::mpsc;

use super::Watched;
use super::format::Formatter;
use super::options::LogOptions;

/// Bytes read at a time.
const BLOCK: usize = 64 * 1024;
/// A line longer than this without newline is passed over; the CRI splits lines at 16 KiB.
const MAX_LINE: usize = 1 << 20;
/// How often a follower looks whether its container still runs, when nothing is written. The end of a container is no
/// event of its log file.
const AUDIT: Duration = Duration::from_secs(1);

/// A time with nanoseconds and offset is shorter.
const LONGEST_TIME: usize = 40;

/// Where chunks go.
type Chunks = mpsc::Sender<Result<Bytes, BodyError>>;

/// A log being read.
pub(super) struct LogReader {
    path: PathBuf,
    file: File,
    inode: u64,
    options: LogOptions,
    formatter: Formatter,
    /// The beginning of a line whose end is not written yet.
    pending: Vec<u8>,
    /// Time of the last whole line, as written.
    last_time: Vec<u8>,
    changes: Option<Changes>,
}

/// Changes of the log's directory.
struct Changes {
    events: EventStream<[u8; 4096]>,
    file_name: OsString,
}

impl LogReader {
    /// Opens the log at the place where the options begin. The watch is set before anything is read, so that no
    /// line falls between.
    pub(super) async fn open(path: &Path, options: LogOptions) -> io::Result<Self> {
        let changes = if options.follow { Some(Changes::of(path)?) } else { None };
        let mut file = File::open(path).await?;
        if let Some(lines) = options.tail {
            let start = tail_start(&mut file, lines).await?;
            file.seek(SeekFrom::Start(start)).await?;
        }
        let inode = file.metadata().await?.ino();
        let formatter = Formatter::new(&options);
        Ok(Self {
            path: path.to_owned(),
            file,
            inode,
            options,
            formatter,
            pending: Vec::new(),
            last_time: Vec::new(),
            changes,
        })
    }

    /// Sends lines until the end: of the file, or when following, of the container. A client that has gone ends it
    /// too.
    pub(super) async fn run(mut self, chunks: &Chunks, watched: &Watched) -> io::Result<()> {
        loop {
            // Asked before reading: what was written before the container ended is then read for certain.
            let is_last = !self.options.follow || watched.has_ended();
            // Likewise: once its successor has a line, nothing more is written to the current file.
            let is_rotated = self.is_rotated(is_last).await?;
            if !self.drain(chunks).await? {
                return Ok(());
            }
            if is_rotated {
                self.take_next().await?;
                continue;
            }
            if self.rewind().await? {
                continue;
            }
            if is_last {
                return Ok(());
            }
            let Some(changes) = &mut self.changes else { return Ok(()) };
            tokio::select! {
                () = chunks.closed() => return Ok(()),
                // Cancel-safe: an event that is not taken stays in the kernel's queue.
                changed = changes.next() => changed?,
                () = tokio::time::sleep(AUDIT) => {}
            }
        }
    }

    /// Sends everything up to the end of the current file; `false` when nothing more is wanted.
    async fn drain(&mut self, chunks: &Chunks) -> io::Result<bool> {
        let mut block = vec![0; BLOCK];
        loop {
            let count = self.file.read(&mut block).await?;
            if count == 0 {
                return Ok(true);
            }
            let out = self.format(&block[..count]);
            if !out.is_empty() && chunks.send(Ok(Bytes::from(out))).await.is_err() {
                return Ok(false);
            }
            if self.formatter.is_done() {
                return Ok(false);
            }
        }
    }

    fn format(&mut self, block: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(block.len());
        let mut rest = block;
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let mut line = &rest[..end];
            if !self.pending.is_empty() {
                self.pending.extend_from_slice(line);
                line = &self.pending;
            }
            let time = line.split(|byte| *byte == b' ').next().unwrap_or_default();
            self.last_time.clear();
            self.last_time.extend_from_slice(time.get(..LONGEST_TIME).unwrap_or(time));
            self.formatter.push(line, &mut out);
            self.pending.clear();
            rest = &rest[end + 1..];
        }
        if self.pending.len() + rest.len() <= MAX_LINE {
            self.pending.extend_from_slice(rest);
        } else {
            self.pending.clear();
        }
        out
    }

    /// Whether another file took the path, and the container writes to it.
    async fn is_rotated(&self, is_last: bool) -> io::Result<bool> {
        if !self.options.follow {
            return Ok(false);
        }
        match tokio::fs::metadata(&self.path).await {
            Ok(metadata) => Ok(metadata.ino() != self.inode && (metadata.len() > 0 || is_last)),
            // Between rename and create, or removed with its container.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Goes on with the file that follows the current one. For a client that is slower than the rotation it is not yet
    /// the one at the path.
    async fn take_next(&mut self) -> io::Result<()> {
        let last = std::str::from_utf8(&self.last_time).ok().and_then(|text| text.parse().ok());
        let path = self.path.clone();
        let next = tokio::task::spawn_blocking(move || rotated::successor(&path, last)).await??;
        self.inode = next.metadata()?.ino();
        self.file = File::from_std(next);
        self.pending.clear();
        Ok(())
    }

    /// Starts over with a file that was truncated in place; tells whether it was.
    async fn rewind(&mut self) -> io::Result<bool> {
        if !self.options.follow {
            return Ok(false);
        }
        let (here, length) = (self.file.stream_position().await?, self.file.metadata().await?.len());
        if length >= here {
            return Ok(false);
        }
        self.file.seek(SeekFrom::Start(0)).await?;
        self.pending.clear();
        Ok(length > 0)
    }
}

impl Changes {
    fn of(path: &Path) -> io::Result<Self> {
        let inotify = Inotify::init()?;
        let dir = path.parent().unwrap_or(Path::new("/"));
        let mask = WatchMask::MODIFY | WatchMask::CREATE | WatchMask::MOVED_TO | WatchMask::CLOSE_WRITE;
        inotify.watches().add(dir, mask)?;
        let events = inotify.into_event_stream([0; 4096])?;
        Ok(Self { events, file_name: path.file_name().unwrap_or_default().to_owned() })
    }

    /// Waits until something happened to the log file.
    async fn next(&mut self) -> io::Result<()> {
        while let Some(event) = self.events.next().await {
            if event?.name.is_none_or(|name| name == self.file_name) {
                return Ok(());
            }
        }
        Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the inotify stream ended"))
    }
}

/// Offset at which the last `lines` lines begin.
async fn tail_start(file: &mut File, lines: u64) -> io::Result<u64> {
    let mut end = file.metadata().await?.len();
    if lines == 0 {
        return Ok(end);
    }
    let mut block = vec![0; BLOCK];
    let mut newlines = 0;
    let mut is_last_byte = true;
    while end > 0 {
        let start = end.saturating_sub(BLOCK as u64);
        let length = usize::try_from(end - start).unwrap_or(BLOCK);
        file.seek(SeekFrom::Start(start)).await?;
        file.read_exact(&mut block[..length]).await?;
        for (index, byte) in block[..length].iter().enumerate().rev() {
            // The newline that ends the last line separates nothing.
            if *byte == b'\n' && !is_last_byte {
                newlines += 1;
                if newlines == lines {
                    return Ok(start + index as u64 + 1);
                }
            }
            is_last_byte = false;
        }
        end = start;
    }
    Ok(0)
}

#[cfg(test)]
mod tests;
