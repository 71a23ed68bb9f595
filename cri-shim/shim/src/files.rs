//! Open files: the shim needs more than one container, so it raises its own limit, lets commands begin a few at a time, and
//! says when there is no room for another. Containers keep the limit that the shim was started with.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use oci_spec::runtime::{PosixRlimit, PosixRlimitBuilder, PosixRlimitType, Process};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Commands that begin at once: each has some twenty files open until it runs.
const STARTS: usize = 16;
/// What all of these may have open together.
const STARTING: u64 = 24 * STARTS as u64;
/// What containers, connections of containerd and attached clients may have open.
const OTHERS: u64 = 256;
/// What a running command has open: its client, two pipes, itself.
const EACH: u64 = 4;
/// Most commands that run at once, however many files there may be: each is a thread.
const MOST: u64 = 512;

/// The shim's limits.
#[derive(Debug)]
pub struct Files {
    /// What processes of containers get when their specification does not say.
    inherited: Rlimit,
    /// Most commands that run at once.
    pub most: usize,
    starting: Mutex<usize>,
    begun: Condvar,
}

/// The right to begin a command, while it lives.
#[derive(Debug)]
pub struct Turn<'a>(&'a Files);

impl Files {
    /// Raises this process's limit as far as it may.
    pub fn raise() -> Self {
        let inherited = getrlimit(Resource::Nofile);
        // One that cannot be raised is worked with.
        setrlimit(Resource::Nofile, Rlimit { current: inherited.maximum, ..inherited }).ok();
        let own = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let most = (own.saturating_sub(OTHERS + STARTING) / EACH).clamp(STARTS as u64, MOST);
        let most = usize::try_from(most).unwrap_or(STARTS);
        Self { inherited, most, starting: Mutex::default(), begun: Condvar::new() }
    }

    /// Gives a process of a container the limit it would have without us, unless its specification has one.
    pub fn keep(&self, process: &mut Process) {
        let mut limits = process.rlimits().clone().unwrap_or_default();
        if limits.iter().any(|limit: &PosixRlimit| limit.typ() == PosixRlimitType::RlimitNofile) {
            return;
        }
        let value = |limit: Option<u64>| limit.unwrap_or(u64::MAX);
        let limit = PosixRlimitBuilder::default()
            .typ(PosixRlimitType::RlimitNofile)
            .soft(value(self.inherited.current))
            .hard(value(self.inherited.maximum))
            .build();
        limits.extend(limit);
        process.set_rlimits(Some(limits));
    }

    /// Waits for a turn to begin a command, at most until `deadline`.
    pub fn turn(&self, deadline: Instant) -> Option<Turn<'_>> {
        let mut starting = self.starting.lock().unwrap_or_else(PoisonError::into_inner);
        while *starting >= STARTS {
            let left =
                deadline.checked_duration_since(Instant::now()).filter(|left| *left > Duration::ZERO)?;
            starting = self.begun.wait_timeout(starting, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        *starting += 1;
        Some(Turn(self))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.starting.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.begun.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_begin_at_once_and_others_wait_their_turn() {
        let files = Files::raise();
        let turns: Vec<_> = (0..STARTS).map(|_| files.turn(Instant::now()).unwrap()).collect();
        assert!(files.turn(Instant::now()).is_none(), "too many begin at once");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| files.turn(Instant::now() + Duration::from_secs(60)).is_some());
            drop(turns);
            assert!(waiting.join().unwrap());
        });
        assert_eq!(*files.starting.lock().unwrap(), 0);
    }

    #[test]
    fn containers_keep_the_limit_they_would_have() {
        let files = Files::raise();
        let mut process = Process::default();
        process.set_rlimits(None);
        files.keep(&mut process);
        let limits = process.rlimits().clone().unwrap();
        assert_eq!(limits.len(), 1);
        assert_eq!(limits[0].soft(), files.inherited.current.unwrap_or(u64::MAX));
        let own =
            PosixRlimitBuilder::default().typ(PosixRlimitType::RlimitNofile).soft(7_u64).hard(9_u64).build();
        process.set_rlimits(Some(vec![own.unwrap()]));
        files.keep(&mut process);
        assert_eq!(process.rlimits().as_ref().unwrap()[0].soft(), 7);
    }
}
