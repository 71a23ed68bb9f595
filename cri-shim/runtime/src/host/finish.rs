//! The last part of every process's set-up, first or additional: limits, streams, confinement, identity, program.
//!
//! Runs in the child. The order is that of other runtimes, because each step needs rights that a later one gives up.

use std::convert::Infallible;
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::link::{self, Message};
use super::{hook, sys};
use crate::hooks::StartHooks;
use crate::plan::process::{ProcessPlan, Streams, is_null_device};
use crate::steps::{At, Failure, Outcome, Step, WARN_OOM_SCORE, WARN_RLIMIT};

/// Files of this process in the host's `/proc`, opened while it can be seen.
pub(crate) struct OwnFiles {
    apparmor: Option<OwnedFd>,
    selinux: Option<OwnedFd>,
}

impl OwnFiles {
    /// Opens those that the plan needs.
    pub(crate) fn open(process: &ProcessPlan) -> Outcome<Self> {
        let open = |path: &CStr| rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
        let apparmor = process.apparmor.as_ref().map(|_| {
            // The older name is shared with other security modules.
            open(c"/proc/thread-self/attr/apparmor/exec").or_else(|_| open(c"/proc/thread-self/attr/exec"))
        });
        let selinux = process.selinux.as_ref().map(|_| open(c"/proc/thread-self/attr/exec"));
        Ok(Self {
            apparmor: apparmor.transpose().at(Step::Apparmor)?,
            selinux: selinux.transpose().at(Step::Selinux)?,
        })
    }
}

/// Puts this process into cgroups by their open `cgroup.procs` or `tasks` files.
pub(crate) fn enter_cgroups(files: &[OwnedFd]) -> Outcome<()> {
    for (index, file) in files.iter().enumerate() {
        rustix::io::write(file, b"0").at_index(Step::EnterCgroup, index)?;
    }
    Ok(())
}

/// The user of this namespace who may do everything in it, after it was entered.
pub(crate) fn become_root() -> Outcome<()> {
    rustix::thread::set_thread_gid(rustix::process::Gid::ROOT).at(Step::BecomeRoot)?;
    rustix::thread::set_thread_uid(rustix::process::Uid::ROOT).at(Step::BecomeRoot)?;
    rustix::thread::set_thread_groups(&[]).at(Step::BecomeRoot)
}

/// The session keyring of the container; a kernel may be built without.
pub(crate) fn keyring(process: &ProcessPlan) -> Outcome<()> {
    match sys::join_keyring(&process.keyring) {
        Err(Errno::NOSYS) => Ok(()),
        other => other.at(Step::Keyring),
    }
}

/// Processor and disk scheduling.
pub(crate) fn schedule(process: &ProcessPlan) -> Outcome<()> {
    if let Some(attributes) = &process.scheduler {
        sys::set_scheduler(attributes).at(Step::Scheduler)?;
    }
    if let Some(priority) = process.io_priority {
        sys::set_io_priority(priority).at(Step::IoPriority)?;
    }
    Ok(())
}

/// What needs rights over the host: limits and the out-of-memory score. Gives the warnings.
pub(crate) fn limits(process: &ProcessPlan) -> Outcome<u32> {
    let mut warnings = 0;
    // Before the limits: among the descriptors copied from a busy caller, a small one has no room for another file.
    if let Some(score) = &process.oom_score_adj {
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::open(c"/proc/self/oom_score_adj", flags, Mode::empty()).at(Step::OomScore)?;
        match rustix::io::write(&file, score) {
            Err(Errno::ACCESS | Errno::PERM) => warnings |= WARN_OOM_SCORE,
            other => other.map(|_| ()).at(Step::OomScore)?,
        }
    }
    for (index, (resource, wanted)) in process.rlimits.iter().enumerate() {
        match setrlimit(*resource, *wanted) {
            Err(Errno::PERM) => {
                warnings |= WARN_RLIMIT;
                let maximum = getrlimit(*resource).maximum;
                let current = match (wanted.current, maximum) {
                    (Some(wanted), Some(maximum)) => Some(wanted.min(maximum)),
                    (wanted, maximum) => wanted.or(maximum),
                };
                setrlimit(*resource, Rlimit { current, maximum }).at_index(Step::Rlimit, index)?;
            }
            other => other.at_index(Step::Rlimit, index)?,
        }
    }
    Ok(warnings)
}

