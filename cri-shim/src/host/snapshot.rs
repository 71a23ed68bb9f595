//! Mounts a containerd snapshot: what its `Mounts` answer says, read-only, at a directory of ours.

use std::io;
use std::path::Path;

use containerd_client::types::Mount;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};

/// The kernel takes one page of options; longer lists of layers are shortened by going to their common directory.
const LONGEST_OPTIONS: usize = 3900;

/// Tells whether something is mounted at `path`.
pub fn is_mount_point(path: &Path) -> bool {
    statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT, StatxFlags::TYPE)
        .is_ok_and(|found| found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// Mounts a view read-only at `target`.
pub fn mount_readonly(mounts: &[Mount], target: &Path) -> io::Result<()> {
    let [one] = mounts else {
        return Err(io::Error::other(format!("containerd gave {} mounts for one snapshot", mounts.len())));
    };
    match one.r#type.as_str() {
        "bind" | "rbind" => {
            mount(Some(one.source.as_str()), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
            let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            let remounted = mount(None::<&str>, target, None::<&str>, flags, None::<&str>);
            if remounted.is_err() {
                nix::mount::umount2(target, nix::mount::MntFlags::MNT_DETACH)?;
            }
            Ok(remounted?)
        }
        "overlay" => overlay(&one.options, target),
        other => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            format!("a snapshotter whose mounts are of type {other:?} cannot be used for image volumes"),
        )),
    }
}

fn overlay(options: &[String], target: &Path) -> io::Result<()> {
    let data: Vec<&str> =
        options.iter().map(String::as_str).filter(|option| !matches!(*option, "ro" | "rw")).collect();
    let text = data.join(",");
    if text.len() < LONGEST_OPTIONS {
        return Ok(mount(Some("overlay"), target, Some("overlay"), MsFlags::MS_RDONLY, Some(text.as_str()))?);
    }
    let (base, text) = shortened(&data)
        .ok_or_else(|| io::Error::other("the list of layers is longer than the kernel takes"))?;
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            // A working directory of this thread's own, for the relative layers.
            unshare(CloneFlags::CLONE_FS)?;
            std::env::set_current_dir(&base)?;
            mount(Some("overlay"), target, Some("overlay"), MsFlags::MS_RDONLY, Some(text.as_str()))?;
            Ok(())
        });
        worker.join().map_err(|_panic| io::Error::other("the mounting thread failed"))?
    })
}

/// The layers relative to a directory they share, when that makes them short enough.
fn shortened(options: &[&str]) -> Option<(String, String)> {
    let layers = options.iter().find_map(|option| option.strip_prefix("lowerdir="))?;
    let base = layers.split(':').next()?.rsplitn(3, '/').nth(2)?;
    let prefix = format!("{base}/");
    let relative: Option<Vec<&str>> = layers.split(':').map(|layer| layer.strip_prefix(&prefix)).collect();
    let relative = format!("lowerdir={}", relative?.join(":"));
    let options =
        options.iter().map(|option| if option.starts_with("lowerdir=") { &relative } else { *option });
    let text = options.collect::<Vec<_>>().join(",");
    (text.len() < LONGEST_OPTIONS).then(|| (base.to_owned(), text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_layers_become_relative_to_what_they_share() {
        let base = "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots";
        let layers: Vec<_> = (0..128).map(|number| format!("{base}/{number}/fs")).collect();
        let lower = format!("lowerdir={}", layers.join(":"));
        let (found, text) = shortened(&["index=off", &lower]).expect("short enough");
        assert_eq!(found, base);
        assert!(text.starts_with("index=off,lowerdir=0/fs:1/fs:") && text.len() < LONGEST_OPTIONS);
        assert_eq!(shortened(&["lowerdir=/a/1/fs:/b/2/fs"]), None);
    }

    #[test]
    fn the_root_is_a_mount_point_and_a_fresh_directory_is_not() {
        assert!(is_mount_point(Path::new("/proc")));
        assert!(!is_mount_point(tempfile::tempdir().expect("temp dir").path()));
    }
}
