//! `start`: finds the pod's shim or makes one, and prints its address.
//!
//! Works in the bundle (the working directory). Also written down there, for containerd's own restart.

use std::io::{self, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use cri_shim_runtime::sealed;
use sha2::{Digest, Sha256};

use crate::bundle::{Bundle, group};
use crate::options::Options;
use crate::serve::listen;
use crate::{proto, task, ttrpc};

/// containerd's folder for shims' sockets: short, so that names fit into a socket address.
const SOCKETS: &str = "/run/containerd/s";
/// How long a shim that is there may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Prints the address of the shim for this bundle.
pub fn run(options: &Options) -> io::Result<()> {
    let bundle = Bundle::at(".");
    let annotations = bundle.annotations()?;
    let path = socket(options, group(&annotations, &options.id));
    let address = format!("unix://{}", path.display());
    if !stays(&path) {
        spawn(options, listen(&path)?)?;
    }
    bundle.write_address(&address)?;
    io::stdout().write_all(address.as_bytes())
}

/// Where the shim of this group listens.
fn socket(options: &Options, group: &str) -> PathBuf {
    let mut hash = Sha256::new();
    for part in ["keelson", &options.address, &options.namespace, group] {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    let mut name = String::with_capacity(64);
    for byte in hash.finalize() {
        for digit in [byte >> 4, byte & 15] {
            name.push(char::from_digit(u32::from(digit), 16).unwrap_or('0'));
        }
    }
    Path::new(SOCKETS).join(name)
}

/// Whether a shim listens there and stays for a new container.
fn stays(path: &Path) -> bool {
    let ask = || -> io::Result<Vec<u8>> {
        let socket = UnixStream::connect(path)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        ttrpc::call(&socket, 0, task::STAY, &proto::task::Empty {})
    };
    ask().is_ok()
}

/// Runs this program as a shim of its own that outlives us, its listening socket as standard input.
fn spawn(options: &Options, listener: UnixListener) -> io::Result<()> {
    let program = std::env::current_exe()?;
    // From a mount that no container can write through; a kernel that has none of these runs it as it is.
    let sealed = sealed::own_program().ok();
    let mut command = Command::new(sealed.as_ref().map_or_else(|| program.clone(), sealed::path));
    command
        .arg0(&program)
        .args(["-namespace", &options.namespace, "-id", &options.id, "-address", &options.address])
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0);
    // It is nobody's child once we have ended.
    drop(command.spawn()?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_namespaces_and_instances_have_sockets_of_their_own() {
        let of = |address: &str, namespace: &str, pod: &str| {
            let options = Options {
                address: address.to_owned(),
                namespace: namespace.to_owned(),
                ..Options::default()
            };
            socket(&options, pod)
        };
        let one = of("/a", "k", "p");
        assert_eq!(one, of("/a", "k", "p"));
        assert!(
            [of("/b", "k", "p"), of("/a", "l", "p"), of("/a", "k", "q"), of("/a", "kp", "")]
                .iter()
                .all(|other| *other != one)
        );
        assert!(one.as_os_str().len() < 108, "fits into a socket address");
    }
}
