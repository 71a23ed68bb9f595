//! How busy the machine and single processes were over a span.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Ticks of `/proc/stat` per second: what Linux shows on every architecture that Debian has.
const TICKS: f64 = 100.0;

/// A span that has ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock {
    /// Seconds of all processors in which they did something.
    pub(super) busy: f64,
    /// Seconds that went by.
    pub(super) wall: f64,
}

/// A span under way.
pub(super) struct Meter {
    begin: Instant,
    idle: f64,
    processors: f64,
}

impl Meter {
    /// Begins a span.
    pub(super) fn start() -> Result<Self> {
        let (idle, processors) = idle()?;
        Ok(Self { begin: Instant::now(), idle, processors })
    }

    /// Ends it. Idle time is counted exactly by the kernel where busy time is sampled, so that busy is what is left.
    pub(super) fn stop(self) -> Result<Clock> {
        let wall = self.begin.elapsed().as_secs_f64();
        let (now, _) = idle()?;
        Ok(Clock { busy: (wall * self.processors - (now - self.idle)).max(0.0), wall })
    }
}

/// Share of a processor that the machine is busy while we do nothing.
pub(super) async fn background(span: Duration) -> Result<f64> {
    let meter = Meter::start()?;
    tokio::time::sleep(span).await;
    let clock = meter.stop()?;
    Ok(clock.busy / clock.wall)
}

/// Idle seconds of all processors so far (idle, waiting for IO, taken by the hypervisor), and how many there are.
fn idle() -> Result<(f64, f64)> {
    parse(&fs::read_to_string("/proc/stat")?).context("/proc/stat has no usual first line")
}

fn parse(stat: &str) -> Option<(f64, f64)> {
    let processors = stat.lines().filter(|line| line.starts_with("cpu") && !line.starts_with("cpu ")).count();
    let fields: Vec<f64> =
        stat.lines().next()?.split_whitespace().skip(1).filter_map(|field| field.parse().ok()).collect();
    let idle = fields.get(3)? + fields.get(4)? + fields.get(7)?;
    Some((idle / TICKS, f64::from(u32::try_from(processors).ok()?)))
}

/// Seconds that the processes of a cgroup have run, from cgroup2's accounting or version 1's.
pub(super) fn of_cgroup(dir: &Path) -> Result<f64> {
    let file = dir.join("cpu.stat");
    let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    let usage = text.lines().find_map(|line| line.strip_prefix("usage_usec ")).context("no usage_usec")?;
    Ok(usage.trim().parse::<f64>()? / 1e6)
}

/// Seconds that all threads of a process have run.
pub(super) fn of_process(pid: i32) -> Result<f64> {
    let mut nanoseconds = 0.0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end between the two reads; what it used is lost then, which only an idle process affords.
        let text = fs::read_to_string(task?.path().join("schedstat")).unwrap_or_default();
        nanoseconds += text.split(' ').next().and_then(|field| field.parse::<f64>().ok()).unwrap_or_default();
    }
    Ok(nanoseconds / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_counts_waiting_and_stolen_time() {
        let stat = "cpu  100 0 50 1000 200 0 0 300 0 0\ncpu0 0 0 0 0 0 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0 0 0\nintr 1\n";
        let (idle, processors) = parse(stat).unwrap();
        assert!((idle - 15.0).abs() < 1e-9 && (processors - 2.0).abs() < 1e-9);
        assert!(parse("intr 1\n").is_none());
    }
}
