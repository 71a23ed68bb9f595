//! What can go wrong with a command in a container, and how callers of the CRI see it.

use std::path::PathBuf;
use std::time::Duration;

use tonic::{Code, Status};

use crate::containerd::ContainerdError;

/// Why a command could not be run, or its end not be seen.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// Nothing to run.
    #[error("the command is empty")]
    NoCommand,
    /// containerd has no such container.
    #[error("container {0:?} not found")]
    NotFound(String),
    /// The container's specification has no usable process.
    #[error("the specification of container {container} has no usable process")]
    Spec {
        /// The container.
        container: String,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// The FIFOs of a process could not be made or opened.
    #[error("cannot prepare {}", path.display())]
    Fifo {
        /// The FIFO or its directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The OCI runtime refused to run the command: it does not exist, or may not be run.
    #[error("failed to exec in container: failed to start exec {exec:?}: {reason}")]
    Refused {
        /// The exec process's id.
        exec: String,
        /// The runtime's words.
        reason: String,
    },
    /// The command did not end in time and was killed.
    #[error("command {command:?} timed out after {after:?} and was killed")]
    Timeout {
        /// The command.
        command: String,
        /// The limit.
        after: Duration,
    },
    /// containerd failed.
    #[error("failed to exec in container")]
    Containerd(#[from] ContainerdError),
    /// The pod's shim failed, or could not be reached.
    #[error("the shim at {}: {message}", socket.display())]
    Shim {
        /// Its own socket.
        socket: PathBuf,
        /// What kind of failure.
        code: Code,
        /// Its words.
        message: String,
    },
    /// The task that ran the command was lost.
    #[error("the exec's task ended early")]
    Lost(#[from] tokio::task::JoinError),
}

impl ExecError {
    /// The error with all its causes, for people.
    pub fn chain(&self) -> String {
        crate::images::registry::chain(self)
    }

    /// The exit code that a shell would report for a command that could not be run.
    pub fn shell_code(&self) -> Option<(u32, &str)> {
        let Self::Refused { reason, .. } = self else { return None };
        let missing =
            reason.contains("executable file not found") || reason.contains("no such file or directory");
        Some((if missing { 127 } else { 126 }, reason))
    }
}

impl From<&ExecError> for Status {
    fn from(error: &ExecError) -> Self {
        let code = match error {
            ExecError::NoCommand => Code::InvalidArgument,
            ExecError::NotFound(_) => Code::NotFound,
            ExecError::Timeout { .. } => Code::DeadlineExceeded,
            ExecError::Containerd(source) => source.code(),
            ExecError::Shim { code, .. } => *code,
            ExecError::Refused { .. } => Code::Unknown,
            ExecError::Spec { .. } | ExecError::Fifo { .. } | ExecError::Lost(_) => Code::Internal,
        };
        Status::new(code, error.chain())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_command_has_the_shells_code() {
        let refused = |reason: &str| ExecError::Refused { exec: "x".to_owned(), reason: reason.to_owned() };
        let missing =
            refused("OCI runtime exec failed: exec: \"nope\": executable file not found in $PATH: unknown");
        assert_eq!(missing.shell_code().map(|(code, _)| code), Some(127));
        let forbidden = refused("OCI runtime exec failed: exec: \"/etc/passwd\": permission denied: unknown");
        assert_eq!(forbidden.shell_code().map(|(code, _)| code), Some(126));
        assert_eq!(ExecError::NoCommand.shell_code(), None);
    }
}
