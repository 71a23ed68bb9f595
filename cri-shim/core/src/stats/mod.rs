//! Figures from the text of kernel files: cgroups of both versions, pressure, interfaces, processes.
//!
//! Nothing here reads a file: callers hand in a function that gives a file's text, empty for one that is not there. A missing
//! or damaged file makes its figures zero or absent, never an error: half of the picture is better than none.

mod cgroup;
mod net;
mod pressure;
mod process;

pub use cgroup::{
    CgroupDetails, CgroupUsage, DeviceUsage, HugePageUsage, Reader, details_v1, details_v2, oom_kills,
    usage_v1, usage_v2,
};
pub use net::{InterfaceCounters, interfaces};
pub use pressure::{Pressure, Stall, pressure};
pub use process::{ProcessUsage, soft_open_files};

/// Average use of CPU between two readings, in billionths of a core; nothing when time stood still or a counter was reset.
pub fn nano_cores(earlier: (i64, u64), later: (i64, u64)) -> Option<u64> {
    let elapsed = u128::try_from(later.0.checked_sub(earlier.0)?).ok().filter(|elapsed| *elapsed > 0)?;
    let used = u128::from(later.1.checked_sub(earlier.1)?);
    u64::try_from(used * 1_000_000_000 / elapsed).ok()
}

/// The number that a file holds.
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
    use proptest::prelude::*;

    #[test]
    fn cpu_rate_needs_time_to_pass() {
        assert_eq!(nano_cores((0, 0), (1_000_000_000, 500_000_000)), Some(500_000_000));
        assert_eq!(nano_cores((5, 0), (5, 9)), None);
        assert_eq!(nano_cores((0, 9), (5, 0)), None, "a new cgroup counts from zero");
    }

    proptest! {
        #[test]
        fn a_rate_is_never_wrong_by_more_than_rounding(
            start in 0_i64..1 << 60,
            elapsed in 1_i64..1 << 40,
            before in 0_u64..1 << 60,
            used in 0_u64..1 << 50,
        ) {
            let rate = nano_cores((start, before), (start + elapsed, before + used)).unwrap();
            let back = u128::from(rate) * u128::from(elapsed.unsigned_abs()) / 1_000_000_000;
            prop_assert!(u128::from(used) - back <= u128::from(elapsed.unsigned_abs()) / 1_000_000_000 + 1);
        }

        #[test]
        fn any_text_gives_figures_and_no_panic(text in "\\PC{0,200}", other in proptest::collection::vec(any::<u8>(), 0..200)) {
            let other = String::from_utf8_lossy(&other).into_owned();
            for text in [text, other] {
                let read = |_: &str, _: &str| text.clone();
                let (one, two) = (usage_v1(&read), usage_v2(&read));
                prop_assert!(one.working_set_bytes <= one.memory_bytes && two.working_set_bytes <= two.memory_bytes);
                let sizes = ["2MB".to_owned()];
                prop_assert_eq!(details_v1(&read, &sizes).huge_pages.len(), 1);
                prop_assert_eq!(details_v2(&read, &sizes).huge_pages.len(), 1);
                interfaces(&text);
                pressure(&text);
                soft_open_files(&text);
                oom_kills(&text);
            }
        }

        #[test]
        fn numbers_of_a_cgroup_come_back_as_written(
            usage in 0_u64..1 << 50, inactive in 0_u64..1 << 50, rss in any::<u64>(), cpu in 0_u64..1 << 50,
        ) {
            let stat = format!("anon {rss}\ninactive_file {inactive}\ntotal_rss {rss}\ntotal_inactive_file {inactive}\n");
            let read = |_: &str, file: &str| match file {
                "memory.stat" => stat.clone(),
                "memory.usage_in_bytes" | "memory.current" => usage.to_string(),
                "cpuacct.usage" => (cpu * 1000).to_string(),
                "cpu.stat" => format!("usage_usec {cpu}\n"),
                _ => String::new(),
            };
            prop_assert_eq!(usage_v1(&read), usage_v2(&read));
            let found = usage_v2(&read);
            prop_assert_eq!((found.memory_bytes, found.rss_bytes, found.cpu_nanoseconds), (usage, rss, cpu * 1000));
            prop_assert_eq!(found.working_set_bytes, usage.saturating_sub(inactive));
        }
    }
}
