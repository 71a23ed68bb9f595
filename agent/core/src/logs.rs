//! Files of a container's log: names of rotated ones, and which of them go. Pure.
//!
//! A log `0.log` is rotated to `0.log.20260102-150405`, the time in UTC; an older one is compressed to `….gz`. What is
//! being compressed ends in `.tmp`.

use std::collections::BTreeSet;

use jiff::{SignedDuration, Timestamp};

const COMPRESSED: &str = ".gz";
const UNFINISHED: &str = ".tmp";
/// `20260102-150405`.
const STAMP: &str = "%Y%m%d-%H%M%S";
const STAMP_LENGTH: usize = 15;
/// With an offset, as a point in time is read.
const STAMP_AND_ZONE: &str = "%Y%m%d-%H%M%S %z";

/// What to do with rotated files before the log is rotated once more.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tidying {
    /// Too old, unfinished, or there in compressed form.
    pub remove: Vec<String>,
    /// To be compressed.
    pub compress: Vec<String>,
}

/// The name that the log gets now: later than all others, even when the clock went back, as names tell the order.
pub fn rotated_name(log: &str, names: &[String], now: Timestamp) -> String {
    let newest = names.iter().filter_map(|name| stamp_of(log, name)).max();
    let newest = newest.and_then(|stamp| Timestamp::strptime(STAMP_AND_ZONE, format!("{stamp} +0000")).ok());
    let after = newest.map(|newest| newest + SignedDuration::from_secs(1));
    format!("{log}.{}", after.map_or(now, |after| after.max(now)).strftime(STAMP))
}

/// The rotated files of `log` among `names`, oldest first; each once, plain before compressed.
pub fn rotated(log: &str, names: &[String]) -> Vec<String> {
    let mut found: Vec<&String> = names.iter().filter(|name| stamp_of(log, name).is_some()).collect();
    found.sort();
    found.dedup_by(|later, kept| later.strip_suffix(COMPRESSED) == Some(kept.as_str()));
    found.into_iter().cloned().collect()
}

/// Plans the tidying of `log`'s directory so that with the current file and the one about to be rotated there are
/// `max_files` at most.
pub fn tidy(log: &str, names: &[String], max_files: usize) -> Tidying {
    let mut tidying = Tidying::default();
    let whole: BTreeSet<&str> =
        names.iter().filter(|name| stamp_of(log, name).is_some()).map(String::as_str).collect();
    for name in names {
        let unfinished = name.strip_suffix(UNFINISHED).is_some_and(|rest| stamp_of(log, rest).is_some());
        let superseded =
            whole.contains(name.as_str()) && whole.contains(format!("{name}{COMPRESSED}").as_str());
        if unfinished || superseded {
            tidying.remove.push(name.clone());
        }
    }
    let mut kept: Vec<&str> =
        whole.iter().copied().filter(|name| !tidying.remove.iter().any(|gone| gone == name)).collect();
    kept.sort_unstable();
    let surplus = kept.len().saturating_sub(max_files.saturating_sub(2));
    tidying.remove.extend(kept.drain(..surplus).map(str::to_owned));
    tidying.compress =
        kept.into_iter().filter(|name| !name.ends_with(COMPRESSED)).map(str::to_owned).collect();
    tidying
}

/// The name while it is written, and the name of the finished file.
pub fn compressed_names(name: &str) -> (String, String) {
    (format!("{name}{COMPRESSED}{UNFINISHED}"), format!("{name}{COMPRESSED}"))
}

/// Whether `name` is a file of `log`: rotated, compressed or unfinished. They go when the log goes.
pub fn belongs_to(log: &str, name: &str) -> bool {
    stamp_of(log, name.strip_suffix(UNFINISHED).unwrap_or(name)).is_some()
}

/// The time in the name of a rotated file of `log`.
fn stamp_of<'a>(log: &str, name: &'a str) -> Option<&'a str> {
    let rest = name.strip_prefix(log)?.strip_prefix('.')?;
    let stamp = rest.strip_suffix(COMPRESSED).unwrap_or(rest);
    let is_stamp = stamp.len() == STAMP_LENGTH
        && stamp
            .bytes()
            .enumerate()
            .all(|(index, byte)| if index == 8 { byte == b'-' } else { byte.is_ascii_digit() });
    is_stamp.then_some(stamp)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(names: &str) -> Vec<String> {
        names.split_whitespace().map(|name| format!("0.log.{name}")).collect()
    }

    #[track_caller]
    fn check(names: &str, max_files: usize, remove: &str, compress: &str) {
        let tidying = tidy("0.log", &list(names), max_files);
        assert_eq!((tidying.remove, tidying.compress), (list(remove), list(compress)), "{names}");
    }

    #[test]
    fn old_files_go_and_others_are_compressed() {
        check("", 5, "", "");
        check("20260102-000001", 5, "", "20260102-000001");
        check("20260102-000002 20260102-000001.gz", 5, "", "20260102-000002");
        check(
            "20260102-000001.gz 20260102-000002.gz 20260102-000003.gz 20260102-000004",
            5,
            "20260102-000001.gz",
            "20260102-000004",
        );
        check("20260102-000001 20260102-000002", 2, "20260102-000001 20260102-000002", "");
        // Interrupted while compressing, before and after the rename.
        check("20260102-000001 20260102-000001.gz.tmp", 5, "20260102-000001.gz.tmp", "20260102-000001");
        check("20260102-000001 20260102-000001.gz", 5, "20260102-000001", "");
        // Nobody's business.
        check("bak 2026 20260102-000001.xz 20260102_000001", 5, "", "");
    }

    #[test]
    fn names_are_upstreams_and_in_order() {
        let now = "2026-01-02T15:04:05.9Z".parse().expect("a time");
        assert_eq!(rotated_name("0.log", &[], now), "0.log.20260102-150405");
        let taken = list("20260102-150405 20260102-150406.gz");
        assert_eq!(rotated_name("0.log", &taken, now), "0.log.20260102-150407");
        let later = list("20260102-235959");
        assert_eq!(rotated_name("0.log", &later, now), "0.log.20260103-000000", "the clock went back");
        assert_eq!(
            rotated("0.log", &list("20260102-150406.gz 20260102-150405 x 20260102-150405.gz")),
            list("20260102-150405 20260102-150406.gz")
        );
        assert!(belongs_to("0.log", "0.log.20260102-150405.gz.tmp"));
        assert!(!belongs_to("0.log", "0.log") && !belongs_to("0.log", "10.log.20260102-150405"));
    }
}
