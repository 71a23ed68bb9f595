//! Limits of the specification as values of cgroup files. Pure.

use oci_spec::runtime::{
    LinuxBlockIo, LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxPids, LinuxRdma, LinuxResources,
};

use crate::error::Error;

/// A value to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Write {
    /// The version 1 controller that has the file; without meaning in version 2.
    pub(crate) controller: &'static str,
    pub(crate) file: String,
    pub(crate) value: String,
    /// What to write when there is no such file: another file's name and value.
    pub(crate) instead: Option<(String, String)>,
    /// Not every kernel has it, and without it nothing is lost.
    pub(crate) optional: bool,
}

#[allow(clippy::needless_pass_by_value, reason = "numbers and texts alike, mostly small")]
fn write(controller: &'static str, file: impl Into<String>, value: impl ToString) -> Write {
    Write { controller, file: file.into(), value: value.to_string(), instead: None, optional: false }
}

/// `cpu.shares` (2 to 262144) as `cpu.weight` (1 to 10000).
pub(crate) fn shares_to_weight(shares: u64) -> u64 {
    1 + ((shares.clamp(2, 262_144) - 2) * 9999) / 262_142
}

/// `blkio.weight` (10 to 1000) as `io.weight` (1 to 10000).
pub(crate) fn blkio_to_io_weight(weight: u16) -> u64 {
    1 + (u64::from(weight.clamp(10, 1000)) - 10) * 9999 / 990
}

/// Memory and swap together as swap alone.
pub(crate) fn swap_alone(swap: i64, memory: i64) -> Result<Option<String>, Error> {
    let field = "linux.resources.memory.swap";
    match swap {
        0 => Ok(None),
        -1 => Ok(Some("max".to_owned())),
        _ if memory <= 0 => Err(Error::spec(field, "needs a memory limit")),
        _ if swap < memory => Err(Error::spec(field, "is below the memory limit")),
        _ => Ok(Some((swap - memory).to_string())),
    }
}

fn max_or(value: i64) -> String {
    if value < 0 { "max".to_owned() } else { value.to_string() }
}

/// Version 1 files.
pub(crate) fn version1(resources: &LinuxResources) -> Result<Vec<Write>, Error> {
    if resources.unified().as_ref().is_some_and(|unified| !unified.is_empty()) {
        return Err(Error::spec("linux.resources.unified", "needs cgroup version 2"));
    }
    let mut writes = Vec::new();
    if let Some(cpu) = resources.cpu() {
        cpuset(cpu, &mut writes);
        cpu_v1(cpu, &mut writes);
    }
    if let Some(memory) = resources.memory() {
        memory_v1(memory, &mut writes)?;
    }
    pids(resources.pids().as_ref(), &mut writes);
    if let Some(io) = resources.block_io() {
        blkio_v1(io, &mut writes);
    }
    huge_pages(resources.hugepage_limits().as_deref(), "limit_in_bytes", &mut writes);
    if let Some(network) = resources.network() {
        writes.extend(network.class_id().map(|class| write("net_cls", "net_cls.classid", class)));
        writes.extend(network.priorities().iter().flatten().map(|priority| {
            write("net_prio", "net_prio.ifpriomap", format!("{} {}", priority.name(), priority.priority()))
        }));
    }
    rdma(resources, &mut writes);
    Ok(writes)
}

fn cpuset(cpu: &LinuxCpu, writes: &mut Vec<Write>) {
    let given = |value: &Option<String>| value.clone().filter(|value| !value.is_empty());
    writes.extend(given(cpu.cpus()).map(|cpus| write("cpuset", "cpuset.cpus", cpus)));
    writes.extend(given(cpu.mems()).map(|mems| write("cpuset", "cpuset.mems", mems)));
}

