//! Layers unpacked by keelson-cri beside the same layers unpacked by containerd: the trees must not differ. Needs root.

mod support;

use std::collections::{BTreeMap, HashMap};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use keelson_cri::containerd::Client;
use keelson_cri::images::settings::Unpacker;
use keelson_cri::images::untar::merge::Target;
use keelson_cri::images::{ImageStore, Places, Settings};
use support::containerd::Containerd;
use support::registry::{Registry, digest, gzip};
use tar::EntryType;

const GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";

/// A layer with entries as odd as archives can have them.
struct Layer(tar::Builder<Vec<u8>>);

impl Layer {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    fn pax(mut self, records: &[(&str, &[u8])]) -> Self {
        self.0.append_pax_extensions(records.iter().copied()).expect("appended");
        self
    }

    /// The path is taken as it is. Owner and time follow from it, so that they differ from entry to entry.
    fn entry(mut self, kind: EntryType, path: &str, link: &str, mode: u32, content: &[u8]) -> Self {
        let mut header = tar::Header::new_gnu();
        let sum: u64 = path.bytes().map(u64::from).sum();
        if path.len() <= 100 {
            header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        }
        if link.len() <= 100 {
            header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        }
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(1000 + sum);
        header.set_gid(3_000_000 + sum);
        header.set_mtime(1_500_000_000 + sum);
        header.set_size(content.len() as u64);
        if matches!(kind, EntryType::Char | EntryType::Block) {
            header.set_device_major(7).expect("gnu");
            header.set_device_minor(300).expect("gnu");
        }
        header.set_cksum();
        if path.len() > 100 || link.len() > 100 {
            if link.is_empty() {
                self.0.append_data(&mut header, path, content).expect("appended");
            } else {
                self.0.append_link(&mut header, path, link).expect("appended");
            }
        } else {
            self.0.append(&header, content).expect("appended");
        }
        self
    }

    fn file(self, path: &str, content: &str) -> Self {
        self.entry(EntryType::Regular, path, "", 0o640, content.as_bytes())
    }

    fn directory(self, path: &str, mode: u32) -> Self {
        self.entry(EntryType::Directory, path, "", mode, b"")
    }

    fn link(self, kind: EntryType, path: &str, target: &str) -> Self {
        self.entry(kind, path, target, 0o777, b"")
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().expect("finished")
    }
}

/// cap_net_bind_service as the kernel stores it.
const CAPABILITY: &[u8] = &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn lowest() -> Vec<u8> {
    let long = format!("long/{}", "n".repeat(180));
    let zeros = vec![0; 300_000];
    Layer::new()
        .directory("./", 0o700)
        .directory("./etc/", 0o755)
        .file("./etc/passwd", "root:x:0:0::/:/bin/sh\n")
        .entry(EntryType::Regular, "bin/su", "", 0o4755, b"\x7fELF")
        .entry(EntryType::Regular, "bin/wall", "", 0o2755, b"#!")
        .directory("tmp", 0o1777)
        .directory("opaque/", 0o750)
        .file("opaque/below", "hidden later")
        .directory("implied/deep/", 0o1770)
        .pax(&[("SCHILY.xattr.user.kept", b"from below")])
        .directory("implied/", 0o711)
        .pax(&[
            ("SCHILY.xattr.security.capability", CAPABILITY),
            ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
        ])
        .file("bin/ping", "capable")
        .pax(&[("SCHILY.xattr.user.one", b"1\0\n="), ("mtime", b"1234567890.123456789"), ("atime", b"1")])
        .file("attributed", "x")
        .pax(&[("mtime", b"-5.5"), ("uid", b"70000"), ("gid", b"4294967294")])
        .file("old", "before 1970")
        .pax(&[("path", "unicode/ö/日本".as_bytes()), ("comment", b"ignored")])
        .file("short", "renamed by PAX")
        .file("../../outside", "stays inside")
        .file("/absolute", "stays inside")
        .file("a/./b/../c", "cleaned")
        .link(EntryType::Symlink, "lib", "usr/lib")
        .directory("usr/lib/", 0o755)
        .file("lib/through-link", "in usr/lib")
        .link(EntryType::Symlink, "etc/absolute-link", "/var/log")
        .file("etc/absolute-link/made", "in var/log of the root")
        .link(EntryType::Symlink, "up", "../../../..")
        .file("up/from-above", "in the root")
        .link(EntryType::Symlink, "dangling", "no/where")
        .link(EntryType::Link, "bin/su-again", "bin/su")
        .link(EntryType::Link, "linked-link", "dangling")
        .link(EntryType::Link, "../by-dots", "/etc/../etc/passwd")
        .entry(EntryType::Fifo, "pipe", "", 0o622, b"")
        .entry(EntryType::Char, "dev/char", "", 0o600, b"")
        .entry(EntryType::Block, "dev/block", "", 0o660, b"")
        .entry(EntryType::Regular, &long, "", 0o600, b"long")
        .link(EntryType::Symlink, "long/link", &"t".repeat(150))
        .entry(EntryType::Regular, "zeros", "", 0o600, &zeros)
        .file("empty", "")
        .file("replaced/by/file", "1")
        .file("replaced", "now a file")
        .file("becomes-directory", "1")
        .directory("becomes-directory", 0o755)
        .file("taken-back", "1")
        .file(".wh.taken-back", "")
        .file("trailing", "bytes")
        .bytes()
}