/// Puts open files on 0, 1 and 2 and gives them to the process's user.
pub(crate) fn streams(process: &ProcessPlan, terminal: Option<&OwnedFd>) -> Outcome<()> {
    match (&process.streams, terminal) {
        (Streams::Files(files), _) => {
            for (index, (file, null)) in files.iter().enumerate() {
                // The container's own null device, so that nothing of the host stays open.
                let own = if *null { null_device() } else { None };
                put(index, own.as_ref().unwrap_or(file).as_fd()).at_index(Step::Stdio, index)?;
            }
        }
        (Streams::Terminal(_), Some(terminal)) => {
            for index in 0..3 {
                put(index, terminal.as_fd()).at_index(Step::Stdio, index)?;
            }
            sys::set_controlling_terminal(rustix::stdio::stdin()).at(Step::Terminal)?;
        }
        (Streams::Terminal(_), None) => return Err(Errno::BADF).at(Step::Stdio),
    }
    for stream in [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()] {
        let stat = rustix::fs::fstat(stream).at(Step::Stdio)?;
        if !is_null_device(&stat) && stat.st_uid != process.uid.as_raw() {
            // Where the user may not have it (a read-only file, an id without a mapping), it stays as it is.
            let _kept = rustix::fs::fchown(stream, Some(process.uid), None);
        }
    }
    Ok(())
}

/// Makes `file` the descriptor with that number, open across exec.
fn put(number: usize, file: BorrowedFd<'_>) -> Result<(), Errno> {
    match number {
        0 => rustix::stdio::dup2_stdin(file),
        1 => rustix::stdio::dup2_stdout(file),
        _ => rustix::stdio::dup2_stderr(file),
    }
}

fn null_device() -> Option<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NOCTTY | OFlags::NONBLOCK;
    let file = rustix::fs::open(c"/dev/null", flags, Mode::empty()).ok()?;
    rustix::fs::fstat(&file).is_ok_and(|stat| is_null_device(&stat)).then_some(file)
}

/// Confinement, identity and program. With `wait` it tells the parent that it is ready, with the warnings so far, and waits for its word.
pub(crate) fn become_program(
    process: &ProcessPlan,
    own: OwnFiles,
    socket: OwnedFd,
    wait: bool,
    warnings: u32,
) -> Infallible {
    if let Err(failure) = labels(&own, process) {
        fail(socket.as_fd(), failure);
    }
    drop(own);
    let Ok((socket, state)) = keep_only(socket, process.hooks.as_ref()) else { sys::exit(1) };
    match confine(process, &socket, state.as_ref(), wait, warnings) {
        Ok(failure) | Err(failure) => fail(socket.as_fd(), failure),
    }
}

/// Tells the parent what failed and ends.
pub(crate) fn fail(socket: BorrowedFd<'_>, failure: Failure) -> ! {
    let _gone = link::send(socket, Message::Failed(failure));
    sys::exit(1)
}

/// What the next exec changes to.
fn labels(own: &OwnFiles, process: &ProcessPlan) -> Outcome<()> {
    if process.no_new_privileges {
        sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0).at(Step::NoNewPrivileges)?;
    }
    if let (Some(file), Some(profile)) = (&own.apparmor, &process.apparmor) {
        rustix::io::write(file, profile).map(|_| ()).at(Step::Apparmor)?;
    }
    if let (Some(file), Some(label)) = (&own.selinux, &process.selinux) {
        rustix::io::write(file, label).map(|_| ()).at(Step::Selinux)?;
    }
    Ok(())
}

/// Closes everything but the streams and the socket, which becomes 3, and what hooks read, 4: a working directory like
/// `/proc/self/fd/7` must find nothing of the host.
fn keep_only(socket: OwnedFd, hooks: Option<&StartHooks>) -> Result<(OwnedFd, Option<OwnedFd>), Errno> {
    let Some(hooks) = hooks else {
        let socket = if socket.as_raw_fd() == 3 { socket } else { moved(socket.as_fd(), 3)? };
        sys::close_from(4)?;
        return Ok((socket, None));
    };
    // Above both places first, so that neither move closes the other.
    let socket = rustix::io::fcntl_dupfd_cloexec(&socket, 5)?;
    let state = rustix::io::fcntl_dupfd_cloexec(&hooks.input, 5)?;
    let (socket, state) = (moved(socket.as_fd(), 3)?, moved(state.as_fd(), 4)?);
    sys::close_from(5)?;
    Ok((socket, Some(state)))
}

fn moved(file: BorrowedFd<'_>, place: i32) -> Result<OwnedFd, Errno> {
    sys::close_one(place);
    let moved = rustix::io::fcntl_dupfd_cloexec(file, place)?;
    if moved.as_raw_fd() == place { Ok(moved) } else { Err(Errno::BADF) }
}

