//! Maps what can go wrong to the specification's error object; the only place that chooses codes.

use std::{error::Error, fmt::Write};

use cni_plugins_host::{invoke::PluginError, netlink::NetlinkError, netns::NetnsError, sysctl::SysctlError};
use cni_plugins_types::{
    CniError, ErrorCode,
    ipam::{AllocateError, RangeError},
};
use serde_json::Value;

/// A failed call, as it is told to the runtime.
#[derive(Debug)]
pub(crate) struct Failure(CniError);

impl Failure {
    /// A failure with a code of the specification.
    pub(crate) fn new(code: ErrorCode, msg: impl Into<String>) -> Self {
        Self(CniError::new(code, msg))
    }

    /// A missing or invalid `CNI_*` variable.
    pub(crate) fn environment(msg: impl Into<String>) -> Self {
        Self::new(ErrorCode::InvalidEnvironment, msg)
    }

    /// A configuration that cannot work.
    pub(crate) fn config(msg: impl Into<String>) -> Self {
        Self::new(ErrorCode::InvalidConfig, msg)
    }

    /// A file or stream that could not be used.
    pub(crate) fn io(step: &str, error: &std::io::Error) -> Self {
        Self::new(ErrorCode::Io, format!("cannot {step}: {error}"))
    }

    /// The same failure with steps that could not be taken back.
    pub(crate) fn with_undo_failures(mut self, failures: &[String]) -> Self {
        if !failures.is_empty() {
            self.0.details = format!("not undone: {}", failures.join("; "));
        }
        self
    }

    /// The object for standard output.
    pub(crate) fn to_value(&self) -> Value {
        serde_json::to_value(&self.0).unwrap_or_default()
    }

    fn internal(error: &dyn Error) -> Self {
        Self::new(ErrorCode::INTERNAL, chain(error))
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl From<CniError> for Failure {
    fn from(error: CniError) -> Self {
        Self(error)
    }
}

impl From<NetlinkError> for Failure {
    fn from(error: NetlinkError) -> Self {
        match &error {
            NetlinkError::Netns(netns) => netns_failure(netns),
            NetlinkError::Request { .. } => Self::internal(&error),
        }
    }
}

impl From<NetnsError> for Failure {
    fn from(error: NetnsError) -> Self {
        netns_failure(&error)
    }
}

impl From<SysctlError> for Failure {
    fn from(error: SysctlError) -> Self {
        Self::internal(&error)
    }
}

impl From<RangeError> for Failure {
    fn from(error: RangeError) -> Self {
        Self::config(error.to_string())
    }
}

impl From<AllocateError> for Failure {
    fn from(error: AllocateError) -> Self {
        Self::internal(&error)
    }
}

impl From<PluginError> for Failure {
    fn from(error: PluginError) -> Self {
        match error {
            PluginError::Reported { error, .. } => Self(*error),
            other => Self::internal(&other),
        }
    }
}

/// A namespace that is not there means an unknown container: nothing is left to clean up.
fn netns_failure(error: &NetnsError) -> Failure {
    let code = match error.source.kind() {
        std::io::ErrorKind::NotFound => ErrorCode::UnknownContainer,
        _ => ErrorCode::INTERNAL,
    };
    Failure::new(code, chain(error))
}

/// The error and its sources in one line, as the object has one message.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        write!(text, ": {inner}").expect("writing to a string cannot fail");
        source = inner.source();
    }
    text
}
