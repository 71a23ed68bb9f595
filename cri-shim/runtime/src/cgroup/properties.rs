//! Limits as properties of a unit: what systemd writes into a cgroup's files whenever it sees to them again. Pure.
//!
//! The files are written by ourselves, too: they take finer values, and more of them. A limit that systemd knows and was
//! not told of is put back to its default when systemd reloads or another property of the unit changes.

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxPids, LinuxResources};

use super::convert;
use super::dbus::Value;

/// A property and its value.
pub(crate) type Property = (&'static str, Value);

/// Stands for no limit.
const INFINITY: u64 = u64::MAX;

/// The properties that hold these limits, on a host whose controllers are of version 2 or of version 1.
pub(crate) fn of(resources: &LinuxResources, version2: bool) -> Vec<Property> {
    let mut list = Vec::new();
    if let Some(memory) = resources.memory() {
        of_memory(memory, version2, &mut list);
    }
    if let Some(limit) = resources.pids().as_ref().map(LinuxPids::limit).filter(|limit| *limit != 0) {
        list.push(("TasksMax", number(limit)));
    }
    if let Some(cpu) = resources.cpu() {
        of_cpu(cpu, version2, &mut list);
    }
    if version2 {
        let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
        unified.sort();
        for property in unified.into_iter().flat_map(|(file, value)| of_file(file, value)) {
            list.retain(|(name, _)| *name != property.0);
            list.push(property);
        }
    }
    list
}

/// Negative numbers stand for no limit.
fn number(value: i64) -> Value {
    Value::U64(u64::try_from(value).unwrap_or(INFINITY))
}

fn of_memory(memory: &LinuxMemory, version2: bool, list: &mut Vec<Property>) {
    let given = |value: Option<i64>| value.filter(|value| *value != 0);
    let limit = given(memory.limit());
    list.extend(limit.map(|limit| (if version2 { "MemoryMax" } else { "MemoryLimit" }, number(limit))));
    if !version2 {
        return;
    }
    // One that is not possible is refused when the file is written.
    let swap = convert::swap_alone(memory.swap().unwrap_or(0), limit.unwrap_or(0)).ok().flatten();
    let swap = swap.or_else(|| (limit == Some(-1)).then(|| "max".to_owned()));
    list.extend(swap.and_then(|swap| Some(("MemorySwapMax", parsed(&swap)?))));
    list.extend(given(memory.reservation()).map(|value| ("MemoryLow", number(value))));
}

fn of_cpu(cpu: &LinuxCpu, version2: bool, list: &mut Vec<Property>) {
    // An idle cgroup has no weight.
    let idle = version2 && cpu.idle().is_some_and(|idle| idle != 0);
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0 && !idle) {
        list.push(if version2 {
            ("CPUWeight", Value::U64(convert::shares_to_weight(shares)))
        } else {
            ("CPUShares", Value::U64(shares.clamp(2, 262_144)))
        });
    }
    let quota = cpu.quota().filter(|quota| *quota != 0);
    list.extend(quota_of(quota, cpu.period().filter(|period| *period != 0)));
    if version2 {
        let set = |list: &Option<String>| list.as_deref().and_then(mask);
        list.extend(set(cpu.cpus()).map(|mask| ("AllowedCPUs", mask)));
        list.extend(set(cpu.mems()).map(|mask| ("AllowedMemoryNodes", mask)));
    }
}

/// Microseconds of each second, rounded up to what systemd can write down (whole percents), and the period.
fn quota_of(quota: Option<i64>, period: Option<u64>) -> Vec<Property> {
    let mut list = Vec::new();
    list.extend(period.map(|period| ("CPUQuotaPeriodUSec", Value::U64(period))));
    if let Some(quota) = quota {
        let quota = u64::try_from(quota).ok();
        let second = quota.and_then(|quota| quota.checked_mul(1_000_000));
        let second =
            second.map_or(INFINITY, |quota| (quota / period.unwrap_or(100_000)).next_multiple_of(10_000));
        list.push(("CPUQuotaPerSecUSec", Value::U64(second)));
    }
    list
}

