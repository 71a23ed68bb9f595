//! The keeper: one tiny process per container that holds its pipes open across a restart of ours.
//!
//! A FIFO forgets what is in it, and its reader sees the end, when nobody has it open. The shim closes its ends when the
//! container ends; so without a keeper the last output of a container that ends while we are away would be lost, and a
//! container that reads standard input would see its end. See `bare/keeper.rs` for when it ends.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Stdio as Inherited;

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
