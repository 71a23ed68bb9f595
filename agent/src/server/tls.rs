//! The server's TLS settings, from PEM files.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::server::WebPkiClientVerifier;
use rustls::version::{TLS12, TLS13};
use rustls::{RootCertStore, ServerConfig, SupportedProtocolVersion};

use super::certificate::Serving;
use crate::config::TlsRules;

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub(super) enum TlsError {
    /// A file is missing or holds no PEM of the wanted kind.
    #[error("cannot read {what} {}", path.display())]
    Read {
        /// What is in the file.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// The client CA cannot be used.
    #[error("cannot use client CA {}", path.display())]
    ClientCa {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The configured versions and suites leave nothing to speak.
    #[error("cannot use tlsMinVersion, tlsCipherSuites and tlsCurvePreferences together")]
    Rules(#[source] rustls::Error),
    /// Certificate and key do not fit, or are not supported.
    #[error("cannot use the serving certificate {}", path.display())]
    Certificate {
        /// The certificate's file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
}

/// TLS 1.2 and 1.3 as `rules` allow, HTTP/2 and 1.1. A client may come without certificate, so that it gets a 401 to read instead of a
/// broken handshake; one with a certificate that the CA did not sign fails. Without a client CA nobody is known.
pub(super) fn server_config(
    serving: Serving,
    client_ca: &Path,
    rules: &TlsRules,
) -> Result<ServerConfig, TlsError> {
    let versions: &[&SupportedProtocolVersion] = if rules.only_13 { &[&TLS13] } else { &[&TLS12, &TLS13] };
    let builder = ServerConfig::builder_with_provider(Arc::new(provider(rules)))
        .with_protocol_versions(versions)
        .map_err(TlsError::Rules)?;
    let builder = if client_ca.as_os_str().is_empty() {
        builder.with_no_client_auth()
    } else {
        let mut roots = RootCertStore::empty();
        for certificate in certificates("the client CA", client_ca)? {
            roots
                .add(certificate)
                .map_err(|error| TlsError::ClientCa { path: client_ca.to_owned(), source: error.into() })?;
        }
        let verifier = WebPkiClientVerifier::builder(Arc::new(roots))
            .allow_unauthenticated()
            .build()
            .map_err(|error| TlsError::ClientCa { path: client_ca.to_owned(), source: error.into() })?;
        builder.with_client_cert_verifier(verifier)
    };
    let mut config = builder.with_cert_resolver(Arc::new(serving));
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// What the rules leave of the suites and key exchanges there are; the suites of TLS 1.3 always stay, as upstream.
fn provider(rules: &TlsRules) -> CryptoProvider {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    if let Some(wanted) = &rules.suites {
        provider.cipher_suites.retain(|suite| {
            suite.tls13().is_some()
                || suite.suite().as_str().is_some_and(|name| wanted.iter().any(|wanted| wanted == name))
        });
    }
    if !rules.curves.is_empty() {
        provider.kx_groups.retain(|group| rules.curves.contains(&u16::from(group.name())));
    }
    provider
}

pub(super) fn certificates(
    what: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = |source| TlsError::Read { what, path: path.to_owned(), source };
    let certificates: Vec<_> =
        CertificateDer::pem_file_iter(path).map_err(read)?.collect::<Result<_, _>>().map_err(read)?;
    if certificates.is_empty() {
        return Err(read(rustls::pki_types::pem::Error::NoItemsFound));
    }
    Ok(certificates)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(rules: &TlsRules) -> Vec<&'static str> {
        provider(rules).cipher_suites.iter().filter_map(|suite| suite.suite().as_str()).collect()
    }

    #[test]
    fn rules_leave_the_suites_that_they_name() {
        let wanted = "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384";
        let rules =
            TlsRules { suites: Some(vec![wanted.to_owned()]), curves: vec![29], ..TlsRules::default() };
        let left = names(&rules);
        assert!(
            left.contains(&wanted) && left.iter().all(|name| *name == wanted || name.starts_with("TLS13_"))
        );
        assert_eq!(provider(&rules).kx_groups.len(), 1);
        assert!(names(&TlsRules::default()).len() > left.len());
        let none = TlsRules { suites: Some(Vec::new()), ..TlsRules::default() };
        assert!(names(&none).iter().all(|name| name.starts_with("TLS13_")) && !names(&none).is_empty());
    }
}
