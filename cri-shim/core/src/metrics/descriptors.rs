//! The metrics there are: the names that cAdvisor gave them and that the kubelet serves under `/metrics/cadvisor`.
//!
//! The list is the one that Kubernetes' own CRI validation asks for (cri-tools, `pkg/validate/pod.go`).

use cri_shim_api::v1::{MetricDescriptor, MetricType};

/// Labels of every metric, as the kubelet's cAdvisor has them: cgroup, id, image, and what Kubernetes calls it.
pub const BASE_LABELS: [&str; 6] = ["id", "name", "image", "namespace", "pod", "container"];

/// One metric.
#[derive(Debug)]
pub struct Descriptor {
    /// Its name.
    pub name: &'static str,
    /// What it counts.
    pub help: &'static str,
    /// Counter or gauge.
    pub kind: MetricType,
    /// Labels beyond [`BASE_LABELS`].
    pub labels: &'static [&'static str],
}

impl Descriptor {
    /// In CRI's form.
    pub fn to_cri(&self) -> MetricDescriptor {
        MetricDescriptor {
            name: self.name.to_owned(),
            help: self.help.to_owned(),
            label_keys: BASE_LABELS.iter().chain(self.labels).map(|label| (*label).to_owned()).collect(),
        }
    }
}

const fn counter(name: &'static str, help: &'static str, labels: &'static [&'static str]) -> Descriptor {
    Descriptor { name, help, kind: MetricType::Counter, labels }
}

const fn gauge(name: &'static str, help: &'static str, labels: &'static [&'static str]) -> Descriptor {
    Descriptor { name, help, kind: MetricType::Gauge, labels }
}

pub(super) static CPU_USAGE: Descriptor =
    counter("container_cpu_usage_seconds_total", "CPU time used, in seconds.", &["cpu"]);
pub(super) static CPU_USER: Descriptor =
    counter("container_cpu_user_seconds_total", "CPU time used outside the kernel, in seconds.", &[]);
pub(super) static CPU_SYSTEM: Descriptor =
    counter("container_cpu_system_seconds_total", "CPU time used inside the kernel, in seconds.", &[]);
pub(super) static CFS_PERIODS: Descriptor =
    counter("container_cpu_cfs_periods_total", "Periods in which the CPU quota was enforced.", &[]);
pub(super) static CFS_THROTTLED_PERIODS: Descriptor =
    counter("container_cpu_cfs_throttled_periods_total", "Periods in which the CPU quota was used up.", &[]);
pub(super) static CFS_THROTTLED: Descriptor = counter(
    "container_cpu_cfs_throttled_seconds_total",
    "Time spent waiting because the CPU quota was used up, in seconds.",
    &[],
);
pub(super) static FS_INODES_FREE: Descriptor = gauge(
    "container_fs_inodes_free",
    "Free inodes of the file system that holds the writable layer.",
    &["device"],
);
pub(super) static FS_INODES: Descriptor = gauge(
    "container_fs_inodes_total",
    "Inodes of the file system that holds the writable layer.",
    &["device"],
);
pub(super) static FS_LIMIT: Descriptor = gauge(
    "container_fs_limit_bytes",
    "Size of the file system that holds the writable layer, in bytes.",
    &["device"],
);
pub(super) static FS_USAGE: Descriptor =
    gauge("container_fs_usage_bytes", "Size of the writable layer, in bytes.", &["device"]);
pub(super) static FS_READ_BYTES: Descriptor =
    counter("container_fs_reads_bytes_total", "Bytes read from disks.", &["device"]);
pub(super) static FS_READS: Descriptor =
    counter("container_fs_reads_total", "Reads from disks.", &["device"]);
pub(super) static FS_WRITTEN_BYTES: Descriptor =
    counter("container_fs_writes_bytes_total", "Bytes written to disks.", &["device"]);
pub(super) static FS_WRITES: Descriptor =
    counter("container_fs_writes_total", "Writes to disks.", &["device"]);
