//! Results of CNI plugins and network configurations: read, and written again in every version.
#![no_main]

use cni_plugins_types::{CniResult, NetworkConfigList, Version};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    drop(NetworkConfigList::parse(text));
    let Ok(value) = serde_json::from_str::<serde_json::Value>(text) else { return };
    let Ok(result) = CniResult::from_value(value, Version::default()) else { return };
    drop(result.addresses_in_sandbox().count());
    let newest = result.to_value(Version::default());
    let again = CniResult::from_value(newest, Version::default()).expect("what we write can be read");
    assert_eq!(again.ips, result.ips);
    assert_eq!(again.routes.len(), result.routes.len());
});
