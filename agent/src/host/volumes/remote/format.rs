//! A disk's file system: found, made where there is none, checked and mounted.
//!
//! Input: a device and the kind that is wanted. A disk is only written to where `blkid` finds nothing on it at all: no file
//! system, no partitions, no volume group. A disk that cannot be read looks the same to `blkid`, so it is read first.

use std::io::Read as _;
use std::path::Path;

use tracing::{info, warn};

use super::mounts::{Places, said};
use super::source::{join_options, mount_arguments};
use super::tools::ToolError;

/// How much of a disk is read to know that it can be.
const PROBE: u64 = 128 * 1024;
/// blkid: nothing was found.
const NOTHING: i32 = 2;
/// fsck: errors were corrected.
const CORRECTED: i32 = 1;
/// fsck: errors are left.
const LEFT: i32 = 4;

/// What a disk has on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Content {
    /// Nothing.
    Empty,
    /// A file system of this kind, or something else that has a name.
    Known(String),
    /// Partitions, or what blkid has no name for.
    Unknown,
}

/// What blkid's answer means.
pub(super) fn content(status: Option<i32>, text: &str) -> Result<Content, String> {
    let value = |name: &str| {
        text.lines()
            .find_map(|line| line.trim().strip_prefix(name)?.strip_prefix('='))
            .filter(|v| !v.is_empty())
    };
    match status {
        Some(NOTHING) if text.trim().is_empty() => Ok(Content::Empty),
        Some(0) => Ok(value("TYPE").map_or(Content::Unknown, |kind| Content::Known(kind.to_owned()))),
        // Signatures of several: whose data it is cannot be known, and a check might write into it.
        Some(8) => Err(format!("blkid finds more than one signature: {text}")),
        status => Err(format!("blkid ended with {status:?}: {text}")),
    }
}

/// Arguments with which a file system is made.
pub(super) fn make_arguments(kind: &str, device: &str) -> Vec<String> {
    let flags: &[&str] = match kind {
        "ext3" | "ext4" => &["-F", "-m0"],
        "xfs" | "btrfs" => &["-f"],
        _ => &[],
    };
    flags.iter().copied().chain([device]).map(str::to_owned).collect()
}

impl Places {
    /// Mounts the disk's file system at `target`, and makes it where the disk is empty.
    pub(super) async fn format_and_mount(
        &self,
        device: &Path,
        target: &Path,
        (kind, options, read_only): (&str, &[String], bool),
    ) -> Result<(), String> {
        let kind = if kind.is_empty() { "ext4" } else { kind };
        let is_kind = kind.chars().all(|letter| letter.is_ascii_alphanumeric() || "._-".contains(letter));
        if !is_kind || kind.starts_with('-') {
            return Err(format!("{kind:?} is no kind of file system"));
        }
        let shown = device.to_string_lossy().into_owned();
        match self.probe(device, &shown).await? {
            Content::Empty if read_only => {
                return Err(format!(
                    "cannot mount unformatted disk {shown} as we are manipulating it in read-only mode"
                ));
            }
            Content::Empty => self.make(kind, &shown).await?,
            found => {
                if found != Content::Known(kind.to_owned()) {
                    warn!(device = %shown, ?found, wanted = kind, "a disk has something else than what is wanted");
                }
                if !read_only {
                    self.repair(&shown).await?;
                }
            }
        }
        let more: &[&str] = if read_only { &["ro", "defaults"] } else { &["defaults"] };
        let options = join_options(options, more);
        let arguments = mount_arguments(Some(kind), &options, &shown, &target.to_string_lossy());
        self.mount(target, &arguments, self.format).await
    }

    async fn probe(&self, device: &Path, shown: &str) -> Result<Content, String> {
        let file = device.to_owned();
        let reading = tokio::task::spawn_blocking(move || {
            let mut some = Vec::new();
            std::fs::File::open(file)?.take(PROBE).read_to_end(&mut some)
        });
        let read = match tokio::time::timeout(self.login, reading).await {
            Ok(read) => read.map_err(std::io::Error::other).and_then(|read| read),
            Err(_elapsed) => Err(std::io::Error::other("it does not answer")),
        };
        let some = read.map_err(|error| format!("cannot read {shown}: {error}"))?;
        if some == 0 {
            return Err(format!("{shown} has no size"));
        }
        let found = self.tools.run("blkid", &["-p", "-o", "export", shown], self.login).await;
        let found = found.map_err(|error| error.to_string())?;
        content(found.status.code(), &found.text)
            .map_err(|problem| format!("could not determine if disk {shown} is formatted: {problem}"))
    }

    async fn make(&self, kind: &str, device: &str) -> Result<(), String> {
        info!(%device, kind, "an empty disk gets a file system");
        let tool = format!("mkfs.{kind}");
        let done = self.tools.run(&tool, &make_arguments(kind, device), self.format).await;
        said(done).map(|_| ()).map_err(|problem| {
            format!("format of disk {device:?} failed: type:({kind:?}) errcode:({problem})")
        })
    }

    async fn repair(&self, device: &str) -> Result<(), String> {
        let ended = match self.tools.run("fsck", &["-a", device], self.format).await {
            Ok(ended) => ended,
            Err(error @ ToolError::Late { .. }) => return Err(error.to_string()),
            Err(error) => {
                // Upstream mounts what it cannot check, too; the file system itself refuses what is broken.
                warn!(%device, %error, "a disk is not checked");
                return Ok(());
            }
        };
        match ended.status.code() {
            Some(LEFT) => Err(format!(
                "'fsck' found errors on device {device} but could not correct them: {}",
                ended.text
            )),
            Some(CORRECTED) => {
                info!(%device, "fsck has corrected errors");
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_disk_on_which_nothing_was_found_is_empty() {
        assert_eq!(content(Some(2), "").unwrap(), Content::Empty);
        assert_eq!(
            content(Some(0), "DEVNAME=/dev/sdb\nTYPE=xfs\n").unwrap(),
            Content::Known("xfs".to_owned())
        );
        assert_eq!(content(Some(0), "DEVNAME=/dev/sdb\nPTTYPE=gpt\n").unwrap(), Content::Unknown);
        assert_eq!(content(Some(0), "TYPE=LVM2_member\n").unwrap(), Content::Known("LVM2_member".to_owned()));
        assert!(content(Some(8), "").is_err());
        for (status, text) in [(Some(2), "error: /dev/sdb: Input/output error"), (Some(4), ""), (None, "")] {
            assert!(content(status, text).is_err(), "{status:?} {text}");
        }
    }

    #[test]
    fn file_systems_are_made_as_upstream_makes_them() {
        assert_eq!(make_arguments("ext4", "/dev/sdb"), ["-F", "-m0", "/dev/sdb"]);
        assert_eq!(make_arguments("xfs", "/dev/sdb"), ["-f", "/dev/sdb"]);
        assert_eq!(make_arguments("ext2", "/dev/sdb"), ["/dev/sdb"]);
    }
}
