//! Writing limits into cgroup files.

use std::io;
use std::path::Path;

use oci_spec::runtime::LinuxResources;

use super::convert::{self, Write};
use super::{Paths, devices, systemd};
use crate::error::Error;

impl Paths {
    /// Writes the limits that are present. Device rules stay as they are, as with runc: containerd's CRI plugin sends the
    /// whole section of the specification with them.
    pub fn update(&self, resources: &LinuxResources) -> Result<(), Error> {
        self.check(resources)?;
        if let Some(unit) = &self.unit {
            systemd::update(unit, resources, self.v1.is_empty())?;
        }
        self.set_limits(resources)
    }

    /// All limits of a new container.
    pub(crate) fn set_all(&self, resources: Option<&LinuxResources>) -> Result<(), Error> {
        devices::set(
            self,
            resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default(),
        )?;
        let Some(resources) = resources else { return Ok(()) };
        self.check(resources)?;
        self.set_limits(resources)
    }

    /// Refuses what would end the container, if that is wished.
    fn check(&self, resources: &LinuxResources) -> Result<(), Error> {
        match resources.memory() {
            Some(memory) if memory.check_before_update() == Some(true) => {
                self.check_usage(memory.limit().unwrap_or(0))
            }
            _ => Ok(()),
        }
    }

    fn set_limits(&self, resources: &LinuxResources) -> Result<(), Error> {
        if self.v1.is_empty() {
            let Some(directory) = &self.unified else { return Ok(()) };
            return put_all(convert::version2(resources)?.iter().map(|write| (directory.as_path(), write)));
        }
        let mut writes = Vec::new();
        for write in &convert::version1(resources)? {
            match self.v1.get(write.controller) {
                Some(directory) => writes.push((directory.as_path(), write.clone())),
                None if write.optional => {}
                None => {
                    return Err(Error::Unavailable {
                        feature: "a resource limit",
                        reason: format!("{}: the host has no controller {:?}", write.file, write.controller),
                    });
                }
            }
        }
        put_all(writes.iter().map(|(directory, write)| (*directory, write)))
    }

    fn check_usage(&self, limit: i64) -> Result<(), Error> {
        let usage = self.stats()?.memory_usage.unwrap_or(0);
        match u64::try_from(limit) {
            Ok(limit) if limit != 0 && usage >= limit => Err(Error::spec(
                "linux.resources.memory.limit",
                format!("{limit} is not above the {usage} bytes in use"),
            )),
            _ => Ok(()),
        }
    }
}

/// Writes in order. Some values are bound by each other's old ones (memory by memory with swap, quota by period): what is
/// refused is tried once more when the rest is written.
fn put_all<'a>(writes: impl Iterator<Item = (&'a Path, &'a Write)>) -> Result<(), Error> {
    let mut again = Vec::new();
    for (directory, write) in writes {
        match put(directory, write) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => again.push((directory, write)),
            other => other.map_err(failed(directory, write))?,
        }
    }
    // Backwards: the one that was in the way comes first.
    for (directory, write) in again.into_iter().rev() {
        put(directory, write).map_err(failed(directory, write))?;
    }
    Ok(())
}

fn failed(directory: &Path, write: &Write) -> impl FnOnce(io::Error) -> Error {
    Error::step(format!("write {:?} to {}", write.value, directory.join(&write.file).display()))
}

fn put(directory: &Path, write: &Write) -> io::Result<()> {
    match write_value(&directory.join(&write.file), &write.value) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => match &write.instead {
            Some((file, value)) => write_value(&directory.join(file), value),
            None if write.optional => Ok(()),
            None => Err(error),
        },
        other => other,
    }
}

/// Never makes a file: outside a cgroup file system that would hide that a limit was not set.
fn write_value(file: &Path, value: &str) -> io::Result<()> {
    use std::io::Write as _;
    std::fs::OpenOptions::new().write(true).open(file)?.write_all(value.as_bytes())
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{LinuxPidsBuilder, LinuxResourcesBuilder};

    use super::*;

    #[test]
    fn a_limit_without_its_file_is_told_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths { unified: Some(dir.path().into()), ..Paths::default() };
        let pids = LinuxPidsBuilder::default().limit(5_i64).build().unwrap();
        let resources = LinuxResourcesBuilder::default().pids(pids).build().unwrap();
        let error = paths.update(&resources).unwrap_err();
        assert!(error.to_string().contains("pids.max"), "{error}");
        std::fs::write(dir.path().join("pids.max"), "").unwrap();
        paths.update(&resources).unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("pids.max")).unwrap(), "5");
    }
}
