//! `cargo xtask test [TIER…]`: the tiers from cheap to dear; each stops the run when it fails.

mod root;

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
            Tier::Root => step("root tests", || root::run(repo, guests))?,
            Tier::E2e => step("end-to-end test", || e2e(repo))?,
            Tier::VmLight => {
                step("tests in a small virtual machine", || crate::vm::light(repo, guests))?;
            }
            Tier::VmDebian => {
                step("tests in a Debian virtual machine", || crate::vm::debian(repo, guests))?;
            }
            Tier::Compat => compat(repo, guests)?,
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

/// The first containerd on PATH is the one that the tests start, with the shim for runc beside it.
fn compat(repo: &Path, choice: &Choice) -> Result<()> {
    if !choice.no_build {
        binaries::build(repo)?;
    }
    if choice.takes("root_foreign") {
        let python = foreign::python_packages(repo)?;
        let kubelet = foreign::kubelet_client(repo)?;
        step("CRI clients of another making", || {
            cargo(repo)
                .args(["test", "--release", "--test", "root_foreign", "--", "--ignored", "--test-threads=1"])
                .env("KEELSON_TEST_PYTHON_CLIENT", python)
                .env("KEELSON_TEST_KUBELET_CLIENT", kubelet)
                .run()
        })?;
    }
    let tests = step("building the root tests of keelson-cri", || {
        root::build(repo, |folder, name| folder == root::CRI && choice.takes(name))
    })?;
    let mut jobs = Vec::new();
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
            let told = version.trim();
            jobs.extend(
                tests.iter().map(|test| root::with_handler(repo, test, handler).with("PATH", &path, told)),
            );
        }
    }
    root::all(repo, choice, jobs)
}

fn e2e(repo: &Path) -> Result<()> {
    binaries::build(repo)?;
    cargo(repo).args(["test", "--release", "--test", "e2e", "--", "--test-threads=1", "--nocapture"]).run()
}
