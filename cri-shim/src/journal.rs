//! Records on disk: one file per sandbox, container and detachment that is still to be done, replaced atomically.
//!
//! A file is written before the first side effect of what it describes, so after `kill -9` everything that exists is
//! explained by one. Files are not synced: what a power cut takes from them it also takes from the kernel objects they
//! describe, and what stays in containerd carries our label and is removed as an orphan.
//! A file that cannot be read is moved aside and reported, never guessed at. All functions block.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use cri_shim_core::record::{ContainerRecord, DetachmentRecord, SandboxRecord};
use prost::Message;

use crate::error::RuntimeError;
use crate::state::Shared;

/// A kind of record and where it is kept.
pub trait Journaled: Message + Default + Clone + Send + 'static {
    /// Name of its directory.
    const DIRECTORY: &'static str;
    /// The id that names its file.
    fn id(&self) -> &str;
}

impl Journaled for SandboxRecord {
    const DIRECTORY: &'static str = "sandboxes";
    fn id(&self) -> &str {
        &self.id
    }
}

impl Journaled for ContainerRecord {
    const DIRECTORY: &'static str = "containers";
    fn id(&self) -> &str {
        &self.id
    }
}

impl Journaled for DetachmentRecord {
    const DIRECTORY: &'static str = "detachments";
    fn id(&self) -> &str {
        &self.sandbox.id
    }
}

impl<R: Journaled + Sync> Shared<R> {
    /// Takes the record from the disk for good. Blocks.
    pub(crate) fn forget(&self, journal: &Journal, id: &str) -> Result<(), RuntimeError> {
        let mut forgotten = self.forgotten.lock().unwrap_or_else(PoisonError::into_inner);
        *forgotten = true;
        journal.remove::<R>(id)
    }
}

/// The directory of records.
#[derive(Clone, Debug)]
pub struct Journal {
    directory: PathBuf,
}

impl Journal {
    /// Opens (and makes) the journal below `directory`.
    pub fn open(directory: &Path) -> Result<Self, RuntimeError> {
        for kind in [SandboxRecord::DIRECTORY, ContainerRecord::DIRECTORY, DetachmentRecord::DIRECTORY] {
            let path = directory.join(kind);
            fs::create_dir_all(&path).map_err(RuntimeError::host("make", &path))?;
        }
        Ok(Self { directory: directory.to_owned() })
    }

    /// Every record of a kind.
    pub fn load<R: Journaled>(&self) -> Result<Vec<R>, RuntimeError> {
        let directory = self.directory.join(R::DIRECTORY);
        let mut records = Vec::new();
        for entry in fs::read_dir(&directory).map_err(RuntimeError::host("list", &directory))? {
            let path = entry.map_err(RuntimeError::host("list", &directory))?.path();
            match path.extension().and_then(|extension| extension.to_str()) {
                // A write that was interrupted: the file it should have replaced still counts.
                Some("new") => remove(&path)?,
                Some("broken") => {}
                _ => {
                    let bytes = fs::read(&path).map_err(RuntimeError::host("read", &path))?;
                    match R::decode(bytes.as_slice())
                        .ok()
                        .filter(|record| path.file_name() == Some(record.id().as_ref()))
                    {
                        Some(record) => records.push(record),
                        None => set_aside(&path)?,
                    }
                }
            }
        }
        Ok(records)
    }

    /// Writes a record over its last version.
    pub fn write<R: Journaled>(&self, record: &R) -> Result<(), RuntimeError> {
        let path = self.directory.join(R::DIRECTORY).join(record.id());
        let new = path.with_extension("new");
        let mut file = fs::File::create(&new).map_err(RuntimeError::host("create", &new))?;
        file.write_all(&record.encode_to_vec()).map_err(RuntimeError::host("write", &new))?;
        fs::rename(&new, &path).map_err(RuntimeError::host("replace", &path))
    }

    /// Forgets a record; one that is gone is fine.
    pub fn remove<R: Journaled>(&self, id: &str) -> Result<(), RuntimeError> {
        remove(&self.directory.join(R::DIRECTORY).join(id))
    }
}

fn set_aside(path: &Path) -> Result<(), RuntimeError> {
    let aside = path.with_extension("broken");
    tracing::error!(file = %path.display(), kept = %aside.display(), "a record is damaged; what it described is removed");
    fs::rename(path, &aside).map_err(RuntimeError::host("set aside", path))
}

fn remove(path: &Path) -> Result<(), RuntimeError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(RuntimeError::host("remove", path)(error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_survive_and_damaged_or_half_written_files_do_no_harm() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(directory.path()).unwrap();
        let record = SandboxRecord { id: "a1".into(), name: "web".into(), ..SandboxRecord::default() };
        journal.write(&record).unwrap();
        fs::write(directory.path().join("sandboxes/a1.new"), b"half").unwrap();
        fs::write(directory.path().join("sandboxes/b2"), b"\xff\xff").unwrap();
        fs::write(directory.path().join("sandboxes/c3"), b"").unwrap();
        assert_eq!(journal.load::<SandboxRecord>().unwrap(), [record]);
        assert_eq!(journal.load::<SandboxRecord>().unwrap().len(), 1, "the damaged ones were set aside");
        journal.remove::<SandboxRecord>("a1").unwrap();
        journal.remove::<SandboxRecord>("a1").unwrap();
        assert!(journal.load::<SandboxRecord>().unwrap().is_empty());
    }
}