fn cpu_v1(cpu: &LinuxCpu, writes: &mut Vec<Write>) {
    let positive = |value: Option<u64>| value.filter(|value| *value != 0);
    writes.extend(positive(cpu.shares()).map(|shares| write("cpu", "cpu.shares", shares)));
    writes.extend(cpu.idle().filter(|idle| *idle != 0).map(|idle| write("cpu", "cpu.idle", idle)));
    writes.extend(positive(cpu.period()).map(|period| write("cpu", "cpu.cfs_period_us", period)));
    writes
        .extend(cpu.quota().filter(|quota| *quota != 0).map(|quota| write("cpu", "cpu.cfs_quota_us", quota)));
    writes.extend(cpu.burst().map(|burst| write("cpu", "cpu.cfs_burst_us", burst)));
    writes.extend(positive(cpu.realtime_period()).map(|period| write("cpu", "cpu.rt_period_us", period)));
    let runtime = cpu.realtime_runtime().filter(|runtime| *runtime != 0);
    writes.extend(runtime.map(|runtime| write("cpu", "cpu.rt_runtime_us", runtime)));
}

#[allow(deprecated, reason = "kernel memory limits are named to be refused or ignored as other runtimes do")]
fn memory_v1(memory: &LinuxMemory, writes: &mut Vec<Write>) -> Result<(), Error> {
    let limit = memory.limit().filter(|limit| *limit != 0);
    // Without a memory limit swap cannot be limited either.
    let swap = memory.swap().filter(|swap| *swap != 0).or(if limit == Some(-1) { Some(-1) } else { None });
    let swap_given = memory.swap().is_some_and(|swap| swap != 0);
    writes.extend(limit.map(|limit| write("memory", "memory.limit_in_bytes", limit)));
    writes.extend(
        swap.map(|swap| Write {
            optional: !swap_given,
            ..write("memory", "memory.memsw.limit_in_bytes", swap)
        }),
    );
    let reservation = memory.reservation().filter(|value| *value != 0);
    writes.extend(reservation.map(|value| write("memory", "memory.soft_limit_in_bytes", value)));
    let tcp = memory.kernel_tcp().filter(|value| *value != 0);
    writes.extend(tcp.map(|value| write("memory", "memory.kmem.tcp.limit_in_bytes", value)));
    if memory.disable_oom_killer() == Some(true) {
        writes.push(write("memory", "memory.oom_control", 1));
    }
    if let Some(swappiness) = memory.swappiness() {
        if swappiness > 100 {
            return Err(Error::spec("linux.resources.memory.swappiness", "is not 0 to 100"));
        }
        writes.push(write("memory", "memory.swappiness", swappiness));
    }
    Ok(())
}

fn pids(pids: Option<&LinuxPids>, writes: &mut Vec<Write>) {
    let limit = pids.map(LinuxPids::limit).filter(|limit| *limit != 0);
    writes.extend(limit.map(|limit| write("pids", "pids.max", max_or(limit))));
}

fn blkio_v1(io: &LinuxBlockIo, writes: &mut Vec<Write>) {
    let either = |file: &str, bfq: &str, value: String| Write {
        instead: Some((format!("blkio.{bfq}"), value.clone())),
        ..write("blkio", format!("blkio.{file}"), value)
    };
    let weight = io.weight().filter(|weight| *weight != 0);
    writes.extend(weight.map(|weight| either("weight", "bfq.weight", weight.to_string())));
    let leaf = io.leaf_weight().filter(|weight| *weight != 0);
    writes.extend(leaf.map(|weight| write("blkio", "blkio.leaf_weight", weight)));
    for device in io.weight_device().iter().flatten() {
        let name = format!("{}:{}", device.major(), device.minor());
        let weight = device.weight().filter(|weight| *weight != 0);
        writes.extend(
            weight.map(|weight| either("weight_device", "bfq.weight_device", format!("{name} {weight}"))),
        );
        let leaf = device.leaf_weight().filter(|weight| *weight != 0);
        writes.extend(
            leaf.map(|weight| write("blkio", "blkio.leaf_weight_device", format!("{name} {weight}"))),
        );
    }
    for (file, devices) in [
        ("read_bps", io.throttle_read_bps_device()),
        ("write_bps", io.throttle_write_bps_device()),
        ("read_iops", io.throttle_read_iops_device()),
        ("write_iops", io.throttle_write_iops_device()),
    ] {
        writes.extend(devices.iter().flatten().map(|device| {
            let value = format!("{}:{} {}", device.major(), device.minor(), device.rate());
            write("blkio", format!("blkio.throttle.{file}_device"), value)
        }));
    }
}

