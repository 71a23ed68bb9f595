//! Embeds the BPF object that `cargo xtask build-ebpf` built; an empty stub where it has not run, so that check,
//! clippy and unit tests need no BPF toolchain. `KEELSON_BPF_OBJECT` names another object.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

fn main() {
    println!("cargo:rerun-if-env-changed=KEELSON_BPF_OBJECT");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("keelson-bpf.o");
    let object = env::var_os("KEELSON_BPF_OBJECT").map_or_else(default_object, PathBuf::from);
    // Watching the directory, not the file, keeps a missing file from making every build a rebuild.
    if let Some(dir) = object.parent() {
        // A read-only tree builds with the stub, and is simply looked at again next time.
        drop(fs::create_dir_all(dir));
        println!("cargo:rerun-if-changed={}", dir.display());
    }
    let bytes = fs::read(&object).unwrap_or_default();
    fs::write(&out, bytes).expect("OUT_DIR is writable");
}

fn default_object() -> PathBuf {
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    manifest.ancestors().nth(2).unwrap_or(Path::new(".")).join("target/bpf/object/keelson-bpf.o")
}
