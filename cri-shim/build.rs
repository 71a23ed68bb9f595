//! Compiles the bare programs (`src/host/bare/`) into static executables for `include_bytes!`.
//!
//! Input: cargo's variables. Output: `$OUT_DIR/pause`, `$OUT_DIR/keeper`. It needs nothing but the rustc and linker that build
//! this crate.

use std::env;
use std::path::PathBuf;
use std::process::Command;

const SOURCES: &str = "src/host/bare";

fn main() {
    println!("cargo:rerun-if-changed={SOURCES}");
    for program in ["pause", "keeper"] {
        compile(program);
    }
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"))
}

fn compile(program: &str) {
    let output = PathBuf::from(variable("OUT_DIR")).join(program);
    let mut rustc = Command::new(variable("RUSTC"));
    rustc.args(["--crate-name", program, "--crate-type", "bin", "--edition", "2024"]);
    rustc.args(["-C", "panic=abort", "-C", "opt-level=s", "-C", "strip=symbols"]);
    rustc.args(["-C", "relocation-model=static", "-C", "target-feature=+crt-static"]);
    for argument in ["-nostartfiles", "-nostdlib", "-static", "-Wl,--build-id=none", "-Wl,-z,noseparate-code"]
    {
        rustc.arg(format!("-Clink-arg={argument}"));
    }
    if variable("TARGET") != variable("HOST") {
        rustc.args(["--target", &variable("TARGET")]);
    }
    if let Ok(linker) = env::var("RUSTC_LINKER") {
        rustc.arg(format!("-Clinker={linker}"));
    }
    rustc.arg("-o").arg(&output).arg(format!("{SOURCES}/{program}.rs"));
    let status = rustc.status().expect("rustc runs");
    assert!(status.success(), "the {program} program does not compile");
}
