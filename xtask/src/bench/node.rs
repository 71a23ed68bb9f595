//! `bench node`: memory of each component as it is now; run it after the walk of the README.

use anyhow::{Result, bail};
use serde::Serialize;

use crate::paths::Layout;
use crate::status;

#[derive(Serialize)]
struct Report {
    components: Vec<status::Line>,
    control_rss_mib: f64,
    agent_and_cri_rss_mib: f64,
}

/// Prints and saves the memory figures with their goals.
pub(crate) fn run(layout: &Layout) -> Result<()> {
    let components = status::collect(layout);
    if components.is_empty() {
        bail!("nothing runs: start with `cargo xtask up --detach`");
    }
    let rss =
        |name: &str| components.iter().filter(|line| line.name == name).map(|line| line.rss_mib).sum::<f64>();
    let (control, node) = (rss("control"), rss("agent") + rss("cri"));
    for line in &components {
        println!("{:<12} RSS {:>6.1} MiB   PSS {:>6.1} MiB", line.name, line.rss_mib, line.pss_mib);
    }
    println!("\ncontrol plane: {control:.1} MiB (goal ≤ 80); agent + CRI: {node:.1} MiB (goal ≤ 60)");
    super::save(layout, "node", &Report { components, control_rss_mib: control, agent_and_cri_rss_mib: node })
}
