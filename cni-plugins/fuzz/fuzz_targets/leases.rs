//! The log of leases: whatever is on disk, a snapshot of what it says reads back the same.
#![no_main]

use std::collections::BTreeMap;

use cni_plugins_types::ipam::leases::Leases;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|lines: &str| {
    let text = format!("keelson-ipam 1 boot\n{lines}");
    let Ok(mut loaded) = Leases::load(&text, "boot") else { return };
    assert!(!loaded.stale && loaded.complete <= text.len());
    let snapshot = loaded.leases.snapshot("boot");
    let again = Leases::load(&snapshot, "boot").expect("what we write can be read");
    let holders = |leases: &Leases| -> BTreeMap<_, _> {
        leases.iter().map(|lease| (lease.owner.clone(), lease.addrs.clone())).collect()
    };
    assert_eq!(holders(&again.leases), holders(&loaded.leases));
    drop(Leases::load(&text, "another"));
});
