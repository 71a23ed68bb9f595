//! The kernel's messages: iterating ends, attributes lie inside what they are in.
#![no_main]

use cni_plugins_host::netlink::{
    Link,
    codec::{attributes, messages, text},
    socket::refusal,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    for (header, body) in messages(bytes) {
        assert!(body.len() <= bytes.len());
        drop(refusal(header.flags, body));
        drop(Link::read(body));
    }
    for (_, payload) in attributes(bytes) {
        assert!(attributes(payload).map(|(_, inner)| inner.len()).sum::<usize>() <= payload.len());
        drop(text(payload));
    }
});
