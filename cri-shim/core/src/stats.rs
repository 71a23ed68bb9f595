//! Figures from the text of cgroup files, for both cgroup versions.

/// What a cgroup uses, as far as its files tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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
    /// Minor page faults.
    pub page_faults: u64,
    /// Major page faults.
    pub major_page_faults: u64,
    /// Processes in it and below it.
    pub processes: u64,
    /// Swap in use.
    pub swap_bytes: u64,
}

/// The text of the files that [`v1`] reads; empty for one that is not there.
#[derive(Clone, Copy, Debug, Default)]
pub struct V1Files<'a> {
    /// `cpuacct.usage`.
    pub cpuacct_usage: &'a str,
    /// `memory.usage_in_bytes`.
    pub memory_usage: &'a str,
    /// `memory.limit_in_bytes`.
    pub memory_limit: &'a str,
    /// `memory.stat`.
    pub memory_stat: &'a str,
    /// `pids.current`.
    pub pids_current: &'a str,
}

/// The text of the files that [`v2`] reads; empty for one that is not there.
#[derive(Clone, Copy, Debug, Default)]
pub struct V2Files<'a> {
    /// `cpu.stat`.
    pub cpu_stat: &'a str,
    /// `memory.current`.
    pub memory_current: &'a str,
    /// `memory.max`.
    pub memory_max: &'a str,
    /// `memory.stat`.
    pub memory_stat: &'a str,
    /// `memory.swap.current`.
    pub memory_swap_current: &'a str,
    /// `pids.current`.
    pub pids_current: &'a str,
}

/// Above this a v1 limit means "none": the kernel shows the largest page-aligned number.
const V1_UNLIMITED: u64 = 1 << 62;

/// Usage from cgroup v1 files.
pub fn v1(files: V1Files<'_>) -> CgroupUsage {
    let stat = |key| value(files.memory_stat, key);
    let usage = number(files.memory_usage);
    CgroupUsage {
        cpu_nanoseconds: number(files.cpuacct_usage),
        memory_bytes: usage,
        working_set_bytes: usage.saturating_sub(stat("total_inactive_file")),
        rss_bytes: stat("total_rss"),
        memory_limit: Some(number(files.memory_limit)).filter(|limit| (1..V1_UNLIMITED).contains(limit)),
        page_faults: stat("total_pgfault"),
        major_page_faults: stat("total_pgmajfault"),
        processes: number(files.pids_current),
        swap_bytes: stat("total_swap"),
    }
}

/// Usage from cgroup v2 files.
pub fn v2(files: V2Files<'_>) -> CgroupUsage {
    let stat = |key| value(files.memory_stat, key);
    let usage = number(files.memory_current);
    CgroupUsage {
        cpu_nanoseconds: value(files.cpu_stat, "usage_usec").saturating_mul(1000),
        memory_bytes: usage,
        working_set_bytes: usage.saturating_sub(stat("inactive_file")),
        rss_bytes: stat("anon"),
        memory_limit: files.memory_max.trim().parse().ok(),
        page_faults: stat("pgfault"),
        major_page_faults: stat("pgmajfault"),
        processes: number(files.pids_current),
        swap_bytes: number(files.memory_swap_current),
    }
}

/// How many processes the kernel killed for memory, from `memory.oom_control` (v1) or `memory.events` (v2).
pub fn oom_kills(text: &str) -> u64 {
    value(text, "oom_kill")
}

/// Average use of CPU between two readings, in billionths of a core; nothing when time stood still or a counter was reset.
pub fn nano_cores(earlier: (i64, u64), later: (i64, u64)) -> Option<u64> {
    let elapsed = u128::try_from(later.0.checked_sub(earlier.0)?).ok().filter(|elapsed| *elapsed > 0)?;
    let used = u128::from(later.1.checked_sub(earlier.1)?);
    u64::try_from(used * 1_000_000_000 / elapsed).ok()
}

/// Received and sent bytes and errors of one interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InterfaceCounters {
    /// Its name.
    pub name: String,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Receive errors.
    pub rx_errors: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Send errors.
    pub tx_errors: u64,
}

/// The interfaces of `/proc/<pid>/net/dev`, without loopback.
pub fn interfaces(net_dev: &str) -> Vec<InterfaceCounters> {
    net_dev
        .lines()
        .filter_map(|line| {
            let (name, counters) = line.split_once(':')?;
            let counters: Vec<u64> = counters.split_ascii_whitespace().map(number).collect();
            (counters.len() >= 11 && name.trim() != "lo").then(|| InterfaceCounters {
                name: name.trim().to_owned(),
                rx_bytes: counters[0],
                rx_errors: counters[2],
                tx_bytes: counters[8],
                tx_errors: counters[10],
            })
        })
        .collect()
}

fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or(0)
}

/// The number after `key` in a file of `key number` lines.
fn value(text: &str, key: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(name, _)| *name == key)
        .map_or(0, |(_, number)| self::number(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_cgroup_versions_give_the_same_figures() {
        let from_v1 = v1(V1Files {
            cpuacct_usage: "5000\n",
            memory_usage: "1000\n",
            memory_limit: "9223372036854771712\n",
            memory_stat: "inactive_file 1\ntotal_rss 400\ntotal_inactive_file 300\ntotal_pgfault 7\n",
            pids_current: "2\n",
        });
        let from_v2 = v2(V2Files {
            cpu_stat: "usage_usec 5\nuser_usec 3\n",
            memory_current: "1000\n",
            memory_max: "max\n",
            memory_stat: "anon 400\ninactive_file 300\npgfault 7\n",
            memory_swap_current: "",
            pids_current: "2\n",
        });
        assert_eq!(from_v1, from_v2);
        assert_eq!(from_v1.working_set_bytes, 700);
        assert_eq!(from_v1.memory_limit, None);
    }

    #[test]
    fn oom_kills_are_counted_and_absent_files_mean_none() {
        assert_eq!(oom_kills("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"), 2);
        assert_eq!(oom_kills(""), 0);
    }

    #[test]
    fn cpu_rate_needs_time_to_pass() {
        assert_eq!(nano_cores((0, 0), (1_000_000_000, 500_000_000)), Some(500_000_000));
        assert_eq!(nano_cores((5, 0), (5, 9)), None);
        assert_eq!(nano_cores((0, 9), (5, 0)), None, "a new cgroup counts from zero");
    }

    #[test]
    fn interface_lines() {
        let text = "Inter-|   Receive\n face |bytes\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0: 10 1 2 0 0 0 0 0 20 1 3 0 0 0 0 0\n";
        let found = interfaces(text);
        assert_eq!(found.len(), 1);
        assert_eq!(
            (found[0].rx_bytes, found[0].rx_errors, found[0].tx_bytes, found[0].tx_errors),
            (10, 2, 20, 3)
        );
    }
}
