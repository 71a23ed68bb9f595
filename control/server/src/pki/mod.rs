//! The cluster's own certificate authority and everything it signs.
//!
//! Inputs: a directory, names and addresses, and the present time. Outputs: PEM files with mode 0600 and the same material in memory. Running
//! it again changes nothing, except that a certificate is issued anew when its names or addresses changed, its authority was replaced, or it
//! ends within [`RENEW_BEFORE_DAYS`]. It never overwrites an authority or a signing key that exists.

mod authority;
mod files;
mod inspect;
mod kubeconfig;

use std::path::PathBuf;

pub use authority::{Authority, Identity, LeafRequest, Usage};
pub use files::write_private;
pub use kubeconfig::render as render_kubeconfig;

/// Certificates that end sooner than this are replaced at start.
pub const RENEW_BEFORE_DAYS: i64 = 30;
/// Life of a leaf certificate.
pub const LEAF_DAYS: i64 = 365;
/// Life of the authority.
pub const AUTHORITY_DAYS: i64 = 3650;

/// What can go wrong with keys and certificates; names the file.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file or directory cannot be read or written.
    #[error("{action} {path}")]
    File {
        /// What was tried: `read`, `write`, `create directory`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A key or certificate cannot be made.
    #[error("issue certificate for {subject}")]
    Issue {
        /// Whom it was for.
        subject: String,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
    /// A key or certificate file does not hold what it should.
    #[error("{path} holds no usable {what}")]
    Unusable {
        /// The file.
        path: PathBuf,
        /// `certificate` or `private key`.
        what: &'static str,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
    /// One half of a pair is there and the other is not.
    #[error("{present} exists but {missing} does not; restore it, or remove both to start over")]
    Half {
        /// The file that is there.
        present: PathBuf,
        /// The file that is not.
        missing: PathBuf,
    },
}
