//! The mount table of this process, `/proc/self/mountinfo`.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// Where the kernel shows it.
pub(crate) const TABLE: &str = "/proc/self/mountinfo";

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    /// Number of the file system's device: `8:16`.
    pub(crate) device: String,
    /// Directory of the file system that is shown.
    pub(crate) root: PathBuf,
    /// Where.
    pub(crate) point: PathBuf,
    /// Type.
    pub(crate) fs_type: String,
    /// Options of the file system.
    pub(crate) super_options: String,
}

/// Every mount, in order.
pub(crate) fn read() -> io::Result<Vec<Mount>> {
    Ok(parse(&std::fs::read_to_string(TABLE)?))
}

/// Mount points at or below `dir`, the newest first: the order to unmount in.
pub(crate) fn below(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mounts = read()?.into_iter().map(|mount| mount.point);
    let mut inside: Vec<PathBuf> = mounts.filter(|point| point.starts_with(dir)).collect();
    inside.reverse();
    Ok(inside)
}

/// The type of what is mounted at `path`, if something is. It is not asked: it may never answer.
pub(crate) fn type_at(path: &Path) -> io::Result<Option<String>> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(None) };
    // The table holds real paths; what was mounted last lies on top.
    let real = parent.canonicalize()?.join(name);
    let found = read()?.into_iter().rev().find(|mount| mount.point == real);
    Ok(found.map(|mount| mount.fs_type))
}

/// Whether something is mounted at `path`. What is mounted there is not asked: it may never answer.
pub(crate) fn is_mount_point(path: &Path) -> io::Result<bool> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(true) };
    // The table holds real paths.
    let real = match parent.canonicalize() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        parent => parent?.join(name),
    };
    Ok(read()?.iter().any(|mount| mount.point == real))
}

/// The device of the file system that holds `path` by its name, links not followed; none for what the root file system holds.
pub(crate) fn holding<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a str> {
    let around = mounts.iter().filter(|mount| path.starts_with(&mount.point));
    // What was mounted last lies on top.
    let nearest = around.max_by_key(|mount| mount.point.components().count())?;
    (nearest.point != Path::new("/")).then_some(nearest.device.as_str())
}

/// Lines that do not have the documented form (proc(5)) are skipped.
pub(crate) fn parse(text: &str) -> Vec<Mount> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Mount> {
    let (mount, file_system) = line.split_once(" - ")?;
    let mut fields = mount.split(' ').skip(2);
    let (device, root, mount_point) = (fields.next()?, fields.next()?, fields.next()?);
    let mut fields = file_system.split(' ');
    let (fs_type, _source) = (fields.next()?, fields.next()?);
    Some(Mount {
        device: device.to_owned(),
        root: unescape(root),
        point: unescape(mount_point),
        fs_type: fs_type.to_owned(),
        super_options: fields.next().unwrap_or_default().to_owned(),
    })
}

/// Space, tab, newline and backslash are written as three octal digits.
fn unescape(text: &str) -> PathBuf {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut index = 0;
    while index < bytes.len() {
        let digits = bytes.get(index + 1..index + 4).and_then(|digits| std::str::from_utf8(digits).ok());
        let escaped = digits.filter(|_| bytes[index] == b'\\');
        if let Some(byte) = escaped.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            plain.push(byte);
            index += 4;
        } else {
            plain.push(bytes[index]);
            index += 1;
        }
    }
    PathBuf::from(OsString::from_vec(plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn optional_fields_and_escapes_are_understood() {
        let mounts = parse(
            "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue\n\
             37 36 0:5 / /a\\040b\\134 rw - tmpfs tmpfs rw,size=4k\nnonsense\n",
        );
        assert_eq!(mounts.len(), 2);
        assert_eq!((mounts[0].fs_type.as_str(), mounts[0].root.as_path()), ("ext3", Path::new("/mnt1")));
        assert_eq!((mounts[0].device.as_str(), mounts[1].device.as_str()), ("98:0", "0:5"));
        assert_eq!(mounts[1].point, Path::new("/a b\\"));
        assert_eq!(mounts[1].super_options, "rw,size=4k");
    }
}
