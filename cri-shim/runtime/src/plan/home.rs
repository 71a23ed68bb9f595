//! The home directory of a user, from the container's `/etc/passwd`.

use std::io::Read;
use std::os::fd::BorrowedFd;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};

/// No account file is larger.
const LIMIT: u64 = 1 << 20;

/// The home of the first account with that number, when the file is there and readable.
pub(crate) fn of(root: BorrowedFd<'_>, uid: u32) -> Option<String> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = rustix::fs::openat2(root, "etc/passwd", flags, Mode::empty(), resolve).ok()?;
    let mode = rustix::fs::fstat(&file).ok()?.st_mode;
    if FileType::from_raw_mode(mode) != FileType::RegularFile {
        return None;
    }
    let mut text = Vec::new();
    std::fs::File::from(file).take(LIMIT).read_to_end(&mut text).ok()?;
    find(&String::from_utf8_lossy(&text), uid)
}

fn find(passwd: &str, uid: u32) -> Option<String> {
    passwd.lines().find_map(|line| {
        let mut parts = line.split(':').skip(2);
        let number: u32 = parts.next()?.parse().ok()?;
        let home = parts.nth(2)?;
        (number == uid && !home.is_empty()).then(|| home.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sixth_part_of_the_user_s_line() {
        let passwd = "# odd line\nroot:x:0:0:root:/root:/bin/sh\nw:x:33:33:w:/var/www:/bin/false\n";
        assert_eq!(find(passwd, 33).as_deref(), Some("/var/www"));
        assert_eq!(find(passwd, 5), None);
    }
}
