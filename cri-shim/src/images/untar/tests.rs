//! Small archives, applied to a temporary directory. What needs root is in `tests/root_layers.rs`.

use std::fs;

use super::*;
use crate::images::decode::Budget;
use crate::images::settings::Settings;

fn meter() -> Meter {
    Budget::new(&Settings::default()).layer(1 << 20)
}

struct Archive(tar::Builder<Vec<u8>>);

impl Archive {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    /// An entry whose path is taken as it is, however bad.
    fn entry(mut self, kind: tar::EntryType, path: &str, link: &str, content: &[u8]) -> Self {
        let mut header = tar::Header::new_gnu();
        let bytes = header.as_old_mut();
        bytes.name[..path.len()].copy_from_slice(path.as_bytes());
        bytes.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_mode(if kind.is_dir() { 0o755 } else { 0o644 });
        header.set_uid(rustix::process::getuid().as_raw().into());
        header.set_gid(rustix::process::getgid().as_raw().into());
        header.set_mtime(1_000_000);
        header.set_cksum();
        self.0.append(&header, content).expect("appended");
        self
    }

    fn file(self, path: &str, content: &str) -> Self {
        self.entry(tar::EntryType::Regular, path, "", content.as_bytes())
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().expect("finished")
    }
}

fn applied(archive: Archive) -> (tempfile::TempDir, Result<Applied, ApplyError>) {
    let dir = tempfile::tempdir().expect("temp dir");
    let target = dir.path().join("root");
    fs::create_dir(&target).expect("made");
    let result = apply(archive.bytes().as_slice(), &target, Whiteouts::Remove, meter());
    (dir, result)
}

#[test]
fn nothing_gets_out_of_the_root() {
    use tar::EntryType::{Link, Symlink};
    let outside = tempfile::tempdir().expect("temp dir");
    let goal = outside.path().to_str().expect("text");
    let cases = [
        Archive::new().file("../../escaped", "x"),
        Archive::new().file("/escaped", "x"),
        Archive::new().entry(Symlink, "out", goal, b"").file("out/escaped", "x"),
        Archive::new().entry(Symlink, "up", "../..", b"").file("up/escaped", "x"),
        Archive::new().entry(Symlink, "a", "b", b"").entry(Symlink, "b", goal, b"").file("a/escaped", "x"),
        Archive::new().file("f", "x").entry(Symlink, "d", "..", b"").entry(Link, "d/escaped", "f", b""),
    ];
    for archive in cases {
        let (dir, result) = applied(archive);
        result.expect("applied inside");
        assert_eq!(fs::read_dir(outside.path()).expect("read").count(), 0);
        let names: Vec<_> =
            fs::read_dir(dir.path()).expect("read").flatten().map(|one| one.file_name()).collect();
        assert_eq!(names, ["root"]);
    }
    // A hard link to a file outside, by whatever name.
    fs::write(outside.path().join("secret"), "s").expect("written");
    let secret = format!("{goal}/secret");
    for archive in [
        Archive::new().entry(Link, "stolen", &secret, b""),
        Archive::new().entry(Symlink, "out", goal, b"").entry(Link, "stolen", "out/secret", b""),
    ] {
        let (dir, result) = applied(archive);
        assert!(matches!(result, Err(ApplyError::Make { path, .. }) if path == "stolen"));
        assert!(!dir.path().join("root/stolen").exists());
    }
}

#[test]
fn the_digest_covers_what_follows_the_end() {
    let mut bytes = Archive::new().file("a", "1").bytes();
    bytes.extend([0; 5000]);
    let dir = tempfile::tempdir().expect("temp dir");
    let done = apply(bytes.as_slice(), dir.path(), Whiteouts::Remove, meter()).expect("applied");
    assert_eq!(done.diff_id, crate::images::digest::of(&bytes));
    assert_eq!(fs::read(dir.path().join("a")).expect("read"), b"1");
    assert_eq!(
        dir.path().join("a").metadata().expect("there").modified().expect("a time"),
        std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000)
    );
}

#[test]
fn directories_keep_their_times_and_implied_ones_are_told() {
    let archive = Archive::new()
        .entry(tar::EntryType::Directory, "d/", "", b"")
        .file("d/one", "1")
        .file("i/j/two", "2")
        .entry(tar::EntryType::Directory, "i/", "", b"");
    let (dir, result) = applied(archive);
    assert_eq!(result.expect("applied").implicit, [PathBuf::from("i/j")]);
    let modified = dir.path().join("root/d").metadata().expect("there").modified().expect("a time");
    assert_eq!(modified, std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000));
}

#[test]
fn later_entries_replace_earlier_ones() {
    let archive =
        Archive::new().file("x/y/z", "1").file("x", "now a file").file("gone", "1").file(".wh.gone", "");
    let (dir, result) = applied(archive);
    result.expect("applied");
    assert_eq!(fs::read(dir.path().join("root/x")).expect("read"), b"now a file");
    assert!(!dir.path().join("root/gone").exists());
}

#[test]
fn bad_entries_are_named() {
    let cases = [
        (Archive::new().file("d/.wh.", ""), "d/.wh."),
        (Archive::new().file(".wh...", ""), ".wh..."),
        (Archive::new().file("f", "1").file("f/below", "2"), "f/below"),
        (Archive::new().entry(tar::EntryType::Continuous, "odd", "", b""), "odd"),
        (Archive::new().entry(tar::EntryType::Link, "l", "missing", b""), "l"),
        (Archive::new().entry(tar::EntryType::Symlink, "s", "s", b"").file("s/x", ""), "s/x"),
    ];
    for (archive, wanted) in cases {
        let (_dir, result) = applied(archive);
        match result.expect_err(wanted) {
            ApplyError::Entry { path, .. } | ApplyError::Make { path, .. } => assert_eq!(path, wanted),
            other => panic!("{wanted}: {other:?}"),
        }
    }
}

#[test]
fn holes_count_before_somebody_else_is_asked() {
    let with_holes = |size: &[u8]| {
        let mut archive = Archive::new();
        let pax: [(&str, &[u8]); 2] = [("GNU.sparse.major", b"1"), ("GNU.sparse.realsize", size)];
        archive.0.append_pax_extensions(pax).expect("appended");
        archive.file("holes", "x").file("after", "y")
    };
    let (_dir, result) = applied(with_holes(b"1000"));
    assert!(matches!(result, Err(ApplyError::Unsupported(_))));
    let (_dir, result) = applied(with_holes(b"99999999999999"));
    assert!(matches!(result, Err(ApplyError::Limit(LimitError::Layer(_)))), "{result:?}");
}
