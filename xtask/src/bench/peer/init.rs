//! The first process of the peer's PID namespace: makes its places, starts containerd and the kubelet, reaps what is
//! orphaned, and ends with the first of the two that does. The kernel then ends everything else of the node.
//!
//! Input: `programs.json` of the place. Output: the two process numbers as seen inside, and in the end a sentence that
//! says what ended and why.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::wait::{WaitStatus, waitpid};
use serde::{Deserialize, Serialize};

use super::config::{Programs, SOCKET};
use super::place::Place;
use crate::cmd::Cmd;
use crate::process::write_atomic;

/// How long containerd may take until it answers.
const START: Duration = Duration::from_secs(60);

/// Process numbers inside the namespace.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Pids {
    /// containerd.
    pub(super) containerd: i32,
    /// The kubelet.
    pub(super) kubelet: i32,
}

/// Runs until one of the two programs has ended, and leaves word of it.
pub(in crate::bench) fn run(repo: &Path) -> Result<()> {
    let place = Place::of(repo);
    let said = inside(&place).unwrap_or_else(|error| format!("{error:#}"));
    write_atomic(&place.file("ended"), said.as_bytes())
}

fn inside(place: &Place) -> Result<String> {
    wait_for("the network", || place.file("connected").is_file())?;
    // Private to this namespace, and gone with it.
    Cmd::new("mount").args(["-t", "tmpfs", "-o", "mode=755", "peer", "/run"]).output()?;
    for (name, target) in [("var-lib", "/var/lib"), ("var-log", "/var/log")] {
        Cmd::new("mount")
            .args(["--bind".as_ref(), place.file(name).as_os_str(), target.as_ref()])
            .output()?;
    }
    let text = fs::read(place.file("programs.json")).context("reading programs.json")?;
    let programs: Programs = serde_json::from_slice(&text).context("parsing programs.json")?;
    let containerd = spawn("containerd", &programs.containerd, place)?;
    wait_for("containerd", || UnixStream::connect(SOCKET).is_ok())
        .with_context(|| format!("see {}", place.log("containerd").display()))?;
    let kubelet = spawn("kubelet", &programs.kubelet, place)?;
    let pids = Pids { containerd, kubelet };
    write_atomic(&place.file("pids.json"), &serde_json::to_vec(&pids)?)?;
    loop {
        let (pid, how) = match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, code)) => (pid, format!("ended with exit status {code}")),
            Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, format!("was ended by {signal}")),
            Ok(_) | Err(nix::errno::Errno::EINTR) => continue,
            Err(error) => return Err(error).context("waiting for the kubelet"),
        };
        if pid.as_raw() == kubelet {
            return Ok(format!("the kubelet {how}"));
        }
        if pid.as_raw() == containerd {
            return Ok(format!("the peer's containerd {how}"));
        }
    }
}

fn spawn(name: &str, line: &[String], place: &Place) -> Result<i32> {
    let (program, arguments) = line.split_first().context("an empty command line")?;
    let path = place.log(name);
    let log = fs::File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    let child = Command::new(program)
        .args(arguments)
        .current_dir("/")
        .env_remove("NOTIFY_SOCKET")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("the {name} {program} cannot be started"))?;
    Ok(child.id().cast_signed())
}

fn wait_for(what: &str, is_there: impl Fn() -> bool) -> Result<()> {
    let end = Instant::now() + START;
    while !is_there() {
        if Instant::now() > end {
            bail!("{what} was not there after {} s", START.as_secs());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
