//! A containerd shim (runtime v2) that runs a pod's containers with the runtime in its own process, and what `keelson-cri`
//! needs to speak with it.
//!
//! `containerd-shim-keelson-v1 start` ([`start`]) finds or makes the shim of a pod; that serves ([`serve`]) the task service
//! ([`task`] over [`lifecycle`], [`ttrpc`]) and its own service for `keelson-cri` ([`own`], [`protocol`]): ExecSync
//! ([`exec_sync`]), log reopening, attach. `delete` ([`remove`]) cleans up after a shim that died. `probe` ([`probe`])
//! tells whether the runtime works on this node.
//!
//! One thread waits for everything ([`shim`]); what may block runs in short threads with small stacks; one more thread
//! per container moves its output ([`pump`]) when it goes to a CRI log or comes from a terminal; events are sent by a thread
//! that ends when there are none ([`publisher`]). No async runtime: an idle shim is one thread and little memory.

pub mod bundle;
pub mod exec_sync;
pub mod figures;
pub mod files;
pub mod follower;
pub mod host;
pub mod lifecycle;
pub mod log_file;
pub mod options;
pub mod own;
pub mod probe;
pub mod process;
pub mod proto;
pub mod protocol;
pub mod publisher;
pub mod pump;
pub mod remove;
pub mod rootfs;
pub mod serve;
pub mod shim;
pub mod start;
pub mod stdio;
pub mod task;
pub mod threads;
pub mod tree;
pub mod ttrpc;

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;

use prost::Message;

use crate::options::Options;
use crate::proto::task::{RuntimeInfo, RuntimeVersion};

/// Name of the runtime as containerd finds it in its PATH.
pub const RUNTIME: &str = "io.containerd.keelson.v1";

/// Does what the command line says.
pub fn run(options: &Options) -> Result<(), String> {
    let told = |error: std::io::Error| error.to_string();
    let version = env!("CARGO_PKG_VERSION");
    if options.version {
        return writeln!(std::io::stdout(), "containerd-shim-keelson-v1 {version}").map_err(told);
    }
    if options.info {
        let version = RuntimeVersion { version: version.to_owned(), revision: String::new() };
        let info = RuntimeInfo { name: RUNTIME.to_owned(), version: Some(version), ..RuntimeInfo::default() };
        return std::io::stdout().write_all(&info.encode_to_vec()).map_err(told);
    }
    match options.action.as_str() {
        "start" => start::run(options).map_err(told),
        "delete" => remove::run(options).map_err(told),
        "probe" => probe::run(options),
        "" => {
            // `start` gave the listening socket as standard input.
            let socket = std::io::stdin().as_fd().try_clone_to_owned().map_err(told)?;
            let null = std::fs::File::open("/dev/null").map_err(told)?;
            nix::unistd::dup2_stdin(null).map_err(|errno| errno.to_string())?;
            serve::run(options, UnixListener::from(socket)).map_err(told)
        }
        other => Err(format!("unknown action {other:?}; there are start, delete and probe")),
    }
}
