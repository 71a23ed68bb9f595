//! Builds the BPF programs and the release binaries, and tells where they are.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use crate::cmd::{Cmd, step};

/// What a node runs.
pub(crate) const EXECUTABLES: &[&str] =
    &["keelson-control", "keelson-cri", "containerd-shim-keelson-v1", "keelson-agent", PLUGINS];
/// The CNI plugins' executable. It is started for every call and lives for two milliseconds, so it is linked statically, with
/// musl where its standard library is installed: glibc asks the processor what it can do at each start, which in a virtual
/// machine takes the better part of a millisecond. It resolves no names and loads nothing, which is what a static glibc, the
/// second choice, cannot do.
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

/// Fails where an executable that a node runs was not built yet.
pub(crate) fn require(repo: &Path) -> Result<()> {
    let missing: Vec<String> = EXECUTABLES
        .iter()
        .map(|name| file(repo, name))
        .filter(|path| !path.is_file())
        .map(|path| path.display().to_string())
        .collect();
    ensure!(
        missing.is_empty(),
        "--no-build: {} not built yet; once without it builds all",
        missing.join(", ")
    );
    Ok(())
}

/// Where cargo leaves an executable of this workspace.
pub(crate) fn file(repo: &Path, name: &str) -> PathBuf {
    let folder = if name == PLUGINS { "static" } else { "release" };
    repo.join("target").join(folder).join(name)
}

/// Flags of a call hold for all that it builds, so this is a call of its own. With the target named they are not for what
/// runs while building (macros), which is therefore not built twice. The result has one place, whichever the target.
fn build_plugins(repo: &Path) -> Result<()> {
    let target = if musl_is_installed() { target("musl") } else { target("gnu") };
    let cmd = cargo(&[PLUGINS]).args(["--target", &target]);
    let cmd = cmd.env("CARGO_ENCODED_RUSTFLAGS", STATIC.join("\u{1f}"));
    SMALL.iter().fold(cmd, |cmd, (key, value)| cmd.env(key, value)).dir(repo).run()?;
    let (built, place) =
        (repo.join("target").join(&target).join("release").join(PLUGINS), file(repo, PLUGINS));
    put(&built, &place).with_context(|| format!("copying {} to {}", built.display(), place.display()))
}

/// Copies in one step: somebody may be about to start it.
fn put(from: &Path, to: &Path) -> io::Result<()> {
    let folder = to.parent().unwrap_or(to);
    std::fs::create_dir_all(folder)?;
    let copy = folder.join(format!("{PLUGINS}.{}", std::process::id()));
    std::fs::copy(from, &copy)?;
    std::fs::rename(copy, to)
}

/// Whether programs for musl can be built: rustup installs its standard library ([`crate::setup`]); Debian has none.
pub(crate) fn musl_is_installed() -> bool {
    let libraries =
        Cmd::new("rustc").args(["--print", "target-libdir", "--target", &target("musl")]).output();
    libraries.is_ok_and(|directory| Path::new(directory.trim()).is_dir())
}

fn cargo(executables: &[&str]) -> Cmd {
    let names = executables.iter().flat_map(|name| ["--bin", name]);
    Cmd::new("cargo").args(["build", "--release"]).args(names)
}

/// This machine's target with one of the C libraries.
pub(crate) fn target(libc: &str) -> String {
    format!("{}-unknown-linux-{libc}", std::env::consts::ARCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_as_rustc_names_them() {
        let told = Cmd::new("rustc").args(["--print", "target-list"]).output().unwrap();
        for libc in ["gnu", "musl"] {
            assert!(told.lines().any(|line| line == target(libc)), "{} and {told}", target(libc));
        }
    }

    #[test]
    fn a_program_is_replaced_in_one_step() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("static/keelson-cni"));
        for text in ["old", "new"] {
            std::fs::write(&from, text).unwrap();
            put(&from, &to).unwrap();
            assert_eq!(std::fs::read_to_string(&to).unwrap(), text);
        }
        assert_eq!(std::fs::read_dir(dir.path().join("static")).unwrap().count(), 1, "nothing else is left");
    }
}
