//! Service account tokens: ES256 JWTs bound to an account and, where asked, to a pod, node or secret.
//!
//! Checking is in two steps: [`TokenAuthority::verify`] proves signature, issuer, time and audience; whether the account and the bound object
//! still exist is for the caller, who can read objects.

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, jwk};
use serde::{Deserialize, Serialize};

/// Issuer and default audience of all tokens.
pub(crate) const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";

/// What can go wrong with tokens.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The signing key cannot be used.
    #[error("use the service account signing key")]
    Key(#[source] jsonwebtoken::errors::Error),
    /// A token could not be signed.
    #[error("sign a service account token")]
    Sign(#[source] jsonwebtoken::errors::Error),
    /// The token is not one of ours, or no longer valid.
    #[error("verify a service account token")]
    Verify(#[source] jsonwebtoken::errors::Error),
}

/// An object named by name and uid.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Reference {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`.
    pub uid: String,
}

/// The `kubernetes.io` claim.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) struct KubernetesClaim {
    /// Namespace of the account.
    pub namespace: String,
    /// The account.
    pub serviceaccount: Reference,
    /// The pod the token is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Reference>,
    /// The node of that pod, or the node the token is bound to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<Reference>,
    /// The secret the token is bound to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<Reference>,
    /// From then on the holder should have a newer token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warnafter: Option<i64>,
}

/// All claims of a token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Claims {
    /// Audiences.
    pub aud: Vec<String>,
    /// End of validity, seconds since 1970.
    pub exp: i64,
    /// Time of issue.
    pub iat: i64,
    /// Issuer.
    pub iss: String,
    /// Unique id.
    pub jti: String,
    /// What the token stands for.
    #[serde(rename = "kubernetes.io")]
    pub kubernetes: KubernetesClaim,
    /// Start of validity.
    pub nbf: i64,
    /// `system:serviceaccount:NAMESPACE:NAME`.
    pub sub: String,
}

/// Signs and verifies tokens with one key.
pub(crate) struct TokenAuthority {
    encoding: EncodingKey,
    decoding: DecodingKey,
    jwk: jwk::Jwk,
    key_id: String,
}

impl TokenAuthority {
    /// From an ECDSA P-256 private key, PKCS #8 PEM.
    pub(crate) fn new(key_pem: &str) -> Result<Self, TokenError> {
        let encoding = EncodingKey::from_ec_pem(key_pem.as_bytes()).map_err(TokenError::Key)?;
        let mut jwk = jwk::Jwk::from_encoding_key(&encoding, Algorithm::ES256).map_err(TokenError::Key)?;
        let key_id = jwk.thumbprint(jwk::ThumbprintHash::SHA256).map_err(TokenError::Key)?;
        jwk.common.key_id = Some(key_id.clone());
        jwk.common.public_key_use = Some(jwk::PublicKeyUse::Signature);
        let decoding = DecodingKey::from_jwk(&jwk).map_err(TokenError::Key)?;
        Ok(Self { encoding, decoding, jwk, key_id })
    }

    /// Sign claims.
    pub(crate) fn sign(&self, claims: &Claims) -> Result<String, TokenError> {
        let header = Header { kid: Some(self.key_id.clone()), ..Header::new(Algorithm::ES256) };
        jsonwebtoken::encode(&header, claims, &self.encoding).map_err(TokenError::Sign)
    }

    /// The claims of a token that we signed, that is valid now and meant for one of the audiences.
    pub(crate) fn verify(&self, token: &str, audiences: &[&str]) -> Result<Claims, TokenError> {
        let mut validation = Validation::new(Algorithm::ES256);
        validation.set_issuer(&[ISSUER]);
        validation.set_audience(audiences);
        validation.validate_nbf = true;
        validation.leeway = 10;
        let data = jsonwebtoken::decode::<Claims>(token, &self.decoding, &validation);
        data.map(|data| data.claims).map_err(TokenError::Verify)
    }

    /// The key set that others verify tokens with.
    pub(crate) fn key_set(&self) -> jwk::JwkSet {
        jwk::JwkSet { keys: vec![self.jwk.clone()] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_for_their_audience_and_time() {
        let key = rcgen::KeyPair::generate().unwrap().serialize_pem();
        let authority = TokenAuthority::new(&key).unwrap();
        let now = jiff::Timestamp::now().as_second();
        let claims = |aud: &str, exp| Claims {
            aud: vec![aud.to_owned()],
            exp,
            iat: now,
            iss: ISSUER.to_owned(),
            jti: "1".to_owned(),
            kubernetes: KubernetesClaim::default(),
            nbf: now,
            sub: "system:serviceaccount:d:a".to_owned(),
        };
        let token = authority.sign(&claims(ISSUER, now + 60)).unwrap();
        assert_eq!(authority.verify(&token, &[ISSUER]).unwrap().sub, "system:serviceaccount:d:a");
        assert!(authority.verify(&token, &["vault"]).is_err());
        let old = authority.sign(&claims(ISSUER, now - 60)).unwrap();
        assert!(authority.verify(&old, &[ISSUER]).is_err());
        let other = TokenAuthority::new(&rcgen::KeyPair::generate().unwrap().serialize_pem()).unwrap();
        assert!(other.verify(&token, &[ISSUER]).is_err());
    }
}
