//! Hooks that the container's own process runs. Runs in the child: system calls only.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use super::link::{self, Message};
use super::sys;
use crate::hooks::{ChildHook, Hooks, StartHooks};
use crate::steps::{At, Failure, Outcome, Step};

/// With all mounts and before the root is changed: lets the parent run its hooks, then runs the container's, in `root`.
pub(crate) fn before_root(hooks: &Hooks, root: BorrowedFd<'_>, socket: BorrowedFd<'_>) -> Outcome<()> {
    if !hooks.before_root() {
        return Ok(());
    }
    link::send(socket, Message::Hooks).at(Step::CreateHook)?;
    if !link::wait_for_go(socket) {
        sys::exit(1);
    }
    let output = Some(hooks.output.as_fd());
    all(
        &hooks.create_container,
        hooks.input.as_fd(),
        output,
        Some(root),
        [Step::CreateHook, Step::CreateHookStatus],
    )
}

/// Before the program, with the program's rights.
pub(crate) fn before_program(hooks: &StartHooks, input: &OwnedFd) -> Outcome<()> {
    all(&hooks.list, input.as_fd(), None, None, [Step::StartHook, Step::StartHookStatus])
}

fn all(
    hooks: &[ChildHook],
    input: BorrowedFd<'_>,
    output: Option<BorrowedFd<'_>>,
    directory: Option<BorrowedFd<'_>>,
    [step, status_step]: [Step; 2],
) -> Outcome<()> {
    for (index, hook) in hooks.iter().enumerate() {
        let status = one(hook, input, output, directory).at_index(step, index)?;
        if status != 0 {
            // Not an error of the kernel's: the number is the hook's own.
            let errno = Errno::from_raw_os_error(status);
            let index = u16::try_from(index).unwrap_or(u16::MAX);
            return Err(Failure { step: status_step, index, errno });
        }
    }
    Ok(())
}

/// Runs one and waits for its end; gives its exit status, or 128 and the signal.
fn one(
    hook: &ChildHook,
    input: BorrowedFd<'_>,
    output: Option<BorrowedFd<'_>>,
    directory: Option<BorrowedFd<'_>>,
) -> Result<i32, Errno> {
    rustix::fs::seek(input, SeekFrom::Start(0))?;
    let (told, tell) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let made = sys::fork(|| {
        let errno = become_hook(hook, input, output, directory);
        let _nobody = rustix::io::write(&tell, &errno.raw_os_error().to_le_bytes());
        sys::exit(127)
    })?;
    drop(tell);
    let pid = Pid::from_raw(made).ok_or(Errno::SRCH)?;
    let mut word = [0_u8; 4];
    // It closes with the hook's program; a word says that there is none.
    let failed = rustix::io::retry_on_intr(|| rustix::io::read(&told, &mut word))? == 4;
    let status = wait(pid, hook.timeout);
    if failed { Err(Errno::from_raw_os_error(i32::from_le_bytes(word))) } else { status }
}

/// Comes back only with the reason why not.
fn become_hook(
    hook: &ChildHook,
    input: BorrowedFd<'_>,
    output: Option<BorrowedFd<'_>>,
    directory: Option<BorrowedFd<'_>>,
) -> Errno {
    let prepared = || -> Result<(), Errno> {
        if let Some(directory) = directory {
            rustix::process::fchdir(directory)?;
        }
        rustix::stdio::dup2_stdin(input)?;
        // Without one the container's own streams: its log tells what the hook printed.
        if let Some(output) = output {
            rustix::stdio::dup2_stdout(output)?;
            rustix::stdio::dup2_stderr(output)?;
        }
        Ok(())
    };
    if let Err(errno) = prepared() {
        return errno;
    }
    sys::unblock_signals();
    sys::execve(&hook.path, hook.argv.pointers(), hook.envp.pointers())
}

fn wait(pid: Pid, patience: Duration) -> Result<i32, Errno> {
    let mut left = patience;
    loop {
        if let Some((_, status)) = rustix::io::retry_on_intr(|| waitpid(Some(pid), WaitOptions::NOHANG))? {
            return Ok(match (status.exit_status(), status.terminating_signal()) {
                (Some(status), _) => status,
                (None, signal) => 128 + signal.unwrap_or(0),
            });
        }
        // Blocked and at its default, as all signals here, so that none is lost between the two.
        match sys::wait_for_child_signal(left) {
            Ok(rest) => left = rest,
            Err(Errno::AGAIN) => {
                kill_process(pid, Signal::KILL)?;
                rustix::io::retry_on_intr(|| waitpid(Some(pid), WaitOptions::empty()))?;
                return Err(Errno::TIMEDOUT);
            }
            Err(errno) => return Err(errno),
        }
    }
}
