//! Service account tokens of pods: requested, kept, and refreshed in time.
//!
//! Kept in memory only; after a restart each pod's token is requested again. At most one per projected source and pod.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::api::PostParams;
use kube::{Api, Client};
use tracing::warn;

/// Deadline of one request.
const DEADLINE: Duration = Duration::from_secs(10);
/// A token is refreshed after this much time even when it lives longer.
const MAX_AGE: SignedDuration = SignedDuration::from_hours(24);
/// Pause before the next attempt when refreshing failed and the old token is still good.
const RETRY: SignedDuration = SignedDuration::from_secs(60);

/// What a token is for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct TokenKey {
    /// Pod that it is bound to.
    pub(crate) pod_uid: String,
    /// That pod's name.
    pub(crate) pod_name: String,
    /// Namespace of both.
    pub(crate) namespace: String,
    /// Whose token.
    pub(crate) service_account: String,
    /// For whom; absent: the API server.
    pub(crate) audience: Option<String>,
    /// Lifetime asked for.
    pub(crate) expiration_seconds: i64,
}

/// A token in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Token {
    /// The token itself.
    pub(crate) text: String,
    /// When to ask for the next.
    pub(crate) refresh_at: Timestamp,
    /// When it stops to be good.
    pub(crate) expires_at: Timestamp,
}

/// The tokens of this node's pods.
pub(crate) struct Tokens {
    client: Client,
    kept: Mutex<HashMap<TokenKey, Token>>,
}

impl Tokens {
    /// Requests through `client`.
    pub(crate) fn new(client: Client) -> Self {
        Self { client, kept: Mutex::default() }
    }

    /// The kept token, or a new one when it is due. A failed refresh is an error only once the old one has expired.
    pub(crate) async fn get(&self, key: &TokenKey) -> Result<Token, String> {
        let now = Timestamp::now();
        let kept = self.kept().get(key).cloned();
        if let Some(token) = kept.as_ref().filter(|token| now < token.refresh_at) {
            return Ok(token.clone());
        }
        let token = match (self.request(key, now).await, kept) {
            (Ok(token), _) => token,
            (Err(message), Some(old)) if now < old.expires_at => {
                warn!(pod = %key.pod_name, namespace = %key.namespace, %message, "service account token not refreshed");
                Token { refresh_at: now + RETRY, ..old }
            }
            (Err(message), _) => return Err(message),
        };
        self.kept().insert(key.clone(), token.clone());
        Ok(token)
    }

    /// Drops a pod's tokens.
    pub(crate) fn forget(&self, pod_uid: &str) {
        self.kept().retain(|key, _| key.pod_uid != pod_uid);
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, HashMap<TokenKey, Token>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn request(&self, key: &TokenKey, now: Timestamp) -> Result<Token, String> {
        let body = TokenRequest {
            spec: Some(TokenRequestSpec {
                audiences: key.audience.clone().map(|audience| vec![audience]),
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".to_owned()),
                    kind: Some("Pod".to_owned()),
                    name: Some(key.pod_name.clone()),
                    uid: Some(key.pod_uid.clone()),
                }),
                expiration_seconds: Some(key.expiration_seconds),
            }),
            ..TokenRequest::default()
        };
        let failed = |cause: String| format!("failed to fetch token: {cause}");
        let api: Api<ServiceAccount> = Api::namespaced(self.client.clone(), &key.namespace);
        let parameters = PostParams::default();
        let request = api.create_subresource("token", &key.service_account, &parameters, &body);
        let answer: TokenRequest = match tokio::time::timeout(DEADLINE, request).await {
            Ok(answer) => answer.map_err(|error| failed(error.to_string()))?,
            Err(_elapsed) => return Err(failed(format!("no answer within {} s", DEADLINE.as_secs()))),
        };
        let status = answer.status.unwrap_or_default();
        let text = status.token.unwrap_or_default();
        if text.is_empty() {
            return Err(failed("the answer has no token".to_owned()));
        }
        let lifetime = SignedDuration::from_secs(key.expiration_seconds);
        let expires_at = status.expiration_timestamp.map_or(now + lifetime, |time| time.0);
        Ok(Token { text, refresh_at: refresh_at(now, expires_at), expires_at })
    }
}

/// At 80 % of the lifetime, and after 24 hours in any case.
fn refresh_at(issued_at: Timestamp, expires_at: Timestamp) -> Timestamp {
    let lifetime = expires_at.duration_since(issued_at);
    issued_at + (lifetime * 4 / 5).min(MAX_AGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refreshed_at_four_fifths_and_daily() {
        let issued: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let at = |seconds| refresh_at(issued, issued + SignedDuration::from_secs(seconds)).to_string();
        assert_eq!(at(3600), "2026-01-01T00:48:00Z");
        assert_eq!(at(10 * 86_400), "2026-01-02T00:00:00Z");
    }
}
