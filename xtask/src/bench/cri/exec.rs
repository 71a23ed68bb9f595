//! ExecSync of `true`: latency as a client sees it, and what it costs the machine.
//!
//! CPU per exec is the system's busy time over a block, minus what the machine was busy in an idle span around the round
//! with the same containers up. The client's own share is part of it, on both sides.

use std::time::Duration;

use anyhow::Result;

use super::cpu::{self, Clock};
use super::driver::{Driver, Pod, Times};
use super::report::{Goal, Row};
use super::{Arguments, Sides};
use crate::bench::stats::{Round, mean, median, p90};

/// Execs that do not count.
const WARM_UP: u32 = 5;

/// Interleaved blocks of execs, one after the other.
pub(super) async fn measure(sides: &Sides, arguments: &Arguments) -> Result<Vec<Row>> {
    let (execs, idle) =
        if arguments.quick { (20, Duration::from_secs(1)) } else { (100, Duration::from_secs(3)) };
    println!("==> ExecSync of `true`, {execs} in a block");
    let (ours, peer) = (pod(&sides.ours).await?, pod(&sides.peer).await?);
    let (mut latencies, mut costs): (Vec<Round>, Vec<Round>) = (Vec::new(), Vec::new());
    for _ in 0..arguments.rounds() {
        let before = cpu::background(idle).await?;
        let (mut latency, mut blocks): (Round, Vec<(bool, Clock)>) = <_>::default();
        for (driver, is_ours) in sides.round() {
            let (pod, side) = if is_ours { (&ours, &mut latency.0) } else { (&peer, &mut latency.1) };
            let clock = cpu::Meter::start()?;
            for _ in 0..execs {
                side.push(driver.exec_true(pod).await.map_err(|error| driver.explain(&error))?);
            }
            blocks.push((is_ours, clock.stop()?));
        }
        let background = f64::midpoint(before, cpu::background(idle).await?);
        let mut cost = Round::default();
        for (is_ours, clock) in blocks {
            let side = if is_ours { &mut cost.0 } else { &mut cost.1 };
            side.push((clock.busy - background * clock.wall) * 1000.0 / f64::from(execs));
        }
        latencies.push(latency);
        costs.push(cost);
    }
    for (driver, pod) in [(&sides.ours, &ours), (&sides.peer, &peer)] {
        driver.end(pod, &mut Times::new()).await?;
    }
    let goal = Goal::Ratio(0.2);
    Ok(vec![
        Row::of_rounds("ExecSync", "latency, median", "ms", &latencies, median, goal),
        Row::of_rounds("ExecSync", "latency, p90", "ms", &latencies, p90, goal),
        Row::of_rounds("ExecSync", "CPU of the machine per exec", "ms", &costs, mean, goal),
    ])
}

async fn pod(driver: &Driver) -> Result<Pod> {
    let pod = driver.start("exec", &mut Times::new()).await.map_err(|error| driver.explain(&error))?;
    for _ in 0..WARM_UP {
        driver.exec_true(&pod).await.map_err(|error| driver.explain(&error))?;
    }
    Ok(pod)
}