fn second() -> Vec<u8> {
    Layer::new()
        .file("etc/.wh.passwd", "")
        .file(".wh.tmp", "")
        .file("opaque/first", "before the mark")
        .file("opaque/.wh..wh..opq", "")
        .file("opaque/last", "after the mark")
        .file("implied/deep/more", "the directories' looks come from below")
        .file("implied/fresh/one", "and these have none")
        .file("usr/lib/new", "")
        .file("lib/over-link", "lib was a link below")
        .directory("replaced", 0o700)
        .file("replaced/inner", "a directory again")
        .file("taken/.wh.twice", "")
        .file("taken/twice", "after its own whiteout")
        .file("aufs/.wh..wh.plnk", "")
        .bytes()
}

/// What only GNU tar writes: files with holes.
fn sparse(dir: &Path, format: &str) -> Vec<u8> {
    let holes = dir.join("holes");
    let file = std::fs::File::create(&holes).expect("created");
    std::os::unix::fs::FileExt::write_all_at(&file, b"data", 900_000).expect("written");
    file.set_len(2_000_000).expect("set");
    let mut made = Command::new("tar");
    made.args(["--sparse", "--format", format, "-C"]).arg(dir).args(["-cf", "-", "holes"]);
    let output = made.output().expect("GNU tar is installed");
    assert!(output.status.success());
    output.stdout
}

type Tree = BTreeMap<PathBuf, String>;

/// Everything of a tree that a container could see. Times of `ignored` directories are whenever they were made.
fn tree(root: &Path, ignored: &[&str]) -> Tree {
    let mut found = Tree::new();
    let mut todo = vec![root.to_owned()];
    while let Some(path) = todo.pop() {
        let name = path.strip_prefix(root).expect("below").to_owned();
        let metadata = path.symlink_metadata().expect("there");
        let kind = metadata.file_type();
        let mut text = vec![format!("{:o} {}:{}", metadata.mode(), metadata.uid(), metadata.gid())];
        // A whiteout is no file that anybody sees the time of.
        let whiteout = kind.is_char_device() && metadata.rdev() == 0;
        if !whiteout && !ignored.iter().any(|one| Path::new(one) == name) {
            text.push(format!(" {}.{}", metadata.mtime(), metadata.mtime_nsec()));
        }
        if kind.is_char_device() || kind.is_block_device() {
            text.push(format!(" device {:x}", metadata.rdev()));
        }
        if kind.is_symlink() {
            text.push(format!(" -> {}", std::fs::read_link(&path).expect("a link").display()));
        }
        if kind.is_file() {
            let content = std::fs::read(&path).expect("read");
            text.push(format!(" links {} size {} {}", metadata.nlink(), content.len(), digest(&content)));
        }
        let mut names = vec![0_u8; 65536];
        let length = rustix::fs::llistxattr(&path, &mut names[..]).expect("listed");
        let mut attributes: Vec<_> =
            names[..length].split(|byte| *byte == 0).filter(|one| !one.is_empty()).collect();
        attributes.sort_unstable();
        for attribute in attributes {
            let mut value = vec![0_u8; 65536];
            let length = rustix::fs::lgetxattr(&path, std::ffi::OsStr::from_bytes(attribute), &mut value[..])
                .expect("read");
            text.push(format!(" {}={:?}", String::from_utf8_lossy(attribute), &value[..length]));
        }
        if kind.is_dir() {
            todo.extend(std::fs::read_dir(&path).expect("read").flatten().map(|entry| entry.path()));
        }
        found.insert(name, text.concat());
    }
    found
}

