//! The `images` section of the configuration file: limits against hostile images, patience with registries, pins.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How images are pulled and unpacked.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Settings {
    /// Most bytes one layer may unpack to.
    pub max_layer_bytes: u64,
    /// Most bytes all layers of an image may unpack to.
    pub max_image_bytes: u64,
    /// Most bytes a layer may unpack to for each byte it has compressed, once it is past [`Settings::RATIO_FROM`].
    pub max_compression_ratio: u64,
    /// A pull that gets no byte for this long is given up.
    pub progress_deadline_seconds: u64,
    /// Layers in transfer at once, of one pull.
    pub parallel_layers: usize,
    /// Layers in transfer at once, over all pulls.
    pub parallel_transfers: usize,
    /// References of images that must not be collected.
    pub pinned: Vec<String>,
    /// Who unpacks layers.
    pub unpacker: Unpacker,
}

/// Who unpacks layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Unpacker {
    /// This process, while a layer arrives; containerd for what it cannot do.
    #[default]
    Builtin,
    /// containerd's diff service, after a layer has arrived.
    Containerd,
}

impl Settings {
    /// Below this many unpacked bytes no compression ratio is suspicious.
    pub const RATIO_FROM: u64 = 256 << 20;

    /// [`Settings::progress_deadline_seconds`].
    pub fn progress_deadline(&self) -> Duration {
        Duration::from_secs(self.progress_deadline_seconds.max(1))
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            max_layer_bytes: 64 << 30,
            max_image_bytes: 256 << 30,
            max_compression_ratio: 250,
            progress_deadline_seconds: 300,
            parallel_layers: 3,
            parallel_transfers: 6,
            pinned: Vec::new(),
            unpacker: Unpacker::default(),
        }
    }
}

/// Where the image service finds and keeps things.
#[derive(Clone, Debug)]
pub struct Places {
    /// Registry configuration in containerd's `certs.d` layout.
    pub registry_config_dir: PathBuf,
    /// Volatile state: mounts of image volumes.
    pub state_dir: PathBuf,
    /// containerd's snapshotter.
    pub snapshotter: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_section_has_usable_values_and_mistakes_are_named() {
        let settings: Settings = serde_norway::from_str("{}").expect("valid");
        assert_eq!(settings, Settings::default());
        assert_eq!(settings.progress_deadline(), Duration::from_secs(300));
        let settings: Settings = serde_norway::from_str("unpacker: containerd").expect("valid");
        assert_eq!(settings.unpacker, Unpacker::Containerd);
        let error = serde_norway::from_str::<Settings>("maxLayerByte: 1").expect_err("unknown");
        assert!(error.to_string().contains("maxLayerByte"), "{error}");
    }
}
