//! The error object a plugin prints on standard output, and the codes the specification reserves.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::version::Version;

/// A code of SPEC.md, section "Error"; plugins may use 100 and above for their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorCode {
    /// 1: the `cniVersion` is not supported.
    IncompatibleVersion,
    /// 2: a field of the configuration is not supported; the message holds key and value.
    UnsupportedField,
    /// 3: the container is unknown or does not exist; the runtime need not clean up.
    UnknownContainer,
    /// 4: an environment variable is missing or invalid; the message names it.
    InvalidEnvironment,
    /// 5: input could not be read or output not written.
    Io,
    /// 6: content could not be decoded.
    Decode,
    /// 7: the network configuration is invalid.
    InvalidConfig,
    /// 11: a transient condition; the runtime should retry.
    TryAgainLater,
    /// 50 (STATUS): the plugin cannot serve ADD.
    NotAvailable,
    /// 51 (STATUS): as 50, and existing containers may have limited connectivity.
    LimitedConnectivity,
    /// Any other number; 100 and above belong to the plugin.
    Other(u32),
}

impl ErrorCode {
    /// A failure inside the plugin that has no code of its own (the first plugin-specific number).
    pub const INTERNAL: ErrorCode = ErrorCode::Other(999);
}

impl From<u32> for ErrorCode {
    fn from(code: u32) -> Self {
        match code {
            1 => ErrorCode::IncompatibleVersion,
            2 => ErrorCode::UnsupportedField,
            3 => ErrorCode::UnknownContainer,
            4 => ErrorCode::InvalidEnvironment,
            5 => ErrorCode::Io,
            6 => ErrorCode::Decode,
            7 => ErrorCode::InvalidConfig,
            11 => ErrorCode::TryAgainLater,
            50 => ErrorCode::NotAvailable,
            51 => ErrorCode::LimitedConnectivity,
            other => ErrorCode::Other(other),
        }
    }
}

impl From<ErrorCode> for u32 {
    fn from(code: ErrorCode) -> Self {
        match code {
            ErrorCode::IncompatibleVersion => 1,
            ErrorCode::UnsupportedField => 2,
            ErrorCode::UnknownContainer => 3,
            ErrorCode::InvalidEnvironment => 4,
            ErrorCode::Io => 5,
            ErrorCode::Decode => 6,
            ErrorCode::InvalidConfig => 7,
            ErrorCode::TryAgainLater => 11,
            ErrorCode::NotAvailable => 50,
            ErrorCode::LimitedConnectivity => 51,
            ErrorCode::Other(code) => code,
        }
    }
}

impl Serialize for ErrorCode {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32((*self).into())
    }
}

impl<'de> Deserialize<'de> for ErrorCode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        u32::deserialize(deserializer).map(ErrorCode::from)
    }
}

/// The error object of the specification.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CniError {
    /// Version of the specification the object follows; empty when the plugin left it out.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cni_version: String,
    /// What kind of failure it is.
    pub code: ErrorCode,
    /// One short line.
    #[serde(default)]
    pub msg: String,
    /// More, possibly several lines.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub details: String,
}

impl CniError {
    /// An error of our newest version with a message and no details.
    pub fn new(code: ErrorCode, msg: impl Into<String>) -> Self {
        Self { cni_version: Version::default().to_string(), code, msg: msg.into(), details: String::new() }
    }

    /// The same error with `details`.
    pub fn with_details(mut self, details: impl Into<String>) -> Self {
        self.details = details.into();
        self
    }
}

impl fmt::Display for CniError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (CNI error code {})", self.msg, u32::from(self.code))?;
        if self.details.is_empty() { Ok(()) } else { write!(f, ": {}", self.details) }
    }
}

impl std::error::Error for CniError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_survive_the_wire() {
        for code in [1, 2, 3, 4, 5, 6, 7, 11, 50, 51, 100, 999] {
            assert_eq!(u32::from(ErrorCode::from(code)), code);
        }
    }

    #[test]
    fn reads_the_object_of_a_foreign_plugin() {
        let error: CniError = serde_json::from_str(r#"{"code":7,"msg":"Invalid config"}"#).unwrap();
        assert_eq!(error.code, ErrorCode::InvalidConfig);
        assert_eq!(error.to_string(), "Invalid config (CNI error code 7)");
    }
}
