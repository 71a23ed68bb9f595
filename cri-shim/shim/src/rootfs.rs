//! The mounts of a container's root file system, as containerd's snapshotters give them: made below the bundle, taken away
//! at the end.

use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::proto::task::Mount;

/// Options longer than this do not fit into the page the kernel copies them to.
const PAGE: usize = 4096 - 512;

/// Makes the mounts, the first one at `root`; what was made is taken away again when a later one fails.
pub fn make(mounts: &[Mount], root: &Path) -> io::Result<()> {
    if mounts.is_empty() {
        return Ok(());
    }
    std::fs::create_dir_all(root)?;
    for one in mounts {
        if let Err(error) = mount_one(one, root) {
            let words = format!("mount {} ({}) at {}: {error}", one.source, one.r#type, root.display());
            remove(root).ok();
            return Err(io::Error::new(error.kind(), words));
        }
    }
    Ok(())
}

/// Takes away whatever is mounted at `root`; nothing is fine.
pub fn remove(root: &Path) -> io::Result<()> {
    loop {
        match umount2(root, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // No mount point, or not there at all.
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Flags and data of a mount's options.
#[derive(Debug, Default, PartialEq, Eq)]
struct Parsed {
    set: u64,
    propagation: u64,
    data: Vec<String>,
}

fn parse(options: &[String]) -> Parsed {
    let mut parsed = Parsed::default();
    let mut flags = MsFlags::empty();
    for option in options {
        let (flag, on) = match option.as_str() {
            "bind" => (MsFlags::MS_BIND, true),
            "rbind" => (MsFlags::MS_BIND | MsFlags::MS_REC, true),
            "ro" => (MsFlags::MS_RDONLY, true),
            "rw" => (MsFlags::MS_RDONLY, false),
            "nosuid" => (MsFlags::MS_NOSUID, true),
            "suid" => (MsFlags::MS_NOSUID, false),
            "nodev" => (MsFlags::MS_NODEV, true),
            "dev" => (MsFlags::MS_NODEV, false),
            "noexec" => (MsFlags::MS_NOEXEC, true),
            "exec" => (MsFlags::MS_NOEXEC, false),
            "noatime" => (MsFlags::MS_NOATIME, true),
            "nodiratime" => (MsFlags::MS_NODIRATIME, true),
            "relatime" => (MsFlags::MS_RELATIME, true),
            "strictatime" => (MsFlags::MS_STRICTATIME, true),
            "sync" => (MsFlags::MS_SYNCHRONOUS, true),
            "dirsync" => (MsFlags::MS_DIRSYNC, true),
            "defaults" | "async" => (MsFlags::empty(), true),
            "private" | "rprivate" | "shared" | "rshared" | "slave" | "rslave" => {
                parsed.propagation = propagation(option).bits();
                continue;
            }
            _ => {
                parsed.data.push(option.clone());
                continue;
            }
        };
        flags.set(flag, on);
    }
    parsed.set = flags.bits();
    parsed
}

fn propagation(option: &str) -> MsFlags {
    let recursive = if option.starts_with('r') { MsFlags::MS_REC } else { MsFlags::empty() };
    recursive
        | match option.trim_start_matches('r') {
            "shared" => MsFlags::MS_SHARED,
            "slave" => MsFlags::MS_SLAVE,
            _ => MsFlags::MS_PRIVATE,
        }
}

fn mount_one(one: &Mount, root: &Path) -> io::Result<()> {
    let parsed = parse(&one.options);
    let flags = MsFlags::from_bits_retain(parsed.set);
    let data = parsed.data.join(",");
    if data.len() >= PAGE && one.r#type == "overlay" {
        overlay_from_within(one, root, flags, parsed.data)?;
    } else {
        let data = (!data.is_empty()).then_some(data.as_str());
        mount(Some(one.source.as_str()), root, Some(one.r#type.as_str()), flags, data)?;
    }
    // A bind mount takes its other flags in a second step only.
    if flags.contains(MsFlags::MS_BIND) && !flags.difference(MsFlags::MS_BIND | MsFlags::MS_REC).is_empty() {
        mount(None::<&str>, root, None::<&str>, flags | MsFlags::MS_REMOUNT, None::<&str>)?;
    }
    if parsed.propagation != 0 {
        let flags = MsFlags::from_bits_retain(parsed.propagation);
        mount(None::<&str>, root, None::<&str>, flags, None::<&str>)?;
    }
    Ok(())
}

/// Mounts an overlay of many layers with paths relative to the layers' common folder, in a thread whose working
/// directory is its own.
fn overlay_from_within(one: &Mount, root: &Path, flags: MsFlags, data: Vec<String>) -> io::Result<()> {
    let (folder, data) = shorten(data);
    let Some(folder) = folder else { return Err(Errno::E2BIG.into()) };
    let (source, root) = (one.source.clone(), root.to_owned());
    let work = move || -> io::Result<()> {
        unshare(CloneFlags::CLONE_FS)?;
        std::env::set_current_dir(&folder)?;
        Ok(mount(Some(source.as_str()), &root, Some("overlay"), flags, Some(data.as_str()))?)
    };
    let thread = std::thread::Builder::new().stack_size(64 << 10).spawn(work)?;
    thread.join().map_err(|_panic| io::Error::other("mounting an overlay ended early"))?
}

/// The options with lower layers relative to their common folder, and that folder.
fn shorten(data: Vec<String>) -> (Option<PathBuf>, String) {
    let lower = data.iter().find_map(|option| option.strip_prefix("lowerdir=")).unwrap_or_default();
    let layers: Vec<PathBuf> = lower.split(':').map(PathBuf::from).collect();
    let Some(first) = layers.first().and_then(|layer| layer.parent()) else { return (None, data.join(",")) };
    let common = first.ancestors().find(|folder| layers.iter().all(|layer| layer.starts_with(folder)));
    let Some(folder) = common.map(Path::to_owned) else { return (None, data.join(",")) };
    let relative: Vec<String> = layers
        .iter()
        .map(|layer| layer.strip_prefix(&folder).unwrap_or(layer).to_string_lossy().into_owned())
        .collect();
    let short = format!("lowerdir={}", relative.join(":"));
    let data: Vec<String> = data
        .into_iter()
        .map(|option| if option.starts_with("lowerdir=") { short.clone() } else { option })
        .collect();
    (Some(folder), data.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_become_flags_and_data() {
        let options = ["rbind", "ro", "rslave", "lowerdir=/a:/b"].map(str::to_owned);
        let parsed = parse(&options);
        assert_eq!(parsed.set, (MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_RDONLY).bits());
        assert_eq!(parsed.propagation, (MsFlags::MS_SLAVE | MsFlags::MS_REC).bits());
        assert_eq!(parsed.data, ["lowerdir=/a:/b"]);
        assert_eq!(parse(&["ro".to_owned(), "rw".to_owned()]).set, 0);
    }

    #[test]
    fn many_layers_fit_by_their_common_folder() {
        let layer = |number: usize| format!("/var/lib/containerd/snapshots/{number}/fs");
        let lower = format!("lowerdir={}", [layer(1), layer(22)].join(":"));
        let (folder, data) = shorten(vec!["index=off".to_owned(), lower, "upperdir=/u".to_owned()]);
        assert_eq!(folder, Some("/var/lib/containerd/snapshots".into()));
        assert_eq!(data, "index=off,lowerdir=1/fs:22/fs,upperdir=/u");
    }
}