/// The rest; gives the failure of exec, or of an earlier step.
fn confine(
    process: &ProcessPlan,
    socket: &OwnedFd,
    state: Option<&OwnedFd>,
    wait: bool,
    warnings: u32,
) -> Outcome<Failure> {
    if let Some(filter) = process.seccomp.as_ref().filter(|_| !process.no_new_privileges) {
        sys::seccomp(&filter.program, filter.flags).at(Step::Seccomp)?;
    }
    identity(process)?;
    let found = find(process)?;
    if process.subreaper {
        sys::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0).at(Step::Session)?;
    }
    if wait {
        let told = link::send(socket.as_fd(), Message::Ready(warnings)).is_ok();
        if !told || !link::wait_for_go(socket.as_fd()) {
            // The one who could start it is gone.
            sys::exit(1);
        }
    } else if warnings != 0 {
        let _gone = link::send(socket.as_fd(), Message::Ready(warnings));
    }
    if let (Some(hooks), Some(state)) = (&process.hooks, state) {
        hook::before_program(hooks, state)?;
    }
    sys::unblock_signals();
    if let Some(filter) = process.seccomp.as_ref().filter(|_| process.no_new_privileges) {
        sys::seccomp(&filter.program, filter.flags).at(Step::Seccomp)?;
    }
    let errno = sys::execve(found, process.argv.pointers(), process.envp.pointers());
    Ok(Failure { step: Step::Exec, index: 0, errno })
}

/// Capabilities, ids and working directory.
fn identity(process: &ProcessPlan) -> Outcome<()> {
    // The kernel ends its list with EINVAL.
    for capability in 0..64_u64 {
        match sys::prctl(libc::PR_CAPBSET_READ, capability, 0) {
            Err(Errno::INVAL) => break,
            _ if process.bounding & (1 << capability) != 0 => {}
            _ => sys::prctl(libc::PR_CAPBSET_DROP, capability, 0).at(Step::BoundingSet)?,
        }
    }
    // As root first: it may enter a directory that the user may not see the way to; else as the user below.
    let entered = rustix::process::chdir(process.cwd.as_c_str());
    sys::prctl(libc::PR_SET_KEEPCAPS, 1, 0).at(Step::Capabilities)?;
    rustix::thread::set_thread_groups(&process.groups).at(Step::Groups)?;
    rustix::thread::set_thread_gid(process.gid).at(Step::Gid)?;
    rustix::thread::set_thread_uid(process.uid).at(Step::Uid)?;
    sys::prctl(libc::PR_SET_KEEPCAPS, 0, 0).at(Step::Capabilities)?;
    capabilities(process)?;
    match entered {
        Err(Errno::ACCESS | Errno::PERM) => rustix::process::chdir(process.cwd.as_c_str()),
        other => other,
    }
    .at(Step::WorkingDirectory)?;
    if !sys::working_directory_is_inside() {
        return Err(Errno::NOENT).at(Step::WorkingDirectory);
    }
    if let Some(mask) = process.umask {
        rustix::process::umask(mask);
    }
    Ok(())
}

fn capabilities(process: &ProcessPlan) -> Outcome<()> {
    let held = rustix::thread::capabilities(None).at(Step::Capabilities)?.permitted;
    // What this host does not hold cannot be given (the parent has warned); the inheritable set follows the same rule.
    let CapabilitySets { effective, permitted, inheritable } = process.capabilities;
    let sets = CapabilitySets {
        effective: effective & permitted & held,
        permitted: permitted & held,
        inheritable: inheritable & held,
    };
    rustix::thread::set_capabilities(None, sets).at(Step::Capabilities)?;
    let ambient = CapabilitySet::from_bits_retain(process.ambient);
    let given = ambient & sets.permitted & sets.inheritable;
    sys::ambient_clear().at(Step::AmbientCapabilities)?;
    for capability in (0..64_u64).filter(|number| given.bits() & (1 << number) != 0) {
        sys::ambient_raise(capability).at(Step::AmbientCapabilities)?;
    }
    Ok(())
}

/// The first candidate that is a file this user may execute.
fn find(process: &ProcessPlan) -> Outcome<&CStr> {
    let mut refused = Errno::NOENT;
    for candidate in &process.candidates {
        match executable(candidate) {
            Ok(()) => return Ok(candidate),
            Err(Errno::NOENT | Errno::NOTDIR) => {}
            Err(errno) => refused = errno,
        }
    }
    Err(refused).at(Step::FindProgram)
}

fn executable(path: &CStr) -> Result<(), Errno> {
    let stat = rustix::fs::statat(CWD, path, AtFlags::empty())?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        return Err(Errno::ISDIR);
    }
    match rustix::fs::accessat(CWD, path, rustix::fs::Access::EXEC_OK, AtFlags::EACCESS) {
        // A profile may not let us ask.
        Err(Errno::NOSYS | Errno::INVAL) => Ok(()),
        other => other,
    }
}