async fn unpacked(containerd: &Containerd, namespace: &str, unpacker: Unpacker, image: &str) -> Vec<PathBuf> {
    let client = Client::new(&containerd.socket(), namespace).expect("a client");
    client.ensure_namespace().await.expect("a namespace");
    let places = Places {
        registry_config_dir: containerd.dir().join("certs.d"),
        state_dir: containerd.dir().join(namespace),
        snapshotter: "overlayfs".to_owned(),
    };
    let store = ImageStore::new(client.clone(), places, Settings { unpacker, ..Settings::default() });
    let image = store.pull(image, None).await.expect("pulled");
    let key = format!("look-{}", image.id);
    let mounts = client.prepare_snapshot(&key, image.chain_id(), HashMap::default()).await.expect("prepared");
    let mut layers = Target::of(&mounts).expect("an overlay").lower;
    layers.reverse();
    layers
}

#[tokio::test(flavor = "multi_thread")]
async fn trees_are_those_that_containerd_makes() {
    rustls::crypto::aws_lc_rs::default_provider().install_default().ok();
    let containerd = Containerd::start();
    let registry = Registry::start().await;
    let certs = containerd.dir().join("certs.d/docker.io");
    std::fs::create_dir_all(&certs).expect("made");
    let hosts = format!("server = \"http://{}\"\n", registry.address());
    std::fs::write(certs.join("hosts.toml"), hosts).expect("written");

    let (first, second) = (lowest(), second());
    let third = Layer::new().file("plain", "not compressed").directory("etc/", 0o700).bytes();
    let scratch = containerd.dir().join("scratch");
    std::fs::create_dir(&scratch).expect("made");
    let posix = sparse(&scratch, "posix");
    let zstd = zstd::encode_all(second.as_slice(), 1).expect("compressed");
    registry.push_blobs(
        "library/nasty",
        "1",
        &[
            (GZIP, gzip(&first), digest(&first)),
            (ZSTD, zstd, digest(&second)),
            (PLAIN, third.clone(), digest(&third)),
            (GZIP, gzip(&posix), digest(&posix)),
            // The same layer once more, on top of others.
            (GZIP, gzip(&second), digest(&second)),
        ],
    );
    let ours = unpacked(&containerd, "ours", Unpacker::Builtin, "nasty:1").await;
    let theirs = unpacked(&containerd, "theirs", Unpacker::Containerd, "nasty:1").await;
    assert_eq!((ours.len(), theirs.len()), (5, 5));
    // The root's own time, and directories that no entry gives one: whenever they were made or last changed.
    let ignored = [
        "",
        "bin",
        "unicode",
        "unicode/ö",
        "a",
        "var",
        "var/log",
        "dev",
        "long",
        "replaced",
        "etc",
        "opaque",
        "implied/deep",
        "implied",
        "implied/fresh",
        "usr",
        "usr/lib",
        "lib",
        "taken",
        "aufs",
        "no",
    ];
    let mut compared = 0;
    for (layer, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
        assert_ne!(ours, theirs);
        let times: &[&str] = if layer == 1 || layer == 4 {
            &ignored
        } else {
            &["", "bin", "unicode", "unicode/ö", "a", "var", "var/log", "dev", "long", "usr", "no"]
        };
        let (mut ours, theirs) = (tree(ours, times), tree(theirs, times));
        for (path, wanted) in &theirs {
            let got = ours.remove(path).unwrap_or_else(|| "missing".to_owned());
            assert_eq!(&got, wanted, "layer {layer}: {}", path.display());
            compared += 1;
        }
        assert!(ours.is_empty(), "layer {layer} has more: {ours:?}");
    }
    assert!(compared > 90, "{compared}");
    // The corpus did reach the odd corners.
    let lowest = tree(&ours[0], &[]);
    for inside in ["outside", "absolute", "usr/lib/through-link", "var/log/made", "from-above", "by-dots"] {
        assert!(lowest.contains_key(Path::new(inside)), "{inside}: {:?}", lowest.keys());
    }
    assert!(!containerd.dir().join("outside").exists() && !Path::new("/from-above").exists());
}
