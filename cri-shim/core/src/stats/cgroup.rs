//! What a cgroup uses, from its files, with one meaning for both cgroup versions.

use super::{Pressure, number, pressure, value};

/// Gives the text of a cgroup's file, by controller (version 1; `unified` for the version 2 tree mounted beside it; empty in
/// version 2) and file name.
pub type Reader<'a> = &'a dyn Fn(&str, &str) -> String;

/// What every request for statistics needs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CgroupUsage {
    /// CPU time since creation in nanoseconds.
    pub cpu_nanoseconds: u64,
    /// All memory charged to it.
    pub memory_bytes: u64,
    /// Memory that cannot simply be dropped: usage without inactive file pages.
    pub working_set_bytes: u64,
    /// Anonymous memory.
    pub rss_bytes: u64,
    /// Memory limit; nothing when unlimited.
    pub memory_limit: Option<u64>,
    /// Page cache.
    pub cache_bytes: u64,
    /// Mapped files.
    pub mapped_file_bytes: u64,
    /// Minor page faults.
    pub page_faults: u64,
    /// Major page faults.
    pub major_page_faults: u64,
    /// Processes in it and below it.
    pub processes: u64,
    /// Swap in use.
    pub swap_bytes: u64,
    /// Swap limit; nothing when unlimited or when swap is not counted.
    pub swap_limit: Option<u64>,
    /// Waiting for the CPU, where the kernel counts it.
    pub cpu_pressure: Option<Pressure>,
    /// Waiting for memory.
    pub memory_pressure: Option<Pressure>,
    /// Waiting for disks.
    pub io_pressure: Option<Pressure>,
}

/// What only metrics need.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CgroupDetails {
    /// CPU time outside the kernel in nanoseconds.
    pub cpu_user_nanoseconds: u64,
    /// CPU time in the kernel in nanoseconds.
    pub cpu_system_nanoseconds: u64,
    /// Periods in which the quota was enforced.
    pub cfs_periods: u64,
    /// Periods in which it was used up.
    pub cfs_throttled_periods: u64,
    /// Time spent waiting for the next period in nanoseconds.
    pub cfs_throttled_nanoseconds: u64,
    /// The most memory ever used.
    pub memory_max_bytes: u64,
    /// Memory of the kernel itself.
    pub kernel_bytes: u64,
    /// How often the memory limit was hit.
    pub memory_failures: u64,
    /// Processes that the kernel killed for memory.
    pub oom_kills: u64,
    /// How many processes and threads there may be; nothing when unlimited.
    pub pids_limit: Option<u64>,
    /// Traffic to disks.
    pub devices: Vec<DeviceUsage>,
    /// Use of huge pages, by size.
    pub huge_pages: Vec<HugePageUsage>,
}

/// Traffic to one disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceUsage {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
}

/// Use of huge pages of one size.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HugePageUsage {
    /// As the kernel writes it: `2MB`.
    pub size: String,
    /// Bytes in use.
    pub bytes: u64,
    /// The most bytes ever in use; the same as now where the kernel keeps no record.
    pub max_bytes: u64,
}

/// Above this a v1 limit means "none": the kernel shows the largest page-aligned number.
const V1_UNLIMITED: u64 = 1 << 62;

fn v1_limit(text: &str) -> Option<u64> {
    Some(number(text)).filter(|limit| (1..V1_UNLIMITED).contains(limit))
}

/// Usage from cgroup v1 files.
pub fn usage_v1(read: Reader<'_>) -> CgroupUsage {
    let stat_text = read("memory", "memory.stat");
    let stat = |key| value(&stat_text, key);
    let usage = number(&read("memory", "memory.usage_in_bytes"));
    let memory_limit = v1_limit(&read("memory", "memory.limit_in_bytes"));
    // The v1 limit is of memory and swap together.
    let both = v1_limit(&read("memory", "memory.memsw.limit_in_bytes"));
    CgroupUsage {
        cpu_nanoseconds: number(&read("cpuacct", "cpuacct.usage")),
        memory_bytes: usage,
        working_set_bytes: usage.saturating_sub(stat("total_inactive_file")),
        rss_bytes: stat("total_rss"),
        memory_limit,
        cache_bytes: stat("total_cache"),
        mapped_file_bytes: stat("total_mapped_file"),
        page_faults: stat("total_pgfault"),
        major_page_faults: stat("total_pgmajfault"),
        processes: number(&read("pids", "pids.current")),
        swap_bytes: stat("total_swap"),
        swap_limit: both.zip(memory_limit).map(|(both, memory)| both.saturating_sub(memory)),
        cpu_pressure: pressure(&read("unified", "cpu.pressure")),
        memory_pressure: pressure(&read("unified", "memory.pressure")),
        io_pressure: pressure(&read("unified", "io.pressure")),
    }
}

