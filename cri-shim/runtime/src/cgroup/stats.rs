//! Figures of a container, from the files of its cgroups.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Paths;
use crate::error::Error;

/// What a container has used. A figure that its controller does not give is absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Whether the figures are of version 2.
    pub unified: bool,
    /// Processor time in nanoseconds.
    pub cpu_usage_ns: Option<u64>,
    /// Of it in user mode.
    pub cpu_user_ns: Option<u64>,
    /// Of it in the kernel.
    pub cpu_system_ns: Option<u64>,
    /// Periods of the quota that have passed, were throttled, and how long.
    pub throttling: Option<Throttling>,
    /// Bytes of memory in use, page cache included.
    pub memory_usage: Option<u64>,
    /// The most it ever was.
    pub memory_peak: Option<u64>,
    /// The limit; absent when there is none.
    pub memory_limit: Option<u64>,
    /// Swap in use (version 2) or memory and swap (version 1).
    pub swap_usage: Option<u64>,
    /// The limit of the same.
    pub swap_limit: Option<u64>,
    /// Every line of `memory.stat`.
    pub memory_stat: BTreeMap<String, u64>,
    /// Kills by the memory limit.
    pub oom_kills: Option<u64>,
    /// Processes and threads.
    pub pids_current: Option<u64>,
    /// Their limit; absent when there is none.
    pub pids_limit: Option<u64>,
    /// Every line of `io.stat` (`rbytes`, `wbytes`, `rios`, `wios`) or `blkio.throttle.*` by device `major:minor`.
    pub io: BTreeMap<String, BTreeMap<String, u64>>,
    /// Bytes of huge pages in use, by page size (`2MB`).
    pub hugetlb_usage: BTreeMap<String, u64>,
}

/// What the processor quota did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Throttling {
    /// Periods that passed.
    pub periods: u64,
    /// Periods in which it was held back.
    pub throttled_periods: u64,
    /// For how long, in nanoseconds.
    pub throttled_ns: u64,
}

impl Paths {
    /// Reads the figures.
    pub fn stats(&self) -> Result<Stats, Error> {
        let mut stats = Stats { unified: self.v1.is_empty(), ..Stats::default() };
        if self.v1.is_empty() {
            let directory = self.unified.as_deref().unwrap_or(Path::new("/nonexistent"));
            if !directory.exists() {
                return Err(gone(directory));
            }
            unified(&mut stats, directory);
        } else {
            if !self.v1.values().any(|directory| directory.exists()) {
                return Err(gone(self.v1.values().next().map_or(Path::new(""), |path| path)));
            }
            version1(&mut stats, &self.v1);
        }
        Ok(stats)
    }
}

fn gone(directory: &Path) -> Error {
    let source = std::io::Error::from(std::io::ErrorKind::NotFound);
    Error::Step { step: format!("read the figures of the cgroup {}", directory.display()), source }
}

/// A file of one number; absent when it cannot be read or says `max`.
fn number(directory: &Path, file: &str) -> Option<u64> {
    std::fs::read_to_string(directory.join(file)).ok()?.trim().parse().ok()
}

/// A file of lines `name number`.
fn table(directory: &Path, file: &str) -> BTreeMap<String, u64> {
    let text = std::fs::read_to_string(directory.join(file)).unwrap_or_default();
    text.lines()
        .filter_map(|line| {
            let (name, value) = line.split_once(' ')?;
            Some((name.to_owned(), value.trim().parse().ok()?))
        })
        .collect()
}

/// Limits above this are none: version 1 rounds the largest number down to a page.
const NO_LIMIT: u64 = 1 << 62;

fn unified(stats: &mut Stats, directory: &Path) {
    let cpu = table(directory, "cpu.stat");
    let ns = |name: &str| cpu.get(name).map(|us| us.saturating_mul(1000));
    stats.cpu_usage_ns = ns("usage_usec");
    stats.cpu_user_ns = ns("user_usec");
    stats.cpu_system_ns = ns("system_usec");
    stats.throttling = cpu.get("nr_periods").map(|periods| Throttling {
        periods: *periods,
        throttled_periods: cpu.get("nr_throttled").copied().unwrap_or(0),
        throttled_ns: ns("throttled_usec").unwrap_or(0),
    });
    stats.memory_usage = number(directory, "memory.current");
    stats.memory_peak = number(directory, "memory.peak");
    stats.memory_limit = number(directory, "memory.max");
    stats.swap_usage = number(directory, "memory.swap.current");
    stats.swap_limit = number(directory, "memory.swap.max");
    stats.memory_stat = table(directory, "memory.stat");
    stats.oom_kills = table(directory, "memory.events").get("oom_kill").copied();
    stats.pids_current = number(directory, "pids.current");
    stats.pids_limit = number(directory, "pids.max");
    let io = std::fs::read_to_string(directory.join("io.stat")).unwrap_or_default();
    stats.io = io.lines().filter_map(io_line).collect();
    huge_pages(stats, directory, ".current");
}

