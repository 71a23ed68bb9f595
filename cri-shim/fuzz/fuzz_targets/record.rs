//! Records on disk: a damaged one is refused or read, and what is read survives being written.
#![no_main]

use cri_shim_core::record::{ContainerRecord, SandboxRecord};
use libfuzzer_sys::fuzz_target;
use prost::Message;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(record) = SandboxRecord::decode(bytes) {
        let again = SandboxRecord::decode(record.encode_to_vec().as_slice()).expect("our own bytes");
        assert_eq!(again.id, record.id);
        assert_eq!((again.phase(), again.state()), (record.phase(), record.state()));
        drop(record.cgroup_parent().to_owned());
    }
    if let Ok(record) = ContainerRecord::decode(bytes) {
        let again = ContainerRecord::decode(record.encode_to_vec().as_slice()).expect("our own bytes");
        assert_eq!((&again.id, again.phase(), again.state()), (&record.id, record.phase(), record.state()));
    }
});