/// Usage from cgroup v2 files.
pub fn usage_v2(read: Reader<'_>) -> CgroupUsage {
    let stat_text = read("", "memory.stat");
    let stat = |key| value(&stat_text, key);
    let usage = number(&read("", "memory.current"));
    CgroupUsage {
        cpu_nanoseconds: value(&read("", "cpu.stat"), "usage_usec").saturating_mul(1000),
        memory_bytes: usage,
        working_set_bytes: usage.saturating_sub(stat("inactive_file")),
        rss_bytes: stat("anon"),
        memory_limit: read("", "memory.max").trim().parse().ok(),
        cache_bytes: stat("file"),
        mapped_file_bytes: stat("file_mapped"),
        page_faults: stat("pgfault"),
        major_page_faults: stat("pgmajfault"),
        processes: number(&read("", "pids.current")),
        swap_bytes: number(&read("", "memory.swap.current")),
        swap_limit: read("", "memory.swap.max").trim().parse().ok(),
        cpu_pressure: pressure(&read("", "cpu.pressure")),
        memory_pressure: pressure(&read("", "memory.pressure")),
        io_pressure: pressure(&read("", "io.pressure")),
    }
}

/// Details from cgroup v1 files; `page_sizes` are the sizes of huge pages that are counted.
pub fn details_v1(read: Reader<'_>, page_sizes: &[String]) -> CgroupDetails {
    let cpu = read("cpu", "cpu.stat");
    let mut devices = Vec::new();
    v1_devices(&read("blkio", "blkio.throttle.io_service_bytes_recursive"), &mut devices, |device| {
        (&mut device.read_bytes, &mut device.written_bytes)
    });
    v1_devices(&read("blkio", "blkio.throttle.io_serviced_recursive"), &mut devices, |device| {
        (&mut device.reads, &mut device.writes)
    });
    CgroupDetails {
        cpu_user_nanoseconds: number(&read("cpuacct", "cpuacct.usage_user")),
        cpu_system_nanoseconds: number(&read("cpuacct", "cpuacct.usage_sys")),
        cfs_periods: value(&cpu, "nr_periods"),
        cfs_throttled_periods: value(&cpu, "nr_throttled"),
        cfs_throttled_nanoseconds: value(&cpu, "throttled_time"),
        memory_max_bytes: number(&read("memory", "memory.max_usage_in_bytes")),
        kernel_bytes: number(&read("memory", "memory.kmem.usage_in_bytes")),
        memory_failures: number(&read("memory", "memory.failcnt")),
        oom_kills: oom_kills(&read("memory", "memory.oom_control")),
        pids_limit: read("pids", "pids.max").trim().parse().ok(),
        devices,
        huge_pages: page_sizes
            .iter()
            .map(|size| HugePageUsage {
                bytes: number(&read("hugetlb", &format!("hugetlb.{size}.usage_in_bytes"))),
                max_bytes: number(&read("hugetlb", &format!("hugetlb.{size}.max_usage_in_bytes"))),
                size: size.clone(),
            })
            .collect(),
    }
}

/// Details from cgroup v2 files; `page_sizes` are the sizes of huge pages that are counted.
pub fn details_v2(read: Reader<'_>, page_sizes: &[String]) -> CgroupDetails {
    let cpu = read("", "cpu.stat");
    let microseconds = |key| value(&cpu, key).saturating_mul(1000);
    let stat = read("", "memory.stat");
    let events = read("", "memory.events");
    CgroupDetails {
        cpu_user_nanoseconds: microseconds("user_usec"),
        cpu_system_nanoseconds: microseconds("system_usec"),
        cfs_periods: value(&cpu, "nr_periods"),
        cfs_throttled_periods: value(&cpu, "nr_throttled"),
        cfs_throttled_nanoseconds: microseconds("throttled_usec"),
        memory_max_bytes: number(&read("", "memory.peak")),
        // Kernels before 5.18 have no sum.
        kernel_bytes: value(&stat, "kernel")
            .max(value(&stat, "kernel_stack").saturating_add(value(&stat, "slab"))),
        memory_failures: value(&events, "max"),
        oom_kills: oom_kills(&events),
        pids_limit: read("", "pids.max").trim().parse().ok(),
        devices: read("", "io.stat").lines().filter_map(v2_device).collect(),
        huge_pages: page_sizes
            .iter()
            .map(|size| {
                let bytes = number(&read("", &format!("hugetlb.{size}.current")));
                HugePageUsage { size: size.clone(), bytes, max_bytes: bytes }
            })
            .collect(),
    }
}

/// Adds lines of `8:0 Read 4096` to the counters that `fields` (reads, writes) picks.
fn v1_devices(
    text: &str,
    devices: &mut Vec<DeviceUsage>,
    fields: fn(&mut DeviceUsage) -> (&mut u64, &mut u64),
) {
    for line in text.lines() {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let [device, operation @ ("Read" | "Write"), count] = words[..] else { continue };
        let Some((major, minor)) = numbers(device) else { continue };
        let known = devices.iter().position(|one| (one.major, one.minor) == (major, minor));
        let index = known.unwrap_or_else(|| {
            devices.push(DeviceUsage { major, minor, ..DeviceUsage::default() });
            devices.len() - 1
        });
        let (reads, writes) = fields(&mut devices[index]);
        *(if operation == "Read" { reads } else { writes }) = number(count);
    }
}

