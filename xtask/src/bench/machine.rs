//! The machine that figures are of, as far as a reader must know it.

use std::fmt;

use anyhow::Result;
use serde::Serialize;

/// Kernel, processors, and how busy it was when the run began.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Machine {
    kernel: String,
    processor: String,
    processors: usize,
    load_before: String,
}

impl Machine {
    /// As it is now.
    pub(crate) fn look() -> Result<Self> {
        let word = |path: &str| -> Result<String> { Ok(std::fs::read_to_string(path)?.trim().to_owned()) };
        let named = word("/proc/cpuinfo")?
            .lines()
            .find_map(|line| Some(line.strip_prefix("model name")?.split_once(": ")?.1.trim().to_owned()));
        Ok(Self {
            kernel: word("/proc/sys/kernel/osrelease")?,
            processor: named.unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            processors: std::thread::available_parallelism()?.get(),
            load_before: word("/proc/loadavg")?,
        })
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kernel, processor, processors, load_before } = self;
        write!(f, "kernel {kernel}, {processors} × {processor}, load before {load_before}")
    }
}
