//! Memory per pod beyond the workload, and CPU while nothing happens.
//!
//! PSS of every process below the side's cgroups, by kind, with 0, 1 and N pods. A side runs alone, so that no page is
//! shared with the other one. "Per pod" is what all processes but the workload grew by, divided by the pods.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

use super::driver::{Driver, Pod, Times, WORKLOAD};
use super::report::{Goal, Row};
use super::{Arguments, cpu, side};
use crate::bench::stats::mean;
use crate::cri_hosts::{Ground, Kind};
use crate::process::memory;

/// Pods started at once.
const LANES: usize = 4;
/// How long nothing happens before the first look: both sides give memory back some time after work.
const REST: Duration = Duration::from_secs(16);
/// Longest wait for memory to settle after that.
const SETTLE: Duration = Duration::from_secs(10);

/// A kind of process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Column {
    /// The containerd daemon.
    Containerd,
    /// keelson-cri.
    Cri,
    /// Shims.
    Shims,
    /// Pause processes, and keepers of pipes.
    PauseAndKeepers,
    /// What the pods are for; not counted.
    Workload,
}

impl Column {
    /// All of them.
    pub(super) const ALL: [Self; 5] =
        [Self::Containerd, Self::Cri, Self::Shims, Self::PauseAndKeepers, Self::Workload];

    /// Heading.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Containerd => "containerd",
            Self::Cri => "cri",
            Self::Shims => "shims",
            Self::PauseAndKeepers => "pause, keeper",
            Self::Workload => "(workload)",
        }
    }
}

/// Memory of one side with a number of pods.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Sample {
    /// `keelson-cri` or `containerd`.
    pub(super) side: &'static str,
    /// Pods that ran.
    pub(super) pods: u32,
    /// PSS in MiB by kind.
    pub(super) pss_mib: BTreeMap<Column, f64>,
    /// Processes by kind.
    pub(super) processes: BTreeMap<Column, usize>,
    /// Resident memory of the server that speaks CRI.
    pub(super) server_rss_mib: f64,
}

impl Sample {
    /// All but the workload.
    fn beyond(&self) -> f64 {
        self.pss_mib.iter().filter(|(column, _)| **column != Column::Workload).map(|(_, mib)| mib).sum()
    }
}

/// What one side's run gave.
struct Run {
    samples: Vec<Sample>,
    server_cpu: f64,
    all_cpu: f64,
}

/// Every side alone, in the order A B (B A when not quick).
pub(super) async fn measure(ground: &Ground, arguments: &Arguments) -> Result<(Vec<Row>, Vec<Sample>)> {
    let order: &[Kind] = if arguments.quick {
        &[Kind::Keelson, Kind::Containerd]
    } else {
        &[Kind::Keelson, Kind::Containerd, Kind::Containerd, Kind::Keelson]
    };
    let (mut ours, mut peers) = (Vec::new(), Vec::new());
    for kind in order {
        let run = run(ground, *kind, arguments).await?;
        if *kind == Kind::Keelson { ours.push(run) } else { peers.push(run) }
    }
    let rows = rows(&ours, &peers, arguments.pods);
    let samples = ours.into_iter().chain(peers).flat_map(|run| run.samples).collect();
    Ok((rows, samples))
}

async fn run(ground: &Ground, kind: Kind, arguments: &Arguments) -> Result<Run> {
    let driver = side(ground, kind, arguments).await?;
    println!("==> memory of {} with 0, 1 and {} pods", driver.name(), arguments.pods);
    let mut pods: Vec<Pod> = Vec::new();
    let mut samples = Vec::new();
    let mut wanted = vec![0, 1, arguments.pods];
    wanted.dedup();
    for count in wanted {
        grow(&driver, &mut pods, count).await.map_err(|error| driver.explain(&error))?;
        samples.push(settled(&driver, count).await?);
    }
    let span = Duration::from_secs(if arguments.quick { 3 } else { 20 });
    let (server_cpu, all_cpu) = idle_cpu(&driver, span).await?;
    for pod in &pods {
        driver.end(pod, &mut Times::new()).await.map_err(|error| driver.explain(&error))?;
    }
    driver.host.stop()?;
    Ok(Run { samples, server_cpu, all_cpu })
}

async fn grow(driver: &Driver, pods: &mut Vec<Pod>, wanted: u32) -> Result<()> {
    let wanted = usize::try_from(wanted)?;
    while pods.len() < wanted {
        let lanes = (0..LANES.min(wanted - pods.len())).map(|_| async {
            let mut times = Times::new();
            driver.start("memory", &mut times).await
        });
        pods.extend(futures::future::try_join_all(lanes).await?);
    }
    Ok(())
}

/// Looks, after a rest, until two looks agree within 1 %, or the time is up.
async fn settled(driver: &Driver, pods: u32) -> Result<Sample> {
    tokio::time::sleep(REST).await;
    let end = Instant::now() + SETTLE;
    let mut last = sample(driver, pods)?;
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let now = sample(driver, pods)?;
        let steady = (now.beyond() - last.beyond()).abs() < last.beyond() * 0.01;
        last = now;
        if steady || Instant::now() > end {
            return Ok(last);
        }
    }
}

