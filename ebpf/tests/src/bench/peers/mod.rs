//! Other ways to forward connections to services, to be measured beside ours.
//!
//! To add one, implement [`Peer`] and name it in [`all`]. What a machine lacks makes its peer absent, which the report
//! says, and nothing else fails.

mod iptables;
mod nftables;

use std::{
    io::{Read, Write},
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::scene::{Scene, SceneService};

/// Something that forwards connections to services in a network namespace.
pub trait Peer: Send + Sync {
    /// How options and reports call it.
    fn name(&self) -> &'static str;
    /// Which program and version forwards; why it cannot be measured on this machine.
    fn version(&self) -> Result<String>;
    /// Makes the calling thread's namespace forward all services; returns when the kernel has everything.
    fn load(&self, scene: &Scene) -> Result<()>;
    /// Replaces one service, as the peer's own proxy does it, in the calling thread's namespace.
    fn change(&self, scene: &Scene, old: &SceneService, new: &SceneService) -> Result<()>;
}

/// Every peer that is known, installed or not.
#[must_use]
pub fn all() -> Vec<Arc<dyn Peer>> {
    vec![
        Arc::new(iptables::Iptables { restore: "iptables-nft-restore", name: "iptables" }),
        Arc::new(iptables::Iptables { restore: "iptables-legacy-restore", name: "iptables-legacy" }),
        Arc::new(nftables::Nftables),
    ]
}

/// Pods' addresses: what comes from elsewhere gets the node's address, in kube-proxy's rules.
const POD_RANGE: &str = "10.0.0.0/8";

/// First line of what a program prints when asked for its version.
fn version_of(program: &str) -> Result<String> {
    let output = Command::new(program)
        .arg("--version")
        .output()
        .with_context(|| format!("{program} is not installed"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!("{program} does not run here: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// The longest that a peer's program may take for one text: some would take many minutes for what is large.
const LONGEST: Duration = Duration::from_secs(60);
/// How often it is looked whether it has ended; an error of its time.
const BREATH: Duration = Duration::from_micros(200);

/// Runs a program on a text.
fn feed(program: &str, arguments: &[&str], text: &str) -> Result<()> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("run {program}"))?;
    let mut input = child.stdin.take().context("standard input")?;
    let mut errors = child.stderr.take().context("standard error")?;
    let until = Instant::now() + LONGEST;
    let (status, said) = std::thread::scope(|scope| -> Result<_> {
        // An early end shows in the status below.
        scope.spawn(move || drop(input.write_all(text.as_bytes())));
        let said = scope.spawn(move || {
            let mut said = Vec::new();
            drop(errors.read_to_end(&mut said));
            String::from_utf8_lossy(&said).into_owned()
        });
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok((status, said.join().unwrap_or_default()));
            }
            if Instant::now() > until {
                child.kill()?;
                child.wait()?;
                bail!("{program} was not done within {} s", LONGEST.as_secs());
            }
            std::thread::sleep(BREATH);
        }
    })?;
    if !status.success() {
        bail!("{program}: {status}: {}", said.lines().take(5).collect::<Vec<_>>().join(" | "));
    }
    Ok(())
}
