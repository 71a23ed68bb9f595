//! A process's streams as containerd names them: FIFOs, plain files (`file://`), or the CRI log that the shim writes itself.
//!
//! Without a terminal a FIFO is the process's own stream: nothing is copied. The shim holds each one open as well while
//! the process runs, so that readers can come and go without the process noticing. A process starts when its output has a
//! reader: containerd opens its end beside the request, and what was written and closed before that would be lost to it.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use cri_shim_runtime::Stdio;
use nix::errno::Errno;
use nix::fcntl::OFlag;

use crate::protocol::LOG_SCHEME;
use crate::pump::{Pump, Sink, Streams};
use crate::threads;

/// How long a reader of the output is waited for; then the process starts without.
const READER_PATIENCE: Duration = Duration::from_secs(10);

/// The streams as a request names them; an empty name is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// Standard input.
    pub stdin: String,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// Whether the process gets a terminal.
    pub terminal: bool,
}

/// What the shim keeps of a process's streams while it runs.
#[derive(Debug, Default)]
pub struct Held {
    stdin: Option<File>,
    outputs: Vec<File>,
    log: Option<PathBuf>,
    pipes: Option<(OwnedFd, OwnedFd)>,
    fifo: Option<File>,
    input: Option<File>,
}

/// Where a name leads.
#[derive(Debug, PartialEq, Eq)]
enum Target<'a> {
    Nothing,
    Fifo(&'a Path),
    File(&'a Path),
    Log(&'a Path),
}

fn target(name: &str) -> io::Result<Target<'_>> {
    if name.is_empty() {
        return Ok(Target::Nothing);
    }
    if let Some(path) = name.strip_prefix(LOG_SCHEME) {
        return Ok(Target::Log(Path::new(path)));
    }
    if let Some(path) = name.strip_prefix("file://") {
        return Ok(Target::File(Path::new(path)));
    }
    let path = name.strip_prefix("fifo://").unwrap_or(name);
    match path.split_once("://") {
        Some((scheme, _)) => {
            let words = format!("stdio {name:?}: the scheme {scheme:?} is not offered by this shim");
            Err(io::Error::new(ErrorKind::InvalidInput, words))
        }
        None => Ok(Target::Fifo(Path::new(path))),
    }
}

fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    told(path, options.open(path))
}

fn told(path: &Path, opened: io::Result<File>) -> io::Result<File> {
    opened.map_err(|error| io::Error::new(error.kind(), format!("open {}: {error}", path.display())))
}

/// Opens a FIFO for both, which never waits for another end.
fn hold(path: &Path) -> io::Result<File> {
    open(path, OpenOptions::new().read(true).write(true).custom_flags(OFlag::O_NONBLOCK.bits()))
}

/// The same for an output, once somebody reads it.
fn hold_output(path: &Path) -> io::Result<File> {
    // Kept until the other is open: a reader that has seen a writer go takes that for the end.
    let writer = await_reader(path)?;
    let both = hold(path);
    drop(writer);
    both
}

/// Opens a FIFO for writing when it has a reader, at the latest after [`READER_PATIENCE`] with none.
fn await_reader(path: &Path) -> io::Result<Option<File>> {
    let mut writing = OpenOptions::new();
    match writing.write(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path) {
        Err(error) if error.raw_os_error() == Some(Errno::ENXIO as i32) => {}
        opened => return told(path, opened).map(Some),
    }
    let (sender, opened) = mpsc::sync_channel(1);
    let waited = path.to_owned();
    threads::spawn("reader", move || {
        // Nobody waits for it any more when it comes too late; it is let through when the FIFO is held.
        drop(sender.send(open(&waited, OpenOptions::new().write(true))));
    })?;
    opened.recv_timeout(READER_PATIENCE).map_or(Ok(None), |opened| opened.map(Some))
}

impl Names {
    /// Opens everything; gives what the process gets and what the shim keeps.
    pub fn open(&self) -> io::Result<(Stdio, Held)> {
        let mut held = Held::default();
        let stdin = match target(&self.stdin)? {
            Target::Nothing => None,
            Target::Fifo(path) => {
                // Both ends first, so that opening each of the others does not wait.
                let both = hold(path)?;
                let mut reading = OpenOptions::new();
                reading.read(true);
                if self.terminal {
                    reading.custom_flags(OFlag::O_NONBLOCK.bits());
                }
                let reader = open(path, &mut reading)?;
                let writing =
                    open(path, OpenOptions::new().write(true).custom_flags(OFlag::O_NONBLOCK.bits()))?;
                drop(both);
                held.stdin = Some(writing);
                Some(reader)
            }
            Target::File(path) => Some(open(path, OpenOptions::new().read(true))?),
            Target::Log(_) => {
                return Err(io::Error::new(ErrorKind::InvalidInput, "standard input cannot be a log"));
            }
        };
        if self.terminal {
            held.input = stdin;
            match target(&self.stdout)? {
                Target::Nothing => {}
                Target::Fifo(path) => held.fifo = Some(hold_output(path)?),
                Target::File(path) => held.fifo = Some(append(path)?),
                Target::Log(path) => held.log = Some(path.to_owned()),
            }
            return Ok((Stdio::Terminal { size: None }, held));
        }
        if let Target::Log(path) = target(&self.stdout)? {
            let (stdout, stdout_in) = pipe()?;
            let (stderr, stderr_in) = pipe()?;
            held.log = Some(path.to_owned());
            held.pipes = Some((stdout, stderr));
            let stdin = stdin.map(OwnedFd::from);
            return Ok((Stdio::Fds { stdin, stdout: Some(stdout_in), stderr: Some(stderr_in) }, held));
        }
        let stdout = held.output(&self.stdout)?;
        let stderr = held.output(&self.stderr)?;
        Ok((Stdio::Fds { stdin: stdin.map(OwnedFd::from), stdout, stderr }, held))
    }
}

