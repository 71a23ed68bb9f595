//! A disk of an iSCSI target on this node: logged in, found, and logged out again.
//!
//! Input: a [`Target`]. Output: its device. Which sessions there are says `iscsiadm`, which device a disk is says udev
//! (`/dev/disk/by-path`); nothing is remembered here.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::iscsi::{self, Call, Record, Session, Target};
use super::mounts::{Places, said};

/// How often a disk is looked for.
const LOOK: Duration = Duration::from_millis(100);
/// How often portals are tried that do not give the disk while others do.
const ATTEMPTS: usize = 2;
/// Deadline of unmounting a disk: what is written to it must get there.
const FLUSH: Duration = Duration::from_secs(120);
/// What a disk's directory says about it.
const RECORD: &str = "iscsi.json";

impl Places {
    /// Logs in where there is no session, and finds the disk's device.
    pub(super) async fn attach(
        &self,
        target: &Target,
        secret: &BTreeMap<String, String>,
    ) -> Result<PathBuf, String> {
        target.check()?;
        let show = ["-m", "iface", "-I", target.interface.as_str(), "-o", "show"];
        let settings = said(self.tools.run("iscsiadm", &show, self.login).await).map_err(|problem| {
            format!("iscsi: could not read iface {} error: {problem}", target.interface)
        })?;
        let settings = iscsi::parse_iface(&settings);
        let is_tcp = settings.get("iface.transport_name").is_none_or(|transport| transport == "tcp");
        if !target.initiator.is_empty() {
            let calls = iscsi::clone_iface(&target.login_interface(), &target.initiator, &settings);
            self.call_all(&calls).await?;
        }
        let (mut found, mut problem) = (BTreeMap::new(), String::new());
        for _ in 0..ATTEMPTS {
            for (number, portal) in target.portals.iter().enumerate() {
                if found.contains_key(&number) {
                    continue;
                }
                match self.attach_at(target, portal, secret, is_tcp).await {
                    Ok(device) => {
                        found.insert(number, device);
                    }
                    Err(error) => {
                        warn!(%portal, iqn = %target.iqn, %error, "a portal does not give the disk");
                        problem = error;
                    }
                }
            }
            // None at all is tried again with its pod; two are as many ways as it takes.
            if found.is_empty() || found.len() >= target.portals.len().min(2) {
                break;
            }
        }
        let devices: Vec<PathBuf> = found.into_values().collect();
        let first = devices.first().cloned();
        let device = first
            .ok_or_else(|| format!("failed to get any path for iscsi disk, last err seen:\n{problem}"))?;
        let patience = if target.portals.len() > 1 { self.multipath } else { Duration::ZERO };
        Ok(self.wait_for_multipath(&devices, patience).await.unwrap_or(device))
    }

