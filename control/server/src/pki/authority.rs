//! The certificate authority: made once, then loaded; signs leaf certificates for clients and servers.

use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};

use super::{AUTHORITY_DAYS, LEAF_DAYS, PkiError, files, inspect};

/// A certificate and its private key, both PEM.
#[derive(Clone)]
pub struct Identity {
    /// The certificate.
    pub certificate_pem: String,
    /// The key, PKCS #8.
    pub key_pem: String,
}

/// What a certificate may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// To authenticate to a server.
    Client,
    /// To serve TLS.
    Server,
}

/// The content of a certificate to be signed.
#[derive(Clone, Debug)]
pub struct LeafRequest {
    /// CN; the user name of a client.
    pub common_name: String,
    /// O; the group of a client.
    pub organization: Option<String>,
    /// What it is for.
    pub usage: Usage,
    /// DNS names and addresses it is valid for.
    pub names: Vec<String>,
}

/// A certificate authority that can sign.
pub struct Authority {
    identity: Identity,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Load `ca.crt` and `ca.key` from `directory`, or make them where neither exists.
    pub fn load_or_create(directory: &Path, now: jiff::Timestamp) -> Result<Self, PkiError> {
        let (certificate_path, key_path) = (directory.join("ca.crt"), directory.join("ca.key"));
        let (certificate_pem, key_pem) = match (files::read(&certificate_path)?, files::read(&key_path)?) {
            (Some(certificate), Some(key)) => (certificate, key),
            // The key is written first: a key alone is a creation that was cut short before anything was signed.
            (None, _) => {
                let identity = self_signed(now)?;
                files::write_private(&key_path, &identity.key_pem)?;
                files::write_private(&certificate_path, &identity.certificate_pem)?;
                (identity.certificate_pem, identity.key_pem)
            }
            (Some(_), None) => {
                return Err(PkiError::Half { present: certificate_path, missing: key_path });
            }
        };
        let key = KeyPair::from_pem(&key_pem).map_err(|source| PkiError::Unusable {
            path: key_path,
            what: "private key",
            source,
        })?;
        let issuer = Issuer::from_ca_cert_pem(&certificate_pem, key)
            .map_err(|source| PkiError::Unusable { path: certificate_path, what: "certificate", source })?;
        Ok(Self { identity: Identity { certificate_pem, key_pem }, issuer })
    }

    /// The authority's certificate, which clients need to trust.
    pub fn certificate_pem(&self) -> &str {
        &self.identity.certificate_pem
    }

    /// The authority's certificate and key, for who signs in its name.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Sign a new certificate with a new key, in memory only.
    pub fn issue(&self, request: &LeafRequest, now: jiff::Timestamp) -> Result<Identity, PkiError> {
        let key = KeyPair::generate().map_err(|source| issue_error(request, source))?;
        self.sign(request, &key, now)
    }

    /// The identity in these two files, issued anew where it is missing or no longer good.
    pub fn ensure(
        &self,
        certificate_path: &Path,
        key_path: &Path,
        request: &LeafRequest,
        now: jiff::Timestamp,
    ) -> Result<Identity, PkiError> {
        let stored_key = files::read(key_path)?.and_then(|pem| Some((KeyPair::from_pem(&pem).ok()?, pem)));
        if let (Some(certificate_pem), Some((key, key_pem))) = (files::read(certificate_path)?, stored_key)
            && inspect::still_good(&certificate_pem, &key, &self.identity.certificate_pem, request, now)
        {
            return Ok(Identity { certificate_pem, key_pem });
        }
        let identity = self.issue(request, now)?;
        files::write_private(key_path, &identity.key_pem)?;
        files::write_private(certificate_path, &identity.certificate_pem)?;
        Ok(identity)
    }

    fn sign(&self, request: &LeafRequest, key: &KeyPair, now: jiff::Timestamp) -> Result<Identity, PkiError> {
        let failed = |source| issue_error(request, source);
        let mut params = CertificateParams::new(request.names.clone()).map_err(failed)?;
        params.distinguished_name = DistinguishedName::new();
        if let Some(organization) = &request.organization {
            params.distinguished_name.push(DnType::OrganizationName, organization.as_str());
        }
        params.distinguished_name.push(DnType::CommonName, request.common_name.as_str());
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![match request.usage {
            Usage::Client => ExtendedKeyUsagePurpose::ClientAuth,
            Usage::Server => ExtendedKeyUsagePurpose::ServerAuth,
        }];
        params.use_authority_key_identifier_extension = true;
        set_validity(&mut params, now, LEAF_DAYS);
        let certificate = params.signed_by(key, &self.issuer).map_err(failed)?;
        Ok(Identity { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() })
    }
}

fn issue_error(request: &LeafRequest, source: rcgen::Error) -> PkiError {
    PkiError::Issue { subject: request.common_name.clone(), source }
}

fn self_signed(now: jiff::Timestamp) -> Result<Identity, PkiError> {
    let failed = |source| PkiError::Issue { subject: "the certificate authority".to_owned(), source };
    let key = KeyPair::generate().map_err(failed)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "keelson-ca");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages =
        vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    set_validity(&mut params, now, AUTHORITY_DAYS);
    let certificate = params.self_signed(&key).map_err(failed)?;
    Ok(Identity { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() })
}

/// Valid from yesterday, so that a clock that is a little behind accepts it.
fn set_validity(params: &mut CertificateParams, now: jiff::Timestamp, days: i64) {
    let today = now.to_zoned(jiff::tz::TimeZone::UTC).date();
    let day = |offset: i64| {
        let date = today.saturating_add(jiff::Span::new().days(offset));
        rcgen::date_time_ymd(i32::from(date.year()), date.month().unsigned_abs(), date.day().unsigned_abs())
    };
    params.not_before = day(-1);
    params.not_after = day(days);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(names: &[&str]) -> LeafRequest {
        LeafRequest {
            common_name: "system:node:a".to_owned(),
            organization: Some("system:nodes".to_owned()),
            usage: Usage::Server,
            names: names.iter().map(|name| (*name).to_owned()).collect(),
        }
    }

    #[test]
    fn a_certificate_is_kept_until_its_names_or_time_change() {
        let dir = tempfile::tempdir().unwrap();
        let now = jiff::Timestamp::now();
        let authority = Authority::load_or_create(dir.path(), now).unwrap();
        let (crt, key) = (dir.path().join("a.crt"), dir.path().join("a.key"));
        let ensure = |names: &[&str], now| {
            let again = Authority::load_or_create(dir.path(), now).unwrap();
            again.ensure(&crt, &key, &request(names), now).unwrap().certificate_pem
        };
        let first = authority.ensure(&crt, &key, &request(&["a", "10.0.0.1"]), now).unwrap().certificate_pem;
        assert_eq!(ensure(&["10.0.0.1", "a"], now), first, "same names, other order");
        let moved = ensure(&["a", "10.0.0.2"], now);
        assert_ne!(moved, first, "the address changed");
        assert_ne!(ensure(&["a", "10.0.0.2"], now + jiff::SignedDuration::from_hours(24 * 340)), moved);
    }

    #[test]
    fn a_lost_authority_key_is_an_error_that_names_the_files() {
        let dir = tempfile::tempdir().unwrap();
        let now = jiff::Timestamp::now();
        Authority::load_or_create(dir.path(), now).unwrap();
        std::fs::remove_file(dir.path().join("ca.key")).unwrap();
        let error = Authority::load_or_create(dir.path(), now).err().unwrap().to_string();
        assert!(error.contains("ca.crt exists but") && error.contains("ca.key does not"), "{error}");
    }
}
