//! WebSocket messages of exec and attach: whatever a client sends ends in time and breaks nothing.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, bool, &[u8])| {
    let (protocol, framed, bytes) = input;
    cri_shim_streaming::fuzz::websocket(protocol, framed, bytes);
});
