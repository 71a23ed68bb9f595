//! Maps what can go wrong to the specification's error object; the only place that chooses codes.

use std::{error::Error, fmt::Write};

use cni_plugins_host::{
    invoke::PluginError, netlink::NetlinkError, netns::NetnsError, nft::NftError, sysctl::SysctlError,
};
use cni_plugins_types::{
    CniError, ErrorCode, Version,
    ipam::{AllocateError, RangeError},
};
use serde_json::Value;

/// The pod has an interface of that name already.
const INTERFACE_EXISTS: ErrorCode = ErrorCode::Other(100);
/// No address is left to give.
const NO_ADDRESS: ErrorCode = ErrorCode::Other(101);
/// CHECK found something other than ADD left.
const DIFFERENT: ErrorCode = ErrorCode::Other(102);
/// The address asked for is held by another.
const ADDRESS_TAKEN: ErrorCode = ErrorCode::Other(103);

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

    /// A key that is not supported (here, or by this kernel).
    pub(crate) fn unsupported(key: &str, value: &dyn std::fmt::Display, why: &str) -> Self {
        Self::new(ErrorCode::UnsupportedField, format!("{key}: {value} is not supported: {why}"))
    }

    /// What CHECK found.
    pub(crate) fn different(msg: impl Into<String>) -> Self {
        Self::new(DIFFERENT, msg)
    }

    /// The pod's interface is there already.
    pub(crate) fn interface_exists(msg: impl Into<String>) -> Self {
        Self::new(INTERFACE_EXISTS, msg)
    }

    /// Something that should not happen.
    pub(crate) fn bug(msg: impl Into<String>) -> Self {
        Self::new(ErrorCode::INTERNAL, msg)
    }

    /// A file or stream that could not be used.
    pub(crate) fn io(step: &str, error: &std::io::Error) -> Self {
        let code = match error.kind() {
            std::io::ErrorKind::TimedOut => ErrorCode::TryAgainLater,
            _ => ErrorCode::Io,
        };
        Self::new(code, format!("cannot {step}: {error}"))
    }

    /// The same failure with steps that could not be taken back.
    pub(crate) fn with_undo_failures(mut self, failures: &[String]) -> Self {
        if !failures.is_empty() {
            // What failed may be what had to be taken back, and for the same reason.
            let shown = failures.iter().map(|failure| failure.replace(&self.to_string(), "the same failure"));
            let told = format!("not undone: {}", shown.collect::<Vec<_>>().join("; "));
            self.0.details =
                if self.0.details.is_empty() { told } else { format!("{}; {told}", self.0.details) };
        }
        self
    }

    /// The same failure, `field` being what it is about.
    pub(crate) fn within(mut self, field: &str) -> Self {
        self.0.msg = format!("{field}: {}", self.0.msg);
        self
    }

    /// The same failure under another code.
    pub(crate) fn with_code(mut self, code: ErrorCode) -> Self {
        self.0.code = code;
        self
    }

    /// Its code.
    pub(crate) fn code(&self) -> ErrorCode {
        self.0.code
    }

    /// What went wrong, without the code.
    pub(crate) fn message(&self) -> &str {
        &self.0.msg
    }

    /// The object for standard output.
    pub(crate) fn to_value(&self, version: Version) -> Value {
        let mut error = self.0.clone();
        error.cni_version = version.to_string();
        serde_json::to_value(&error).unwrap_or_default()
    }

    /// A failed call of another plugin, `section` being where the configuration names it. A code that it told is passed on.
    pub(crate) fn of_plugin(section: &str, kind: &str, error: PluginError) -> Self {
        let failure = match error {
            PluginError::Reported { error, .. } => Self(*error),
            error @ PluginError::Output(_) => Self::new(ErrorCode::Decode, chain(&error)),
            error @ PluginError::Type(_) => Self::config(chain(&error)),
            error @ (PluginError::NotFound { .. }
            | PluginError::Run { .. }
            | PluginError::Deadline { .. }
            | PluginError::Failed { .. }) => Self::internal(&error),
        };
        Self(CniError { msg: format!("{section}: {kind}: {}", failure.0.msg), ..failure.0 })
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
            NetlinkError::Request { source, .. } if source.kind() == std::io::ErrorKind::TimedOut => {
                Self::new(ErrorCode::TryAgainLater, chain(&error))
            }
            NetlinkError::Request { .. } => Self::internal(&error),
        }
    }
}

impl From<NftError> for Failure {
    fn from(error: NftError) -> Self {
        Self::internal(&error)
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
        let code = match error {
            AllocateError::Exhausted(_) => NO_ADDRESS,
            AllocateError::NotAvailable(_) => ADDRESS_TAKEN,
            AllocateError::Outside(_) => ErrorCode::InvalidConfig,
        };
        Self::new(code, error.to_string())
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
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        write!(text, ": {inner}").expect("writing to a string cannot fail");
        source = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_not_be_undone_for_the_same_reason_is_not_said_twice() {
        let dead = || Failure::config("ipam: fake: dead");
        let undone = [format!("release addresses: {}", dead()), "delete the pair: busy".to_owned()];
        let told = dead().with_undo_failures(&undone).0;
        assert_eq!(told.details, "not undone: release addresses: the same failure; delete the pair: busy");
        assert_eq!(told.msg, "ipam: fake: dead");
    }
}
