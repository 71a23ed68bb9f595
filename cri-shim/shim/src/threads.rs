//! Threads with small stacks: one for each piece of work that may block.

use std::io;

/// Enough for parsing a specification and making a container; only what is touched takes memory.
const STACK: usize = 256 << 10;

/// Runs `work` in a thread of its own.
pub fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name(name.to_owned()).stack_size(STACK).spawn(work).map(drop)
}
