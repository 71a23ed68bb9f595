//! `lb-bench [--services N] [--seconds S] [--precision P] [--rounds N] [--block N]`: measures and prints one JSON object.
#![allow(clippy::print_stdout, reason = "the report goes to standard output")]

use std::time::Duration;

use anyhow::{Context, Result, bail};
use ebpf_tests::bench::{Options, lb};

fn main() -> Result<()> {
    let mut options = Options::default();
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().with_context(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--services" => options.services = value.parse().context("--services")?,
            "--seconds" => options.limit = Duration::from_secs(value.parse().context("--seconds")?),
            "--precision" => options.precision = value.parse().context("--precision")?,
            "--rounds" => options.rounds = value.parse().context("--rounds")?,
            "--block" => options.block = value.parse().context("--block")?,
            _ => bail!(
                "unknown option {name}: use --services N, --seconds S, --precision P, --rounds N or --block N"
            ),
        }
    }
    println!("{}", serde_json::to_string_pretty(&lb(options)?)?);
    Ok(())
}
