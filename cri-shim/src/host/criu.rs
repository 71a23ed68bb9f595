//! CRIU's images of a container that one of our shims runs.
//!
//! Input: the first process, its specification, directories. Output: images, CRIU's log, what the process had as stdio. The
//! options are those that runc gives CRIU, so that whoever restores finds images of the same kind.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::socket;
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use prost::Message;

use crate::error::RuntimeError;

/// Whose images are to be written, and where.
#[derive(Debug)]
pub struct Dump<'a> {
    /// The container's first process, as the node numbers it.
    pub pid: u32,
    /// Its specification.
    pub spec: &'a Spec,
    /// An empty directory for the images.
    pub images: &'a Path,
    /// Where the log goes, [`LOG`].
    pub work: &'a Path,
}

/// CRIU's log in the working directory.
pub const LOG: &str = "dump.log";

/// Writes the images; the container stands still for that time and then goes on. Blocks. [`super::process::kill_imaging`] ends
/// it.
///
/// # Errors
/// CRIU cannot be run, fails, or takes longer than `patience`; why is in the log.
pub fn dump(dump: &Dump<'_>, patience: Duration) -> Result<(), RuntimeError> {
    write_images(dump, patience).map_err(RuntimeError::host("have CRIU write images to", dump.images))
}

fn write_images(dump: &Dump<'_>, patience: Duration) -> io::Result<()> {
    std::fs::write(dump.images.join("descriptors.json"), serde_json::to_vec(&stdio_of(dump.pid))?)?;
    let kind = socket::SockType::SeqPacket;
    let (ours, theirs) =
        socket::socketpair(socket::AddressFamily::Unix, kind, None, socket::SockFlag::SOCK_CLOEXEC)?;
    let ours = UnixDatagram::from(ours);
    ours.set_read_timeout(Some(patience.max(Duration::from_secs(1))))?;
    let (images, work) = (File::open(dump.images)?, File::open(dump.work)?);
    // Its working directory is how it is found after a crash of ours.
    let mut criu = Command::new("criu")
        .args(["swrk", "0"])
        .current_dir(dump.work)
        .stdin(theirs)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    // It opens the directories by way of our descriptors.
    let request =
        Request { r#type: DUMP, options: Some(options(dump, images.as_raw_fd(), work.as_raw_fd())) };
    let answer = ours.send(&request.encode_to_vec()).and_then(|_| {
        let mut answer = vec![0; 64 << 10];
        let length = received(&ours, &mut answer)?;
        Answer::decode(&answer[..length]).map_err(io::Error::other)
    });
    // One that has answered ends by itself; one that has not must not go on.
    drop(criu.kill());
    criu.wait()?;
    match answer {
        Ok(answer) if answer.success => Ok(()),
        Ok(answer) => Err(io::Error::other(format!("error {}: {}", answer.number, answer.message))),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Err(io::Error::new(io::ErrorKind::TimedOut, format!("not done after {} s", patience.as_secs())))
        }
        Err(error) => Err(error),
    }
}

/// Waits for an answer. A signal that this thread happens to take does not end the wait: what CRIU has begun must not be cut off.
fn received(socket: &UnixDatagram, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match socket.recv(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // It has ended without one.
            Ok(0) => return Err(io::Error::other("CRIU ended without an answer")),
            other => return other,
        }
    }
}

/// The numbers and types of CRIU's `rpc.proto`; only what is used.
const DUMP: i32 = 1;
/// `IGNORE`: the container's cgroups are whoever restores it's to make.
const IGNORE: i32 = 0;

