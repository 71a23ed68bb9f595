//! The figures of containers and sandboxes as metrics, for `ListMetricDescriptors` and `ListPodSandboxMetrics`.
//!
//! Input: parsed figures ([`crate::stats`]) and labels. Output: CRI metrics. CRI carries whole numbers and the kubelet passes
//! them on as they are, so times are in whole seconds. The time stamp is 0, which says that a figure is read when it is
//! asked for.

mod descriptors;

use cri_shim_api::v1::{LinuxContainerResources, Metric, UInt64Value};

pub use descriptors::{ALL, BASE_LABELS, Descriptor};

use self::descriptors as d;
use crate::stats::{CgroupDetails, CgroupUsage, InterfaceCounters, Pressure, ProcessUsage};

const SECOND: u64 = 1_000_000_000;

/// Values of [`BASE_LABELS`].
#[derive(Clone, Debug, Default)]
pub struct Labels {
    /// The cgroup.
    pub cgroup: String,
    /// The id of the container or sandbox.
    pub id: String,
    /// The image; empty for a sandbox.
    pub image: String,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub pod: String,
    /// The container's name; empty for a sandbox.
    pub container: String,
}

/// The file system that holds a container's writable layer.
#[derive(Clone, Debug, Default)]
pub struct DiskFigures {
    /// Its device, as far as it has one.
    pub device: String,
    /// Its size in bytes.
    pub size: u64,
    /// Its inodes.
    pub inodes: u64,
    /// Those that are free.
    pub free_inodes: u64,
    /// What the writable layer takes of it, in bytes.
    pub used: u64,
}

/// Everything that is known of one container at one moment.
#[derive(Clone, Debug, Default)]
pub struct ContainerFigures {
    /// Usage of its cgroup.
    pub usage: CgroupUsage,
    /// The rest of its cgroup.
    pub details: CgroupDetails,
    /// Its processes.
    pub processes: ProcessUsage,
    /// Its disk, when that is known.
    pub disk: Option<DiskFigures>,
    /// Names of its block devices, in the order of `details.devices`.
    pub device_names: Vec<String>,
    /// Its limits.
    pub resources: LinuxContainerResources,
    /// When it was started, in nanoseconds since the epoch.
    pub started_at: i64,
    /// When this was read, in nanoseconds since the epoch.
    pub now: i64,
}

/// Collects metrics that share their base labels.
struct Sheet {
    base: Vec<String>,
    metrics: Vec<Metric>,
}

impl Sheet {
    fn new(labels: Labels) -> Self {
        let Labels { cgroup, id, image, namespace, pod, container } = labels;
        Self { base: vec![cgroup, id, image, namespace, pod, container], metrics: Vec::new() }
    }

    fn put(&mut self, descriptor: &Descriptor, value: u64) {
        self.put_with(descriptor, &[], value);
    }

    fn put_with(&mut self, descriptor: &Descriptor, extra: &[&str], value: u64) {
        let extra = extra.iter().map(|label| (*label).to_owned());
        self.metrics.push(Metric {
            name: descriptor.name.to_owned(),
            timestamp: 0,
            metric_type: descriptor.kind.into(),
            label_values: self.base.iter().cloned().chain(extra).collect(),
            value: Some(UInt64Value { value }),
        });
    }
}

/// The metrics of a sandbox: its interfaces.
pub fn of_sandbox(labels: Labels, interfaces: &[InterfaceCounters]) -> Vec<Metric> {
    let mut sheet = Sheet::new(labels);
    for one in interfaces {
        let counters = [
            (&d::RX_BYTES, one.rx_bytes),
            (&d::RX_PACKETS, one.rx_packets),
            (&d::RX_DROPPED, one.rx_dropped),
            (&d::RX_ERRORS, one.rx_errors),
            (&d::TX_BYTES, one.tx_bytes),
            (&d::TX_PACKETS, one.tx_packets),
            (&d::TX_DROPPED, one.tx_dropped),
            (&d::TX_ERRORS, one.tx_errors),
        ];
        for (descriptor, value) in counters {
            sheet.put_with(descriptor, &[&one.name], value);
        }
    }
    sheet.metrics
}

