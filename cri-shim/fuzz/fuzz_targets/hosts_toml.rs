//! Registry configurations: `hosts.toml`.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(hosts) =
        keelson_cri::images::hosts::parse(text, Path::new("/certs.d/a/hosts.toml"), "registry.example")
    {
        assert!(!hosts.is_empty(), "the registry itself is always there");
        for host in hosts {
            assert!(
                host.origin.starts_with("http://") || host.origin.starts_with("https://"),
                "{}",
                host.origin
            );
        }
    }
});
