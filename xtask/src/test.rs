//! `cargo xtask test [TIER…]`: the tiers from cheap to dear; each stops the run when it fails.

use std::path::Path;

use anyhow::{Result, bail};

use crate::cmd::{Cmd, step};
use crate::images::Packages;
use crate::vm::Choice;
use crate::{binaries, foreign, setup, tidy};

/// A group of tests with the same needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Tier {
    /// fmt, clippy, tidy, cargo deny.
    Lint,
    /// Pure and component tests; no root.
    Unit,
    /// Network namespaces, cgroups, containerd, BPF.
    Root,
    /// `up`, kubectl, curl, kill -9, `down`.
    E2e,
    /// Root tests of single packages in a virtual machine: Debian's kernel, cgroup v2 only, no systemd.
    VmLight,
    /// keelson-cri as a service in a Debian 12 guest: systemd, both cgroup drivers, runc, crun and keelson handlers.
    VmDebian,
    /// keelson-cri with others than the development machine's: CRI clients that are not ours (Kubernetes' own among them),
    /// and the containerds of newer Debians (1.7 and 2.x), all root tests on each. Only when named: it downloads them, and what those suites hold moves.
    Compat,
}

impl Tier {
    fn has_guest(self) -> bool {
        matches!(self, Self::VmLight | Self::VmDebian)
    }
}

/// Debian suites whose containerd the tier `compat` runs: 1.7 and 2.x.
const COMPAT_SUITES: &[&str] = &["trixie", "forky"];

/// What runs when no tier is named, in its order.
const ALL: &[Tier] = &[Tier::Lint, Tier::Unit, Tier::Root, Tier::E2e];

/// Runs the named tiers, or all.
pub(crate) fn run(repo: &Path, tiers: &[Tier], guests: &Choice) -> Result<()> {
    let chosen: Vec<Tier> = if tiers.is_empty() { ALL.to_vec() } else { tiers.to_vec() };
    if guests.list && !chosen.iter().all(|tier| tier.has_guest()) {
        bail!("--list prints the jobs of vm-light and vm-debian: name them");
    }
    if guests.list {
        return chosen.iter().try_for_each(|tier| match tier {
            Tier::VmLight => crate::vm::light(repo, guests),
            _ => crate::vm::debian(repo, guests),
        });
    }
    let needs_root = chosen.iter().any(|tier| !matches!(tier, Tier::Lint | Tier::Unit));
    if needs_root && !nix::unistd::geteuid().is_root() {
        bail!("the tiers root, e2e, vm-* and compat need root; without it: `cargo xtask test lint unit`");
    }
    if !guests.no_build {
        setup::run(repo, setup::Scope::Test)?;
    }
    if chosen.iter().any(|tier| tier.has_guest()) {
        setup::virtual_machines()?;
    }
    if !guests.no_build {
        step("building the BPF programs", || crate::build_ebpf::run(repo))?;
    }
    for tier in chosen {
        match tier {
            Tier::Lint => lint(repo)?,
            Tier::Unit => step("unit tests", || unit(repo))?,
            Tier::Root => step("root tests", || root(repo))?,
            Tier::E2e => step("end-to-end test", || e2e(repo))?,
            Tier::VmLight => {
                step("tests in a small virtual machine", || crate::vm::light(repo, guests))?;
            }
            Tier::VmDebian => {
                step("tests in a Debian virtual machine", || crate::vm::debian(repo, guests))?;
            }
            Tier::Compat => compat(repo)?,
        }
    }
    Ok(())
}

/// No package is ever named: cargo would choose other features for what they depend on, and build all of it once more.
fn cargo(repo: &Path) -> Cmd {
    Cmd::new("cargo").dir(repo)
}

fn lint(repo: &Path) -> Result<()> {
    step("fmt", || cargo(repo).args(["fmt", "--all", "--check"]).run())?;
    step("tidy", || tidy::run(repo))?;
    step("deny", || {
        let deny = setup::cargo_program("cargo-deny").unwrap_or_else(|| "cargo-deny".into());
        Cmd::new(deny).args(["--log-level", "error", "check", "bans", "licenses", "sources"]).dir(repo).run()
    })?;
    step("clippy", || {
        cargo(repo).args(["clippy", "--release", "--quiet", "--all-targets", "--", "-D", "warnings"]).run()
    })
}

