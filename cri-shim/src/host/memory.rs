//! The C library's allocator, kept small: one arena for all threads, and free memory given back after bursts of work.
#![allow(unsafe_code, reason = "functions of the C library's allocator")]

use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// How long after work memory is given back: more work may follow at once and need it again.
const REST: Duration = Duration::from_secs(5);

static WORK: Notify = Notify::const_new();

/// Uses one arena for all threads. To be called before there are others.
pub fn economize() {
    // SAFETY: mallopt takes two numbers and may be called at any time; no other thread allocates yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Gives memory that is free back to the kernel.
fn trim() {
    // SAFETY: malloc_trim takes a number, locks the allocator itself and touches only memory that is free.
    unsafe { libc::malloc_trim(0) };
}

/// Tells that there was work. The allocator is the whole process's, and so is this.
pub fn after_work() {
    WORK.notify_one();
}

/// Gives memory back some time after work, at most every [`REST`], until `cancel`. Sleeps as long as nothing is to be done.
pub async fn keep_small(cancel: CancellationToken) {
    let work = async {
        loop {
            WORK.notified().await;
            tokio::time::sleep(REST).await;
            trim();
        }
    };
    // Cancel-safe: there is nothing to lose.
    tokio::select! {
        () = cancel.cancelled() => {}
        () = work => {}
    }
}