/// The metrics of a container.
pub fn of_container(labels: Labels, figures: &ContainerFigures) -> Vec<Metric> {
    let mut sheet = Sheet::new(labels);
    cpu(&mut sheet, figures);
    memory(&mut sheet, figures);
    disks(&mut sheet, figures);
    processes(&mut sheet, figures);
    limits(&mut sheet, figures);
    for (pressure, waiting, stalled) in [
        (figures.usage.cpu_pressure, &d::CPU_WAITING, &d::CPU_STALLED),
        (figures.usage.memory_pressure, &d::MEMORY_WAITING, &d::MEMORY_STALLED),
        (figures.usage.io_pressure, &d::IO_WAITING, &d::IO_STALLED),
    ] {
        if let Some(Pressure { some, full }) = pressure {
            sheet.put(waiting, some.total_nanoseconds / SECOND);
            sheet.put(stalled, full.total_nanoseconds / SECOND);
        }
    }
    sheet.put(&d::LAST_SEEN, seconds(figures.now));
    sheet.put(&d::START_TIME, seconds(figures.started_at));
    sheet.metrics
}

fn cpu(sheet: &mut Sheet, figures: &ContainerFigures) {
    let details = &figures.details;
    sheet.put_with(&d::CPU_USAGE, &["total"], figures.usage.cpu_nanoseconds / SECOND);
    sheet.put(&d::CPU_USER, details.cpu_user_nanoseconds / SECOND);
    sheet.put(&d::CPU_SYSTEM, details.cpu_system_nanoseconds / SECOND);
    sheet.put(&d::CFS_PERIODS, details.cfs_periods);
    sheet.put(&d::CFS_THROTTLED_PERIODS, details.cfs_throttled_periods);
    sheet.put(&d::CFS_THROTTLED, details.cfs_throttled_nanoseconds / SECOND);
}

fn memory(sheet: &mut Sheet, figures: &ContainerFigures) {
    let (usage, details) = (&figures.usage, &figures.details);
    sheet.put(&d::MEMORY_CACHE, usage.cache_bytes);
    sheet.put(&d::MEMORY_RSS, usage.rss_bytes);
    sheet.put(&d::MEMORY_KERNEL, details.kernel_bytes);
    sheet.put(&d::MEMORY_MAPPED, usage.mapped_file_bytes);
    sheet.put(&d::MEMORY_SWAP, usage.swap_bytes);
    sheet.put(&d::MEMORY_FAILCNT, details.memory_failures);
    sheet.put(&d::MEMORY_USAGE, usage.memory_bytes);
    // The kernel's record may lag behind, or not be kept at all.
    sheet.put(&d::MEMORY_MAX, details.memory_max_bytes.max(usage.memory_bytes));
    sheet.put(&d::MEMORY_WORKING_SET, usage.working_set_bytes);
    for (kind, faults) in [("pgfault", usage.page_faults), ("pgmajfault", usage.major_page_faults)] {
        for scope in ["container", "hierarchy"] {
            sheet.put_with(&d::MEMORY_FAILURES, &[kind, scope], faults);
        }
    }
    sheet.put(&d::OOM, details.oom_kills);
    for pages in &details.huge_pages {
        sheet.put_with(&d::HUGETLB, &[&pages.size], pages.bytes);
        sheet.put_with(&d::HUGETLB_MAX, &[&pages.size], pages.max_bytes);
    }
}

fn disks(sheet: &mut Sheet, figures: &ContainerFigures) {
    if let Some(disk) = &figures.disk {
        for (descriptor, value) in [
            (&d::FS_LIMIT, disk.size),
            (&d::FS_USAGE, disk.used),
            (&d::FS_INODES, disk.inodes),
            (&d::FS_INODES_FREE, disk.free_inodes),
        ] {
            sheet.put_with(descriptor, &[&disk.device], value);
        }
    }
    for (device, name) in figures.details.devices.iter().zip(&figures.device_names) {
        for (descriptor, value) in [
            (&d::FS_READ_BYTES, device.read_bytes),
            (&d::FS_READS, device.reads),
            (&d::FS_WRITTEN_BYTES, device.written_bytes),
            (&d::FS_WRITES, device.writes),
        ] {
            sheet.put_with(descriptor, &[name], value);
        }
        let (major, minor) = (device.major.to_string(), device.minor.to_string());
        for (operation, bytes) in [("Read", device.read_bytes), ("Write", device.written_bytes)] {
            sheet.put_with(&d::BLKIO, &[name, &major, &minor, operation], bytes);
        }
    }
}

