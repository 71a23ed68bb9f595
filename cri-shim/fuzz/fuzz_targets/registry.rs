//! What a registry answers: manifests, indexes, challenges, errors, where a part begins. The first line is a header, the rest a
//! body.
#![no_main]

use keelson_cri::images::auth::Challenge;
use keelson_cri::images::manifest::{self, Parsed};
use keelson_cri::images::{hostclient, registry};
use libfuzzer_sys::fuzz_target;

const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

fuzz_target!(|bytes: &[u8]| {
    let (header, body) = bytes.split_at(bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len()));
    let Ok(header) = std::str::from_utf8(header) else { return };
    drop(Challenge::parse(header));
    drop(registry::range_start(header));
    let words = hostclient::explain(body);
    assert!(words.chars().count() <= 303 && !words.contains(char::is_control), "{words:?}");
    for media_type in
        [header, "application/vnd.oci.image.index.v1+json", "application/vnd.oci.image.manifest.v1+json", ""]
    {
        if let Ok(Parsed::Index(index)) = manifest::parse(body, media_type, DIGEST) {
            drop(manifest::select(&index));
        }
    }
});
