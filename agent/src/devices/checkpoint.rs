//! Who has which device, on disk. Blocks.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use agent_core::devices::{Grant, Ledger};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use tracing::warn;

/// File of the grants.
const FILE: &str = "keelson_allocations.json";

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Written {
    /// Resources that plugins had.
    resources: Vec<String>,
    grants: Vec<WrittenGrant>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct WrittenGrant {
    pod_uid: String,
    container: String,
    resource: String,
    ids: Vec<String>,
    /// The plugin's answer, base64.
    answer: String,
}

/// Replaces the file in one step.
pub(super) fn save(directory: &Path, ledger: &Ledger) -> io::Result<()> {
    let grants = ledger.grants().map(|((pod_uid, container), resource, grant)| WrittenGrant {
        pod_uid: pod_uid.clone(),
        container: container.clone(),
        resource: resource.to_owned(),
        ids: grant.ids.iter().cloned().collect(),
        answer: STANDARD.encode(&grant.answer),
    });
    let resources = ledger.resources().map(str::to_owned).collect();
    let text = serde_json::to_string(&Written { resources, grants: grants.collect() })?;
    std::fs::create_dir_all(directory)?;
    let temporary = directory.join(format!(".{FILE}"));
    let file = std::fs::File::create(&temporary)?;
    io::Write::write_all(&mut &file, text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(temporary, directory.join(FILE))
}

/// What was given away and is still held: by pods that have a directory below `root_dir`. A file that cannot be read is
/// said and counts as empty.
pub(super) fn load(directory: &Path, root_dir: &Path) -> Ledger {
    let path = directory.join(FILE);
    let written = match std::fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Written::default(),
        Err(error) => {
            warn!(path = %path.display(), %error, "who has which device is not known");
            Written::default()
        }
        Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
            warn!(path = %path.display(), %error, "who has which device is not known");
            Written::default()
        }),
    };
    let mut ledger = Ledger::default();
    for resource in &written.resources {
        ledger.set_devices(resource, BTreeMap::new());
    }
    for found in written.grants {
        if root_dir.join("pods").join(&found.pod_uid).is_dir() {
            let answer = STANDARD.decode(&found.answer).unwrap_or_default();
            let grant = Grant { ids: found.ids.into_iter().collect(), answer };
            ledger.grant((found.pod_uid, found.container), &found.resource, grant);
        }
    }
    ledger
}

/// Removes what is no file of ours: sockets of plugins, which then notice that the agent is a new one.
pub(super) fn remove_sockets(directory: &Path) -> io::Result<()> {
    use std::os::unix::fs::FileTypeExt as _;
    std::fs::create_dir_all(directory)?;
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_socket() {
            crate::files::remove(&entry.path())?;
        }
    }
    Ok(())
}
