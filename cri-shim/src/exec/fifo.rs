//! The FIFOs over which the shim passes a process's streams: `<dir>/<container>/<exec>/{stdin,stdout,stderr}`.
//!
//! The directory exists before the process does and is removed after it, so that it tells a restarted program what was
//! running. Readers are opened before the shim writes: a reader that never saw a writer waits, and one whose writer has
//! closed sees the end.

use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;
use tokio::net::unix::pipe;

use super::error::ExecError;

/// Between two looks whether a FIFO is read yet, which the kernel tells nobody who writes: the first pause, and the longest.
const LOOK: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(50));
/// How long a shim may take to read what it was given.
const READER_PATIENCE: Duration = Duration::from_secs(20);

/// Which streams a process has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// It is sent input.
    pub stdin: bool,
    /// Its errors are separate from its output: not so with a terminal.
    pub stderr: bool,
}

/// The FIFOs of one process. The files are removed on drop.
#[derive(Debug)]
pub struct Fifos {
    dir: PathBuf,
    wanted: Wanted,
}

/// Our ends.
#[derive(Debug)]
pub struct Ends {
    /// Writes the process's input.
    pub stdin: Option<pipe::Sender>,
    /// Reads its output.
    pub stdout: pipe::Receiver,
    /// Reads its errors.
    pub stderr: Option<pipe::Receiver>,
}

impl Fifos {
    /// Makes the FIFOs and opens our ends.
    pub fn create(
        dir: &Path,
        container: &str,
        exec: &str,
        wanted: Wanted,
    ) -> Result<(Self, Ends), ExecError> {
        let fifos = Self { dir: dir.join(container).join(exec), wanted };
        let failed = |source| ExecError::Fifo { path: fifos.dir.clone(), source };
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&fifos.dir).map_err(failed)?;
        let make = |name: &str| {
            let path = fifos.dir.join(name);
            nix::unistd::mkfifo(&path, Mode::from_bits_truncate(0o600))
                .map_err(|errno| failed(errno.into()))?;
            Ok::<_, ExecError>(path)
        };
        let read = |name: &str| pipe::OpenOptions::new().open_receiver(make(name)?).map_err(failed);
        // Read and write, as a FIFO without a reader cannot be opened for writing alone.
        let write =
            |name: &str| pipe::OpenOptions::new().read_write(true).open_sender(make(name)?).map_err(failed);
        let ends = Ends {
            stdin: wanted.stdin.then(|| write("stdin")).transpose()?,
            stdout: read("stdout")?,
            stderr: wanted.stderr.then(|| read("stderr")).transpose()?,
        };
        Ok((fifos, ends))
    }

    /// Closes our end of the input, once somebody reads it. A shim of containerd begins to after it has told that the process
    /// runs: what was written would be lost until then, and the shim wait for a writer for ever.
    pub async fn end_input(&self, both: pipe::Sender) {
        let Ok(writer) = pipe::OpenOptions::new().open_sender(self.dir.join("stdin")) else { return };
        drop(both);
        let begun = tokio::time::Instant::now();
        let mut pause = LOOK.0;
        while !is_read(&writer) && begun.elapsed() < READER_PATIENCE {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LOOK.1);
        }
    }

    /// Path of a stream for the shim, empty for one that is not there.
    pub fn path(&self, name: &str) -> String {
        let there = match name {
            "stdin" => self.wanted.stdin,
            "stderr" => self.wanted.stderr,
            _ => true,
        };
        if there { self.dir.join(name).display().to_string() } else { String::new() }
    }
}

impl Drop for Fifos {
    fn drop(&mut self) {
        remove(&self.dir);
    }
}

/// Whether anybody has the other end open.
fn is_read(writer: &pipe::Sender) -> bool {
    let mut asked = [PollFd::new(writer.as_fd(), PollFlags::empty())];
    let answered = poll(&mut asked, PollTimeout::ZERO);
    answered.is_err() || !asked[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR))
}

/// Removes the directory of one process, and that of its container when it was the last.
pub fn remove(dir: &Path) {
    if let Err(error) = std::fs::remove_dir_all(dir)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, dir = %dir.display(), "cannot remove the FIFOs of a process");
    }
    // Fails while others are in it, which is fine.
    if let Some(parent) = dir.parent()
        && let Err(error) = std::fs::remove_dir(parent)
    {
        tracing::trace!(%error, dir = %parent.display(), "kept");
    }
}

/// Container and exec ids of all processes that have a directory.
pub fn left_behind(dir: &Path) -> io::Result<Vec<(String, String)>> {
    let mut left = Vec::new();
    for container in entries(dir)? {
        for exec in entries(&dir.join(&container))? {
            left.push((container.clone(), exec));
        }
    }
    Ok(left)
}

fn entries(dir: &Path) -> io::Result<Vec<String>> {
    let read = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        read => read?,
    };
    read.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn a_reader_waits_for_its_writer_and_sees_its_end() {
        let dir = tempfile::tempdir().expect("temp dir");
        let wanted = Wanted { stdin: true, stderr: false };
        let (fifos, mut ends) = Fifos::create(dir.path(), "c", "e", wanted).expect("made");
        assert_eq!(left_behind(dir.path()).expect("listed"), [("c".to_owned(), "e".to_owned())]);
        assert_eq!(fifos.path("stderr"), "");
        let mut text = String::new();
        let early =
            tokio::time::timeout(std::time::Duration::from_millis(30), ends.stdout.read_to_string(&mut text));
        assert!(early.await.is_err(), "no writer yet is not the end");
        let mut writer = pipe::OpenOptions::new().open_sender(fifos.path("stdout")).expect("opened");
        writer.write_all(b"out").await.expect("written");
        drop(writer);
        ends.stdout.read_to_string(&mut text).await.expect("read");
        assert_eq!(text, "out");
        drop(fifos);
        assert!(left_behind(dir.path()).expect("listed").is_empty());
        assert!(!dir.path().join("c").exists());
    }

    #[tokio::test]
    async fn input_waits_for_whoever_reads_it() {
        let dir = tempfile::tempdir().expect("temp dir");
        let wanted = Wanted { stdin: true, stderr: false };
        let (fifos, mut ends) = Fifos::create(dir.path(), "c", "e", wanted).expect("made");
        let mut input = ends.stdin.take().expect("an input");
        input.write_all(b"said early").await.expect("written");
        let ending = fifos.end_input(input);
        tokio::pin!(ending);
        let early = tokio::time::timeout(std::time::Duration::from_millis(30), &mut ending);
        assert!(early.await.is_err(), "nobody reads it yet");
        let mut reader = pipe::OpenOptions::new().open_receiver(fifos.path("stdin")).expect("opened");
        tokio::time::timeout(READER_PATIENCE / 2, ending).await.expect("it is read");
        let mut text = String::new();
        reader.read_to_string(&mut text).await.expect("read");
        assert_eq!(text, "said early", "and then its end");
    }
}
