//! Image references: what is read can be written and read again.
#![no_main]

use keelson_cri::images::reference::{Reference, id_prefix};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    drop(id_prefix(text));
    if let Ok(reference) = Reference::parse(text) {
        let written = reference.to_string();
        let again = Reference::parse(&written).expect("the normal form is valid");
        assert_eq!(again.to_string(), written);
        assert_eq!((again.registry(), again.repository()), (reference.registry(), reference.repository()));
    }
});
