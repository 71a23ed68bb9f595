//! The keeper: one tiny process per container that holds its pipes open across a restart of ours.
//!
//! A FIFO forgets what is in it, and its reader sees the end, when nobody has it open. The shim closes its ends when the
//! container ends; so without a keeper the last output of a container that ends while we are away would be lost, and a
//! container that reads standard input would see its end. See `bare/keeper.rs` for when it ends.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Stdio as Inherited;

use nix::sys::signal::Signal;

use super::{files, process};
use crate::containerd::tasks::Stdio;
use crate::error::RuntimeError;

/// The static executable that `build.rs` makes of `bare/keeper.rs`.
pub const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/keeper"));

/// Starts the keeper of a container whose task was made, so that the shim has the pipes open already. Must be called inside
/// a tokio runtime, which takes note of its end.
pub fn start(program: &Path, stdio: &Stdio) -> Result<(), RuntimeError> {
    let mut keeper = tokio::process::Command::new(program);
    keeper.env_clear().current_dir("/");
    // Writing as well, because a shim opens standard input to read in its own time.
    keeper
        .stdin(open(&stdio.stdin, true)?)
        .stdout(open(&stdio.stdout, false)?)
        .stderr(open(&stdio.stderr, false)?);
    let mut child = keeper.spawn().map_err(RuntimeError::host("run", program))?;
    tokio::spawn(async move {
        // How it ended does not matter: it holds nothing that is needed by then.
        child.wait().await.ok();
    });
    Ok(())
}

/// Makes the keeper of a container, if there is one, let go of the container's standard input, so that it can end. Reads
/// `/proc`, so not for async code.
pub fn release_stdin(program: &Path, stdin: &str) -> Result<(), RuntimeError> {
    let proc = Path::new("/proc");
    for name in files::names_in(proc)? {
        let Ok(pid) = name.parse::<u32>() else { continue };
        let place = proc.join(&name);
        let Some(began) = process::start_time(pid) else { continue };
        // One that was replaced by another version since has a mark behind its path.
        let runs =
            |path: std::path::PathBuf| path.to_string_lossy().starts_with(program.to_string_lossy().as_ref());
        let holds = fs::read_link(place.join("fd/0")).is_ok_and(|open| open == Path::new(stdin));
        if !holds || !fs::read_link(place.join("exe")).is_ok_and(runs) {
            continue;
        }
        let keeper = process::open(pid, began);
        let told =
            keeper.and_then(|keeper| keeper.map_or(Ok(()), |keeper| process::send(&keeper, Signal::SIGUSR1)));
        told.map_err(RuntimeError::host("signal the keeper", &place))?;
    }
    Ok(())
}

fn open(path: &str, write: bool) -> Result<Inherited, RuntimeError> {
    if path.is_empty() {
        return Ok(Inherited::null());
    }
    let path = Path::new(path);
    let file: File = OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(RuntimeError::host("open pipe", path))?;
    Ok(file.into())
}