/// `8:0 rbytes=1 wbytes=2 …`
fn io_line(line: &str) -> Option<(String, BTreeMap<String, u64>)> {
    let (device, rest) = line.split_once(' ')?;
    let figures = rest.split(' ').filter_map(|part| {
        let (name, value) = part.split_once('=')?;
        Some((name.to_owned(), value.parse().ok()?))
    });
    Some((device.to_owned(), figures.collect()))
}

fn version1(stats: &mut Stats, paths: &BTreeMap<String, std::path::PathBuf>) {
    let none = std::path::PathBuf::from("/nonexistent");
    let of = |controller: &str| paths.get(controller).unwrap_or(&none).as_path();
    let cpu = of("cpuacct");
    stats.cpu_usage_ns = number(cpu, "cpuacct.usage");
    stats.cpu_user_ns = number(cpu, "cpuacct.usage_user");
    stats.cpu_system_ns = number(cpu, "cpuacct.usage_sys");
    let throttled = table(of("cpu"), "cpu.stat");
    stats.throttling = throttled.get("nr_periods").map(|periods| Throttling {
        periods: *periods,
        throttled_periods: throttled.get("nr_throttled").copied().unwrap_or(0),
        throttled_ns: throttled.get("throttled_time").copied().unwrap_or(0),
    });
    let memory = of("memory");
    let limit = |file: &str| number(memory, file).filter(|limit| *limit < NO_LIMIT);
    stats.memory_usage = number(memory, "memory.usage_in_bytes");
    stats.memory_peak = number(memory, "memory.max_usage_in_bytes");
    stats.memory_limit = limit("memory.limit_in_bytes");
    stats.swap_usage = number(memory, "memory.memsw.usage_in_bytes");
    stats.swap_limit = limit("memory.memsw.limit_in_bytes");
    stats.memory_stat = table(memory, "memory.stat");
    stats.oom_kills = table(memory, "memory.oom_control").get("oom_kill").copied();
    stats.pids_current = number(of("pids"), "pids.current");
    stats.pids_limit = number(of("pids"), "pids.max");
    for (file, read, write) in [
        ("blkio.throttle.io_service_bytes", "rbytes", "wbytes"),
        ("blkio.throttle.io_serviced", "rios", "wios"),
    ] {
        let text = std::fs::read_to_string(of("blkio").join(file)).unwrap_or_default();
        for (device, kind, value) in text.lines().filter_map(blkio_line) {
            let name = match kind {
                "Read" => read,
                "Write" => write,
                _ => continue,
            };
            stats.io.entry(device.to_owned()).or_default().insert(name.to_owned(), value);
        }
    }
    huge_pages(stats, of("hugetlb"), ".usage_in_bytes");
}

/// `8:0 Read 123`
fn blkio_line(line: &str) -> Option<(&str, &str, u64)> {
    let mut parts = line.split(' ');
    Some((parts.next()?, parts.next()?, parts.next()?.parse().ok()?))
}

fn huge_pages(stats: &mut Stats, directory: &Path, suffix: &str) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let size = name.strip_prefix("hugetlb.").and_then(|name| name.strip_suffix(suffix));
        if let Some(size) = size.filter(|size| !size.contains('.'))
            && let Some(bytes) = number(directory, &name)
        {
            stats.hugetlb_usage.insert(size.to_owned(), bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_both_versions() {
        let (device, figures) = io_line("8:16 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0").unwrap();
        assert_eq!((device.as_str(), figures["wbytes"]), ("8:16", 20));
        assert_eq!(blkio_line("8:0 Read 4096"), Some(("8:0", "Read", 4096)));
        assert_eq!(blkio_line("Total 9"), None);
    }

    #[test]
    fn version_2_figures_from_files() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        put(
            "cpu.stat",
            "usage_usec 5\nuser_usec 3\nsystem_usec 2\nnr_periods 4\nnr_throttled 1\nthrottled_usec 9\n",
        );
        put("memory.current", "4096\n");
        put("memory.max", "max\n");
        put("memory.events", "low 0\noom_kill 2\n");
        put("hugetlb.2MB.current", "0\n");
        put("hugetlb.2MB.rsvd.current", "0\n");
        let paths = Paths { unified: Some(dir.path().into()), ..Paths::default() };
        let stats = paths.stats().unwrap();
        assert_eq!(stats.cpu_usage_ns, Some(5000));
        assert_eq!(stats.throttling.unwrap().throttled_ns, 9000);
        assert_eq!((stats.memory_usage, stats.memory_limit, stats.oom_kills), (Some(4096), None, Some(2)));
        assert_eq!(stats.hugetlb_usage.keys().collect::<Vec<_>>(), ["2MB"]);
    }
}
