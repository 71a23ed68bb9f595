//! The log of one network's addresses on disk, safe against crashes and parallel calls.
//!
//! Below the directory: `lock` (held by an open [`Store`]) and `leases`, the log of
//! [`cni_plugins_types::ipam::leases`], readable as it is. Changes are appended in one write; a log that
//! has become long is replaced in one step. A call killed in between leaves a line without its end, which
//! the next call cuts off. Nothing is synced to the disk: after a crash of the machine the boot id is
//! another one, and no record of before counts. Such a crash may also leave the file empty, or full of zeros;
//! that is told from damage done while pods run by the time of the file's last change.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use cni_plugins_host::{
    file,
    lock::{Lock, lock},
};
use cni_plugins_types::ipam::leases::{Change, Leases};

use crate::failure::Failure;

/// Seconds to wait for other calls, each of which holds the lock for less than a millisecond.
const LOCK_SECONDS: u32 = 10;
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Seconds since the boot, sleep included.
const UPTIME: &str = "/proc/uptime";

/// An open, locked store.
pub(crate) struct Store {
    file: PathBuf,
    boot_id: String,
    leases: Leases,
    _lock: Lock,
}

impl Store {
    /// Opens the store, making its directory, and waits for its lock; the lock goes with the value.
    pub(crate) fn open(dir: &Path) -> Result<Self, Failure> {
        let lock_path = dir.join("lock");
        let mut options = OpenOptions::new();
        options.create(true).truncate(false).write(true).custom_flags(file::NEVER_WAIT);
        let open = || options.open(&lock_path);
        let file = match open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(dir).map_err(|error| failed("create", dir, &error))?;
                open()
            }
            opened => opened,
        };
        let file = file.map_err(|error| failed("open", &lock_path, &error))?;
        let lock = lock(file, LOCK_SECONDS).map_err(|error| failed("lock", &lock_path, &error))?;
        let boot_id =
            fs::read_to_string(BOOT_ID).map_err(|error| failed("read", BOOT_ID.as_ref(), &error))?;
        let mut store = Self {
            file: dir.join("leases"),
            boot_id: boot_id.trim().to_owned(),
            leases: Leases::default(),
            _lock: lock,
        };
        store.load()?;
        Ok(store)
    }

    /// What is held.
    pub(crate) fn leases(&self) -> &Leases {
        &self.leases
    }

    /// Records changes. When this returns they hold, whatever happens to this process.
    pub(crate) fn commit(&mut self, changes: &[Change]) -> Result<(), Failure> {
        if changes.is_empty() {
            return Ok(());
        }
        for change in changes {
            self.leases.apply(change);
        }
        if self.leases.is_long() {
            return self.replace();
        }
        let text: String = changes.iter().map(|change| change.line() + "\n").collect();
        let append = || {
            let mut file = OpenOptions::new().append(true).open(&self.file)?;
            let before = file.metadata()?.len();
            file.write_all(text.as_bytes()).inspect_err(|_| {
                // A full disk: half a line is no line, and the next call would cut it off as well.
                drop(file.set_len(before));
            })
        };
        append().map_err(|error| failed("write", &self.file, &error))
    }

    fn load(&mut self) -> Result<(), Failure> {
        let mut file = match file::open_regular(&self.file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return self.replace(),
            opened => opened.map_err(|error| failed("read", &self.file, &error))?,
        };
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(|error| failed("read", &self.file, &error))?;
        let text = String::from_utf8_lossy(&bytes);
        let loaded = match Leases::load(&text, &self.boot_id) {
            Ok(loaded) => loaded,
            // Whatever it said was of a boot that is over.
            Err(error) if error.line == 1 && was_left_by_an_earlier_boot(&file) => return self.replace(),
            Err(error) => {
                let file = self.file.display();
                return Err(Failure::new(
                    cni_plugins_types::ErrorCode::Decode,
                    format!("{file}: {error}; with no pod on this node the file may be removed"),
                ));
            }
        };
        self.leases = loaded.leases;
        if loaded.stale {
            return self.replace();
        }
        if loaded.complete < bytes.len() {
            let cut = || {
                let file = File::options().write(true).open(&self.file)?;
                file.set_len(u64::try_from(loaded.complete).map_err(io::Error::other)?)
            };
            cut().map_err(|error| failed("repair", &self.file, &error))?;
        }
        Ok(())
    }

    /// Writes the state anew. The temporary name needs no uniqueness: the lock is held.
    fn replace(&mut self) -> Result<(), Failure> {
        let text = self.leases.snapshot(&self.boot_id);
        let temporary = self.file.with_extension("new");
        fs::write(&temporary, text)
            .and_then(|()| fs::rename(&temporary, &self.file))
            .map_err(|error| failed("replace", &self.file, &error))
    }
}

/// Whether nobody has changed the file since the machine was started. In doubt somebody has.
fn was_left_by_an_earlier_boot(file: &File) -> bool {
    let changed = file.metadata().ok().and_then(|metadata| {
        // Of the inode, which nobody but the kernel sets.
        let seconds = u64::try_from(metadata.ctime()).ok()?;
        Some(UNIX_EPOCH + Duration::from_secs(seconds))
    });
    let uptime = fs::read_to_string(UPTIME).ok().and_then(|text| {
        let seconds: f64 = text.split_whitespace().next()?.parse().ok()?;
        Duration::try_from_secs_f64(seconds).ok()
    });
    changed.zip(uptime).is_some_and(|(changed, uptime)| is_before_boot(changed, SystemTime::now(), uptime))
}

/// A clock that is set forward after the boot makes a file of this boot look older than it is; this matters only for a file
/// that was damaged, too. One that is set back makes it look younger, and the file is refused.
fn is_before_boot(changed: SystemTime, now: SystemTime, uptime: Duration) -> bool {
    now.checked_sub(uptime).is_some_and(|boot| changed + Duration::from_secs(1) < boot)
}

fn failed(step: &str, path: &Path, error: &io::Error) -> Failure {
    Failure::io(&format!("{step} {}", path.display()), error)
}

#[cfg(test)]
mod tests;
