//! `bench lb`: new TCP connections per second through a ClusterIP ÷ direct to the backend, interleaved.
//!
//! The measuring program, `lb-bench` of ebpf/tests, makes its own network namespaces and cgroup, and prints JSON.

use anyhow::{Context, Result};

use crate::cmd::{Cmd, step};
use crate::paths::Layout;

/// Builds and runs the measurement.
pub(crate) fn run(layout: &Layout, rounds: u32) -> Result<()> {
    crate::preflight::require_root()?;
    crate::build_ebpf::run(&layout.repo)?;
    step("building lb-bench", || crate::binaries::build_only(&layout.repo, &["lb-bench"]))?;
    let rounds = rounds.to_string();
    let text = step("measuring", || {
        Cmd::new(layout.binary("lb-bench")).args(["--rounds", rounds.as_str()]).output()
    })?;
    let report: serde_json::Value = serde_json::from_str(&text).context("parsing what lb-bench printed")?;
    println!("{}", serde_json::to_string_pretty(&report)?);
    super::save(layout, "lb", &report)
}
