//! `delete`: takes away what a container's dead shim left, and prints how the container ended.
//!
//! containerd also runs it after an orderly end, when nothing is left and nothing is to be done.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, SystemTime};

use prost::Message;

use crate::bundle::Bundle;
use crate::options::Options;
use crate::proto::{self, task::DeleteResponse};
use crate::protocol::SOCKET_ANNOTATION;
use crate::rootfs;
use crate::shim::SIGKILL;

/// How long killed processes may take to go; containerd waits five seconds for all of it.
const PATIENCE: Duration = Duration::from_secs(4);
/// Exit status of what SIGKILL ended.
const KILLED: u32 = 137;

/// Cleans the bundle up and prints an encoded `DeleteResponse`.
pub fn run(options: &Options) -> io::Result<()> {
    let bundle = options.bundle.clone().map_or_else(|| Bundle::at("."), Bundle::at);
    let mut pid = 0;
    if let Some(kept) = bundle.kept() {
        let container = kept.container;
        pid = u32::try_from(container.pid).unwrap_or_default();
        // One that has ended is fine.
        container.kill(SIGKILL).ok();
        container.delete(PATIENCE).map_err(|error| io::Error::other(error.chain()))?;
        for problem in container.run_poststop() {
            bundle.say(&problem);
        }
        rootfs::remove(&bundle.rootfs())?;
        bundle.forget();
        remove_sockets(&bundle);
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
        if UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
            std::fs::remove_file(path).ok();
        }
    }
}
