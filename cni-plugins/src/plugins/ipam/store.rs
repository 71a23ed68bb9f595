//! The allocations of one network on disk, safe against crashes and parallel calls.
//!
//! Below the directory: `lock` (flock, held by an open [`Store`]); one record per held address, linked
//! under two names, `<address>` and `own.<set>.<container id>.<ifname>`; `last.<set>`, the address
//! given last; `boot`, the boot id of the last sweep.
//!
//! A record is written under a temporary name and then linked, first as `own…`, then as the address
//! (which fails when somebody holds it), so a call killed in between leaves at most an owner record
//! without address, which its DEL, its next ADD or GC clears. No address can be held without its owner
//! record. Containers do not outlive a boot: the first call after one drops every record of an earlier
//! boot. For the same reason nothing is synced to the disk.

use std::{
    fmt::Write as _,
    fs::{self, File, OpenOptions},
    io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use cni_plugins_types::ipam::{Allocation, RangeSet};
use nix::fcntl::{Flock, FlockArg};

use crate::{
    call::{Attachment, Call},
    failure::Failure,
};

/// An open, locked store.
pub(super) struct Store {
    dir: PathBuf,
    boot_id: String,
    _lock: Flock<File>,
}

/// Who holds addresses: a container's interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Owner {
    container_id: String,
    ifname: String,
}

/// A file operation of the store that failed.
#[derive(Debug)]
pub(super) struct StoreError {
    /// What was tried.
    pub(super) step: &'static str,
    /// The file.
    pub(super) path: PathBuf,
    /// Why it failed.
    pub(super) source: io::Error,
}

/// Contents of a record.
struct Record {
    owner: Owner,
    boot_id: String,
    addr: IpAddr,
}

impl Owner {
    /// The attachment a call is about.
    pub(super) fn of(call: &Call) -> Self {
        Self { container_id: call.container_id.clone(), ifname: call.ifname.clone() }
    }

    /// Whether this is that attachment.
    pub(super) fn is(&self, attachment: &Attachment) -> bool {
        self.container_id == attachment.container_id && self.ifname == attachment.ifname
    }

    /// The container's id.
    pub(super) fn container_id(&self) -> &str {
        &self.container_id
    }

    fn file_suffix(&self) -> String {
        format!("{}.{}", self.container_id, self.ifname)
    }
}