fn sample(driver: &Driver, pods: u32) -> Result<Sample> {
    let daemons = driver.host.daemons();
    let (mut pss, mut processes) = (BTreeMap::new(), BTreeMap::new());
    for process in driver.host.processes() {
        // One that has just ended has no memory.
        let Some((_, kib)) = memory(process.pid) else { continue };
        let column = column(process.pid, &daemons);
        *pss.entry(column).or_insert(0.0) += mib(kib);
        *processes.entry(column).or_insert(0) += 1;
    }
    let server = *daemons.last().context("no daemon runs")?;
    let (rss, _) = memory(server).with_context(|| format!("{} has ended", driver.name()))?;
    Ok(Sample { side: driver.name(), pods, pss_mib: pss, processes, server_rss_mib: mib(rss) })
}

fn column(pid: i32, daemons: &[i32]) -> Column {
    match daemons.iter().position(|daemon| *daemon == pid) {
        Some(0) => return Column::Containerd,
        Some(_) => return Column::Cri,
        None => {}
    }
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    kind_of(&line)
}

/// The kind of a process that is no daemon, by its command line.
fn kind_of(line: &[u8]) -> Column {
    let mut arguments = line.split(|byte| *byte == 0).map(String::from_utf8_lossy);
    let program = arguments.next().unwrap_or_default();
    let second = arguments.next().unwrap_or_default();
    let name = program.rsplit('/').next().unwrap_or_default();
    if second == WORKLOAD {
        Column::Workload
    } else if name.starts_with("containerd-shim") && second != "sandbox" {
        Column::Shims
    } else {
        Column::PauseAndKeepers
    }
}

/// Shares of a processor that the CRI server, and all daemons and shims together, take while nothing happens.
async fn idle_cpu(driver: &Driver, span: Duration) -> Result<(f64, f64)> {
    let server = *driver.host.daemons().last().context("no daemon runs")?;
    let group = driver.host.daemon_cgroup();
    let before = (cpu::of_process(server)?, cpu::of_cgroup(&group)?);
    let begin = Instant::now();
    tokio::time::sleep(span).await;
    let wall = begin.elapsed().as_secs_f64();
    let after = (cpu::of_process(server)?, cpu::of_cgroup(&group)?);
    let of_server = after.0.since(before.0).with_context(|| format!("CPU of {}, idle", driver.name()))?;
    Ok((of_server / wall * 100.0, (after.1 - before.1) / wall * 100.0))
}

fn rows(ours: &[Run], peers: &[Run], pods: u32) -> Vec<Row> {
    let at = |runs: &[Run], count: u32, value: &dyn Fn(&Sample) -> f64| {
        let values: Vec<f64> = runs
            .iter()
            .filter_map(|run| run.samples.iter().find(|sample| sample.pods == count))
            .map(value)
            .collect();
        mean(&values)
    };
    let per_pod = |runs: &[Run], count: u32| {
        (at(runs, count, &Sample::beyond) - at(runs, 0, &Sample::beyond)) / f64::from(count)
    };
    let of =
        |name: &str, unit, ours, peer, goal| Row::plain("memory and idle CPU", name, unit, ours, peer, goal);
    let mut rows = Vec::new();
    let mut counts = vec![1, pods];
    counts.dedup();
    for count in counts {
        let name = format!("PSS per pod beyond the workload, {count} pods");
        rows.push(of(
            &name,
            "MiB",
            per_pod(ours, count),
            per_pod(peers, count),
            Goal::Ours(4e6 / 1_048_576.0),
        ));
    }
    let rss = |runs: &[Run]| at(runs, pods, &|sample| sample.server_rss_mib);
    rows.push(of(&format!("server's RSS, {pods} pods"), "MiB", rss(ours), rss(peers), Goal::Ours(25.0)));
    let cpu = |runs: &[Run], of: fn(&Run) -> f64| mean(&runs.iter().map(of).collect::<Vec<_>>());
    let server: fn(&Run) -> f64 = |run| run.server_cpu;
    let all: fn(&Run) -> f64 = |run| run.all_cpu;
    rows.push(of(
        "server's CPU, idle",
        "% of a core",
        cpu(ours, server),
        cpu(peers, server),
        Goal::Ours(0.5),
    ));
    rows.push(of(
        "CPU of daemons and shims, idle",
        "% of a core",
        cpu(ours, all),
        cpu(peers, all),
        Goal::None,
    ));
    rows
}

fn mib(kib: u64) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "a node's memory in KiB fits 52 bits")]
    let kib = kib as f64;
    kib / 1024.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_by_its_command_line() {
        assert_eq!(kind_of(b"/pause\0idle\0"), Column::Workload);
        assert_eq!(kind_of(b"/pause\0"), Column::PauseAndKeepers);
        assert_eq!(kind_of(b"/usr/bin/containerd-shim-runc-v2\0-namespace\0k8s.io\0"), Column::Shims);
        assert_eq!(kind_of(b"/x/containerd-shim-keelson-v1\0sandbox\0"), Column::PauseAndKeepers);
        assert_eq!(kind_of(b""), Column::PauseAndKeepers);
    }
}
