//! `delete`: takes away what a container's dead shim left, and prints how the container ended.
//!
//! containerd also runs it after an orderly end, when nothing is left and nothing is to be done.

use std::io::{self, Write};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use prost::Message;

use crate::bundle::Bundle;
use crate::options::Options;
use crate::proto::{self, task::DeleteResponse};
use crate::protocol::SOCKET_ANNOTATION;
use crate::rootfs;
use crate::serve::hold_folder;
use crate::shim::SIGKILL;

/// How long all of it may take: containerd kills this program after five seconds.
const ALL: Duration = Duration::from_secs(4);
/// How long of that killed processes may take to go.
const PATIENCE: Duration = Duration::from_secs(3);
/// Exit status of what SIGKILL ended.
const KILLED: u32 = 137;

/// Cleans the bundle up and prints an encoded `DeleteResponse`.
pub fn run(options: &Options) -> io::Result<()> {
    let end = Instant::now() + ALL;
    let bundle = options.bundle.clone().map_or_else(|| Bundle::at("."), Bundle::at);
    let mut pid = 0;
    remove_sockets(&bundle);
    if let Some(kept) = bundle.kept() {
        let container = kept.container;
        pid = u32::try_from(container.pid).unwrap_or_default();
        // One that has ended is fine.
        container.kill(SIGKILL).ok();
        let deleted = container.delete(PATIENCE).map_err(|error| io::Error::other(error.chain()));
        // Mounted or not, the processes that are left see the same.
        rootfs::remove(&bundle.rootfs())?;
        deleted?;
        bundle.forget();
        // Last: a slow one must not keep anything mounted.
        for problem in container.run_poststop(end.saturating_duration_since(Instant::now())) {
            bundle.say(&problem);
        }
    }
    let exited_at = Some(proto::timestamp(SystemTime::now()));
    let answer = DeleteResponse { pid, exit_status: KILLED, exited_at };
    io::stdout().write_all(&answer.encode_to_vec())
}

/// A dead shim's sockets lead nowhere. One that is served belongs to a shim that lives.
fn remove_sockets(bundle: &Bundle) {
    let task = bundle.address();
    let task = task.as_deref().and_then(|address| address.trim().strip_prefix("unix://"));
    let annotations = bundle.annotations().unwrap_or_default();
    let own = annotations.get(SOCKET_ANNOTATION).map(String::as_str);
    for path in [task, own].into_iter().flatten().map(Path::new) {
        let _held = hold_folder(path).ok();
        if ask(path).is_err_and(|errno| errno == Errno::ECONNREFUSED) {
            std::fs::remove_file(path).ok();
        }
    }
}

/// Whether a socket is listened on, without waiting: one of a shim that stands still may have no room for another connection,
/// and meanwhile no shim could be started.
fn ask(path: &Path) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let asking = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(asking.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(asking)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn only_a_socket_that_nobody_listens_on_is_dead() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let refusal = || ask(&path).map(drop).expect_err("refused");
        assert_eq!(refusal(), Errno::ENOENT);
        let listener = UnixListener::bind(&path).expect("bound");
        // Nobody accepts, so that the room for connections is used up.
        let waiting: Vec<_> = std::iter::from_fn(|| ask(&path).ok()).collect();
        assert!(!waiting.is_empty());
        assert_eq!(refusal(), Errno::EAGAIN);
        drop((listener, waiting));
        assert_eq!(refusal(), Errno::ECONNREFUSED);
    }
}
