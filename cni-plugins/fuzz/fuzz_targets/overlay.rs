//! The overlay's state: what is accepted is whole, and is read back from what is written of it.
#![no_main]

use cni_plugins_types::overlay::State;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    let Ok(state) = State::parse(text, "boot") else { return };
    assert!(state.ready && !state.pod_cidrs.is_empty() && state.mtu >= 68);
    for (index, range) in state.pod_cidrs.iter().enumerate() {
        assert_eq!(range.addr(), range.network());
        assert!(state.pod_cidrs[..index].iter().all(|other| !other.overlaps(range)));
    }
    let written = serde_json::to_vec(&state).expect("a state can be written");
    assert_eq!(State::parse(&written, "boot").expect("what we write can be read"), state);
});
