//! Ranges of addresses: what is given is never held, excluded or the gateway, and choosing ends. The first byte says how many
//! addresses are taken.
#![no_main]

use cni_plugins_types::ipam::IpamConfig;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((count, text)) = bytes.split_first() else { return };
    let Ok(config) = serde_json::from_slice::<IpamConfig>(text) else { return };
    let Ok(sets) = config.range_sets() else { return };
    for set in &sets {
        let mut held = std::collections::BTreeSet::new();
        let mut last = None;
        for _ in 0..*count {
            let Ok(given) = set.allocate(last, |addr| held.contains(&addr)) else { break };
            let addr = given.address.addr();
            assert!(held.insert(addr), "{addr} is given twice");
            assert!(set.holds(addr) && set.find(addr) == Some(given));
            assert_ne!(Some(addr), given.gateway);
            last = Some(addr);
        }
    }
});
