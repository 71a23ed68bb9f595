//! A container's figures in the messages that containerd hands on to whoever asks (`Tasks.Metrics`).

use cri_shim_runtime::cgroup::Stats;
use prost::Message;
use prost_types::Any;

use crate::proto::metrics::{v1, v2};

/// The figures, in the form for the version of the cgroups they come from.
pub fn metrics(stats: &Stats) -> Any {
    if stats.unified {
        Any { type_url: "io.containerd.cgroups.v2.Metrics".to_owned(), value: unified(stats).encode_to_vec() }
    } else {
        Any { type_url: "io.containerd.cgroups.v1.Metrics".to_owned(), value: legacy(stats).encode_to_vec() }
    }
}

/// A limit that is none is the largest number, as the kernel's own counters have it.
const NO_LIMIT: u64 = u64::MAX;

fn unified(stats: &Stats) -> v2::Metrics {
    let micro = |nanoseconds: Option<u64>| nanoseconds.unwrap_or_default() / 1000;
    let throttling = stats.throttling.unwrap_or_default();
    let of = |name: &str| stats.memory_stat.get(name).copied().unwrap_or_default();
    let io = stats.io.iter().filter_map(|(device, figures)| {
        let (major, minor) = device.split_once(':')?;
        let of = |name: &str| figures.get(name).copied().unwrap_or_default();
        Some(v2::IoEntry {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            rbytes: of("rbytes"),
            wbytes: of("wbytes"),
            rios: of("rios"),
            wios: of("wios"),
        })
    });
    let hugetlb = stats.hugetlb_usage.iter();
    v2::Metrics {
        pids: stats.pids_current.map(|current| v2::Pids { current, limit: stats.pids_limit.unwrap_or(0) }),
        cpu: stats.cpu_usage_ns.map(|_| v2::Cpu {
            usage_usec: micro(stats.cpu_usage_ns),
            user_usec: micro(stats.cpu_user_ns),
            system_usec: micro(stats.cpu_system_ns),
            nr_periods: throttling.periods,
            nr_throttled: throttling.throttled_periods,
            throttled_usec: throttling.throttled_ns / 1000,
        }),
        memory: stats.memory_usage.map(|usage| v2::Memory {
            anon: of("anon"),
            file: of("file"),
            kernel_stack: of("kernel_stack"),
            slab: of("slab"),
            sock: of("sock"),
            shmem: of("shmem"),
            file_mapped: of("file_mapped"),
            file_dirty: of("file_dirty"),
            file_writeback: of("file_writeback"),
            anon_thp: of("anon_thp"),
            inactive_anon: of("inactive_anon"),
            active_anon: of("active_anon"),
            inactive_file: of("inactive_file"),
            active_file: of("active_file"),
            unevictable: of("unevictable"),
            slab_reclaimable: of("slab_reclaimable"),
            slab_unreclaimable: of("slab_unreclaimable"),
            pgfault: of("pgfault"),
            pgmajfault: of("pgmajfault"),
            usage,
            usage_limit: stats.memory_limit.unwrap_or(NO_LIMIT),
            swap_usage: stats.swap_usage.unwrap_or_default(),
            swap_limit: stats.swap_limit.unwrap_or(NO_LIMIT),
            max_usage: stats.memory_peak.unwrap_or_default(),
        }),
        io: Some(v2::Io { usage: io.collect() }),
        hugetlb: hugetlb
            .map(|(size, usage)| v2::Hugetlb { current: *usage, pagesize: size.clone() })
            .collect(),
        memory_events: stats.oom_kills.map(|oom_kill| v2::MemoryEvents { oom_kill }),
    }
}

fn legacy(stats: &Stats) -> v1::Metrics {
    let throttling = stats.throttling.unwrap_or_default();
    let of = |name: &str| stats.memory_stat.get(name).copied().unwrap_or_default();
    let hugetlb = stats.hugetlb_usage.iter();
    v1::Metrics {
        hugetlb: hugetlb.map(|(size, usage)| v1::Hugetlb { usage: *usage, pagesize: size.clone() }).collect(),
        pids: stats.pids_current.map(|current| v1::Pids { current, limit: stats.pids_limit.unwrap_or(0) }),
        cpu: stats.cpu_usage_ns.map(|total| v1::Cpu {
            usage: Some(v1::CpuUsage {
                total,
                kernel: stats.cpu_system_ns.unwrap_or_default(),
                user: stats.cpu_user_ns.unwrap_or_default(),
            }),
            throttling: Some(v1::Throttle {
                periods: throttling.periods,
                throttled_periods: throttling.throttled_periods,
                throttled_time: throttling.throttled_ns,
            }),
        }),
        memory: stats.memory_usage.map(|usage| v1::Memory {
            cache: of("cache"),
            rss: of("rss"),
            mapped_file: of("mapped_file"),
            pg_fault: of("pgfault"),
            pg_maj_fault: of("pgmajfault"),
            inactive_anon: of("inactive_anon"),
            active_anon: of("active_anon"),
            inactive_file: of("inactive_file"),
            active_file: of("active_file"),
            unevictable: of("unevictable"),
            hierarchical_memory_limit: of("hierarchical_memory_limit"),
            hierarchical_swap_limit: of("hierarchical_memsw_limit"),
            total_cache: of("total_cache"),
            total_rss: of("total_rss"),
            total_mapped_file: of("total_mapped_file"),
            total_pg_fault: of("total_pgfault"),
            total_pg_maj_fault: of("total_pgmajfault"),
            total_inactive_anon: of("total_inactive_anon"),
            total_active_anon: of("total_active_anon"),
            total_inactive_file: of("total_inactive_file"),
            total_active_file: of("total_active_file"),
            total_unevictable: of("total_unevictable"),
            usage: Some(v1::MemoryEntry {
                limit: stats.memory_limit.unwrap_or(NO_LIMIT),
                usage,
                max: stats.memory_peak.unwrap_or_default(),
            }),
            swap: stats.swap_usage.map(|usage| v1::MemoryEntry {
                limit: stats.swap_limit.unwrap_or(NO_LIMIT),
                usage,
                max: 0,
            }),
        }),
        memory_oom_control: stats.oom_kills.map(|oom_kill| v1::OomControl { oom_kill }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_keep_their_units() {
        let mut stats =
            Stats { unified: true, cpu_usage_ns: Some(5_000), memory_usage: Some(10), ..Stats::default() };
        stats.memory_stat.insert("anon".to_owned(), 7);
        let any = metrics(&stats);
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let told = v2::Metrics::decode(any.value.as_slice()).unwrap();
        assert_eq!(told.cpu.unwrap().usage_usec, 5);
        let memory = told.memory.unwrap();
        assert_eq!((memory.usage, memory.anon, memory.usage_limit), (10, 7, u64::MAX));
        assert!(told.pids.is_none());
        stats.unified = false;
        let any = metrics(&stats);
        let told = v1::Metrics::decode(any.value.as_slice()).unwrap();
        assert_eq!(told.cpu.unwrap().usage.unwrap().total, 5_000);
    }
}
