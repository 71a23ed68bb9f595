//! `cargo xtask setup`: installs what is missing for building, running and testing, and nothing else.
//!
//! Debian packages by the program they bring, the BPF toolchain (nightly's sources and bpf-linker, or Debian's
//! web toolchain where there is no rustup), musl's standard library, and cargo-deny for the lint tier. Idempotent.

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::cmd::{Cmd, step, which};

/// A program and the Debian package that brings it.
struct Tool {
    program: &'static str,
    package: &'static str,
    needed_for: &'static str,
}

const TOOLS: &[Tool] = &[
    Tool { program: "containerd", package: "containerd", needed_for: "running containers" },
    Tool { program: "runc", package: "runc", needed_for: "running containers" },
    Tool { program: "kubectl", package: "kubernetes-client", needed_for: "talking to the cluster" },
    Tool { program: "protoc", package: "protobuf-compiler", needed_for: "building containerd-client" },
    Tool { program: "cc", package: "gcc", needed_for: "linking" },
    Tool { program: "ip", package: "iproute2", needed_for: "looking at the host's routes and links" },
    Tool { program: "nft", package: "nftables", needed_for: "tests that no rule is written" },
    Tool {
        program: "/usr/lib/cni/bridge",
        package: "containernetworking-plugins",
        needed_for: "the pods' network in conformance runs and benches",
    },
    Tool { program: "curl", package: "curl", needed_for: "the walk of the README" },
];

/// What is loaded while running, by its name for the loader.
const LIBRARIES: &[Tool] = &[Tool {
    program: "libseccomp.so.2",
    package: "libseccomp2",
    needed_for: "seccomp profiles of containers",
}];

/// What the virtual-machine tiers need beside the rest.
const VM_TOOLS: &[Tool] = &[
    Tool { program: "qemu-system-x86_64", package: "qemu-system-x86", needed_for: "virtual machines" },
    Tool { program: "mmdebstrap", package: "mmdebstrap", needed_for: "the Debian guest" },
    Tool { program: "mkfs.ext4", package: "e2fsprogs", needed_for: "the guest's disks" },
];

/// What `bench lb` measures beside our data plane.
const FORWARDING_PEERS: &[Tool] = &[
    Tool { program: "iptables-restore", package: "iptables", needed_for: "a peer of the service data plane" },
    Tool { program: "nft", package: "nftables", needed_for: "a peer of the service data plane" },
];

/// How much of the tool set a command needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Build and run (`up`, `bench`).
    Run,
    /// Also the lint tools (`test`, `ci`).
    Test,
}

/// Version of bpf-linker that matches nightly's LLVM 22.
const BPF_LINKER: &str = "0.10.4";

/// Installs what `scope` lacks; tells what it does.
pub(crate) fn run(repo: &Path, scope: Scope) -> Result<()> {
    debian_packages(TOOLS.iter().chain(LIBRARIES))?;
    bpf_toolchain(repo)?;
    musl(repo)?;
    if scope == Scope::Test {
        cargo_tool("cargo-deny", &["--locked"])?;
    }
    Ok(())
}

/// Installs what libFuzzer is built with, and the nightly toolchain where its sanitizer is wanted.
pub(crate) fn fuzzing(sanitize: bool) -> Result<()> {
    if sanitize {
        if which("rustup").is_none() {
            bail!("--sanitize needs nightly Rust, and there is no rustup to install it (https://rustup.rs)");
        }
        nightly_sources()?;
    }
    debian_packages(&[
        Tool { program: "c++", package: "g++", needed_for: "libFuzzer" },
        Tool { program: "protoc", package: "protobuf-compiler", needed_for: "building containerd-client" },
    ])
}

/// Installs the peers of the service data plane.
pub(crate) fn forwarding_peers() -> Result<()> {
    debian_packages(FORWARDING_PEERS)
}

/// Installs what a CRI client in Python is fetched with.
pub(crate) fn python() -> Result<()> {
    debian_packages(&[
        Tool { program: "python3", package: "python3", needed_for: "a CRI client that is not ours" },
        Tool { program: "pip3", package: "python3-pip", needed_for: "a CRI client that is not ours" },
    ])
}

/// Installs what virtual machines need.
pub(crate) fn virtual_machines() -> Result<()> {
    debian_packages(VM_TOOLS)
}

