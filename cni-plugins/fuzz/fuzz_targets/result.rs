//! Results of plugins: what is read is written in every version, and read again without loss of addresses.
#![no_main]

use cni_plugins_types::{CniError, CniResult, Version};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    drop(serde_json::from_str::<CniError>(text));
    let Ok(value) = serde_json::from_str::<serde_json::Value>(text) else { return };
    let Ok(result) = CniResult::from_value(value, Version::default()) else { return };
    for version in Version::ALL {
        let written = result.to_value(version);
        let again = CniResult::from_value(written, version).expect("what we write can be read");
        assert_eq!(again.cni_version, version);
        assert_eq!(again.ips, result.ips);
        assert_eq!(again.routes.len(), result.routes.len());
        assert_eq!(again.interfaces.len(), result.interfaces.len());
    }
});
