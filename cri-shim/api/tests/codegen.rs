//! Regenerates `src/gen/runtime.v1.rs` and fails when the checked-in file differs; `KEELSON_REGENERATE=1` rewrites it.

use std::path::Path;

#[test]
fn generated_code_is_what_the_proto_says() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = tempfile::tempdir().expect("temporary directory");
    tonic_prost_build::configure()
        .btree_map(".")
        .skip_debug([".runtime.v1.AuthConfig"])
        .out_dir(out.path())
        .emit_rerun_if_changed(false)
        .compile_protos(&[root.join("proto/runtime/v1/api.proto")], &[root.join("proto")])
        .expect("protoc compiles the proto (Debian: protobuf-compiler)");
    let fresh = std::fs::read_to_string(out.path().join("runtime.v1.rs")).expect("generated file");
    let checked_in = root.join("src/gen/runtime.v1.rs");
    if std::env::var_os("KEELSON_REGENERATE").is_some() {
        std::fs::write(&checked_in, &fresh).expect("rewrite the generated file");
    }
    let current = std::fs::read_to_string(&checked_in).unwrap_or_default();
    assert!(
        current == fresh,
        "{} is out of date: run `KEELSON_REGENERATE=1 cargo nextest run -p cri-shim-api`",
        checked_in.display()
    );
}
