//! A plugin calling another: blocking, as plugins are processes without a runtime.

use std::{
    fs::File,
    io::{self, Read, Seek, Write},
    os::fd::AsFd,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::memfd::{MFdFlags, memfd_create},
};
use serde_json::Value;

use super::{
    PluginError,
    exec::{Finished, MAX_OUTPUT, find_plugin, outcome},
};

/// Calls plugin `kind` as a delegate of the running plugin: with this process's own `CNI_*` variables
/// except the command and those of `environment`, and in its process group, so that whoever kills this plugin kills the
/// delegate too.
pub fn delegate(
    dirs: &[PathBuf],
    kind: &str,
    cni_command: &str,
    input: &Value,
    environment: &[(&str, &str)],
    deadline: Duration,
) -> Result<Option<Value>, PluginError> {
    let executable = find_plugin(dirs, kind)?;
    let run_error = |source| PluginError::Run { path: executable.clone(), source };
    let mut child = Command::new(&executable)
        .env("CNI_COMMAND", cni_command)
        .envs(environment.iter().copied())
        .stdin(input_file(input).map_err(run_error)?)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(run_error)?;
    match communicate(&mut child, Instant::now() + deadline) {
        Ok(finished) => outcome(&finished),
        Err(error) => {
            // It may have ended meanwhile; either way it is waited for, so that no zombie stays.
            let ended = child.kill().and_then(|()| child.wait());
            if error.kind() == io::ErrorKind::TimedOut {
                return Err(PluginError::Deadline { deadline });
            }
            Err(run_error(ended.err().unwrap_or(error)))
        }
    }
}

/// The object as a file in memory: unlike a pipe it can be written before anyone reads.
fn input_file(input: &Value) -> io::Result<File> {
    let mut file = File::from(memfd_create(c"cni-input", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(input.to_string().as_bytes())?;
    file.rewind()?;
    Ok(file)
}

fn communicate(child: &mut Child, end: Instant) -> io::Result<Finished> {
    let missing = || io::Error::other("a standard stream is missing");
    let mut stdout = child.stdout.take().ok_or_else(missing)?;
    let mut stderr = child.stderr.take().ok_or_else(missing)?;
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let (mut out_open, mut err_open) = (true, true);
    while out_open || err_open {
        let timeout =
            PollTimeout::try_from(end.saturating_duration_since(Instant::now())).map_err(io::Error::other)?;
        let events = |open| if open { PollFlags::POLLIN } else { PollFlags::empty() };
        let mut watched = Vec::with_capacity(2);
        if out_open {
            watched.push(PollFd::new(stdout.as_fd(), events(true)));
        }
        if err_open {
            watched.push(PollFd::new(stderr.as_fd(), events(true)));
        }
        match poll(&mut watched, timeout) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let ready: Vec<bool> = watched
            .iter()
            .map(|watched| watched.revents().is_some_and(|events| !events.is_empty()))
            .collect();
        let (out_ready, err_ready) = match (out_open, err_open) {
            (true, true) => (ready[0], ready[1]),
            (true, false) => (ready[0], false),
            _ => (false, ready[0]),
        };
        if out_ready {
            out_open = read_some(&mut stdout, &mut out)?;
        }
        if err_ready {
            err_open = read_some(&mut stderr, &mut err)?;
        }
    }
    Ok((child.wait()?, out, err))
}

/// Reads what is there; tells whether more may come. What goes beyond the bound is dropped.
fn read_some(from: &mut impl Read, into: &mut Vec<u8>) -> io::Result<bool> {
    let mut part = [0; 16 << 10];
    let len = from.read(&mut part)?;
    let room = usize::try_from(MAX_OUTPUT).unwrap_or(usize::MAX).saturating_sub(into.len());
    into.extend_from_slice(&part[..len.min(room)]);
    Ok(len > 0)
}
