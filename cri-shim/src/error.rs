//! Why a request failed, and which gRPC status that is.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use cni_plugins_host::invoke::InvokeError;
use cni_plugins_host::netns::NetnsError;
use cri_shim_core::names::NameError;
use cri_shim_core::oci::SpecError;
use cri_shim_core::users::UserError;
use tonic::{Code, Status};

use crate::containerd::ContainerdError;
use crate::exec::ExecError;
use crate::images::ImageError;

/// A failed request.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// No such sandbox or container.
    #[error("{kind} {id:?} does not exist")]
    NotFound {
        /// `sandbox` or `container`.
        kind: &'static str,
        /// The id asked for.
        id: String,
    },
    /// The name belongs to something that is not in a state to be given back as the answer.
    #[error("name {name:?} is taken by {id} ({state})")]
    NameTaken {
        /// The name.
        name: String,
        /// What has it.
        id: String,
        /// Its state.
        state: &'static str,
    },
    /// The object's state does not allow this.
    #[error("{kind} {id} is {state}, not {needed}")]
    WrongState {
        /// `sandbox` or `container`.
        kind: &'static str,
        /// Its id.
        id: String,
        /// Its state.
        state: &'static str,
        /// The state the request needs.
        needed: &'static str,
    },
    /// A part of the request that no name can be made of.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The configuration cannot be turned into an OCI specification.
    #[error(transparent)]
    Spec(Box<SpecError>),
    /// The user cannot be found out.
    #[error(transparent)]
    User(#[from] UserError),
    /// A field with a value this runtime does not offer.
    #[error("{field}: {problem}")]
    Invalid {
        /// The CRI field.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// A runtime handler that this node does not offer.
    #[error("{problem}")]
    Handler {
        /// Which, why, and which ones there are.
        problem: String,
    },
    /// A sandbox's pause process could not be made.
    #[error("cannot make the pause process of sandbox {id}")]
    Pause {
        /// The sandbox.
        id: String,
        /// Why.
        #[source]
        source: Box<cri_shim_runtime::Error>,
    },
    /// A sandbox's pause process could not be held, watched or killed.
    #[error("cannot hold the pause process of sandbox {id}")]
    PauseLost {
        /// The sandbox.
        id: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// containerd refused or was away.
    #[error(transparent)]
    Containerd(#[from] ContainerdError),
    /// The pod's own shim failed.
    #[error(transparent)]
    Shim(Box<ExecError>),
    /// The image could not be used.
    #[error(transparent)]
    Image(Box<ImageError>),
    /// A network namespace could not be made or removed.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// Something that this node or handler cannot do.
    #[error("{what} is not offered: {reason}")]
    Unimplemented {
        /// What was asked for.
        what: &'static str,
        /// Why it cannot be done.
        reason: String,
    },
    /// There is no usable pod network yet.
    #[error("{0}")]
    NetworkNotReady(String),
    /// The pod network refused.
    #[error("pod network {step} of sandbox {id}")]
    Network {
        /// `setup` or `teardown`.
        step: &'static str,
        /// The sandbox.
        id: String,
        /// Why.
        #[source]
        source: Box<InvokeError>,
    },
    /// What attached the sandbox to the pod network cannot be asked to detach it.
    #[error(
        "pod network teardown of sandbox {id}: network {network:?} is not configured, and no result of its plugins is kept"
    )]
    NetworkGone {
        /// The sandbox.
        id: String,
        /// The network's name.
        network: String,
    },
    /// A step on the host's files failed.
    #[error("cannot {step} {}", path.display())]
    Host {
        /// What was tried.
        step: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The work did not end in time.
    #[error("{what} took longer than {seconds} s")]
    Deadline {
        /// What was waited for.
        what: String,
        /// How long.
        seconds: u64,
    },
    /// The runtime has not finished recovering what ran before.
    #[error("the runtime is not ready: {0}")]
    NotReady(String),
    /// The task that did the work is gone.
    #[error("{0} was interrupted")]
    Interrupted(&'static str),
    /// The same failure, told to several callers that had joined.
    #[error("{0}")]
    Shared(Arc<RuntimeError>),
}

impl RuntimeError {
    /// A failed step on a file, for `map_err`.
    pub fn host(step: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Host { step, path, source }
    }

    /// The gRPC code that says best what happened.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::NotFound { .. } => Code::NotFound,
            Self::Image(error) => crate::images::service::status(error).code(),
            Self::NameTaken { .. } => Code::AlreadyExists,
            Self::Shim(error) => Status::from(error.as_ref()).code(),
            Self::WrongState { .. } => Code::FailedPrecondition,
            Self::Name(_) | Self::Spec(_) | Self::User(_) | Self::Invalid { .. } | Self::Handler { .. } => {
                Code::InvalidArgument
            }
            Self::Containerd(error) => error.code(),
            Self::NetworkNotReady(_) | Self::NotReady(_) => Code::Unavailable,
            Self::Deadline { .. } => Code::DeadlineExceeded,
            Self::Unimplemented { .. } => Code::Unimplemented,
            Self::Netns(_)
            | Self::Network { .. }
            | Self::NetworkGone { .. }
            | Self::Host { .. }
            | Self::Pause { .. }
            | Self::PauseLost { .. }
            | Self::Interrupted(_) => Code::Internal,
            Self::Shared(error) => error.code(),
        }
    }
}

impl From<SpecError> for RuntimeError {
    fn from(error: SpecError) -> Self {
        Self::Spec(Box::new(error))
    }
}

impl From<ImageError> for RuntimeError {
    fn from(error: ImageError) -> Self {
        Self::Image(Box::new(error))
    }
}

impl From<RuntimeError> for Status {
    fn from(error: RuntimeError) -> Self {
        Status::new(error.code(), short(&chain(&error)))
    }
}

/// The longest message of a status: it travels as a header, and clients refuse long ones.
const MAX_MESSAGE: usize = 2048;

/// A message that a client will take, however long the name was that it is about.
pub fn short(message: &str) -> String {
    if message.len() <= MAX_MESSAGE {
        return message.to_owned();
    }
    let end = message.floor_char_boundary(MAX_MESSAGE / 2);
    let start = message.ceil_char_boundary(message.len() - MAX_MESSAGE / 2);
    format!("{} … {}", &message[..end], &message[start..])
}

/// The error with everything below it, in one line.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = match error.downcast_ref::<RuntimeError>() {
        Some(RuntimeError::Shared(inner)) => std::error::Error::source(&**inner),
        _ => error.source(),
    };
    while let Some(inner) = source {
        let words = inner.to_string();
        // Wrappers that only pass a message on would say it twice.
        if !text.ends_with(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        source = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_giant_name_does_not_make_a_giant_status() {
        let error = RuntimeError::NotFound { kind: "sandbox", id: "ä".repeat(1 << 20) };
        let message = Status::from(error).message().to_owned();
        assert!(message.len() < 2 * MAX_MESSAGE, "{}", message.len());
        assert!(message.starts_with("sandbox") && message.ends_with("does not exist"));
    }

    #[test]
    fn a_status_tells_the_whole_chain_once() {
        let missing = std::io::Error::from(std::io::ErrorKind::NotFound);
        let error = RuntimeError::host("open", Path::new("/x"))(missing);
        let shared = RuntimeError::Shared(Arc::new(error));
        let status = Status::from(shared);
        assert_eq!(status.code(), Code::Internal);
        assert_eq!(status.message(), "cannot open /x: entity not found");
    }
}
