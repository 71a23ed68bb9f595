//! Compiles the pause program (`src/host/pause/main.rs`) into a static executable for `include_bytes!`.
//!
//! Input: cargo's variables. Output: `$OUT_DIR/pause`. It needs nothing but the rustc and linker that build this crate.

use std::env;
use std::path::PathBuf;
use std::process::Command;

const SOURCE: &str = "src/host/pause/main.rs";

fn main() {
    println!("cargo:rerun-if-changed={SOURCE}");
    let variable = |name| env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"));
    let output = PathBuf::from(variable("OUT_DIR")).join("pause");
    let mut rustc = Command::new(variable("RUSTC"));
    rustc.args(["--crate-name", "pause", "--crate-type", "bin", "--edition", "2024"]);
    rustc.args(["-C", "panic=abort", "-C", "opt-level=s", "-C", "strip=symbols"]);
    rustc.args(["-C", "relocation-model=static", "-C", "target-feature=+crt-static"]);
    for argument in ["-nostartfiles", "-nostdlib", "-static", "-Wl,--build-id=none", "-Wl,-z,noseparate-code"] {
        rustc.arg(format!("-Clink-arg={argument}"));
    }
    if variable("TARGET") != variable("HOST") {
        rustc.args(["--target", &variable("TARGET")]);
    }
    if let Ok(linker) = env::var("RUSTC_LINKER") {
        rustc.arg(format!("-Clinker={linker}"));
    }
    let status = rustc.arg("-o").arg(&output).arg(SOURCE).status().expect("rustc runs");
    assert!(status.success(), "the pause program does not compile");
}
