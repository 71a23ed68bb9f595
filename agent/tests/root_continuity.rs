//! A real agent with only its proxy is killed, lied to and moved to other layouts under load, and nothing fails. The full
//! size is `cargo xtask bench lb --soak`.

use std::{path::PathBuf, time::Duration};

use anyhow::Result;
use ebpf_tests::bench::soak::{Options, soak};

#[test]
fn kills_empty_lists_and_other_layouts_fail_no_client() -> Result<()> {
    let report = soak(&Options {
        agent: PathBuf::from(env!("CARGO_BIN_EXE_keelson-agent")),
        other: None,
        duration: Duration::from_secs(12),
        every: Duration::from_millis(500),
        services: 50,
    })?;
    println!("{report:?}");
    assert_eq!(report.failures, Vec::<String>::new());
    assert!(report.kills > 4 && report.layouts > 0 && report.empty_lists > 0, "{report:?}");
    assert!(report.connections > 100 && report.datagrams > 100 && report.requests > 100, "{report:?}");
    Ok(())
}