fn v2_device(line: &str) -> Option<DeviceUsage> {
    let mut words = line.split_ascii_whitespace();
    let (major, minor) = numbers(words.next()?)?;
    let mut device = DeviceUsage { major, minor, ..DeviceUsage::default() };
    for (key, count) in words.filter_map(|word| word.split_once('=')) {
        match key {
            "rbytes" => device.read_bytes = number(count),
            "wbytes" => device.written_bytes = number(count),
            "rios" => device.reads = number(count),
            "wios" => device.writes = number(count),
            _ => {}
        }
    }
    Some(device)
}

fn numbers(device: &str) -> Option<(u32, u32)> {
    let (major, minor) = device.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// How many processes the kernel killed for memory, from `memory.oom_control` (v1) or `memory.events` (v2).
pub fn oom_kills(text: &str) -> u64 {
    value(text, "oom_kill")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reader<'a>(files: &'a [(&'a str, &'a str)]) -> impl Fn(&str, &str) -> String + 'a {
        |_, wanted| {
            let found = files.iter().find(|(name, _)| *name == wanted);
            found.map(|(_, text)| (*text).to_owned()).unwrap_or_default()
        }
    }

    #[test]
    fn both_cgroup_versions_give_the_same_figures() {
        let from_v1 = usage_v1(&reader(&[
            ("cpuacct.usage", "5000\n"),
            ("memory.usage_in_bytes", "1000\n"),
            ("memory.limit_in_bytes", "9223372036854771712\n"),
            ("memory.stat", "inactive_file 1\ntotal_rss 400\ntotal_inactive_file 300\ntotal_pgfault 7\n"),
            ("pids.current", "2\n"),
        ]));
        let from_v2 = usage_v2(&reader(&[
            ("cpu.stat", "usage_usec 5\nuser_usec 3\n"),
            ("memory.current", "1000\n"),
            ("memory.max", "max\n"),
            ("memory.stat", "anon 400\ninactive_file 300\npgfault 7\n"),
            ("pids.current", "2\n"),
        ]));
        assert_eq!(from_v1, from_v2);
        assert_eq!(from_v1.working_set_bytes, 700);
        assert_eq!(from_v1.memory_limit, None);
    }

    #[test]
    fn both_cgroup_versions_give_the_same_details() {
        let from_v1 = details_v1(
            &reader(&[
                ("cpuacct.usage_user", "3000"),
                ("cpuacct.usage_sys", "2000"),
                ("cpu.stat", "nr_periods 9\nnr_throttled 4\nthrottled_time 6000\n"),
                ("memory.max_usage_in_bytes", "77"),
                ("memory.failcnt", "5"),
                ("memory.oom_control", "oom_kill_disable 0\noom_kill 1\n"),
                ("pids.max", "max"),
                (
                    "blkio.throttle.io_service_bytes_recursive",
                    "254:0 Read 10\n254:0 Write 20\n254:0 Total 30\nTotal 30\n",
                ),
                ("blkio.throttle.io_serviced_recursive", "254:0 Read 1\n254:0 Write 2\n"),
                ("hugetlb.2MB.usage_in_bytes", "8"),
                ("hugetlb.2MB.max_usage_in_bytes", "8"),
            ]),
            &["2MB".to_owned()],
        );
        let from_v2 = details_v2(
            &reader(&[
                ("cpu.stat", "user_usec 3\nsystem_usec 2\nnr_periods 9\nnr_throttled 4\nthrottled_usec 6\n"),
                ("memory.peak", "77"),
                ("memory.events", "max 5\noom_kill 1\n"),
                ("pids.max", "max"),
                ("io.stat", "254:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0\n"),
                ("hugetlb.2MB.current", "8"),
            ]),
            &["2MB".to_owned()],
        );
        assert_eq!(from_v1, from_v2);
        assert_eq!(from_v1.devices[0].written_bytes, 20);
    }

    #[test]
    fn a_swap_limit_of_version_1_is_what_memory_leaves() {
        let usage = usage_v1(&reader(&[
            ("memory.limit_in_bytes", "100"),
            ("memory.memsw.limit_in_bytes", "150"),
            ("memory.stat", "total_swap 20\n"),
        ]));
        assert_eq!((usage.swap_limit, usage.swap_bytes), (Some(50), 20));
    }

    #[test]
    fn oom_kills_are_counted_and_absent_files_mean_none() {
        assert_eq!(oom_kills("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"), 2);
        assert_eq!(oom_kills(""), 0);
    }
}
