//! ExecSync: a command in a container, its output and its exit code, with a real deadline. No process but the command.
//!
//! The command is made the subreaper of what it starts, so that everything it started stays below it, also what forks
//! twice and opens a session of its own: when the deadline passes or the client leaves, the whole tree is ended.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use cri_shim_runtime::{Child, Exec, Stdio, wait};
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::pipe2;

use crate::lifecycle::exec_words;
use crate::own;
use crate::protocol::{ExecSync, Kind, MAX_OUTPUT};
use crate::shim::{Container, Shim};
use crate::tree;
use crate::ttrpc::{Code, Failure};

/// How long output may stand still after the command's end, while something it started holds the stream open.
const QUIET: Duration = Duration::from_millis(250);
/// How long output of what a command without a deadline left behind is passed on after its end.
const LONGEST_REST: Duration = Duration::from_secs(10);
/// How long a command may wait until others have begun.
const TURN: Duration = Duration::from_secs(60);
/// How long the client waits for the end of a killed command.
const LAST_WAIT: Duration = Duration::from_secs(2);
/// Bytes moved at once.
const PIECE: usize = 16 * 1024;

/// Runs the command and sends what it says and how it ends.
pub fn run(
    shim: &Shim,
    container: &Container,
    request: &ExecSync,
    client: &UnixStream,
) -> Result<(), Failure> {
    let begun = Instant::now();
    let deadline = (request.timeout_ms > 0).then(|| begun + Duration::from_millis(request.timeout_ms));
    if !container.lock().init.is_alive() || container.lock().pending.is_some() {
        let words = format!("container {} is not running", container.id);
        return Err(Failure::new(Code::FailedPrecondition, words));
    }
    if request.args.is_empty() {
        return Err(Failure::new(Code::InvalidArgument, "the command is empty"));
    }
    let mut process =
        container.bundle.process().map_err(|error| Failure::new(Code::Internal, error.to_string()))?;
    process.set_args(Some(request.args.clone()));
    process.set_terminal(Some(false));
    process.set_console_size(None);
    shim.files.keep(&mut process);
    let Some(turn) = shim.files.turn(deadline.unwrap_or(begun + TURN).min(begun + TURN)) else {
        if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            return Err(Failure::new(Code::DeadlineExceeded, "the command timed out before it began"));
        }
        let words = format!("other commands of the pod have not begun after {TURN:?}; try again");
        return Err(Failure::new(Code::ResourceExhausted, words));
    };
    let host = |error: nix::Error| Failure::new(Code::Internal, format!("pipe: {error}"));
    let (stdout, stdout_in) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(host)?;
    let (stderr, stderr_in) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(host)?;
    let blocking = |fd: OwnedFd| -> Result<OwnedFd, Failure> {
        nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFL(OFlag::empty())).map_err(host)?;
        Ok(fd)
    };
    let stdio =
        Stdio::Fds { stdin: None, stdout: Some(blocking(stdout_in)?), stderr: Some(blocking(stderr_in)?) };
    let child = container
        .runtime
        .exec(Exec { process: &process, stdio, subreaper: true })
        .map_err(|error| Failure::new(Code::Unknown, exec_words(&error)))?;
    drop((process, turn));
    let outputs = [Output::new(Kind::Stdout, stdout), Output::new(Kind::Stderr, stderr)];
    Running { child, outputs, client, deadline, ended: None }.follow()
}

/// One stream of the command.
struct Output {
    kind: Kind,
    pipe: Option<File>,
    sent: usize,
}

impl Output {
    fn new(kind: Kind, pipe: OwnedFd) -> Self {
        Self { kind, pipe: Some(pipe.into()), sent: 0 }
    }

    /// Sends what there is. An error says that the client has gone.
    fn pass(&mut self, client: &UnixStream, moved: &mut bool) -> std::io::Result<()> {
        let mut buffer = [0_u8; PIECE];
        while let Some(pipe) = &mut self.pipe {
            match pipe.read(&mut buffer) {
                Ok(0) => self.pipe = None,
                Ok(count) => {
                    *moved = true;
                    // What is more than the limit is read and dropped: the command goes on.
                    let room = count.min(MAX_OUTPUT - self.sent);
                    if room > 0 {
                        own::send(client, self.kind, &buffer[..room])?;
                        self.sent += room;
                    }
                    return Ok(());
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(_) => self.pipe = None,
            }
        }
        Ok(())
    }
}

struct Running<'a> {
    child: Child,
    outputs: [Output; 2],
    client: &'a UnixStream,
    deadline: Option<Instant>,
    /// Its status and until when its output may stand still.
    ended: Option<(u32, Instant)>,
}

impl Running<'_> {
    fn follow(mut self) -> Result<(), Failure> {
        loop {
            if self.ended.is_none() {
                match wait::reap(&self.child.pidfd, false) {
                    Ok(Some(exit)) => {
                        let status = u32::try_from(exit.status).unwrap_or(255);
                        self.ended = Some((status, Instant::now() + QUIET));
                    }
                    Ok(None) => {}
                    Err(error) => return Err(Failure::new(Code::Internal, error.chain())),
                }
            }
            let mut moved = false;
            for output in &mut self.outputs {
                if output.pass(self.client, &mut moved).is_err() {
                    self.end_tree();
                    return Ok(());
                }
            }
            if let Some((status, quiet)) = &mut self.ended {
                let done = self.outputs.iter().all(|output| output.pipe.is_none());
                let now = Instant::now();
                // What it left behind may write without an end.
                let late = *self.deadline.get_or_insert(now + LONGEST_REST) <= now;
                if done || late || (!moved && *quiet <= now) {
                    own::end(self.client, *status);
                    return Ok(());
                }
                if moved {
                    *quiet = now + QUIET;
                }
            } else if self.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                self.end_tree();
                return Err(late());
            }
            if self.wait() {
                self.end_tree();
                return Ok(());
            }
        }
    }

    /// Waits for news; says whether the client has gone.
    fn wait(&self) -> bool {
        let mut fds = vec![PollFd::new(self.client.as_fd(), PollFlags::empty())];
        if self.ended.is_none() {
            fds.push(PollFd::new(self.child.pidfd.as_fd(), PollFlags::POLLIN));
        }
        let pipes = self.outputs.iter().filter_map(|output| output.pipe.as_ref());
        fds.extend(pipes.map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN)));
        let until = self.ended.map_or(self.deadline, |(_, quiet)| Some(quiet));
        let timeout = until.map_or(PollTimeout::NONE, |until| {
            let left = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        // Interrupted: look again.
        poll(&mut fds, timeout).is_ok() && fds[0].any().unwrap_or(true)
    }

    /// Ends the command with everything it started. The client does not wait for a command that a file system which
    /// hangs keeps in the kernel; this thread does.
    fn end_tree(&mut self) {
        if self.ended.is_some() {
            return;
        }
        tree::kill(self.child.pid, &self.child.pidfd);
        let patience = PollTimeout::try_from(LAST_WAIT).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.child.pidfd.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, patience) == Ok(0) {
            own::fail(self.client, &late());
            self.client.shutdown(Shutdown::Both).ok();
        }
        wait::reap(&self.child.pidfd, true).ok();
    }
}

fn late() -> Failure {
    Failure::new(Code::DeadlineExceeded, "the command timed out and was killed")
}
