//! The kernel refuses memory for larger maps: what is programmed goes on, changes that fit are written, and growth works
//! once there is memory.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};
use ebpf_common::Protocol::Tcp;
use ebpf_loader::{Capacity, Change, Config, DataPlane, ServiceTable};
use ebpf_tests::{
    arena::Arena,
    servers::{Server, ask_tcp},
    tables::{at, ips, key, service},
};

/// Enough for the process and the programs, not for the maps that are asked for below.
const LIMIT: u64 = 256 << 20;
const CONTROLLER: &str = "/sys/fs/cgroup/memory";

/// A cgroup of the version 1 memory controller with this process in it.
struct Limited {
    dir: PathBuf,
    home: PathBuf,
}

impl Limited {
    /// `None` where that controller is not mounted.
    fn enter() -> Result<Option<Self>> {
        let groups = fs::read_to_string("/proc/self/cgroup")?;
        let own = groups.lines().find_map(|line| line.split_once(":memory:").map(|(_, path)| path));
        let Some(own) = own.filter(|_| PathBuf::from(CONTROLLER).join("memory.limit_in_bytes").exists())
        else {
            return Ok(None);
        };
        let home = PathBuf::from(CONTROLLER).join(own.trim_start_matches('/'));
        let dir = PathBuf::from(CONTROLLER).join(format!("keelson-test-{}", std::process::id()));
        fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
        let limited = Self { dir, home };
        fs::write(limited.dir.join("memory.limit_in_bytes"), LIMIT.to_string())?;
        fs::write(limited.dir.join("cgroup.procs"), "0")?;
        Ok(Some(limited))
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        drop(fs::write(self.home.join("cgroup.procs"), "0"));
        // What was charged and is not freed keeps no directory.
        drop(fs::remove_dir(&self.dir));
    }
}

#[test]
fn maps_that_the_kernel_has_no_memory_for_change_nothing() -> Result<()> {
    let arena = Arena::enter(&ips(&["10.244.0.1"]))?;
    let _server = Server::tcp(at("10.244.0.1:8080"))?;
    let (one, two) = (at("10.96.0.10:80"), at("10.96.0.11:80"));
    let web = |vip| service(Tcp, &[vip], &[at("10.244.0.1:8080")]);
    let mut table = ServiceTable::from([(key("one"), web(one))]);
    let mut plane = arena.open()?;
    plane.replace_all(&table);
    plane.attach()?;
    let before = plane.usage().capacity;
    {
        let Some(_limited) = Limited::enter()? else {
            println!("skipped: the version 1 memory controller is not mounted");
            return Ok(());
        };
        // 512 MB for the backend index.
        let larger = Capacity { extent_words: 1 << 26, ..before };
        assert!(plane.grow(larger, table.clone())?.is_none(), "the kernel had the memory");
        assert_eq!(plane.usage().capacity, before);
        assert_eq!(ask_tcp(one)?.1, one, "what was there goes on");
        let report = plane.apply(&[Change::Upsert(key("two"), web(two))]);
        assert!(report.refused.is_empty(), "{:?}", report.refused);
        assert_eq!(ask_tcp(two)?.1, two);
        let pin_dir = arena.pin_dir.with_file_name(format!("keelson-test-{}-new", std::process::id()));
        let config = Config { capacity: larger, pin_dir, ..arena.config() };
        let error =
            DataPlane::open(config.clone()).err().context("a new data plane of that size has memory")?;
        let said = format!("{:#}", anyhow::Error::new(error));
        drop(ebpf_loader::unload(&config.pin_dir));
        assert!(said.contains("memory"), "{said}");
    }
    table.insert(key("two"), web(two));
    let larger = Capacity { backends: before.backends * 2, ..before };
    let report = plane.grow(larger, table)?.context("now there is memory")?;
    assert!(report.refused.is_empty(), "{:?}", report.refused);
    for vip in [one, two] {
        assert_eq!(ask_tcp(vip)?.1, vip);
    }
    Ok(())
}
