//! Continue tokens: the revision of a list and the key it goes on after, opaque to clients.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use control_api::status::ApiError;
use control_store::Revision;
use serde::{Deserialize, Serialize};

/// Version mark inside the token, as upstream.
const VERSION: &str = "meta.k8s.io/v1";

/// A decoded continue token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ContinueToken {
    #[serde(rename = "v")]
    version: String,
    /// Revision of the list; -1 for "whatever is newest".
    #[serde(rename = "rv")]
    revision: i64,
    /// Go on after this key.
    start: String,
}

impl ContinueToken {
    /// A token that goes on after `key` in the state at `revision` (`None`: the newest state).
    pub(super) fn new(revision: Option<Revision>, key: &str) -> Self {
        let revision = revision.map_or(-1, |revision| i64::try_from(revision.0).unwrap_or(-1));
        Self { version: VERSION.to_owned(), revision, start: key.to_owned() }
    }

    /// The text that clients send back.
    pub(super) fn encode(&self) -> String {
        URL_SAFE_NO_PAD.encode(serde_json::to_string(self).unwrap_or_default())
    }

    /// Read a token from a client.
    pub(super) fn decode(text: &str) -> Result<Self, ApiError> {
        let invalid = || ApiError::bad_request("continue key is not valid: it was not made by this server");
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_not_base64| invalid())?;
        let token: Self = serde_json::from_slice(&bytes).map_err(|_not_json| invalid())?;
        if token.version == VERSION { Ok(token) } else { Err(invalid()) }
    }

    /// The revision of the list, `None` for the newest.
    pub(super) fn revision(&self) -> Option<Revision> {
        u64::try_from(self.revision).ok().map(Revision)
    }

    /// The key to go on after.
    pub(super) fn start(&self) -> &str {
        &self.start
    }
}
