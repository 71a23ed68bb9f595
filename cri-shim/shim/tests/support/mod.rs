//! What root tests of the shim share: a containerd of their own, and containers of busybox run through its task service.

#![allow(dead_code, unreachable_pub, reason = "each test file uses a part")]

#[path = "../../../tests/support/containerd.rs"]
pub mod containerd;
pub mod node;
pub mod own;

use std::time::{Duration, Instant};

/// How long anything may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits for a condition.
#[track_caller]
pub fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Processes whose command line contains a word.
pub fn processes_with(word: &str) -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").expect("procfs").flatten();
    entries
        .filter_map(|entry| entry.file_name().to_string_lossy().parse().ok())
        .filter(|pid: &i32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(word) && *pid != std::process::id().cast_signed()
        })
        .collect()
}