pub(super) static BLKIO: Descriptor = counter(
    "container_blkio_device_usage_total",
    "Bytes transferred, by disk and operation.",
    &["device", "major", "minor", "operation"],
);
pub(super) static HUGETLB: Descriptor =
    gauge("container_hugetlb_usage_bytes", "Huge pages in use, in bytes.", &["pagesize"]);
pub(super) static HUGETLB_MAX: Descriptor =
    gauge("container_hugetlb_max_usage_bytes", "The most huge pages ever in use, in bytes.", &["pagesize"]);
pub(super) static LAST_SEEN: Descriptor =
    gauge("container_last_seen", "When the container was last looked at, in seconds since the epoch.", &[]);
pub(super) static MEMORY_CACHE: Descriptor = gauge("container_memory_cache", "Page cache, in bytes.", &[]);
pub(super) static MEMORY_RSS: Descriptor = gauge("container_memory_rss", "Anonymous memory, in bytes.", &[]);
pub(super) static MEMORY_KERNEL: Descriptor =
    gauge("container_memory_kernel_usage", "Memory of the kernel on the container's behalf, in bytes.", &[]);
pub(super) static MEMORY_MAPPED: Descriptor =
    gauge("container_memory_mapped_file", "Mapped files, in bytes.", &[]);
pub(super) static MEMORY_SWAP: Descriptor = gauge("container_memory_swap", "Swap in use, in bytes.", &[]);
pub(super) static MEMORY_FAILCNT: Descriptor =
    counter("container_memory_failcnt", "How often the memory limit was hit.", &[]);
pub(super) static MEMORY_USAGE: Descriptor =
    gauge("container_memory_usage_bytes", "All memory in use, in bytes.", &[]);
pub(super) static MEMORY_MAX: Descriptor =
    gauge("container_memory_max_usage_bytes", "The most memory ever in use, in bytes.", &[]);
pub(super) static MEMORY_WORKING_SET: Descriptor =
    gauge("container_memory_working_set_bytes", "Memory that cannot simply be dropped, in bytes.", &[]);
pub(super) static MEMORY_FAILURES: Descriptor =
    counter("container_memory_failures_total", "Page faults, by kind and scope.", &["failure_type", "scope"]);
pub(super) static RX_BYTES: Descriptor =
    counter("container_network_receive_bytes_total", "Bytes received.", &["interface"]);
pub(super) static RX_PACKETS: Descriptor =
    counter("container_network_receive_packets_total", "Packets received.", &["interface"]);
pub(super) static RX_DROPPED: Descriptor = counter(
    "container_network_receive_packets_dropped_total",
    "Packets dropped while receiving.",
    &["interface"],
);
pub(super) static RX_ERRORS: Descriptor =
    counter("container_network_receive_errors_total", "Errors while receiving.", &["interface"]);
pub(super) static TX_BYTES: Descriptor =
    counter("container_network_transmit_bytes_total", "Bytes sent.", &["interface"]);
pub(super) static TX_PACKETS: Descriptor =
    counter("container_network_transmit_packets_total", "Packets sent.", &["interface"]);
pub(super) static TX_DROPPED: Descriptor = counter(
    "container_network_transmit_packets_dropped_total",
    "Packets dropped while sending.",
    &["interface"],
);
pub(super) static TX_ERRORS: Descriptor =
    counter("container_network_transmit_errors_total", "Errors while sending.", &["interface"]);
pub(super) static OOM: Descriptor =
    counter("container_oom_events_total", "Processes that the kernel killed because memory ran out.", &[]);
pub(super) static FILES: Descriptor = gauge("container_file_descriptors", "Open file descriptors.", &[]);
pub(super) static PROCESSES: Descriptor = gauge("container_processes", "Processes.", &[]);
pub(super) static SOCKETS: Descriptor = gauge("container_sockets", "Open sockets.", &[]);
pub(super) static THREADS: Descriptor = gauge("container_threads", "Threads.", &[]);
pub(super) static THREADS_MAX: Descriptor =
    gauge("container_threads_max", "How many threads there may be; 0 without a limit.", &[]);
pub(super) static ULIMITS: Descriptor =
    gauge("container_ulimits_soft", "Soft limits of the first process.", &["ulimit"]);
