//! The certificate that the kubelet API shows, which may change while it is served.

use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use super::tls::{TlsError, certificates};

/// Certificate chain and key of new connections. Clones share it.
#[derive(Debug, Clone)]
pub struct Serving(Arc<RwLock<Arc<CertifiedKey>>>);

impl Serving {
    /// From two PEM files.
    pub fn from_files(cert_file: &Path, key_file: &Path) -> anyhow::Result<Self> {
        Ok(Self(Arc::new(RwLock::new(Arc::new(read(cert_file, key_file)?)))))
    }

    /// From one PEM text with the certificate chain and the key.
    pub fn from_pem(pem: &str) -> anyhow::Result<Self> {
        Ok(Self(Arc::new(RwLock::new(Arc::new(parse(pem)?)))))
    }

    /// Shows what the files hold now; what cannot be used changes nothing.
    pub fn reload(&self, cert_file: &Path, key_file: &Path) -> anyhow::Result<()> {
        self.set(read(cert_file, key_file)?);
        Ok(())
    }

    /// Shows another certificate; what cannot be used changes nothing.
    pub fn replace(&self, pem: &str) -> anyhow::Result<()> {
        self.set(parse(pem)?);
        Ok(())
    }

    /// What a new connection gets.
    pub fn current(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn set(&self, key: CertifiedKey) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(key);
    }
}

impl ResolvesServerCert for Serving {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }
}

fn read(cert_file: &Path, key_file: &Path) -> Result<CertifiedKey, TlsError> {
    let chain = certificates("the certificate", cert_file)?;
    let key = PrivateKeyDer::from_pem_file(key_file).map_err(|source| TlsError::Read {
        what: "the key",
        path: key_file.to_owned(),
        source,
    })?;
    certified(chain, key).map_err(|source| TlsError::Certificate { path: cert_file.to_owned(), source })
}

fn parse(pem: &str) -> anyhow::Result<CertifiedKey> {
    let chain = CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_slice(pem.as_bytes())?;
    Ok(certified(chain, key)?)
}

fn certified(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<CertifiedKey, rustls::Error> {
    CertifiedKey::from_der(chain, key, &rustls::crypto::aws_lc_rs::default_provider())
}
