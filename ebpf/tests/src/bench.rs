//! How much a ClusterIP costs: new TCP connections per second through it, over those straight to the pod.
//!
//! Two pods (network namespaces joined to a node's by veth pairs, routed there), one client thread and one server
//! thread, each on a CPU of its own. Blocks of connections go direct, through the service, and direct again as a
//! control, in the order D V C C V D, so that a slow drift of the machine cancels out; rounds are repeated until the
//! 95 % interval of the ratio is narrow enough or the time is up. The hook's own time comes from the kernel's
//! program statistics, taken apart because they cost time themselves.

mod pods;
mod statistics;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ebpf_common::Protocol;
use ebpf_loader::DataPlane;
use serde::Serialize;

use crate::{
    arena::Arena,
    tables::{filler, key, service},
};
use pods::{Block, BlockSpec, Pods};
pub use statistics::Interval;

/// Connections whose cost is measured with the kernel's statistics on.
const HOOK_SAMPLE: u32 = 5000;
/// Rounds before the interval is believed.
const LEAST_ROUNDS: usize = 10;

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Services in the maps beside the one that is dialled, with three endpoints each.
    pub services: u32,
    /// Stop when the 95 % interval is within this fraction of the ratio.
    pub precision: f64,
    /// Stop anyway after this long.
    pub limit: Duration,
    /// Stop anyway after this many rounds.
    pub rounds: usize,
    /// Connections per block.
    pub block: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self { services: 1, precision: 0.01, limit: Duration::from_mins(2), rounds: usize::MAX, block: 2000 }
    }
}

/// What came out.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Services in the maps.
    pub services: u32,
    /// Rounds of six blocks.
    pub rounds: usize,
    /// Connections per second, median of blocks, direct to the pod.
    pub direct_per_sec: f64,
    /// Connections per second, median of blocks, through the ClusterIP.
    pub service_per_sec: f64,
    /// Service ÷ direct.
    pub ratio: Interval,
    /// Direct ÷ direct: how far the machine alone moves the ratio.
    pub control: Interval,
    /// Whether the interval became as narrow as asked for.
    pub precise: bool,
    /// The connect hook's own nanoseconds when the address is a service.
    pub hook_service_ns: f64,
    /// The connect hook's own nanoseconds when it is not.
    pub hook_direct_ns: f64,
    /// Microseconds of a connect, 99th percentile, direct.
    pub direct_p99_us: f64,
    /// Microseconds of a connect, 99th percentile, through the ClusterIP.
    pub service_p99_us: f64,
    /// Milliseconds to program all services.
    pub load_ms: f64,
}

/// Measures. Needs root; touches nothing outside its own namespaces, cgroup and pins.
pub fn lb(options: Options) -> Result<Report> {
    ensure!(ebpf_loader::is_built(), "built without the BPF programs: run `cargo xtask build-ebpf` first");
    let arena = Arena::enter(&[])?;
    let pods = Pods::start()?;
    let (mut plane, load) = fill(&arena, options.services)?;
    plane.attach()?;
    // Warm caches and see that both ways work before anything counts.
    pods.run(BlockSpec::direct(500))?;
    pods.run(BlockSpec::service(500))?;
    let rounds = measure(&pods, &options)?;
    let statistics = rounds.summary().context("no round was measured")?;
    let hook_service_ns = hook_ns(&pods, BlockSpec::service(HOOK_SAMPLE))?;
    let hook_direct_ns = hook_ns(&pods, BlockSpec::direct(HOOK_SAMPLE))?;
    Ok(Report {
        services: options.services,
        rounds: rounds.len(),
        direct_per_sec: rounds.direct.rate(),
        service_per_sec: rounds.service.rate(),
        ratio: statistics.0,
        control: statistics.1,
        precise: statistics.0.half_width() <= options.precision,
        hook_service_ns,
        hook_direct_ns,
        direct_p99_us: rounds.direct.p99_us(),
        service_p99_us: rounds.service.p99_us(),
        load_ms: load.as_secs_f64() * 1000.0,
    })
}

fn fill(arena: &Arena, services: u32) -> Result<(DataPlane, Duration)> {
    let mut table = filler(services.saturating_sub(1), 3);
    table.insert(key("bench"), service(Protocol::Tcp, &[pods::VIP], &[pods::BACKEND]));
    let mut config = arena.config();
    config.capacity = ebpf_loader::Capacity::default();
    let mut plane = DataPlane::open(config)?;
    let start = Instant::now();
    let report = plane.replace_all(&table);
    let load = start.elapsed();
    ensure!(report.refused.is_empty(), "not programmed: {:?}", report.refused);
    Ok((plane, load))
}

/// All blocks of all rounds.
struct Rounds {
    direct: statistics::Series,
    service: statistics::Series,
    control: statistics::Series,
}

impl Rounds {
    fn len(&self) -> usize {
        self.direct.pairs()
    }

    /// Ratio of service to direct, and of control to direct.
    fn summary(&self) -> Option<(Interval, Interval)> {
        Some((self.service.ratio_to(&self.direct)?, self.control.ratio_to(&self.direct)?))
    }
}

fn measure(pods: &Pods, options: &Options) -> Result<Rounds> {
    let mut rounds = Rounds {
        direct: statistics::Series::default(),
        service: statistics::Series::default(),
        control: statistics::Series::default(),
    };
    let (direct, service) = (BlockSpec::direct(options.block), BlockSpec::service(options.block));
    let until = Instant::now() + options.limit;
    while Instant::now() < until && rounds.len() < options.rounds {
        let blocks: Vec<Block> = [direct, service, direct, direct, service, direct]
            .into_iter()
            .map(|spec| pods.run(spec))
            .collect::<Result<_>>()?;
        let [d1, v1, c1, c2, v2, d2]: [Block; 6] =
            blocks.try_into().ok().context("a round has six blocks")?;
        rounds.direct.push(d1, d2);
        rounds.service.push(v1, v2);
        rounds.control.push(c1, c2);
        let narrow = rounds.summary().is_some_and(|(ratio, _)| ratio.half_width() <= options.precision);
        if rounds.len() >= LEAST_ROUNDS && narrow {
            break;
        }
    }
    Ok(rounds)
}

/// Mean run time of the connect hook over a block, by the kernel's own clock.
fn hook_ns(pods: &Pods, spec: BlockSpec) -> Result<f64> {
    let _on = ebpf_loader::run_time_stats().context("turn program statistics on")?;
    let before = ebpf_loader::program_runs("kl_connect4")?;
    pods.run(spec)?;
    let after = ebpf_loader::program_runs("kl_connect4")?;
    let deltas = after.into_iter().map(|now| {
        let then = before.iter().find(|then| then.id == now.id).cloned().unwrap_or_default();
        (now.count - then.count, now.nanos - then.nanos)
    });
    // Another data plane may be live on this machine; ours is the one that just ran the block.
    let (count, nanos) = deltas.max_by_key(|(count, _)| *count).context("the connect hook is not loaded")?;
    ensure!(count >= u64::from(spec.connections), "the connect hook ran {count} times only");
    #[allow(clippy::cast_precision_loss, reason = "a mean for people")]
    Ok(nanos as f64 / count as f64)
}
