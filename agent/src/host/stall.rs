//! Tells at once when tasks of the node begin to wait for memory: the kernel's pressure stall information.
//!
//! <https://docs.kernel.org/accounting/psi.html>. Where the kernel has none, nothing is ever told, and the eviction loop's
//! timer alone decides when it looks.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Told when tasks waited for memory for 150 ms within two seconds, at most once in these two.
const TRIGGER: &[u8] = b"some 150000 2000000\0";

/// A trigger at the kernel.
pub struct MemoryStall(Option<AsyncFd<File>>);

impl MemoryStall {
    /// Sets the trigger; without one where the kernel refuses.
    pub fn new() -> Self {
        Self::at(Path::new("/proc/pressure/memory")).map_or(Self(None), |fd| Self(Some(fd)))
    }

    fn at(path: &Path) -> io::Result<AsyncFd<File>> {
        let mut file = OpenOptions::new().read(true).write(true).open(path)?;
        file.write_all(TRIGGER)?;
        super::sys::on_priority(file)
    }

    /// Waits for the next stall; for ever where there is no trigger. Cancel-safe.
    pub async fn wait(&mut self) {
        let Some(fd) = &self.0 else { return std::future::pending().await };
        match fd.ready(Interest::PRIORITY).await {
            Ok(mut ready) => ready.clear_ready(),
            Err(_closed) => {
                self.0 = None;
                std::future::pending::<()>().await;
            }
        }
    }
}

impl Default for MemoryStall {
    fn default() -> Self {
        Self::new()
    }
}
