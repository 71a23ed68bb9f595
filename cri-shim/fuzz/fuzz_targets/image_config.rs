//! Image configurations, with a manifest of as many layers as the first byte says.
#![no_main]

use keelson_cri::images::manifest;
use libfuzzer_sys::fuzz_target;
use oci_spec::image::ImageManifest;
use serde_json::json;

const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

fuzz_target!(|bytes: &[u8]| {
    let Some((layers, config)) = bytes.split_first() else { return };
    let layer =
        json!({ "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": DIGEST, "size": 1 });
    let text = json!({
        "schemaVersion": 2,
        "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": DIGEST, "size": 1 },
        "layers": vec![layer; usize::from(layers % 4)],
    });
    let parsed: ImageManifest = serde_json::from_value(text).expect("a manifest");
    if let Ok(config) = manifest::parse_config(config, &parsed) {
        let ids = config.rootfs().diff_ids();
        assert_eq!(ids.len(), usize::from(layers % 4), "as many layers as the manifest has");
        assert_eq!(manifest::chain_ids(ids).len(), ids.len());
    }
});