fn debian_packages<'a>(tools: impl IntoIterator<Item = &'a Tool>) -> Result<()> {
    let missing: Vec<&Tool> = tools.into_iter().filter(|tool| !is_there(tool.program)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    if which("apt-get").is_none() {
        let list: Vec<String> =
            missing.iter().map(|tool| format!("{} (for {})", tool.program, tool.needed_for)).collect();
        bail!("these programs are missing and there is no apt-get to install them: {}", list.join(", "));
    }
    if !nix::unistd::geteuid().is_root() {
        let packages: Vec<&str> = missing.iter().map(|tool| tool.package).collect();
        bail!("missing packages, and only root can install them: apt-get install {}", packages.join(" "));
    }
    let packages: Vec<&str> = missing.iter().map(|tool| tool.package).collect();
    step(&format!("installing Debian packages: {}", packages.join(" ")), || {
        apt(&["update", "-qq"])?;
        let mut args = vec!["install", "-y", "-qq", "--no-install-recommends"];
        args.extend(&packages);
        apt(&args)
    })
}

/// A program on PATH, or a library in one of the directories that the loader looks in.
fn is_there(name: &str) -> bool {
    if !name.contains(".so.") {
        return which(name).is_some();
    }
    let triple = format!("/usr/lib/{}-linux-gnu", std::env::consts::ARCH);
    [triple.as_str(), "/usr/lib64", "/usr/lib", "/lib64", "/lib"]
        .iter()
        .any(|directory| Path::new(directory).join(name).exists())
}

fn apt(args: &[&str]) -> Result<()> {
    Cmd::new("apt-get").args(args).env("DEBIAN_FRONTEND", "noninteractive").output().map(drop)
}

/// The sources of `core` and a linker for the BPF target: by rustup where there is one, else Debian's.
fn bpf_toolchain(repo: &Path) -> Result<()> {
    if which("rustup").is_some() {
        nightly_sources()?;
        return cargo_bpf_linker(repo);
    }
    let missing: Vec<&str> = ["cargo-web", "rustc-web", "rust-web-src"]
        .into_iter()
        .filter(|package| !installed(package))
        .collect();
    if !missing.is_empty() {
        step(&format!("installing Debian packages: {}", missing.join(" ")), || {
            apt(&["update", "-qq"])?;
            let mut args = vec!["install", "-y", "-qq", "--no-install-recommends"];
            args.extend(&missing);
            apt(&args)
        })?;
    }
    cargo_bpf_linker(repo)
}

/// The standard library that the CNI plugins' executable is linked with, by rustup; without it they are built with glibc, and
/// start more slowly.
fn musl(repo: &Path) -> Result<()> {
    if which("rustup").is_none() || crate::binaries::musl_is_installed() {
        return Ok(());
    }
    let target = crate::binaries::target("musl");
    step(&format!("adding the target {target} (for the CNI plugins)"), || {
        Cmd::new("rustup").args(["target", "add", &target]).dir(repo).run()
    })
}

fn installed(package: &str) -> bool {
    Cmd::new("dpkg-query")
        .args(["-W", "-f", "${db:Status-Status}", package])
        .output()
        .is_ok_and(|status| status == "installed")
}

fn nightly_sources() -> Result<()> {
    let installed =
        Cmd::new("rustup").args(["component", "list", "--toolchain", "nightly", "--installed"]).output();
    match installed {
        Ok(list) if list.contains("rust-src") => return Ok(()),
        Ok(_) => {}
        Err(_) => {
            step("installing the nightly toolchain (for the BPF target)", || {
                Cmd::new("rustup").args(["toolchain", "install", "nightly", "--profile", "minimal"]).run()
            })?;
        }
    }
    step("adding rust-src to nightly (for the BPF target)", || {
        Cmd::new("rustup").args(["component", "add", "rust-src", "--toolchain", "nightly"]).run()
    })
}

fn cargo_bpf_linker(repo: &Path) -> Result<()> {
    if cargo_program("bpf-linker").is_some() {
        return Ok(());
    }
    step(&format!("installing bpf-linker {BPF_LINKER} (about a minute)"), || {
        let mut cmd = Cmd::new("cargo");
        if which("rustup").is_some() {
            cmd = cmd.args(["+nightly"]);
        }
        cmd.args([
            "install",
            "bpf-linker",
            "--version",
            BPF_LINKER,
            "--locked",
            "--no-default-features",
            "--features",
        ])
        .args(["rust-llvm-22"])
        .dir(repo.parent().unwrap_or(repo))
        .run()
    })
}

fn cargo_tool(name: &str, flags: &[&str]) -> Result<()> {
    if cargo_program(name).is_some() {
        return Ok(());
    }
    step(&format!("installing {name} (two minutes)"), || {
        Cmd::new("cargo").args(["install", name]).args(flags).run().context("cargo install")
    })
}

/// A program that cargo installed, on PATH or in cargo's own bin directory.
pub(crate) fn cargo_program(name: &str) -> Option<std::path::PathBuf> {
    which(name).or_else(|| {
        let home = std::env::var_os("CARGO_HOME")
            .map(std::path::PathBuf::from)
            .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")))?;
        Some(home.join("bin").join(name)).filter(|file| file.is_file())
    })
}
