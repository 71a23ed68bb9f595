//! What the agent reads from the API server: its pods, its node, services, and the objects that its pods use.
//!
//! Each source is one watch with reconnects; nothing is polled. Outputs are channels and stores; decisions are made
//! elsewhere.

pub mod node;
pub mod objects;
pub mod pods;
pub mod services;

use std::time::Duration;

use kube::runtime::utils::Backoff;

const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Pauses between reconnects of a watch: short, because one node is no herd, and so that a restarted API server is
/// noticed soon.
#[derive(Debug)]
pub(crate) struct Reconnect {
    next: Duration,
}

impl Default for Reconnect {
    fn default() -> Self {
        Self { next: FIRST_PAUSE }
    }
}

impl Iterator for Reconnect {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let pause = self.next;
        self.next = pause.saturating_mul(2).min(LONGEST_PAUSE);
        Some(pause)
    }
}

impl Backoff for Reconnect {
    fn reset(&mut self) {
        self.next = FIRST_PAUSE;
    }
}
