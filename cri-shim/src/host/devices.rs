//! Devices of the host that a container asks for.

use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use cri_shim_api::v1::Device;
use cri_shim_core::oci::devices::HostDevice;
use nix::sys::stat::{major, minor};

use crate::error::RuntimeError;

/// Directories of `/dev` that a container has for itself.
const OWN: [&str; 4] = ["pts", "shm", "mqueue", "console"];

/// The devices asked for; a directory stands for every device below it.
pub fn find(wanted: &[Device]) -> Result<Vec<HostDevice>, RuntimeError> {
    let mut found = Vec::new();
    for device in wanted {
        let host = Path::new(&device.host_path);
        let host = host.canonicalize().map_err(|error| {
            let problem = format!("{}: {error}", device.host_path);
            RuntimeError::Invalid { field: "devices.host_path", problem }
        })?;
        if host.is_dir() {
            let mut below = Vec::new();
            walk(&host, &mut below)?;
            for mut node in below {
                let rest = Path::new(&node.path).strip_prefix(&host).unwrap_or(Path::new("")).to_owned();
                node.path = Path::new(&device.container_path).join(rest).to_string_lossy().into_owned();
                node.permissions.clone_from(&device.permissions);
                found.push(node);
            }
        } else if let Some(mut node) = describe(&host)? {
            node.path.clone_from(&device.container_path);
            node.permissions.clone_from(&device.permissions);
            found.push(node);
        } else {
            let problem = format!("{} is not a device", device.host_path);
            return Err(RuntimeError::Invalid { field: "devices.host_path", problem });
        }
    }
    Ok(found)
}

/// Every device of the host, for a privileged container.
pub fn all() -> Result<Vec<HostDevice>, RuntimeError> {
    let mut found = Vec::new();
    walk(Path::new("/dev"), &mut found)?;
    Ok(found)
}

fn walk(directory: &Path, found: &mut Vec<HostDevice>) -> Result<(), RuntimeError> {
    for name in super::files::names_in(directory)? {
        let path: PathBuf = directory.join(&name);
        let own = directory == Path::new("/dev") && OWN.contains(&name.as_str());
        // Symbolic links lead to devices that are found by themselves.
        let Ok(kind) = path.symlink_metadata().map(|metadata| metadata.file_type()) else { continue };
        if kind.is_dir() && !own {
            walk(&path, found)?;
        } else if (kind.is_char_device() || kind.is_block_device()) && !own {
            found.extend(describe(&path)?);
        }
    }
    Ok(())
}

/// The device at `path`; nothing when that is no device.
pub fn describe(path: &Path) -> Result<Option<HostDevice>, RuntimeError> {
    let metadata = path.metadata().map_err(RuntimeError::host("inspect", path))?;
    let kind = metadata.file_type();
    if !kind.is_char_device() && !kind.is_block_device() {
        return Ok(None);
    }
    let number = |number: u64| i64::try_from(number).unwrap_or_default();
    Ok(Some(HostDevice {
        path: path.to_string_lossy().into_owned(),
        block: kind.is_block_device(),
        major: number(major(metadata.rdev())),
        minor: number(minor(metadata.rdev())),
        mode: metadata.permissions().mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        permissions: "rwm".to_owned(),
    }))
}