pub(super) static SPEC_CPU_PERIOD: Descriptor =
    gauge("container_spec_cpu_period", "Period of the CPU quota, in microseconds.", &[]);
pub(super) static SPEC_CPU_QUOTA: Descriptor =
    gauge("container_spec_cpu_quota", "CPU quota per period, in microseconds.", &[]);
pub(super) static SPEC_CPU_SHARES: Descriptor = gauge("container_spec_cpu_shares", "CPU shares.", &[]);
pub(super) static SPEC_MEMORY: Descriptor =
    gauge("container_spec_memory_limit_bytes", "Memory limit, in bytes; 0 without one.", &[]);
pub(super) static SPEC_RESERVATION: Descriptor = gauge(
    "container_spec_memory_reservation_limit_bytes",
    "Memory that is kept for the container, in bytes.",
    &[],
);
pub(super) static SPEC_SWAP: Descriptor = gauge(
    "container_spec_memory_swap_limit_bytes",
    "Limit of memory and swap together, in bytes; 0 without one.",
    &[],
);
pub(super) static START_TIME: Descriptor =
    gauge("container_start_time_seconds", "When the container was started, in seconds since the epoch.", &[]);
pub(super) static CPU_STALLED: Descriptor = counter(
    "container_pressure_cpu_stalled_seconds_total",
    "Time in which every task waited for the CPU, in seconds.",
    &[],
);
pub(super) static CPU_WAITING: Descriptor = counter(
    "container_pressure_cpu_waiting_seconds_total",
    "Time in which some task waited for the CPU, in seconds.",
    &[],
);
pub(super) static MEMORY_STALLED: Descriptor = counter(
    "container_pressure_memory_stalled_seconds_total",
    "Time in which every task waited for memory, in seconds.",
    &[],
);
pub(super) static MEMORY_WAITING: Descriptor = counter(
    "container_pressure_memory_waiting_seconds_total",
    "Time in which some task waited for memory, in seconds.",
    &[],
);
pub(super) static IO_STALLED: Descriptor = counter(
    "container_pressure_io_stalled_seconds_total",
    "Time in which every task waited for disks, in seconds.",
    &[],
);
pub(super) static IO_WAITING: Descriptor = counter(
    "container_pressure_io_waiting_seconds_total",
    "Time in which some task waited for disks, in seconds.",
    &[],
);

/// Every metric.
pub static ALL: [&Descriptor; 56] = [
    &CPU_USAGE,
    &CPU_USER,
    &CPU_SYSTEM,
    &CFS_PERIODS,
    &CFS_THROTTLED_PERIODS,
    &CFS_THROTTLED,
    &FS_INODES_FREE,
    &FS_INODES,
    &FS_LIMIT,
    &FS_USAGE,
    &FS_READ_BYTES,
    &FS_READS,
    &FS_WRITTEN_BYTES,
    &FS_WRITES,
    &BLKIO,
    &HUGETLB,
    &HUGETLB_MAX,
    &LAST_SEEN,
    &MEMORY_CACHE,
    &MEMORY_RSS,
    &MEMORY_KERNEL,
    &MEMORY_MAPPED,
    &MEMORY_SWAP,
    &MEMORY_FAILCNT,
    &MEMORY_USAGE,
    &MEMORY_MAX,
    &MEMORY_WORKING_SET,
    &MEMORY_FAILURES,
    &RX_BYTES,
    &RX_PACKETS,
    &RX_DROPPED,
    &RX_ERRORS,
    &TX_BYTES,
    &TX_PACKETS,
    &TX_DROPPED,
    &TX_ERRORS,
    &OOM,
    &FILES,
    &PROCESSES,
    &SOCKETS,
    &THREADS,
    &THREADS_MAX,
    &ULIMITS,
    &SPEC_CPU_PERIOD,
    &SPEC_CPU_QUOTA,
    &SPEC_CPU_SHARES,
    &SPEC_MEMORY,
    &SPEC_RESERVATION,
    &SPEC_SWAP,
    &START_TIME,
    &CPU_STALLED,
    &CPU_WAITING,
    &MEMORY_STALLED,
    &MEMORY_WAITING,
    &IO_STALLED,
    &IO_WAITING,
];
