//! Builds the BPF programs and the release binaries.

use std::path::Path;

use anyhow::Result;

use crate::cmd::{Cmd, step};

/// Packages whose executables a node runs.
const PACKAGES: &[&str] = &["keelson-control", "keelson-cri", "keelson-shim", "keelson-agent", "keelson-cni"];

/// BPF programs first: the agent embeds them. The whole workspace is named, so that cargo chooses the same features
/// as for the tests and builds nothing twice.
pub(crate) fn build(repo: &Path) -> Result<()> {
    step("building the BPF programs", || crate::build_ebpf::run(repo))?;
    step("building release binaries (some minutes the first time)", || {
        let mut cmd = Cmd::new("cargo").args(["build", "--release"]);
        for package in PACKAGES {
            cmd = cmd.args(["--package", package]);
        }
        cmd.dir(repo).run()
    })
}
