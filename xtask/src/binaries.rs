//! Builds the BPF programs and the release binaries, and tells where they are.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::cmd::{Cmd, step};

/// What a node runs.
const EXECUTABLES: &[&str] =
    &["keelson-control", "keelson-cri", "containerd-shim-keelson-v1", "keelson-agent", PLUGINS];
/// The CNI plugins' executable. Linked statically: it is started for every call and lives for two milliseconds, of which the
/// dynamic loader would take a quarter. It resolves no names and loads nothing, which is what static glibc cannot do.
const PLUGINS: &str = "keelson-cni";
/// How. Without position independence there is nothing to relocate at each start.
const STATIC: [&str; 4] = ["-C", "target-feature=+crt-static", "-C", "relocation-model=static"];
/// Small, since every page of it is a fault of its own at each start.
const SMALL: [(&str, &str); 4] = [
    ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "s"),
    ("CARGO_PROFILE_RELEASE_LTO", "fat"),
    ("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1"),
    ("CARGO_PROFILE_RELEASE_STRIP", "symbols"),
];

/// BPF programs first: the agent embeds them.
pub(crate) fn build(repo: &Path) -> Result<()> {
    step("building the BPF programs", || crate::build_ebpf::run(repo))?;
    step("building release binaries (some minutes the first time)", || {
        // The plugins twice: tests of other packages find them beside the rest.
        cargo(EXECUTABLES).dir(repo).run()?;
        build_plugins(repo)
    })
}

/// Executables by their names and not by their packages: with a package named, cargo would choose other features for what
/// it depends on than a whole build does, and build all of that once more.
pub(crate) fn build_only(repo: &Path, executables: &[&str]) -> Result<()> {
    let (plugins, others): (Vec<&str>, Vec<&str>) = executables.iter().partition(|name| **name == PLUGINS);
    if !others.is_empty() {
        cargo(&others).dir(repo).run()?;
    }
    if plugins.is_empty() { Ok(()) } else { build_plugins(repo) }
}

/// Where cargo leaves an executable of this workspace.
pub(crate) fn file(repo: &Path, name: &str) -> PathBuf {
    let target = repo.join("target");
    let folder = if name == PLUGINS { target.join(host()).join("release") } else { target.join("release") };
    folder.join(name)
}

/// Flags of a call hold for all that it builds, so this is a call of its own. With the target named they are not for what
/// runs while building (macros), which is therefore not built twice.
fn build_plugins(repo: &Path) -> Result<()> {
    let cmd = cargo(&[PLUGINS]).args(["--target", &host()]);
    let cmd = cmd.env("CARGO_ENCODED_RUSTFLAGS", STATIC.join("\u{1f}"));
    SMALL.iter().fold(cmd, |cmd, (key, value)| cmd.env(key, value)).dir(repo).run()
}

fn cargo(executables: &[&str]) -> Cmd {
    let names = executables.iter().flat_map(|name| ["--bin", name]);
    Cmd::new("cargo").args(["build", "--release"]).args(names)
}

/// The target that this program was built for, which is the machine's own.
fn host() -> String {
    let libc = if cfg!(target_env = "musl") { "musl" } else { "gnu" };
    format!("{}-unknown-linux-{libc}", std::env::consts::ARCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_target_is_as_rustc_names_it() {
        let told = Cmd::new("rustc").args(["-vV"]).output().unwrap();
        assert!(told.lines().any(|line| line == format!("host: {}", host())), "{} and {told}", host());
    }
}
