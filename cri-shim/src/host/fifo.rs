//! Named pipes between a shim and us.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::sys::stat::Mode;

use crate::containerd::tasks::Stdio;
use crate::error::RuntimeError;

/// Which pipes a process gets.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pipes {
    /// Whether it reads standard input.
    pub stdin: bool,
    /// Whether it has a terminal, whose output is one stream.
    pub terminal: bool,
}

/// The paths the pipes of `name` have in `directory`, whether they exist or not.
pub fn paths(directory: &Path, name: &str, pipes: Pipes) -> Stdio {
    let path = |stream: &str| directory.join(format!("{name}-{stream}")).to_string_lossy().into_owned();
    Stdio {
        stdin: if pipes.stdin { path("stdin") } else { String::new() },
        stdout: path("stdout"),
        stderr: if pipes.terminal { String::new() } else { path("stderr") },
        terminal: pipes.terminal,
    }
}

/// Makes the pipes of `name` in `directory` (which is made too); ones left by an earlier try are replaced.
pub fn make(directory: &Path, name: &str, pipes: Pipes) -> Result<Stdio, RuntimeError> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(RuntimeError::host("make", directory))?;
    let stdio = paths(directory, name, pipes);
    for path in [&stdio.stdin, &stdio.stdout, &stdio.stderr].into_iter().filter(|path| !path.is_empty()) {
        let path = PathBuf::from(path);
        super::files::remove_file(&path)?;
        nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)
            .map_err(|errno| RuntimeError::host("make pipe", &path)(errno.into()))?;
    }
    Ok(stdio)
}