/// A file of version 2 that systemd has a property for.
fn of_file(file: &str, value: &str) -> Vec<Property> {
    let name = match file {
        "memory.max" => "MemoryMax",
        "memory.high" => "MemoryHigh",
        "memory.low" => "MemoryLow",
        "memory.min" => "MemoryMin",
        "memory.swap.max" => "MemorySwapMax",
        "pids.max" => "TasksMax",
        "cpu.weight" => "CPUWeight",
        "cpuset.cpus" => return mask(value).map(|mask| ("AllowedCPUs", mask)).into_iter().collect(),
        "cpuset.mems" => return mask(value).map(|mask| ("AllowedMemoryNodes", mask)).into_iter().collect(),
        "cpu.max" => {
            let mut words = value.split_whitespace();
            let quota = words.next().map(|word| word.parse().unwrap_or(-1));
            return quota_of(quota, words.next().and_then(|word| word.parse().ok()));
        }
        _ => return Vec::new(),
    };
    parsed(value).map(|value| (name, value)).into_iter().collect()
}

/// A number, or `max`.
fn parsed(text: &str) -> Option<Value> {
    match text.trim() {
        "max" => Some(Value::U64(INFINITY)),
        text => text.parse().ok().map(Value::U64),
    }
}

/// A list such as `0-2,5` as bits, the lowest first.
fn mask(list: &str) -> Option<Value> {
    let mut bytes: Vec<u8> = Vec::new();
    for part in list.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.trim().parse::<usize>().ok()?, last.trim().parse::<usize>().ok()?);
        // As many as a kernel can have.
        if first > last || last >= 8192 {
            return None;
        }
        bytes.resize(bytes.len().max(last / 8 + 1), 0);
        for bit in first..=last {
            if let Some(byte) = bytes.get_mut(bit / 8) {
                *byte |= 1 << (bit % 8);
            }
        }
    }
    (!bytes.is_empty()).then_some(Value::Bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn properties(text: &str, version2: bool) -> Vec<Property> {
        of(&serde_json::from_str(text).unwrap(), version2)
    }

    #[test]
    fn a_container_of_the_kubelet() {
        let text = r#"{"memory":{"limit":1048576,"swap":3145728,"reservation":4096},"pids":{"limit":5},
                       "cpu":{"shares":1024,"quota":12345,"period":100000,"cpus":"0-1,9"}}"#;
        assert_eq!(
            properties(text, true),
            [
                ("MemoryMax", Value::U64(1 << 20)),
                ("MemorySwapMax", Value::U64(2 << 20)),
                ("MemoryLow", Value::U64(4096)),
                ("TasksMax", Value::U64(5)),
                ("CPUWeight", Value::U64(39)),
                ("CPUQuotaPeriodUSec", Value::U64(100_000)),
                ("CPUQuotaPerSecUSec", Value::U64(130_000)),
                ("AllowedCPUs", Value::Bytes(vec![0b11, 0b10])),
            ]
        );
        assert_eq!(
            properties(text, false),
            [
                ("MemoryLimit", Value::U64(1 << 20)),
                ("TasksMax", Value::U64(5)),
                ("CPUShares", Value::U64(1024)),
                ("CPUQuotaPeriodUSec", Value::U64(100_000)),
                ("CPUQuotaPerSecUSec", Value::U64(130_000)),
            ]
        );
    }

    #[test]
    fn no_limit_is_told_as_such() {
        let text = r#"{"memory":{"limit":-1},"pids":{"limit":-1},"cpu":{"quota":-1}}"#;
        let all = [
            ("MemoryMax", Value::U64(INFINITY)),
            ("MemorySwapMax", Value::U64(INFINITY)),
            ("TasksMax", Value::U64(INFINITY)),
            ("CPUQuotaPerSecUSec", Value::U64(INFINITY)),
        ];
        assert_eq!(properties(text, true), all);
    }

    #[test]
    fn files_of_version_2_count_more() {
        let text = r#"{"memory":{"limit":1048576},"unified":{"memory.max":"8192","memory.high":"max",
                       "memory.oom.group":"1","cpu.max":"50000 200000","cpuset.cpus":"odd"}}"#;
        assert_eq!(
            properties(text, true),
            [
                ("CPUQuotaPeriodUSec", Value::U64(200_000)),
                ("CPUQuotaPerSecUSec", Value::U64(250_000)),
                ("MemoryHigh", Value::U64(INFINITY)),
                ("MemoryMax", Value::U64(8192)),
            ]
        );
    }

    #[test]
    fn lists_of_processors() {
        assert_eq!(mask("0,2-3"), Some(Value::Bytes(vec![0b1101])));
        assert_eq!(mask(" 8 \n"), Some(Value::Bytes(vec![0, 1])));
        for odd in ["", "3-1", "x", "0-99999999"] {
            assert_eq!(mask(odd), None, "{odd:?}");
        }
    }
}
