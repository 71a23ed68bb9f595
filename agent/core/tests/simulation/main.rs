//! A node in virtual time: the real decisions ([`agent_core::pod_loop`] and all that it asks) run pods of many shapes on a fake
//! runtime and a fake API server, while containers crash, sandboxes die, calls fail or lose their answers, events get lost, the
//! watch lags, the clock is set, the agent is killed. Rules are checked at each step, and that all is well in the end.
//!
//! Each seed is another story. `KEELSON_SEED=N` plays one, `KEELSON_SEEDS=N` as many; a failure tells its seed and the last
//! 50 things that happened (`KEELSON_TRACE=N`: as many).

mod accidents;
mod agent;
mod api;
mod check;
mod random;
mod runtime;
mod shapes;
mod steps;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Seeds of an ordinary run.
const SEEDS: u64 = 100;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{variable} is a number")))
}

#[test]
fn pods_obey_the_rules_whatever_happens() {
    let seeds = match number("KEELSON_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("KEELSON_SEEDS").unwrap_or(SEEDS),
    };
    for seed in seeds {
        let mut world = world::World::new(seed);
        let played = catch_unwind(AssertUnwindSafe(|| world.run()));
        if let Err(problem) = played {
            let text = problem.downcast_ref::<String>().cloned();
            let text = text.or_else(|| problem.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            panic!("KEELSON_SEED={seed}: {} at {}", text.unwrap_or_default(), world.story());
        }
    }
}
