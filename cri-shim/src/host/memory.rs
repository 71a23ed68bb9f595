//! Memory, kept small: the C library's allocator with one arena for all threads, and memory given back after bursts of work:
//! what is free, and the pages of the program that only the work needed.
#![allow(unsafe_code, reason = "functions of the C library's allocator")]

use std::time::Duration;

use keelson_shim::host::memory::{Program, trim};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// How long after work free memory is given back: more work may follow at once and need it again.
const REST: Duration = Duration::from_secs(5);
/// How long nothing must have been changed before pages of the program are let go. What a kubelet asks all the time uses few
/// of them, which come back from the kernel's cache at once.
const QUIET: Duration = Duration::from_secs(10);

static WORK: Notify = Notify::const_new();
static CHANGE: Notify = Notify::const_new();

/// Uses one arena for all threads. To be called before there are others.
pub fn economize() {
    // SAFETY: mallopt takes two numbers and may be called at any time; no other thread allocates yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Tells that there was work. The allocator is the whole process's, and so is this.
pub fn after_work() {
    WORK.notify_one();
}

/// Tells that the work has changed something: much of the program had a part in it.
pub fn after_change() {
    CHANGE.notify_one();
}

/// Gives memory back some time after work, at most every [`REST`], and pages of the program when [`QUIET`] has come, until
/// `cancel`. Sleeps as long as nothing is to be done.
pub async fn keep_small(cancel: CancellationToken) {
    let work = async {
        loop {
            WORK.notified().await;
            tokio::time::sleep(REST).await;
            trim();
        }
    };
    let quiet = async {
        let program = Program::find();
        loop {
            // The start is one.
            while tokio::time::timeout(QUIET, CHANGE.notified()).await.is_ok() {}
            trim();
            program.unload();
            CHANGE.notified().await;
        }
    };
    // Cancel-safe: there is nothing to lose.
    tokio::select! {
        () = cancel.cancelled() => {}
        () = work => {}
        () = quiet => {}
    }
}
