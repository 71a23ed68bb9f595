//! Builds the BPF programs and the release binaries.

use std::path::Path;

use anyhow::Result;

use crate::cmd::{Cmd, step};

/// What a node runs.
const EXECUTABLES: &[&str] =
    &["keelson-control", "keelson-cri", "containerd-shim-keelson-v1", "keelson-agent", "keelson-cni"];

/// BPF programs first: the agent embeds them.
pub(crate) fn build(repo: &Path) -> Result<()> {
    step("building the BPF programs", || crate::build_ebpf::run(repo))?;
    step("building release binaries (some minutes the first time)", || build_only(repo, EXECUTABLES))
}

/// Executables by their names and not by their packages: with a package named, cargo would choose other features for what
/// it depends on than a whole build does, and build all of that once more.
pub(crate) fn build_only(repo: &Path, executables: &[&str]) -> Result<()> {
    let mut cmd = Cmd::new("cargo").args(["build", "--release"]);
    for name in executables {
        cmd = cmd.args(["--bin", name]);
    }
    cmd.dir(repo).run()
}
