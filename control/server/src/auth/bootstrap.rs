//! Bootstrap tokens: `<id>.<secret>`, kept in a Secret `bootstrap-token-<id>` of `kube-system`.
//!
//! Input: a token and the cached Secret. Output: a user of the group `system:bootstrappers`, who may ask for a certificate
//! and nothing else. A token that has expired, or whose Secret is gone, is nobody's from that moment on.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use control_api::kinds;
use jiff::Timestamp;
use serde_json::Value;

use super::{AUTHENTICATED, BOOTSTRAPPERS, User};
use crate::api::Api;

const NAMESPACE: &str = "kube-system";
const KIND: &str = "bootstrap.kubernetes.io/token";
const ID_LENGTH: usize = 6;
const SECRET_LENGTH: usize = 16;

/// Whether a bearer token has the form of a bootstrap token.
pub(crate) fn is_token(token: &str) -> bool {
    parts(token).is_some()
}

fn parts(token: &str) -> Option<(&str, &str)> {
    let (id, secret) = token.split_once('.')?;
    let fits = |text: &str, length: usize| {
        text.len() == length && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
    };
    (fits(id, ID_LENGTH) && fits(secret, SECRET_LENGTH)).then_some((id, secret))
}

/// The user of a bootstrap token.
pub(crate) fn user(api: &Api, token: &str) -> Option<User> {
    let (id, _) = parts(token)?;
    let secrets = kinds::find("", "v1", "secrets")?;
    let secret = api.cached(secrets, Some(NAMESPACE), &format!("bootstrap-token-{id}"))?;
    user_of(&secret.value().ok()?, token, Timestamp::now())
}

/// Pure half of [`user`].
fn user_of(object: &Value, token: &str, now: Timestamp) -> Option<User> {
    let (id, secret) = parts(token)?;
    let data = |key: &str| -> Option<String> {
        let encoded = object.get("data")?.get(key)?.as_str()?;
        String::from_utf8(STANDARD.decode(encoded).ok()?).ok()
    };
    let is_open = object["type"] == KIND
        && object.pointer("/metadata/deletionTimestamp").is_none()
        && data("token-id").as_deref() == Some(id)
        && same(data("token-secret").unwrap_or_default().as_bytes(), secret.as_bytes())
        && data("usage-bootstrap-authentication").as_deref() == Some("true");
    if !is_open {
        return None;
    }
    // An end that cannot be read is one that has passed.
    if let Some(end) = data("expiration")
        && end.trim().parse::<Timestamp>().ok().is_none_or(|end| end <= now)
    {
        return None;
    }
    let mut groups = vec![BOOTSTRAPPERS.to_owned()];
    let extra = data("auth-extra-groups").unwrap_or_default();
    // None but its own kind: a token must not make its holder a node or a master.
    let extra = extra.split(',').map(str::trim).filter(|group| group.starts_with("system:bootstrappers:"));
    groups.extend(extra.map(str::to_owned));
    groups.push(AUTHENTICATED.to_owned());
    Some(User { name: format!("system:bootstrap:{id}"), uid: String::new(), groups, extra: Vec::new() })
}

/// Compares in a time that does not tell where they differ.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const TOKEN: &str = "abcdef.0123456789abcdef";

    fn secret(changes: &[(&str, &str)]) -> Value {
        let mut data = json!({});
        let usual = [
            ("token-id", "abcdef"),
            ("token-secret", "0123456789abcdef"),
            ("usage-bootstrap-authentication", "true"),
            ("auth-extra-groups", "system:bootstrappers:workers,system:masters"),
        ];
        for (key, value) in usual.iter().chain(changes) {
            data[key] = json!(STANDARD.encode(value));
        }
        json!({"type": KIND, "metadata": {"name": "bootstrap-token-abcdef"}, "data": data})
    }

    #[test]
    fn a_token_is_good_while_its_secret_says_so() {
        let now: Timestamp = "2026-01-02T03:04:05Z".parse().unwrap();
        let user = user_of(&secret(&[]), TOKEN, now).unwrap();
        assert_eq!(user.name, "system:bootstrap:abcdef");
        assert_eq!(user.groups, [BOOTSTRAPPERS, "system:bootstrappers:workers", AUTHENTICATED]);
        let refused = |changes: &[(&str, &str)]| user_of(&secret(changes), TOKEN, now).is_none();
        assert!(refused(&[("token-secret", "0123456789abcdee")]));
        assert!(refused(&[("token-id", "abcdee")]));
        assert!(refused(&[("usage-bootstrap-authentication", "false")]));
        assert!(refused(&[("expiration", "2026-01-02T03:04:04Z")]));
        assert!(refused(&[("expiration", "soon")]));
        assert!(!refused(&[("expiration", "2026-01-02T03:04:06Z")]));
        let mut other = secret(&[]);
        other["type"] = json!("Opaque");
        assert!(user_of(&other, TOKEN, now).is_none());
    }

    #[test]
    fn the_form_tells_bootstrap_tokens_from_others() {
        assert!(is_token(TOKEN));
        for other in ["", "abcdef", "ABCDEF.0123456789abcdef", "abcdef.0123456789abcde", "eyJhbGciOi.x.y"] {
            assert!(!is_token(other), "{other}");
        }
    }
}