/// Everything but the `root_*` and `e2e` test programs.
fn unit(repo: &Path) -> Result<()> {
    cargo(repo).args(["test", "--release", "--lib", "--bins", "--test", "it"]).run()
}

/// One after the other: they share the kernel.
fn root(repo: &Path) -> Result<()> {
    binaries::build(repo)?;
    let args = ["test", "--release", "--no-fail-fast", "--test", "root_*", "--", "--test-threads=1"];
    cargo(repo).args(args).run()?;
    step("root tests of keelson-cri with handler runc", || {
        cri_tests(repo)?.env("KEELSON_TEST_HANDLER", "runc").run()
    })?;
    for (target, handler) in
        [("keelson", "keelson"), ("keelson", "runc"), ("containerd", ""), ("containerd", "keelson")]
    {
        step(&format!("CRI conformance of {target} {handler}"), || conformance(repo, target, handler))?;
    }
    for set in ["keelson", "debian"] {
        step(&format!("CNI conformance of {set}'s plugins"), || cni_conformance(repo, set))?;
    }
    Ok(())
}

/// What is ours passes at once; a race of the reference must only not be the rule.
fn attempts(is_ours: bool) -> &'static str {
    if is_ours { "1" } else { "3" }
}

/// The suite on a private instance: ours, and the reference that the suite itself is checked on.
fn conformance(repo: &Path, target: &str, handler: &str) -> Result<()> {
    let name = format!("{target}-{handler}");
    let junit = repo.join("target/conformance").join(format!("{}.xml", name.trim_end_matches('-')));
    Cmd::new(std::env::current_exe()?)
        .args(["conformance", "cri", "--no-build", "--start", target, "--handler", handler])
        .args(["--attempts", attempts(target == "keelson"), "--junit"])
        .args([junit])
        .dir(repo)
        .run()
}

/// The suite on our plugins, and on the reference that the suite itself is checked on.
fn cni_conformance(repo: &Path, set: &str) -> Result<()> {
    let junit = repo.join("target/conformance").join(format!("cni-{set}.xml"));
    Cmd::new(std::env::current_exe()?)
        .args(["conformance", "cni", "--no-build", "--set", set])
        .args(["--attempts", attempts(set == "keelson"), "--junit"])
        .args([junit])
        .dir(repo)
        .run()
}

/// The first containerd on PATH is the one that the tests start, with the shim for runc beside it.
fn compat(repo: &Path) -> Result<()> {
    binaries::build(repo)?;
    let python = foreign::python_packages(repo)?;
    let kubelet = foreign::kubelet_client(repo)?;
    step("CRI clients of another making", || {
        cargo(repo)
            .args(["test", "--release", "--test", "root_foreign", "--", "--ignored", "--test-threads=1"])
            .env("KEELSON_TEST_PYTHON_CLIENT", python)
            .env("KEELSON_TEST_KUBELET_CLIENT", kubelet)
            .run()
    })?;
    for suite in COMPAT_SUITES {
        let dir = repo.join("target/debs").join(suite);
        let packages = step(&format!("fetching the containerd of Debian {suite}"), || {
            Packages::fetch_from(suite, &dir, &["containerd"])
        })?;
        let bin = packages.tree("containerd").join("usr/bin");
        let version = Cmd::new(bin.join("containerd")).args(["--version"]).output()?;
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::join_paths(std::iter::once(bin).chain(std::env::split_paths(&path)))?;
        for handler in ["keelson", "runc"] {
            step(&format!("root tests of keelson-cri, handler {handler}, on {}", version.trim()), || {
                cri_tests(repo)?.env("PATH", &path).env("KEELSON_TEST_HANDLER", handler).run()
            })?;
        }
    }
    Ok(())
}

/// All root tests of keelson-cri.
fn cri_tests(repo: &Path) -> Result<Cmd> {
    let mut cmd = cargo(repo).args(["test", "--release", "--no-fail-fast"]);
    for name in root_tests(&repo.join("cri-shim/tests"))? {
        cmd = cmd.args(["--test".to_owned(), name]);
    }
    Ok(cmd.args(["--", "--test-threads=1"]))
}

/// The names of the root tests in a package's `tests`.
fn root_tests(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with("root_") && path.extension().is_some_and(|extension| extension == "rs") {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

fn e2e(repo: &Path) -> Result<()> {
    binaries::build(repo)?;
    cargo(repo).args(["test", "--release", "--test", "e2e", "--", "--test-threads=1", "--nocapture"]).run()
}
