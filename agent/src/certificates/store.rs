//! Certificate and key in one file, as upstream keeps them: `<name>-<time>.pem`, with the link `<name>-current.pem` to the
//! newest. Blocks.
//!
//! The link changes in one step, so that a reader finds the old pair or the new one, whole.

use std::io;
use std::path::{Path, PathBuf};

use agent_core::certificates::Validity;
use anyhow::Context as _;
use jiff::Timestamp;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::files::{self, remove};

/// Where the pairs of one purpose are.
#[derive(Debug, Clone)]
pub(super) struct Store {
    directory: PathBuf,
    /// `kubelet-client` or `kubelet-server`.
    name: &'static str,
}

/// A certificate and what it says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pair {
    /// Certificate and key, PEM.
    pub(super) pem: String,
    /// How long it is valid.
    pub(super) validity: Validity,
    /// DNS names and addresses.
    pub(super) names: Vec<String>,
}

impl Pair {
    /// Reads what the first certificate of a PEM text says.
    pub(super) fn parse(pem: &str) -> anyhow::Result<Self> {
        let der = CertificateDer::from_pem_slice(pem.as_bytes()).context("there is no certificate in it")?;
        let (_, certificate) = X509Certificate::from_der(&der)
            .map_err(|error| anyhow::anyhow!("its certificate does not parse: {error}"))?;
        let time = |time: &x509_parser::time::ASN1Time| Timestamp::from_second(time.timestamp());
        let validity = Validity {
            from: time(&certificate.validity().not_before)?,
            until: time(&certificate.validity().not_after)?,
        };
        let alternatives = certificate.subject_alternative_name().ok().flatten();
        let names = alternatives.iter().flat_map(|extension| &extension.value.general_names);
        Ok(Self { pem: pem.to_owned(), validity, names: names.filter_map(shown).collect() })
    }
}

/// A name as a certificate is asked for with it.
fn shown(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => {
            let v4 = <[u8; 4]>::try_from(*bytes).ok().map(std::net::IpAddr::from);
            let v6 = || <[u8; 16]>::try_from(*bytes).ok().map(std::net::IpAddr::from);
            v4.or_else(v6).map(|address| address.to_string())
        }
        _ => None,
    }
}

impl Store {
    /// Pairs named so below a directory.
    pub(super) fn new(directory: PathBuf, name: &'static str) -> Self {
        Self { directory, name }
    }

    /// The link to the newest pair.
    pub(super) fn current_path(&self) -> PathBuf {
        self.directory.join(format!("{}-current.pem", self.name))
    }

    /// Where the key of a request waits for its certificate.
    pub(super) fn pending_key_path(&self) -> PathBuf {
        self.directory.join(format!("{}.key.tmp", self.name))
    }

    /// The newest pair; `None` where there is none, or it cannot be used.
    pub(super) fn current(&self) -> Option<Pair> {
        let path = self.current_path();
        let text = files::read(&path).inspect_err(|error| {
            tracing::warn!(file = %path.display(), %error, "certificate cannot be read");
        });
        let pair = Pair::parse(&text.ok()??).and_then(|pair| {
            crate::server::Serving::from_pem(&pair.pem)?;
            Ok(pair)
        });
        pair.inspect_err(
            |error| tracing::warn!(file = %path.display(), "certificate cannot be used: {error:#}"),
        )
        .ok()
    }

    /// Keeps a new pair and makes it the current one; forgets its request's key and all pairs before the last.
    pub(super) fn save(&self, pem: &str, now: Timestamp) -> io::Result<()> {
        let file = format!("{}-{}.pem", self.name, now.strftime("%Y-%m-%d-%H-%M-%S"));
        files::write_private(&self.directory.join(&file), pem)?;
        let link = self.current_path();
        let before = std::fs::read_link(&link).ok();
        let temporary = link.with_extension("pem.tmp");
        remove(&temporary)?;
        std::os::unix::fs::symlink(&file, &temporary)?;
        std::fs::rename(&temporary, &link)?;
        std::fs::File::open(&self.directory)?.sync_all()?;
        remove(&self.pending_key_path())?;
        self.tidy(&file, before.as_deref())
    }

    /// Removes pairs that are neither the current one nor the one before it.
    fn tidy(&self, current: &str, before: Option<&Path>) -> io::Result<()> {
        for entry in std::fs::read_dir(&self.directory)? {
            let name = entry?.file_name();
            let Some(text) = name.to_str() else { continue };
            let stamp = text.strip_prefix(self.name).and_then(|rest| rest.strip_suffix(".pem"));
            let is_dated = stamp.is_some_and(|stamp| stamp.starts_with("-2"));
            if is_dated && text != current && before != Some(Path::new(text)) {
                remove(&self.directory.join(text))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(name: &str) -> String {
        let made = rcgen::generate_simple_self_signed([name.to_owned(), "10.0.0.1".to_owned()]).unwrap();
        format!("{}{}", made.cert.pem(), made.signing_key.serialize_pem())
    }

    #[test]
    fn the_link_leads_to_the_newest_and_old_ones_go() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::new(directory.path().to_owned(), "kubelet-client");
        assert_eq!(store.current(), None);
        for (second, name) in [("01", "one"), ("02", "two"), ("03", "three")] {
            std::fs::write(store.pending_key_path(), "x").unwrap();
            let now = format!("2026-01-02T03:04:{second}Z").parse().unwrap();
            store.save(&pair(name), now).unwrap();
            assert_eq!(store.current().unwrap().names, [name, "10.0.0.1"]);
        }
        let mut names: Vec<_> =
            std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(
            names,
            [
                "kubelet-client-2026-01-02-03-04-02.pem",
                "kubelet-client-2026-01-02-03-04-03.pem",
                "kubelet-client-current.pem"
            ]
        );
        std::fs::write(store.current_path(), "half a fi").unwrap();
        assert_eq!(store.current(), None, "what cannot be used is as if it were not there");
    }
}
