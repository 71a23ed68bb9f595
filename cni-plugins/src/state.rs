//! Records of what plugins changed, one file per attachment, written before the change.
//!
//! They are below `/run`, so that they are gone after a boot like what they describe, and below the inode
//! of the host's network namespace, as one machine may carry several nodes (`stateDir` of a configuration
//! chooses another place). A file is `<network>,<container>,<interface>.json`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use cni_plugins_host::netns;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    call::{Attachment, Call},
    failure::Failure,
};

/// Where records are unless a configuration says otherwise.
pub(crate) const DEFAULT_DIR: &str = "/run/keelson/cni";

/// The records of one plugin in one network namespace.
pub(crate) struct StateDir(PathBuf);

impl StateDir {
    /// The directory for `plugin`; it need not be there.
    pub(crate) fn of(call: &Call, plugin: &str) -> Result<Self, Failure> {
        let given = call.config.get("stateDir").and_then(Value::as_str).filter(|dir| !dir.is_empty());
        // Only a call that takes away comes here with a relative one: an earlier version may have written below it, and
        // where none did nothing is made.
        let given = given.filter(|dir| dir.starts_with('/') || Path::new(dir).is_dir());
        let base = given.unwrap_or(DEFAULT_DIR);
        Ok(Self(Path::new(base).join(plugin).join(netns::own_identity()?.to_string())))
    }

    /// The directory, which may be missing.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// The directory, made when missing.
    pub(crate) fn make(&self) -> Result<&Path, Failure> {
        fs::create_dir_all(&self.0).map_err(|error| failed("create", &self.0, &error))?;
        Ok(&self.0)
    }

    /// Writes the record of the call's attachment, in one step.
    pub(crate) fn write<T: Serialize>(&self, call: &Call, record: &T) -> Result<(), Failure> {
        let path = self.file(&call.network, &call.container_id, &call.ifname);
        let temporary = path.with_extension("tmp");
        let text = serde_json::to_vec(record).map_err(|error| Failure::bug(error.to_string()))?;
        self.make()?;
        fs::write(&temporary, text)
            .and_then(|()| fs::rename(&temporary, &path))
            .map_err(|error| failed("write", &path, &error))
    }

    /// The record of an attachment; nothing when there is none, or a damaged one.
    pub(crate) fn read<T: DeserializeOwned>(
        &self,
        network: &str,
        attachment: &Attachment,
    ) -> Result<Option<T>, Failure> {
        let path = self.file(network, &attachment.container_id, &attachment.ifname);
        match fs::read(&path) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("read", &path, &error)),
        }
    }

    /// Whether an attachment has a record.
    pub(crate) fn has(&self, network: &str, attachment: &Attachment) -> bool {
        self.file(network, &attachment.container_id, &attachment.ifname).exists()
    }

    /// Removes the record of an attachment; absence is success.
    pub(crate) fn remove(&self, network: &str, attachment: &Attachment) -> Result<(), Failure> {
        let path = self.file(network, &attachment.container_id, &attachment.ifname);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", &path, &error)),
            _ => Ok(()),
        }
    }

    /// The attachments of a network that have a record. Files that a killed call left half-written are
    /// removed by the way.
    pub(crate) fn list(&self, network: &str) -> Result<Vec<Attachment>, Failure> {
        let entries = match fs::read_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(|error| failed("list", &self.0, &error))?,
        };
        let mut found = Vec::new();
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Some(rest) = name.strip_prefix(network).and_then(|rest| rest.strip_prefix(',')) else {
                continue;
            };
            if rest.strip_suffix(".tmp").is_some() {
                drop(fs::remove_file(entry.path()));
            } else if let Some((container_id, ifname)) =
                rest.strip_suffix(".json").and_then(|rest| rest.split_once(','))
            {
                found.push(Attachment { container_id: container_id.to_owned(), ifname: ifname.to_owned() });
            }
        }
        Ok(found)
    }

    fn file(&self, network: &str, container_id: &str, ifname: &str) -> PathBuf {
        self.0.join(format!("{network},{container_id},{ifname}.json"))
    }
}

fn failed(step: &str, path: &Path, error: &io::Error) -> Failure {
    Failure::io(&format!("{step} {}", path.display()), error)
}

impl Attachment {
    /// The attachment a call is about.
    pub(crate) fn of(call: &Call) -> Self {
        Self { container_id: call.container_id.clone(), ifname: call.ifname.clone() }
    }
}