    /// The device that stands for all ways to the disk. A file system on one of the ways would keep it from coming about.
    async fn wait_for_multipath(&self, devices: &[PathBuf], patience: Duration) -> Option<PathBuf> {
        let end = Instant::now() + patience;
        loop {
            let whole = devices.iter().find_map(|device| self.multipath_of(device));
            if whole.is_some() || Instant::now() >= end {
                return whole;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn attach_at(
        &self,
        target: &Target,
        portal: &str,
        secret: &BTreeMap<String, String>,
        is_tcp: bool,
    ) -> Result<PathBuf, String> {
        let mut session = self.session(target, portal).await?;
        if session.is_none() {
            if let Err(problem) = self.call_all(&iscsi::login(target, portal, secret)).await {
                self.call_all(&iscsi::forget(target, portal)).await?;
                return Err(problem);
            }
            info!(%portal, iqn = %target.iqn, "logged in");
            session = self.session(target, portal).await?;
        }
        let session =
            session.ok_or_else(|| format!("iscsi: no session at {portal} after a login that went well"))?;
        self.scan(session.id, target.lun).await?;
        let end = Instant::now() + self.device;
        loop {
            if let Some(device) = self.device_of(target, portal, is_tcp) {
                return Ok(device);
            }
            if Instant::now() >= end {
                return Err(format!("Could not attach disk: Timeout after {}s", self.device.as_secs()));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The session at a portal.
    async fn session(&self, target: &Target, portal: &str) -> Result<Option<Session>, String> {
        let sessions = self.sessions().await?;
        Ok(sessions.into_iter().find(|one| one.portal == portal && one.iqn == target.iqn))
    }

    async fn sessions(&self) -> Result<Vec<Session>, String> {
        // It ends with an error where there are none.
        let done = self.tools.run("iscsiadm", &["-m", "session"], self.login).await;
        Ok(iscsi::parse_sessions(&done.map_err(|error| error.to_string())?.text))
    }

    async fn call_all(&self, calls: &[Call]) -> Result<(), String> {
        for call in calls {
            let done = said(self.tools.run("iscsiadm", &call.arguments, self.login).await);
            match (done, &call.problem) {
                (Err(error), Some(problem)) => return Err(format!("{problem}: {error}")),
                (Err(error), None) => debug!(%error, "iscsiadm, which may fail here"),
                (Ok(_), _) => {}
            }
        }
        Ok(())
    }

    /// Has the kernel look for this one disk.
    async fn scan(&self, session: u32, lun: i32) -> Result<(), String> {
        let device = self.sys.join(format!("class/iscsi_session/session{session}/device"));
        let device = device.canonicalize().map_err(|error| format!("{}: {error}", device.display()))?;
        let mut parts = device.iter().filter_map(|part| part.to_str());
        let is_host = |part: &&str| part.strip_prefix("host").is_some_and(|rest| rest.parse::<u32>().is_ok());
        let host = parts.rfind(is_host).ok_or_else(|| format!("{} is of no SCSI host", device.display()))?;
        let file = self.sys.join("class/scsi_host").join(host).join("scan");
        let done = self.tell_kernel(&file, format!("0 0 {lun}")).await;
        done.map_err(|error| format!("{}: {error}", file.display()))
    }

    /// The device of a disk at a portal.
    fn device_of(&self, target: &Target, portal: &str, is_tcp: bool) -> Option<PathBuf> {
        let (links, name) = (self.dev.join("disk/by-path"), iscsi::link_name(target, portal));
        let link = if is_tcp {
            links.join(name)
        } else {
            let all = std::fs::read_dir(&links).ok()?.flatten().map(|entry| entry.path());
            let end = format!("-{name}");
            let mut fitting: Vec<_> = all.filter(|path| path.to_string_lossy().ends_with(&end)).collect();
            fitting.sort();
            fitting.into_iter().next()?
        };
        link.canonicalize().ok()
    }

    /// The device that stands for all ways to the disk, where there is one.
    fn multipath_of(&self, device: &Path) -> Option<PathBuf> {
        let name = device.file_name()?;
        for entry in std::fs::read_dir(self.sys.join("block")).ok()?.flatten() {
            let file = entry.path();
            let is_slave = file.join("slaves").join(name).exists();
            let uuid = std::fs::read_to_string(file.join("dm/uuid")).unwrap_or_default();
            if is_slave && uuid.starts_with("mpath-") {
                return Some(self.dev.join(entry.file_name()));
            }
        }
        None
    }

    /// Takes a disk that no pod has any more from the node, and logs out where it was the last one of its target.
    pub(super) async fn detach(&self, dir: &Path, is_last: bool) -> Result<(), String> {
        self.unmount(dir, FLUSH).await?;
        let record = read(dir)?;
        let unflushed = self.drop_devices(&record).await?;
        if is_last {
            let done = self.call_all(&iscsi::logout(&record)).await;
            let left = self.sessions().await?;
            let is_left =
                left.iter().any(|one| one.iqn == record.iqn && record.portals.contains(&one.portal));
            match done {
                Err(problem) if is_left => {
                    return Err(unflushed.map_or(problem.clone(), |before| format!("{before}; {problem}")));
                }
                Err(problem) => debug!(%problem, "was logged out already"),
                Ok(()) => info!(iqn = %record.iqn, "logged out"),
            }
        }
        if let Some(problem) = unflushed {
            warn!(%problem, "the disk is gone all the same");
        }
        let gone = |done| crate::files::gone(done).map_err(|error| format!("{}: {error}", dir.display()));
        gone(std::fs::remove_file(dir.join(RECORD)))?;
        gone(std::fs::remove_dir(dir))?;
        if let Some(parent) = dir.parent() {
            // Another disk of this iface keeps it.
            std::fs::remove_dir(parent).ok();
        }
        Ok(())
    }

    /// Has the kernel forget the disk: at the next login another may have its number. Says where a multipath device stays.
    async fn drop_devices(&self, record: &Record) -> Result<Option<String>, String> {
        let Ok(lun) = record.lun.parse() else { return Ok(None) };
        let target = Target { iqn: record.iqn.clone(), lun, ..Target::default() };
        let devices: Vec<PathBuf> = record
            .portals
            .iter()
            .filter_map(|portal| {
                self.device_of(&target, portal, true).or_else(|| self.device_of(&target, portal, false))
            })
            .collect();
        let whole = devices.iter().find_map(|device| self.multipath_of(device));
        // What is not in the list of mounts any more may still be being written.
        for device in whole.as_ref().map_or(devices.as_slice(), std::slice::from_ref) {
            self.is_free(device).await?;
        }
        let mut unflushed = None;
        if let Some(whole) = whole {
            let shown = whole.to_string_lossy().into_owned();
            let done = said(self.tools.run("multipath", &["-f", &shown], self.login).await);
            unflushed = done.err().map(|problem| format!("{shown} is not flushed: {problem}"));
        }
        for name in devices.iter().filter_map(|device| device.file_name()) {
            let file = self.sys.join("block").join(name).join("device/delete");
            if let Err(error) = self.tell_kernel(&file, "1".to_owned()).await {
                debug!(path = %file.display(), %error, "a disk stays known to the kernel");
            }
        }
        Ok(unflushed)
    }

    /// An error while somebody, be it the kernel that writes back what was cached, has the device for itself (`O_EXCL` of a
    /// device, open(2)).
    async fn is_free(&self, device: &Path) -> Result<(), String> {
        let opening = self.ask(device, |device| {
            let only = nix::fcntl::OFlag::O_EXCL.bits();
            std::fs::OpenOptions::new().read(true).custom_flags(only).open(device).map(drop)
        });
        match opening.await {
            Err(error)
                if error.kind() == ErrorKind::TimedOut || error.raw_os_error() == Some(nix::libc::EBUSY) =>
            {
                Err(format!("{} is still in use", device.display()))
            }
            // One that is gone, or gives errors, holds nothing that could be waited for.
            _ => Ok(()),
        }
    }

    /// Writes into a file of sysfs, which waits for the disk's answer.
    async fn tell_kernel(&self, file: &Path, what: String) -> io::Result<()> {
        self.ask(file, move |file| std::fs::write(file, what)).await
    }

    /// Does what waits for a disk's answer. A file that has not answered is not asked again before it has: no more threads wait
    /// in the kernel than there are files.
    async fn ask<T: Send + 'static>(
        &self,
        file: &Path,
        work: impl FnOnce(&Path) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let silent = || io::Error::new(ErrorKind::TimedOut, "the disk does not answer");
        let is_free = self.waiting().insert(file.to_owned());
        if !is_free {
            return Err(silent());
        }
        let (this, path) = (self.clone(), file.to_owned());
        let working = tokio::task::spawn_blocking(move || {
            let done = work(&path);
            this.waiting().remove(&path);
            done
        });
        match tokio::time::timeout(self.login, working).await {
            Ok(done) => done.map_err(io::Error::other).and_then(|done| done),
            Err(_elapsed) => Err(silent()),
        }
    }

    fn waiting(&self) -> MutexGuard<'_, BTreeSet<PathBuf>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes down what is in a disk's directory, before anything is mounted over it.
pub(super) fn write(dir: &Path, target: &Target) -> Result<(), String> {
    let text = serde_json::to_string(&target.record()).map_err(|error| error.to_string())?;
    super::super::make_dir(dir, 0o750)
        .and_then(|()| crate::files::write_private(&dir.join(RECORD), &text))
        .map_err(|error| format!("iscsi: create {}: {error}", dir.display()))
}

/// What a disk's directory says; where there is nothing, what its name says.
fn read(dir: &Path) -> Result<Record, String> {
    let text = std::fs::read_to_string(dir.join(RECORD)).unwrap_or_default();
    if let Ok(record) = serde_json::from_str::<Record>(&text)
        && !record.portals.is_empty()
    {
        return Ok(record);
    }
    let part = |path: Option<&std::ffi::OsStr>| path.unwrap_or_default().to_string_lossy().into_owned();
    let (name, above) = (part(dir.file_name()), part(dir.parent().and_then(Path::file_name)));
    let unclear = || format!("{} says of no target", dir.display());
    let (target, lun) = name.rsplit_once("-lun-").ok_or_else(unclear)?;
    let at = ["-iqn.", "-eui.", "-naa."].iter().find_map(|mark| target.find(mark)).ok_or_else(unclear)?;
    Ok(Record {
        portals: vec![target[..at].to_owned()],
        iqn: target[at + 1..].to_owned(),
        lun: lun.to_owned(),
        iface: above.strip_prefix("iface-").unwrap_or("default").to_owned(),
        ..Record::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_without_a_record_tells_its_target_by_its_name() {
        let record = read(Path::new("/nowhere/iface-eth/[fd00::1]:3260-iqn.2026-01.a-b:c-lun-12")).unwrap();
        assert_eq!(
            (record.portals[0].as_str(), record.iqn.as_str()),
            ("[fd00::1]:3260", "iqn.2026-01.a-b:c")
        );
        assert_eq!((record.lun.as_str(), record.iface.as_str()), ("12", "eth"));
        assert!(read(Path::new("/nowhere/iface-eth/else")).is_err());
    }
}