fn processes(sheet: &mut Sheet, figures: &ContainerFigures) {
    let processes = &figures.processes;
    sheet.put(&d::FILES, processes.file_descriptors);
    sheet.put(&d::PROCESSES, processes.processes);
    sheet.put(&d::SOCKETS, processes.sockets);
    // The kernel's controller counts threads; where it is missing, there is at least one to a process.
    sheet.put(&d::THREADS, figures.usage.processes.max(processes.processes));
    sheet.put(&d::THREADS_MAX, figures.details.pids_limit.unwrap_or(0));
    if let Some(limit) = processes.max_open_files {
        sheet.put_with(&d::ULIMITS, &["max_open_files"], limit);
    }
}

fn limits(sheet: &mut Sheet, figures: &ContainerFigures) {
    // What the kernel takes where nothing was asked for.
    let or =
        |asked: i64, default: u64| u64::try_from(asked).ok().filter(|asked| *asked > 0).unwrap_or(default);
    let resources = &figures.resources;
    sheet.put(&d::SPEC_CPU_PERIOD, or(resources.cpu_period, 100_000));
    sheet.put(&d::SPEC_CPU_SHARES, or(resources.cpu_shares, 1024));
    if resources.cpu_quota > 0 {
        sheet.put(&d::SPEC_CPU_QUOTA, or(resources.cpu_quota, 0));
    }
    sheet.put(&d::SPEC_MEMORY, or(resources.memory_limit_in_bytes, 0));
    sheet.put(&d::SPEC_SWAP, or(resources.memory_swap_limit_in_bytes, 0));
    let reserved = resources.unified.get("memory.min").and_then(|bytes| bytes.parse().ok());
    sheet.put(&d::SPEC_RESERVATION, reserved.unwrap_or(0));
}

fn seconds(nanoseconds: i64) -> u64 {
    u64::try_from(nanoseconds).unwrap_or_default() / SECOND
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::stats::{DeviceUsage, HugePageUsage};

    fn everything() -> Vec<Metric> {
        let figures = ContainerFigures {
            usage: CgroupUsage {
                cpu_nanoseconds: 3_999_999_999,
                cpu_pressure: Some(Pressure::default()),
                memory_pressure: Some(Pressure::default()),
                io_pressure: Some(Pressure::default()),
                ..CgroupUsage::default()
            },
            details: CgroupDetails {
                devices: vec![DeviceUsage { major: 254, read_bytes: 11, ..DeviceUsage::default() }],
                huge_pages: vec![HugePageUsage::default()],
                ..CgroupDetails::default()
            },
            processes: ProcessUsage { max_open_files: Some(1024), ..ProcessUsage::default() },
            disk: Some(DiskFigures::default()),
            device_names: vec!["/dev/vda".to_owned()],
            resources: LinuxContainerResources { cpu_quota: 20_000, ..LinuxContainerResources::default() },
            ..ContainerFigures::default()
        };
        let mut all = of_container(Labels::default(), &figures);
        all.extend(of_sandbox(Labels::default(), &[InterfaceCounters::default()]));
        all
    }

    #[test]
    fn every_metric_that_is_announced_can_be_given_with_its_labels() {
        let announced: BTreeMap<_, _> = ALL.iter().map(|one| (one.name, one.to_cri())).collect();
        assert_eq!(announced.len(), 56, "no name twice");
        let given = everything();
        for metric in &given {
            let descriptor = &announced[metric.name.as_str()];
            assert_eq!(metric.label_values.len(), descriptor.label_keys.len(), "{}", metric.name);
        }
        let names: BTreeSet<_> = given.iter().map(|metric| metric.name.as_str()).collect();
        assert_eq!(names, announced.keys().copied().collect());
        assert!(announced.values().all(|one| !one.help.is_empty()));
    }

    #[test]
    fn no_series_is_given_twice() {
        let given = everything();
        let series: BTreeSet<_> = given.iter().map(|metric| (&metric.name, &metric.label_values)).collect();
        assert_eq!(series.len(), given.len());
    }

    #[test]
    fn times_are_whole_seconds_and_defaults_are_the_kernels() {
        let given = everything();
        let value = |name: &str| {
            let metric = given.iter().find(|metric| metric.name == name).unwrap();
            metric.value.unwrap().value
        };
        assert_eq!(value("container_cpu_usage_seconds_total"), 3);
        assert_eq!(value("container_spec_cpu_period"), 100_000);
        assert_eq!(value("container_spec_cpu_quota"), 20_000);
        assert_eq!(value("container_fs_reads_bytes_total"), 11);
    }
}