impl Store {
    /// Opens the store, making its directory, and waits for its lock; the lock goes with the value.
    pub(super) fn open(dir: &Path) -> Result<Self, StoreError> {
        fs::create_dir_all(dir).map_err(|source| failed("create", dir, source))?;
        let path = dir.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|source| failed("open", &path, source))?;
        let lock = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| failed("lock", &path, errno.into()))?;
        let boot_path = Path::new("/proc/sys/kernel/random/boot_id");
        let boot_id = read(boot_path)?.unwrap_or_default().trim().to_owned();
        let store = Self { dir: dir.to_owned(), boot_id, _lock: lock };
        store.sweep_after_boot()?;
        Ok(store)
    }

    /// An address of `set` for `owner`: the one it holds, else `wanted`, else the next free one.
    pub(super) fn allocate(
        &self,
        owner: &Owner,
        set_index: usize,
        set: &RangeSet,
        wanted: Option<IpAddr>,
    ) -> Result<Allocation, Failure> {
        let own_name = format!("own.{set_index}.{}", owner.file_suffix());
        if let Some(kept) = self.kept(owner, &own_name, set, wanted)? {
            return Ok(kept);
        }
        let last_name = self.dir.join(format!("last.{set_index}"));
        let last_given = read(&last_name)?.and_then(|text| text.trim().parse().ok());
        let is_held = |addr: IpAddr| self.dir.join(addr.to_string()).exists();
        let given = match wanted {
            Some(addr) => set.allocate_exactly(addr, is_held)?,
            None => set.allocate(last_given, is_held)?,
        };
        let addr = given.address.addr();
        self.record(owner, &own_name, addr)?;
        write_atomically(&last_name, &addr.to_string())?;
        Ok(given)
    }

    /// Gives back everything `owner` holds; nothing held is success.
    pub(super) fn release(&self, owner: &Owner) -> Result<(), StoreError> {
        let suffix = format!(".{}", owner.file_suffix());
        self.release_files(|name, _| name.ends_with(&suffix), |record_owner| record_owner == owner)
    }

    /// Gives back everything whose owner is not kept.
    pub(super) fn release_all_but(&self, is_kept: impl Fn(&Owner) -> bool) -> Result<(), StoreError> {
        self.release_files(|_, _| true, |owner| !is_kept(owner))
    }

    /// The addresses `owner` holds.
    pub(super) fn held_by(&self, owner: &Owner) -> Result<Vec<IpAddr>, StoreError> {
        let suffix = format!(".{}", owner.file_suffix());
        let mut held = Vec::new();
        for (name, path) in self.owner_files()? {
            if !name.ends_with(&suffix) {
                continue;
            }
            if let Some(record) = read(&path)?.as_deref().and_then(Record::parse)
                && record.owner == *owner
                && self.dir.join(record.addr.to_string()).exists()
            {
                held.push(record.addr);
            }
        }
        Ok(held)
    }

    /// The allocation `owner` has already, completed when a killed call left it half done.
    fn kept(
        &self,
        owner: &Owner,
        own_name: &str,
        set: &RangeSet,
        wanted: Option<IpAddr>,
    ) -> Result<Option<Allocation>, StoreError> {
        let own_path = self.dir.join(own_name);
        let Some(record) = read(&own_path)?.as_deref().and_then(Record::parse) else { return Ok(None) };
        let usable = set.find(record.addr).filter(|_| wanted.is_none_or(|wanted| wanted == record.addr));
        let address_path = self.dir.join(record.addr.to_string());
        if let Some(allocation) = usable {
            let holder = read(&address_path)?.as_deref().and_then(Record::parse);
            match holder {
                Some(holder) if holder.owner == *owner => return Ok(Some(allocation)),
                Some(_) => {}
                None => {
                    fs::hard_link(&own_path, &address_path)
                        .map_err(|source| failed("link", &address_path, source))?;
                    return Ok(Some(allocation));
                }
            }
        }
        self.drop_record(&own_path, &record)?;
        Ok(None)
    }

    fn record(&self, owner: &Owner, own_name: &str, addr: IpAddr) -> Result<(), StoreError> {
        let mut text = String::new();
        let lines = [&owner.container_id, &owner.ifname, &self.boot_id, &addr.to_string()];
        for line in lines {
            writeln!(text, "{line}").expect("writing to a string cannot fail");
        }
        let own_path = self.dir.join(own_name);
        let address_path = self.dir.join(addr.to_string());
        write_atomically(&own_path, &text)?;
        fs::hard_link(&own_path, &address_path).map_err(|source| failed("link", &address_path, source))
    }

    fn release_files(
        &self,
        by_name: impl Fn(&str, &Path) -> bool,
        by_owner: impl Fn(&Owner) -> bool,
    ) -> Result<(), StoreError> {
        for (name, path) in self.owner_files()? {
            if !by_name(&name, &path) {
                continue;
            }
            match read(&path)?.as_deref().map(Record::parse) {
                Some(Some(record)) if by_owner(&record.owner) => self.drop_record(&path, &record)?,
                // Unreadable: no owner can claim it, so it only blocks.
                Some(None) => remove(&path)?,
                _ => {}
            }
        }
        Ok(())
    }

    /// Removes a record's names, the address first: it is the one others wait for.
    fn drop_record(&self, own_path: &Path, record: &Record) -> Result<(), StoreError> {
        let address_path = self.dir.join(record.addr.to_string());
        let holder = read(&address_path)?.as_deref().and_then(Record::parse);
        if holder.is_some_and(|holder| holder.owner == record.owner) {
            remove(&address_path)?;
        }
        remove(own_path)
    }

    fn sweep_after_boot(&self) -> Result<(), StoreError> {
        let boot_path = self.dir.join("boot");
        if read(&boot_path)?.is_some_and(|swept| swept.trim() == self.boot_id) {
            return Ok(());
        }
        for (_, path) in self.owner_files()? {
            match read(&path)?.as_deref().map(Record::parse) {
                Some(Some(record)) if record.boot_id == self.boot_id => {}
                Some(Some(record)) => self.drop_record(&path, &record)?,
                Some(None) => remove(&path)?,
                None => {}
            }
        }
        write_atomically(&boot_path, &self.boot_id)
    }

    fn owner_files(&self) -> Result<Vec<(String, PathBuf)>, StoreError> {
        let entries = fs::read_dir(&self.dir).map_err(|source| failed("list", &self.dir, source))?;
        let mut files = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|source| failed("list", &self.dir, source))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("own.") {
                files.push((name, entry.path()));
            }
        }
        Ok(files)
    }
}

impl Record {
    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let mut next = || lines.next().filter(|line| !line.is_empty());
        let owner = Owner { container_id: next()?.to_owned(), ifname: next()?.to_owned() };
        Some(Self { owner, boot_id: next()?.to_owned(), addr: next()?.parse().ok()? })
    }
}

fn failed(step: &'static str, path: &Path, source: io::Error) -> StoreError {
    StoreError { step, path: path.to_owned(), source }
}

fn read(path: &Path) -> Result<Option<String>, StoreError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(failed("read", path, source)),
    }
}

fn remove(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(failed("remove", path, source)),
        _ => Ok(()),
    }
}

/// Replaces a file in one step. The temporary name needs no uniqueness: the lock is held.
fn write_atomically(path: &Path, text: &str) -> Result<(), StoreError> {
    let temporary = path.with_file_name(".tmp");
    fs::write(&temporary, text).map_err(|source| failed("write", path, source))?;
    fs::rename(&temporary, path).map_err(|source| failed("rename", path, source))
}

#[cfg(test)]
mod tests;
