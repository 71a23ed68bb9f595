//! Layers: whatever a tar stream says, nothing outside the directory it is applied to is touched, and reading ends.
//!
//! The first byte chooses between entries put together from words that are interesting (never a name of the host's, as this
//! may run as root), and bytes whose headers get the right checksum, for the reader alone.
#![no_main]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use keelson_cri::images::decode::Budget;
use keelson_cri::images::settings::Settings;
use keelson_cri::images::untar::stream::TarReader;
use keelson_cri::images::untar::{Whiteouts, apply};
use libfuzzer_sys::fuzz_target;

const BLOCK: usize = 512;

/// Parts of paths and links.
const WORDS: [&str; 16] = [
    "a",
    "b",
    "c",
    "a/b",
    "..",
    "../..",
    ".",
    "",
    "/",
    "//",
    "../outside",
    ".wh.a",
    ".wh..wh..opq",
    ".wh...",
    "outside",
    "b/../..",
];

/// Kinds of entries, known and not.
const KINDS: [u8; 14] = *b"0512346\0xLKgSz";

/// A directory of this process, in memory where there is such a place.
static PLACE: LazyLock<PathBuf> = LazyLock::new(|| {
    let base = Path::new("/dev/shm");
    let base = if base.is_dir() { base.to_owned() } else { std::env::temp_dir() };
    base.join(format!("keelson-fuzz-layer-{}", std::process::id()))
});

/// Takes bytes from the front; zeroes when there are no more.
struct Source<'a>(&'a [u8]);

impl Source<'_> {
    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().map_or((0, self.0), |(first, rest)| (*first, rest));
        self.0 = rest;
        first
    }

    fn path(&mut self) -> String {
        let count = self.byte() % 4;
        let parts: Vec<&str> = (0..=count).map(|_| WORDS[usize::from(self.byte()) % WORDS.len()]).collect();
        parts.join("/")
    }
}

fn checksum(block: &mut [u8]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// One entry with its content.
fn entry(source: &mut Source, archive: &mut Vec<u8>) {
    let (path, link) = (source.path(), source.path());
    let kind = KINDS[usize::from(source.byte()) % KINDS.len()];
    let content: Vec<u8> = match kind {
        b'x' => {
            let record = format!(
                " {}={}\n",
                ["path", "linkpath", "size", "mtime"][usize::from(source.byte() % 4)],
                link
            );
            let length = record.len() + 2;
            format!("{length:02}{record}").into_bytes()
        }
        b'L' | b'K' => [link.as_bytes(), b"\0"].concat(),
        b'0' => vec![b'x'; usize::from(source.byte()) * 4],
        _ => Vec::new(),
    };
    let mut block = [0; BLOCK];
    block[..path.len().min(100)].copy_from_slice(&path.as_bytes()[..path.len().min(100)]);
    let mode = [0o755, 0o644, 0o4755, 0o7777, 0][usize::from(source.byte() % 5)];
    block[100..108].copy_from_slice(format!("{mode:07o}\0").as_bytes());
    block[108..116].copy_from_slice(b"0000000\0");
    block[116..124].copy_from_slice(b"0000000\0");
    block[124..136].copy_from_slice(format!("{:011o}\0", content.len()).as_bytes());
    block[136..148].copy_from_slice(b"00000000000\0");
    block[156] = kind;
    block[157..157 + link.len().min(100)].copy_from_slice(&link.as_bytes()[..link.len().min(100)]);
    block[257..265].copy_from_slice(b"ustar\x0000");
    checksum(&mut block);
    archive.extend_from_slice(&block);
    archive.extend_from_slice(&content);
    archive.resize(archive.len().next_multiple_of(BLOCK), 0);
}

/// Applies an archive beside a directory that must stay as it is.
fn apply_beside_others(archive: &[u8], whiteouts: Whiteouts) {
    let (root, outside) = (PLACE.join("in/root"), PLACE.join("outside"));
    fs::remove_dir_all(&*PLACE).ok();
    for directory in [&root, &outside, &PLACE.join("in/outside")] {
        fs::create_dir_all(directory).expect("made");
        fs::write(directory.join("kept"), "kept").expect("written");
    }
    fs::remove_file(root.join("kept")).expect("removed");
    let before = outside_of(&root);
    let meter = Budget::new(&Settings { max_layer_bytes: 1 << 20, ..Settings::default() })
        .layer(archive.len() as u64);
    let applied = apply(archive, &root, whiteouts, meter);
    assert_eq!(outside_of(&root), before, "something outside was touched");
    if let Ok(applied) = applied {
        for path in applied.implicit {
            assert!(
                path.components().all(|part| matches!(part, std::path::Component::Normal(_))),
                "{path:?}"
            );
        }
    }
    fs::remove_dir_all(&*PLACE).expect("all that was made can be removed");
}

/// What is there beside `root`, with content, modes and times of change.
fn outside_of(root: &Path) -> Vec<(PathBuf, Vec<u8>, u32)> {
    use std::os::unix::fs::MetadataExt;
    let (mut found, mut next) = (Vec::new(), vec![PLACE.clone()]);
    while let Some(directory) = next.pop() {
        for entry in fs::read_dir(&directory).expect("read").flatten() {
            let path = entry.path();
            let metadata = path.symlink_metadata().expect("there");
            if path == root {
                continue;
            }
            if metadata.is_dir() {
                next.push(path.clone());
            }
            let content = fs::read(&path).unwrap_or_default();
            found.push((path, content, metadata.mode()));
        }
    }
    found.sort();
    found
}

/// Reads any bytes as an archive whose checksums are right.
fn read_all(bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    for block in bytes.chunks_exact_mut(BLOCK) {
        // Content blocks become valid headers, too: the reader must not care.
        checksum(block);
    }
    let mut reader = TarReader::new(bytes.as_slice());
    let (mut entries, mut buffer) = (0, [0; 300]);
    while let Ok(Some(header)) = reader.next_entry() {
        entries += 1;
        assert!(entries <= bytes.len() / BLOCK, "every entry takes a block");
        let mut left = header.size;
        while let Ok(count @ 1..) = reader.read(&mut buffer) {
            left = left.checked_sub(count as u64).expect("no more than the header said");
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((choice, rest)) = bytes.split_first() else { return };
    if choice % 4 == 3 {
        return read_all(rest);
    }
    let (mut source, mut archive) = (Source(rest), Vec::new());
    while !source.0.is_empty() {
        entry(&mut source, &mut archive);
    }
    if choice % 4 != 2 {
        archive.resize(archive.len() + 2 * BLOCK, 0);
    }
    apply_beside_others(&archive, if choice % 2 == 0 { Whiteouts::Remove } else { Whiteouts::Overlay });
});