fn huge_pages(limits: Option<&[LinuxHugepageLimit]>, file: &str, writes: &mut Vec<Write>) {
    for limit in limits.unwrap_or_default() {
        let size = limit.page_size();
        let value = if file == "max" { max_or(limit.limit()) } else { limit.limit().to_string() };
        writes.push(write("hugetlb", format!("hugetlb.{size}.{file}"), &value));
        let reserved = write("hugetlb", format!("hugetlb.{size}.rsvd.{file}"), value);
        writes.push(Write { optional: true, ..reserved });
    }
}

fn rdma(resources: &LinuxResources, writes: &mut Vec<Write>) {
    let mut sorted: Vec<(&String, &LinuxRdma)> = resources.rdma().iter().flatten().collect();
    sorted.sort_by_key(|(name, _)| *name);
    writes.extend(sorted.into_iter().map(|(name, limits)| {
        let mut value = name.clone();
        if let Some(handles) = limits.hca_handles() {
            value.extend([" hca_handle=", &handles.to_string()]);
        }
        if let Some(objects) = limits.hca_objects() {
            value.extend([" hca_object=", &objects.to_string()]);
        }
        write("rdma", "rdma.max", value)
    }));
}

/// Version 2 files.
pub(crate) fn version2(resources: &LinuxResources) -> Result<Vec<Write>, Error> {
    let mut writes = Vec::new();
    if let Some(cpu) = resources.cpu() {
        cpuset(cpu, &mut writes);
        cpu_v2(cpu, &mut writes);
    }
    if let Some(memory) = resources.memory() {
        memory_v2(memory, &mut writes)?;
    }
    pids(resources.pids().as_ref(), &mut writes);
    if let Some(io) = resources.block_io() {
        io_v2(io, &mut writes);
    }
    huge_pages(resources.hugepage_limits().as_deref(), "max", &mut writes);
    rdma(resources, &mut writes);
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort();
    for (file, value) in unified {
        if file.is_empty() || file.contains('/') || !file.contains('.') {
            return Err(Error::spec(format!("linux.resources.unified[{file}]"), "is not a cgroup file"));
        }
        writes.push(write("", file.clone(), value));
    }
    Ok(writes)
}

fn cpu_v2(cpu: &LinuxCpu, writes: &mut Vec<Write>) {
    let shares = cpu.shares().filter(|shares| *shares != 0);
    let idle = cpu.idle().filter(|idle| *idle != 0);
    writes.extend(idle.map(|idle| write("cpu", "cpu.idle", idle)));
    // The weight of an idle cgroup cannot be written.
    if idle.is_none() {
        writes.extend(shares.map(|shares| write("cpu", "cpu.weight", shares_to_weight(shares))));
    }
    writes.extend(cpu.burst().map(|burst| write("cpu", "cpu.max.burst", burst)));
    let quota = cpu.quota().filter(|quota| *quota != 0);
    let period = cpu.period().filter(|period| *period != 0);
    if quota.is_some() || period.is_some() {
        let quota = quota.filter(|quota| *quota > 0).map_or("max".to_owned(), |quota| quota.to_string());
        writes.push(write("cpu", "cpu.max", format!("{quota} {}", period.unwrap_or(100_000))));
    }
}

fn memory_v2(memory: &LinuxMemory, writes: &mut Vec<Write>) -> Result<(), Error> {
    let limit = memory.limit().unwrap_or(0);
    let swap = swap_alone(memory.swap().unwrap_or(0), limit)?;
    // No memory limit, no swap limit.
    let swap = swap.or_else(|| (limit == -1).then(|| "max".to_owned()));
    writes.extend(swap.map(|swap| Write {
        // A kernel without swap accounting has nothing to limit.
        optional: swap == "max" || swap == "0",
        ..write("memory", "memory.swap.max", swap)
    }));
    if limit != 0 {
        writes.push(write("memory", "memory.max", max_or(limit)));
    }
    let reservation = memory.reservation().filter(|value| *value != 0);
    writes.extend(reservation.map(|value| write("memory", "memory.low", max_or(value))));
    Ok(())
}