#[derive(Clone, PartialEq, prost::Message)]
struct Request {
    #[prost(int32, required, tag = "1")]
    r#type: i32,
    #[prost(message, optional, tag = "2")]
    options: Option<Options>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Answer {
    #[prost(int32, required, tag = "1")]
    r#type: i32,
    #[prost(bool, required, tag = "2")]
    success: bool,
    #[prost(int32, tag = "7")]
    number: i32,
    #[prost(string, tag = "9")]
    message: String,
}

/// A mount that is not copied: its place in the container, and the name under which it is found again.
#[derive(Clone, PartialEq, prost::Message)]
struct ExternalMount {
    #[prost(string, required, tag = "1")]
    place: String,
    #[prost(string, required, tag = "2")]
    name: String,
}

#[allow(clippy::struct_excessive_bools, reason = "the message is CRIU's")]
#[derive(Clone, PartialEq, prost::Message)]
struct Options {
    #[prost(int32, required, tag = "1")]
    images: i32,
    #[prost(int32, optional, tag = "2")]
    pid: Option<i32>,
    #[prost(bool, tag = "3")]
    leave_running: bool,
    #[prost(bool, tag = "4")]
    unix_sockets_outside: bool,
    #[prost(bool, tag = "5")]
    tcp_established: bool,
    #[prost(bool, tag = "6")]
    evasive_devices: bool,
    #[prost(bool, tag = "8")]
    file_locks: bool,
    #[prost(int32, tag = "9")]
    log_level: i32,
    #[prost(string, tag = "10")]
    log_file: String,
    #[prost(int32, optional, tag = "17")]
    work: Option<i32>,
    #[prost(bool, tag = "18")]
    link_remap: bool,
    #[prost(message, repeated, tag = "23")]
    external_mounts: Vec<ExternalMount>,
    #[prost(int32, optional, tag = "34")]
    cgroups: Option<i32>,
    #[prost(string, repeated, tag = "37")]
    external: Vec<String>,
    #[prost(bool, tag = "50")]
    orphan_terminals: bool,
}

fn options(dump: &Dump<'_>, images: i32, work: i32) -> Options {
    Options {
        images,
        pid: i32::try_from(dump.pid).ok(),
        leave_running: true,
        unix_sockets_outside: true,
        tcp_established: true,
        evasive_devices: true,
        file_locks: true,
        log_level: 4,
        log_file: LOG.to_owned(),
        work: Some(work),
        link_remap: true,
        external_mounts: masked(dump.pid, dump.spec),
        cgroups: Some(IGNORE),
        external: externals(dump.pid, dump.spec),
        // A terminal's other end is ours.
        orphan_terminals: true,
    }
}

/// What stands behind descriptors 0 to 2: who restores puts other ones there.
fn stdio_of(pid: u32) -> Vec<PathBuf> {
    (0..3).map(|fd| std::fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap_or_default()).collect()
}

/// What belongs to the node or the pod, not to the container: it is named in the images, not copied.
fn externals(pid: u32, spec: &Spec) -> Vec<String> {
    // Found out by CRIU itself, with what is shared or follows the node: volumes, files of the pod, devices, masked paths.
    let mut all = vec!["mnt[]:ms".to_owned()];
    let linux = spec.linux().as_ref();
    let namespaces = linux.and_then(|linux| linux.namespaces().as_ref()).into_iter().flatten();
    for namespace in namespaces.filter(|namespace| namespace.path().is_some()) {
        let (name, key) = match namespace.typ() {
            LinuxNamespaceType::Network => ("net", "extRootNetNS"),
            LinuxNamespaceType::Pid => ("pid", "extRootPidNS"),
            _ => continue,
        };
        if let Some(inode) = inode(pid, name) {
            all.push(format!("{name}[{inode}]:{key}"));
        }
    }
    all
}

/// Files that `/dev/null` hides. Newer CRIUs find them out by themselves, 3.17 of Debian 12 does not.
fn masked(pid: u32, spec: &Spec) -> Vec<ExternalMount> {
    let paths = spec.linux().as_ref().and_then(|linux| linux.masked_paths().as_ref()).into_iter().flatten();
    let is_file = |path: &&String| {
        let inside = Path::new("/proc").join(pid.to_string()).join("root").join(path.trim_start_matches('/'));
        // A directory is hidden by an empty file system of its own.
        std::fs::metadata(inside).is_ok_and(|found| !found.is_dir())
    };
    let hidden = paths.filter(is_file);
    hidden.map(|path| ExternalMount { place: path.clone(), name: "/dev/null".to_owned() }).collect()
}

/// The number of a process's namespace.
fn inode(pid: u32, name: &str) -> Option<u64> {
    let link = std::fs::read_link(format!("/proc/{pid}/ns/{name}")).ok()?;
    let text = link.to_str()?;
    text.strip_prefix(name)?.strip_prefix(":[")?.strip_suffix(']')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(namespaces: &serde_json::Value) -> Spec {
        serde_json::from_value(
            serde_json::json!({"ociVersion": "1.0.2", "linux": {"namespaces": namespaces}}),
        )
        .expect("a specification")
    }

    #[test]
    fn namespaces_of_the_pod_are_not_copied() {
        let pid = std::process::id();
        let joined = serde_json::json!([
            {"type": "network", "path": "/run/netns/x"}, {"type": "ipc", "path": "/proc/1/ns/ipc"},
            {"type": "pid"}, {"type": "mount"},
        ]);
        let net = inode(pid, "net").expect("a network namespace");
        assert_eq!(
            externals(pid, &spec(&joined)),
            ["mnt[]:ms".to_owned(), format!("net[{net}]:extRootNetNS")]
        );
        let target = serde_json::json!([{"type": "pid", "path": "/proc/1/ns/pid"}]);
        assert!(externals(pid, &spec(&target))[1].ends_with(":extRootPidNS"));
    }

    #[test]
    fn hidden_files_are_not_copied() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("file");
        std::fs::write(&file, "").expect("written");
        let shown = |path: &Path| path.display().to_string();
        let paths = [shown(&file), shown(directory.path()), shown(&directory.path().join("none"))];
        let spec: Spec = serde_json::from_value(
            serde_json::json!({"ociVersion": "1.0.2", "linux": {"maskedPaths": paths}}),
        )
        .expect("a specification");
        let hidden = ExternalMount { place: shown(&file), name: "/dev/null".to_owned() };
        assert_eq!(masked(std::process::id(), &spec), [hidden]);
    }

    #[test]
    fn the_request_has_the_numbers_of_the_protocol() {
        let spec = spec(&serde_json::json!([]));
        let (images, work) = (Path::new("/w/c/checkpoint"), Path::new("/w/c"));
        let options = options(&Dump { pid: 7, spec: &spec, images, work }, 5, 6);
        let bytes = Request { r#type: DUMP, options: Some(options) }.encode_to_vec();
        // Type 1; options: images 5, pid 7, leave running.
        assert!(bytes.starts_with(&[0x08, 1, 0x12]) && bytes[4..].starts_with(&[0x08, 5, 0x10, 7, 0x18, 1]));
        let answer = Answer::decode(&[0x08, 1, 0x10, 0, 0x38, 3, 0x4a, 1, b'x'][..]).expect("an answer");
        assert_eq!((answer.success, answer.number, answer.message.as_str()), (false, 3, "x"));
    }
}
