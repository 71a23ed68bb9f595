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

/// What a process has run for, and which process that was: its id alone may have gone to another one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Run {
    seconds: f64,
    began: u64,
}

impl Run {
    /// Seconds that the same process has run since an earlier look. Another process is an error: what the first one used
    /// is not known any more.
    pub(super) fn since(self, earlier: Self) -> Result<f64> {
        anyhow::ensure!(self.began == earlier.began, "the process was replaced by another one meanwhile");
        Ok((self.seconds - earlier.seconds).max(0.0))
    }
}

/// What all threads of a process have run, those that have ended among them (the threads' own counts fall when one ends).
pub(super) fn of_process(pid: i32) -> Result<Run> {
    let file = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&file).with_context(|| format!("reading {file}"))?;
    run_of(&text).with_context(|| format!("{file} has not the usual fields"))
}

fn run_of(stat: &str) -> Option<Run> {
    // The name, in brackets, may contain anything; the third field follows it.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    let ticks = f64::from(u32::try_from(number(14)? + number(15)?).ok()?);
    Some(Run { seconds: ticks / TICKS, began: number(22)? })
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

    #[test]
    fn a_thread_that_ends_takes_nothing_back_and_another_process_is_told() {
        // What is counted for the whole process only grows, whatever its threads do.
        let pid = i32::try_from(std::process::id()).unwrap();
        let busy = || {
            let end = Instant::now() + Duration::from_millis(100);
            while Instant::now() < end {
                std::hint::spin_loop();
            }
        };
        let (worked, look) = (std::sync::Barrier::new(2), std::sync::Barrier::new(2));
        let (during, after) = std::thread::scope(|scope| {
            let worker = scope.spawn(|| {
                busy();
                worked.wait();
                look.wait();
            });
            worked.wait();
            let during = of_process(pid).unwrap();
            look.wait();
            worker.join().unwrap();
            (during, of_process(pid).unwrap())
        });
        assert!(after.seconds >= during.seconds, "{during:?}, then {after:?}");
        assert!(after.since(during).unwrap() >= 0.0);

        let of = |used: u32, began: u32| {
            run_of(&format!("7 (a) b) S 1 1 1 0 -1 0 0 0 0 0 {used} 50 0 0 20 0 3 0 {began} 0 0")).unwrap()
        };
        assert!((of(250, 900).since(of(100, 900)).unwrap() - 1.5).abs() < 1e-9);
        assert!(of(250, 901).since(of(100, 900)).is_err());
        assert!(run_of("7 (a) S 1").is_none());
    }
}
