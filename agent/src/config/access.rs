//! Who may call the kubelet API. Pure.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::GoDuration;

/// `authentication`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Authentication {
    /// Client certificates.
    pub x509: X509Authentication,
    /// Anonymous requests.
    pub anonymous: Enabled,
    /// Bearer tokens by TokenReview.
    pub webhook: Webhook,
}

/// `authentication.x509`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct X509Authentication {
    /// CA of client certificates; empty switches them off.
    #[serde(rename = "clientCAFile")]
    pub client_ca_file: PathBuf,
}

/// An on/off switch.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Enabled {
    /// On or off.
    pub enabled: bool,
}

/// `authentication.webhook`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Webhook {
    /// On or off.
    pub enabled: bool,
    /// How long an answer is kept.
    #[serde(rename = "cacheTTL")]
    pub cache_ttl: Option<GoDuration>,
}

/// `authorization`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Authorization {
    /// `Webhook` or `AlwaysAllow`.
    pub mode: String,
    /// How long answers are kept.
    pub webhook: WebhookAuthorization,
}

/// `authorization.webhook`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct WebhookAuthorization {
    /// A yes.
    #[serde(rename = "cacheAuthorizedTTL")]
    pub cache_authorized_ttl: Option<GoDuration>,
    /// A no.
    #[serde(rename = "cacheUnauthorizedTTL")]
    pub cache_unauthorized_ttl: Option<GoDuration>,
}
