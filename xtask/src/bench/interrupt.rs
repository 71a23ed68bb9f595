//! A measurement that somebody ends tidies up after itself.
//!
//! The first SIGINT or SIGTERM is remembered, and the work finds it at its next [`check`], so that whatever it made goes
//! as after any error. The second one ends the process at once; what it leaves the next run removes.

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};
use tokio::signal::unix::{SignalKind, signal};

/// Signals so far.
static SEEN: AtomicU32 = AtomicU32::new(0);

/// From now on [`check`] tells of signals.
pub(super) fn watch() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    let wait = move || {
        runtime.block_on(async {
            loop {
                // Cancel-safe: a signal that is not taken stays.
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                if SEEN.fetch_add(1, Ordering::Relaxed) > 0 {
                    // As nobody could ignore it; what it leaves is known by its process number.
                    nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL).ok();
                }
                eprintln!("interrupted: tidying up");
            }
        });
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(wait).context("waiting for signals")?;
    Ok(())
}

/// An error once a signal has come.
pub(super) fn check() -> Result<()> {
    if SEEN.load(Ordering::Relaxed) > 0 {
        bail!("interrupted");
    }
    Ok(())
}
