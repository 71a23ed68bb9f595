//! What the agent reads from the API server: its pods, its node, services, and the objects that its pods use; and the
//! static pods of the node itself, which [`mirrors`] shows in the API.
//!
//! Each source of the API is one watch with reconnects; nothing is polled. Outputs are channels and stores; decisions are made
//! elsewhere.

pub mod manifest;
pub mod mirrors;
pub mod node;
pub mod objects;
pub mod offline;
pub mod pods;
pub mod services;
pub mod static_pods;
pub mod static_url;

use std::time::{Duration, Instant};

use kube::runtime::utils::Backoff;

const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A watch that worked this long after a pause starts over with short ones.
const QUIET: Duration = Duration::from_secs(30);

/// Pauses between reconnects of a watch: short, because one node is no herd, and so that a restarted API server is
/// noticed soon.
#[derive(Debug)]
pub(crate) struct Reconnect {
    next: Duration,
    last: Option<Instant>,
}

impl Default for Reconnect {
    fn default() -> Self {
        Self { next: FIRST_PAUSE, last: None }
    }
}

impl Iterator for Reconnect {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        if self.last.is_some_and(|last| last.elapsed() > QUIET + self.next) {
            self.next = FIRST_PAUSE;
        }
        self.last = Some(Instant::now());
        let pause = self.next;
        self.next = pause.saturating_mul(2).min(LONGEST_PAUSE);
        Some(pause)
    }
}

impl Backoff for Reconnect {
    /// The watcher calls this for each event, the first of which precedes every attempt to list: no sign of success.
    fn reset(&mut self) {}
}
