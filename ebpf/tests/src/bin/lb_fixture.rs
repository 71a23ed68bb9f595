//! Opens a data plane with one service, says so, and waits to be killed: the process that restart tests kill.
//!
//! `lb-fixture PIN_DIR CGROUP VIP:PORT BACKEND:PORT...`; prints `adopted` or `fresh` once attached.
#![allow(clippy::print_stdout, reason = "the test reads the line")]

use std::{net::SocketAddr, path::PathBuf};

use anyhow::{Context, Result, ensure};
use ebpf_common::Protocol;
use ebpf_loader::{Capacity, Config, DataPlane, ServiceTable};
use ebpf_tests::tables::{key, service};

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut next = || arguments.next().context("usage: lb-fixture PIN_DIR CGROUP VIP:PORT BACKEND:PORT...");
    let (pin_dir, cgroup_dir) = (PathBuf::from(next()?), PathBuf::from(next()?));
    let vip: SocketAddr = next()?.parse()?;
    let backends = arguments.map(|text| text.parse()).collect::<Result<Vec<SocketAddr>, _>>()?;
    let capacity = Capacity { frontends: 16_384, services: 8192, backends: 32_768, extent_words: 65_536 };
    let mut plane = DataPlane::open(Config { pin_dir, cgroup_dir, capacity })?;
    let table = ServiceTable::from([(key("fixture"), service(Protocol::Tcp, &[vip], &backends))]);
    let report = plane.replace_all(&table);
    ensure!(report.refused.is_empty(), "{:?}", report.refused);
    plane.attach()?;
    println!("{}", if plane.adopted() { "adopted" } else { "fresh" });
    loop {
        std::thread::park();
    }
}
