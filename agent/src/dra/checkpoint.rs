//! Which pods use which claims, and what drivers made of these, on disk. Blocks.

use std::io;
use std::path::{Path, PathBuf};

use agent_core::claims::{Claim, Ledger};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tracing::warn;

use crate::files;

/// The file, below the kubelet's root directory.
const FILE: &str = "dra_manager_state";
/// Of this form.
const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
struct Written {
    version: u32,
    /// Of `claims`, as they are written.
    checksum: String,
    /// JSON of [`WrittenClaim`]s.
    claims: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct WrittenClaim {
    namespace: String,
    name: String,
    #[serde(flatten)]
    claim: Claim,
}

/// Where it is.
pub(super) fn path(root_dir: &Path) -> PathBuf {
    root_dir.join(FILE)
}

/// Replaces the file in one step.
pub(super) fn save(path: &Path, ledger: &Ledger) -> io::Result<()> {
    let claims: Vec<WrittenClaim> = ledger
        .claims()
        .map(|((namespace, name), claim)| WrittenClaim {
            namespace: namespace.clone(),
            name: name.clone(),
            claim: claim.clone(),
        })
        .collect();
    let claims = serde_json::to_string(&claims)?;
    let written = Written { version: VERSION, checksum: checksum(&claims), claims };
    files::write_private(path, &serde_json::to_string(&written)?)
}

/// What an earlier agent knew. A file that cannot be used is said, put aside, and counts as empty.
pub(super) fn load(path: &Path) -> Ledger {
    let problem = match files::read(path) {
        Ok(None) => return Ledger::default(),
        Ok(Some(text)) => match parse(&text) {
            Ok(ledger) => return ledger,
            Err(problem) => problem,
        },
        Err(error) => error.to_string(),
    };
    let aside = path.with_extension("unusable");
    warn!(path = %path.display(), %problem, aside = %aside.display(),
        "which ResourceClaims are prepared is not known");
    if let Err(error) = std::fs::rename(path, &aside) {
        warn!(path = %path.display(), %error, "cannot put the file aside");
    }
    Ledger::default()
}

fn parse(text: &str) -> Result<Ledger, String> {
    let written: Written = serde_json::from_str(text).map_err(|error| error.to_string())?;
    if written.version != VERSION {
        return Err(format!("version {} is not known, expected {VERSION}", written.version));
    }
    if written.checksum != checksum(&written.claims) {
        return Err("the checksum is wrong".to_owned());
    }
    let claims: Vec<WrittenClaim> =
        serde_json::from_str(&written.claims).map_err(|error| error.to_string())?;
    Ok(Ledger::restored(claims.into_iter().map(|found| ((found.namespace, found.name), found.claim))))
}

fn checksum(text: &str) -> String {
    STANDARD.encode(Sha256::digest(text.as_bytes()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use agent_core::claims::{Device, Usable};

    use super::*;

    #[test]
    fn claims_outlive_the_agent_and_damage_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let path = path(directory.path());
        assert_eq!(load(&path), Ledger::default());
        let key = ("ns".to_owned(), "c".to_owned());
        let usable = Usable {
            key: key.clone(),
            uid: "u".to_owned(),
            drivers: BTreeSet::from(["d".to_owned(), "later".to_owned()]),
        };
        let mut ledger = Ledger::default();
        ledger.reserve("p", &[usable]).unwrap();
        let device = Device { cdi_ids: vec!["v/c=1".to_owned()], ..Device::default() };
        ledger.prepared(&key, "d", vec![device]);
        save(&path, &ledger).unwrap();
        let found = load(&path);
        assert!(found.holds("p"));
        let (_, claim) = found.claims().next().unwrap();
        assert_eq!(claim.drivers["d"].devices.as_ref().unwrap()[0].cdi_ids, ["v/c=1"]);
        assert_eq!(claim.drivers["later"].devices, None);

        let damaged = std::fs::read_to_string(&path).unwrap().replace("v/c=1", "v/c=2");
        std::fs::write(&path, &damaged).unwrap();
        assert_eq!(load(&path), Ledger::default());
        assert!(!path.exists() && path.with_extension("unusable").exists());
        save(&path, &ledger).unwrap();
        assert!(load(&path).holds("p"));
    }
}
