//! Why a containerd call failed: the call, the object it was about, and containerd's own status.

use std::time::Duration;

use tonic::metadata::errors::InvalidMetadataValue;
use tonic::{Code, Status};

/// A failed call.
#[derive(Debug, thiserror::Error)]
pub enum ContainerdError {
    /// containerd answered with an error, or could not be reached (`Unavailable`).
    #[error("containerd {call}{}: {}", about(object), status.message())]
    Call {
        /// The service and method.
        call: &'static str,
        /// The id, reference or digest the call was about.
        object: String,
        /// What containerd answered.
        status: Box<Status>,
    },
    /// No answer in time.
    #[error("containerd {call}{}: no answer within {deadline:?}", about(object))]
    Deadline {
        /// The service and method.
        call: &'static str,
        /// The id, reference or digest the call was about.
        object: String,
        /// How long was waited.
        deadline: Duration,
    },
    /// A namespace name that no header can carry.
    #[error("{namespace:?} cannot name a containerd namespace")]
    Namespace {
        /// The name.
        namespace: String,
        /// Why not.
        #[source]
        source: InvalidMetadataValue,
    },
    /// An answer that misses a part containerd always sends.
    #[error("containerd {call}{}: the answer has no {missing}", about(object))]
    Incomplete {
        /// The service and method.
        call: &'static str,
        /// The id, reference or digest the call was about.
        object: String,
        /// The missing part.
        missing: &'static str,
    },
}

impl ContainerdError {
    pub(super) fn call(call: &'static str, object: &str, status: Status) -> Self {
        Self::Call { call, object: object.to_owned(), status: Box::new(status) }
    }

    /// The gRPC code to hand on.
    pub fn code(&self) -> Code {
        match self {
            Self::Call { status, .. } => status.code(),
            Self::Deadline { .. } => Code::DeadlineExceeded,
            Self::Namespace { .. } => Code::InvalidArgument,
            Self::Incomplete { .. } => Code::Internal,
        }
    }

    /// containerd's own words, without the call and object.
    pub fn message(&self) -> String {
        match self {
            Self::Call { status, .. } => status.message().to_owned(),
            other => other.to_string(),
        }
    }

    /// The object does not exist.
    pub fn is_not_found(&self) -> bool {
        self.code() == Code::NotFound
    }

    /// The object exists already.
    pub fn is_already_exists(&self) -> bool {
        self.code() == Code::AlreadyExists
    }

    /// The shim behind the task is just ending.
    pub fn is_shim_closing(&self) -> bool {
        matches!(self, Self::Call { status, .. } if status.message().contains("ttrpc: closed"))
    }

    /// A pod's shim was just ending when containerd asked it for another container, or when its successor wanted to take its
    /// socket away: nothing was made, and the next try finds it gone and starts another.
    pub fn is_shim_gone_at_start(&self) -> bool {
        const ENDING: [&str; 2] = ["connect: ", "remove pre-existing socket: "];
        matches!(self, Self::Call { status, .. } if status.message().contains("failed to start shim")
            && ENDING.iter().any(|step| status.message().contains(step)))
    }

    /// containerd (or the shim behind it) could not be reached: worth another try later.
    pub fn is_unavailable(&self) -> bool {
        // A transport that breaks in the middle of a call is reported as Unknown or Internal by the HTTP/2 layer.
        match self {
            Self::Call { status, .. } => {
                matches!(status.code(), Code::Unavailable | Code::Cancelled)
                    || (matches!(status.code(), Code::Unknown | Code::Internal)
                        && (status.message().contains("transport error")
                            || status.message().contains("ttrpc: closed")
                            || status.message().contains("h2 protocol error")))
            }
            _ => false,
        }
    }
}

/// The object in a message, where there is one.
fn about(object: &str) -> String {
    if object.is_empty() { String::new() } else { format!(" {object}") }
}

/// Turns "does not exist" into success, for calls that only want the object gone.
pub fn gone<T>(result: Result<T, ContainerdError>) -> Result<(), ContainerdError> {
    match result {
        Err(error) if !error.is_not_found() => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shim_that_was_just_ending_is_known_by_containerds_words() {
        let told = |message: &str| ContainerdError::Call {
            call: "Tasks.Create",
            object: "c1".to_owned(),
            status: Box::new(tonic::Status::unknown(message)),
        };
        for step in [
            "start failed: io.containerd.runc.v2: remove pre-existing socket: remove /run/containerd/s/3e: no such file or directory: exit status 1",
            "start failed: dial unix /run/containerd/s/3e: connect: connection refused",
        ] {
            assert!(told(&format!("failed to start shim: {step}")).is_shim_gone_at_start(), "{step}");
        }
        assert!(!told("failed to start shim: fork/exec: no such file or directory").is_shim_gone_at_start());
    }
}
