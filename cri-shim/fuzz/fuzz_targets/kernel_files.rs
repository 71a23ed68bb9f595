//! Files of the kernel that figures are read from.
#![no_main]

use cri_shim_core::stats;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let read = |_: &str, _: &str| text.to_owned();
    let sizes = ["2MB".to_owned()];
    for usage in [stats::usage_v1(&read), stats::usage_v2(&read)] {
        assert!(usage.working_set_bytes <= usage.memory_bytes);
    }
    drop((stats::details_v1(&read, &sizes), stats::details_v2(&read, &sizes)));
    drop((stats::interfaces(text), stats::pressure(text), stats::soft_open_files(text)));
});
