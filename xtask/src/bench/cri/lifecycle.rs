//! Times of sandboxes and containers from run to remove, at 1, 2 and 10 parallel pods.

use anyhow::Result;
use futures::future::try_join_all;

use super::driver::{CALLS, Driver, Times};
use super::report::{Goal, Row};
use super::{Arguments, Sides};
use crate::bench::stats::{Round, median, p90};

/// Pods at once.
const PARALLEL: [u32; 3] = [1, 2, 10];
/// Cycles in a block at the least, whatever the parallelism.
const CYCLES: u32 = 4;

/// Interleaved blocks at every parallelism; two rows (median and p90) for each call.
pub(super) async fn measure(sides: &Sides, arguments: &Arguments) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for parallel in PARALLEL {
        println!("==> sandboxes and containers, {parallel} parallel");
        let mut rounds = Vec::new();
        for _ in 0..arguments.rounds() {
            let (mut ours, mut peers) = (Vec::new(), Vec::new());
            for (driver, is_ours) in sides.round() {
                let times = block(driver, parallel, arguments.quick).await?;
                if is_ours { ours.extend(times) } else { peers.extend(times) }
            }
            rounds.push((ours, peers));
        }
        rows.extend(rows_of(parallel, &rounds));
    }
    Ok(rows)
}

/// Lanes beside each other, each going through some cycles.
async fn block(driver: &Driver, parallel: u32, quick: bool) -> Result<Vec<Times>> {
    let cycles = if quick { 1 } else { (CYCLES / parallel).max(1) };
    let lanes = (0..parallel).map(|lane| async move {
        let mut times = Vec::new();
        for _ in 0..cycles {
            times.push(driver.cycle(&format!("pod-{lane}")).await?);
        }
        anyhow::Ok(times)
    });
    let lanes = try_join_all(lanes).await.map_err(|error| driver.explain(&error))?;
    Ok(lanes.into_iter().flatten().collect())
}

fn rows_of(parallel: u32, rounds: &[(Vec<Times>, Vec<Times>)]) -> Vec<Row> {
    let mut rows = Vec::new();
    for call in CALLS {
        let of = |times: &[Times]| times.iter().filter_map(|times| times.get(&call)).copied().collect();
        let rounds: Vec<Round> = rounds.iter().map(|(ours, peers)| (of(ours), of(peers))).collect();
        let goal = Goal::Ratio(if call.of_sandbox() { 1.0 / 3.0 } else { 0.5 });
        for (name, statistic) in [("median", median as fn(&[f64]) -> f64), ("p90", p90)] {
            let name = format!("{}, {name}", call.name());
            rows.push(Row::of_rounds(&format!("{parallel} parallel"), &name, "ms", &rounds, statistic, goal));
        }
    }
    rows
}