fn append(path: &Path) -> io::Result<File> {
    open(path, OpenOptions::new().create(true).append(true).mode(0o600))
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(nix::unistd::pipe2(OFlag::O_CLOEXEC)?)
}

impl Held {
    fn output(&mut self, name: &str) -> io::Result<Option<OwnedFd>> {
        match target(name)? {
            Target::Nothing => Ok(None),
            Target::Fifo(path) => {
                self.outputs.push(hold_output(path)?);
                Ok(Some(open(path, OpenOptions::new().write(true))?.into()))
            }
            Target::File(path) => Ok(Some(append(path)?.into())),
            Target::Log(_) => {
                Err(io::Error::new(ErrorKind::InvalidInput, "both outputs are the same log, or none is"))
            }
        }
    }

    /// Starts moving what has to be moved; `None` when the process's streams lead where they should by themselves.
    pub fn pump(
        &mut self,
        console: Option<&OwnedFd>,
        drained: impl FnOnce() + Send + 'static,
    ) -> io::Result<Option<Pump>> {
        let sink = match (self.log.take(), self.fifo.take()) {
            (Some(path), _) => Sink::Log((!path.as_os_str().is_empty()).then_some(path)),
            (None, Some(fifo)) => Sink::Fifo(fifo),
            (None, None) => Sink::Nowhere,
        };
        let streams = match (console, self.pipes.take()) {
            (Some(master), _) => {
                let input = match self.input.take() {
                    Some(input) => Some((input, master.try_clone()?)),
                    None => None,
                };
                Streams { stdout: master.try_clone()?, stderr: None, sink, input }
            }
            (None, Some((stdout, stderr))) => Streams { stdout, stderr: Some(stderr), sink, input: None },
            (None, None) => return Ok(None),
        };
        Pump::start(streams, drained).map(Some)
    }

    /// Lets the process see the end of its input once every other writer has closed it.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Lets go of everything: the process has ended.
    pub fn release(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn fifo(dir: &Path, name: &str) -> String {
        let path = dir.join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        path.to_string_lossy().into_owned()
    }

    #[test]
    fn names_lead_where_they_say() {
        assert_eq!(target("").unwrap(), Target::Nothing);
        assert_eq!(target("/run/x").unwrap(), Target::Fifo(Path::new("/run/x")));
        assert_eq!(target("keelson-log:///var/log/0.log").unwrap(), Target::Log(Path::new("/var/log/0.log")));
        assert_eq!(target("keelson-log://").unwrap(), Target::Log(Path::new("")));
        assert_eq!(target("file:///x").unwrap(), Target::File(Path::new("/x")));
        let refused = target("binary:///logger?x=y").unwrap_err().to_string();
        assert!(refused.contains("\"binary\""), "{refused}");
    }

    #[test]
    fn a_fifo_outlives_its_readers_and_ends_with_the_process() {
        let dir = tempfile::tempdir().unwrap();
        let names =
            Names { stdout: fifo(dir.path(), "out"), stdin: fifo(dir.path(), "in"), ..Names::default() };
        // A reader that is there before.
        let first = hold(Path::new(&names.stdout)).unwrap();
        let (stdio, mut held) = names.open().unwrap();
        drop(first);
        let Stdio::Fds { stdin: Some(stdin), stdout: Some(stdout), stderr: None } = stdio else {
            panic!("{stdio:?}")
        };
        let (mut stdin, mut stdout) = (File::from(stdin), File::from(stdout));
        // A reader that leaves is no broken pipe.
        drop(File::open(&names.stdout).unwrap());
        stdout.write_all(b"kept").unwrap();
        let mut reader = File::open(&names.stdout).unwrap();
        drop(stdout);
        held.close_stdin();
        assert_eq!(stdin.read(&mut [0; 4]).unwrap(), 0, "nobody writes any more");
        held.release();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "kept");
    }

    #[test]
    fn what_is_said_before_the_reader_comes_is_not_lost() {
        let dir = tempfile::tempdir().unwrap();
        let names =
            Names { stdout: fifo(dir.path(), "out"), stderr: fifo(dir.path(), "err"), ..Names::default() };
        let (sender, over) = mpsc::channel();
        let process = names.clone();
        std::thread::spawn(move || {
            let (stdio, mut held) = process.open().unwrap();
            let Stdio::Fds { stdout: Some(stdout), stderr: Some(stderr), .. } = stdio else {
                panic!("no output")
            };
            File::from(stdout).write_all(b"said").unwrap();
            File::from(stderr).write_all(b"too").unwrap();
            held.release();
            sender.send(()).unwrap();
        });
        assert!(over.recv_timeout(Duration::from_millis(300)).is_err(), "it waits for its readers");
        let readers = [(names.stdout, "said"), (names.stderr, "too")].map(|(name, wanted)| {
            std::thread::spawn(move || {
                let mut text = String::new();
                File::open(name).unwrap().read_to_string(&mut text).unwrap();
                assert_eq!(text, wanted);
            })
        });
        for reader in readers {
            reader.join().unwrap();
        }
        over.recv_timeout(Duration::from_secs(20)).unwrap();
    }
}
