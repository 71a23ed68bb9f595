//! What the node's own processes take over a span.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::bench::interrupt;
use crate::paths::Layout;
use crate::process::{Record, memory};

/// Ticks of `/proc/PID/stat` per second: what Linux shows on every architecture that Debian has.
const TICKS: f64 = 100.0;
/// What a burst leaves behind is over by then.
const SETTLE: Duration = Duration::from_secs(10);

/// One process.
#[derive(Debug, Serialize)]
pub(super) struct Line {
    /// Its name, without the node's.
    pub(super) name: String,
    /// Resident memory at the end, MiB.
    pub(super) rss_mib: f64,
    /// Share of one processor.
    pub(super) percent: f64,
}

/// The processes of one of our nodes, and those of all nodes.
pub(super) fn of_node(layout: &Layout, node: &str) -> Result<Vec<Record>> {
    let records: Vec<Record> = Record::load_all(&layout.procs())
        .into_iter()
        .filter(|record| record.process.is_alive() && record.name != "supervisor")
        .filter(|record| record.name.split_once('@').is_none_or(|(_, of)| of == node))
        .collect();
    ensure!(!records.is_empty(), "nothing runs: start with `cargo xtask up --detach`");
    Ok(records)
}

/// Watches processes for so long, after a pause.
pub(super) async fn over(records: &[Record], span: Duration) -> Result<Vec<Line>> {
    tokio::time::sleep(SETTLE).await;
    let begin = Instant::now();
    let before = seconds(records)?;
    while begin.elapsed() < span {
        interrupt::check()?;
        tokio::time::sleep(Duration::from_millis(500).min(span)).await;
    }
    let wall = begin.elapsed().as_secs_f64();
    let after = seconds(records)?;
    let line = |((record, before), after): ((&Record, &f64), &f64)| {
        let (rss, _) = memory(record.process.pid).unwrap_or_default();
        Line {
            name: record.name.split('@').next().unwrap_or_default().to_owned(),
            rss_mib: f64::from(u32::try_from(rss).unwrap_or(u32::MAX)) / 1024.0,
            percent: (after - before) / wall * 100.0,
        }
    };
    Ok(records.iter().zip(&before).zip(&after).map(line).collect())
}

/// Seconds of processors that each has used.
fn seconds(records: &[Record]) -> Result<Vec<f64>> {
    let of = |record: &Record| {
        let path = format!("/proc/{}/stat", record.process.pid);
        let stat = std::fs::read_to_string(&path).with_context(|| format!("{} has ended", record.name))?;
        parse(&stat).with_context(|| format!("{path} is not as expected"))
    };
    records.iter().map(of).collect()
}

/// utime and stime; the name before them may hold anything, and ends with the last parenthesis.
fn parse(stat: &str) -> Option<f64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let user: f64 = fields.nth(11)?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some((user + system) / TICKS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_found_behind_any_name() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194560 100 0 0 0 150 50 0 0 20 0 1 0 5 1000 10";
        assert!((parse(stat).unwrap() - 2.0).abs() < f64::EPSILON);
        assert_eq!(parse("nonsense"), None);
    }
}