fn io_v2(io: &LinuxBlockIo, writes: &mut Vec<Write>) {
    if let Some(weight) = io.weight().filter(|weight| *weight != 0) {
        writes.push(Write {
            instead: Some(("io.weight".to_owned(), blkio_to_io_weight(weight).to_string())),
            ..write("io", "io.bfq.weight", weight)
        });
    }
    for device in io.weight_device().iter().flatten() {
        if let Some(weight) = device.weight().filter(|weight| *weight != 0) {
            let name = format!("{}:{}", device.major(), device.minor());
            writes.push(Write {
                instead: Some(("io.weight".to_owned(), format!("{name} {}", blkio_to_io_weight(weight)))),
                ..write("io", "io.bfq.weight", format!("{name} {weight}"))
            });
        }
    }
    for (key, devices) in [
        ("rbps", io.throttle_read_bps_device()),
        ("wbps", io.throttle_write_bps_device()),
        ("riops", io.throttle_read_iops_device()),
        ("wiops", io.throttle_write_iops_device()),
    ] {
        writes.extend(devices.iter().flatten().map(|device| {
            // 0 means no limit, as in version 1.
            let rate = if device.rate() == 0 { "max".to_owned() } else { device.rate().to_string() };
            write("io", "io.max", format!("{}:{} {key}={rate}", device.major(), device.minor()))
        }));
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{LinuxCpuBuilder, LinuxMemoryBuilder, LinuxPidsBuilder, LinuxResourcesBuilder};
    use proptest::prelude::*;

    use super::*;

    fn lines(writes: Vec<Write>) -> Vec<String> {
        writes.into_iter().map(|write| format!("{}={}", write.file, write.value)).collect()
    }

    fn pod() -> LinuxResources {
        LinuxResourcesBuilder::default()
            .cpu(
                LinuxCpuBuilder::default()
                    .shares(512_u64)
                    .quota(50_000_i64)
                    .period(100_000_u64)
                    .cpus("0-1")
                    .build()
                    .unwrap(),
            )
            .memory(LinuxMemoryBuilder::default().limit(1 << 20_i64).swap(1 << 20_i64).build().unwrap())
            .pids(LinuxPidsBuilder::default().limit(-1_i64).build().unwrap())
            .build()
            .unwrap()
    }

    #[test]
    fn a_container_of_the_kubelet_on_version_1() {
        assert_eq!(
            lines(version1(&pod()).unwrap()),
            [
                "cpuset.cpus=0-1",
                "cpu.shares=512",
                "cpu.cfs_period_us=100000",
                "cpu.cfs_quota_us=50000",
                "memory.limit_in_bytes=1048576",
                "memory.memsw.limit_in_bytes=1048576",
                "pids.max=max",
            ]
        );
    }

    #[test]
    fn the_same_on_version_2() {
        assert_eq!(
            lines(version2(&pod()).unwrap()),
            [
                "cpuset.cpus=0-1",
                "cpu.weight=20",
                "cpu.max=50000 100000",
                "memory.swap.max=0",
                "memory.max=1048576",
                "pids.max=max",
            ]
        );
    }

    #[test]
    fn unified_files_are_for_version_2_and_only_files() {
        let with = |key: &str| {
            LinuxResourcesBuilder::default()
                .unified(
                    [(key.to_owned(), "1".to_owned())]
                        .into_iter()
                        .collect::<std::collections::HashMap<_, _>>(),
                )
                .build()
                .unwrap()
        };
        assert!(version1(&with("memory.high")).is_err());
        assert_eq!(lines(version2(&with("memory.high")).unwrap()), ["memory.high=1"]);
        assert!(version2(&with("../memory.high")).is_err());
    }

    #[test]
    fn swap_needs_a_limit_it_is_above() {
        assert_eq!(swap_alone(300, 100).unwrap().as_deref(), Some("200"));
        assert_eq!(swap_alone(-1, 100).unwrap().as_deref(), Some("max"));
        assert!(swap_alone(50, 100).is_err() && swap_alone(50, -1).is_err());
    }

    proptest! {
        #[test]
        fn weights_stay_in_range_and_in_order(a in any::<u64>(), b in any::<u64>()) {
            let (low, high) = (a.min(b), a.max(b));
            prop_assert!((1..=10_000).contains(&shares_to_weight(a)));
            prop_assert!(shares_to_weight(low) <= shares_to_weight(high));
        }

        #[test]
        fn io_weights_stay_in_range(weight in any::<u16>()) {
            prop_assert!((1..=10_000).contains(&blkio_to_io_weight(weight)));
        }
    }
}
