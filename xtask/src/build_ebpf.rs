//! `cargo xtask build-ebpf`: builds the BPF programs and puts the object where the loader's build script finds it.
//!
//! Takes the workspace root; leaves `target/bpf/object/keelson-bpf.o`, touched only when its bytes changed, so that
//! an unchanged object rebuilds nothing. Uses whichever toolchain can build `core` for the BPF target: rustup's
//! nightly first, else a stable one with its sources and `RUSTC_BOOTSTRAP=1`. Installs nothing.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

mod stack;

const TARGET: &str = "bpfel-unknown-none";

/// How cargo is called for the BPF target.
struct Toolchain {
    /// What to tell the user.
    name: String,
    /// Program and leading arguments.
    cargo: Vec<String>,
    /// Whether unstable flags must be unlocked on a stable compiler.
    bootstrap: bool,
}

/// Builds the programs of the workspace at `root`.
pub(crate) fn run(root: &Path) -> Result<()> {
    let linker = find_linker()?;
    let toolchain = find_toolchain()?;
    println!("    toolchain: {}, linker: {}", toolchain.name, linker.display());
    let target_dir = root.join("target/bpf");
    let status = command(&toolchain, root, &target_dir, &linker)?
        .status()
        .with_context(|| format!("cannot start {}", toolchain.cargo[0]))?;
    if !status.success() {
        bail!(
            "the BPF programs do not build with {}: {status} (see the compiler's message above)",
            toolchain.name
        );
    }
    let built = target_dir.join(TARGET).join("release/keelson-bpf");
    let object = target_dir.join("object/keelson-bpf.o");
    let bytes = fs::read(&built).with_context(|| format!("cargo built no {}", built.display()))?;
    let (deepest, stack) = stack::check(&bytes)?;
    publish(&bytes, &object)?;
    println!("    {}: {} bytes, {stack} bytes of stack at most ({deepest})", object.display(), bytes.len());
    Ok(())
}

fn command(toolchain: &Toolchain, root: &Path, target_dir: &Path, linker: &Path) -> Result<Command> {
    let mut command = Command::new(&toolchain.cargo[0]);
    command
        .args(&toolchain.cargo[1..])
        .args(["build", "--release", "--package", "ebpf-programs", "--bin", "keelson-bpf"])
        .args(["--target", TARGET, "-Z", "build-std=core", "--target-dir"])
        .arg(target_dir)
        .current_dir(root);
    // The linker derives BTF from full debug information, in one unit; the workspace's own profile has neither.
    for (key, value) in [("DEBUG", "2"), ("STRIP", "none"), ("CODEGEN_UNITS", "1"), ("INCREMENTAL", "false")]
    {
        command.env(format!("CARGO_PROFILE_RELEASE_{key}"), value);
    }
    command.env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "3").env("CARGO_PROFILE_RELEASE_PANIC", "abort");
    let linker = linker.to_str().context("the path of bpf-linker is not UTF-8")?;
    let flags = [
        "-Cdebuginfo=2".to_owned(),
        format!("-Clinker={linker}"),
        "-Clink-arg=--btf".to_owned(),
        // In that order, sets and moves of memory would be calls of loops over single bytes, each with a frame of its own.
        "-Clink-arg=--disable-expand-memcpy-in-order".to_owned(),
        format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH),
    ];
    command.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    // Whatever toolchain runs xtask must not leak into the one that builds for BPF.
    for key in
        ["RUSTC", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTUP_TOOLCHAIN", "CARGO", "CARGO_TARGET_DIR"]
    {
        command.env_remove(key);
    }
    if toolchain.bootstrap {
        command.env("RUSTC_BOOTSTRAP", "1");
    }
    Ok(command)
}

/// Puts the object into place, atomically, unless the same bytes are there already.
fn publish(bytes: &[u8], object: &Path) -> Result<()> {
    if fs::read(object).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let dir = object.parent().context("the object has a directory")?;
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let fresh = object.with_extension("o.new");
    fs::write(&fresh, bytes).with_context(|| format!("cannot write {}", fresh.display()))?;
    fs::rename(&fresh, object).with_context(|| format!("cannot put {} in place", object.display()))
}

/// rustup's nightly, else any cargo whose compiler has the standard library's sources.
fn find_toolchain() -> Result<Toolchain> {
    let nightly = ["rustup", "run", "nightly"];
    if has_sources(&[&nightly[..], &["rustc"]].concat()) {
        let cargo = [&nightly[..], &["cargo"]].concat().into_iter().map(str::to_owned).collect();
        return Ok(Toolchain { name: "rustup's nightly".into(), cargo, bootstrap: false });
    }
    if has_sources(&["rustc"]) {
        let name = "the stable compiler with RUSTC_BOOTSTRAP=1".into();
        return Ok(Toolchain { name, cargo: vec!["cargo".into()], bootstrap: true });
    }
    bail!(
        "no Rust toolchain can build `core` for the BPF target: run \
         `rustup toolchain install nightly --component rust-src`, or install Debian's `rust-web-src` package beside \
         `rustc-web` and `cargo-web`"
    )
}

/// Whether the standard library's sources lie below the sysroot of this compiler.
fn has_sources(rustc: &[&str]) -> bool {
    let output = Command::new(rustc[0])
        .args(&rustc[1..])
        .args(["--print", "sysroot"])
        .env_remove("RUSTUP_TOOLCHAIN")
        .output();
    let Ok(output) = output else { return false };
    let sysroot = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    output.status.success() && sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file()
}

/// `bpf-linker` in PATH or in cargo's own bin directory.
fn find_linker() -> Result<PathBuf> {
    let cargo_bin = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")))
        .map(|home| home.join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(cargo_bin)
        .map(|dir| dir.join("bpf-linker"))
        .find(|candidate| candidate.is_file())
        .context("bpf-linker is not installed: run `cargo xtask setup`, or `cargo install bpf-linker`")
}
