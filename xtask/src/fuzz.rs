//! `cargo xtask fuzz [TARGET…]`: builds the fuzz targets of [`CRATES`] and runs each for a while.
//!
//! Stable Rust is enough: the parsers have no unsafe code, so what is looked for are panics, overflows, broken assertions, and
//! inputs that take too long or too much. Corpora are kept below `target/fuzz`, so that a later run goes on where the last
//! one stopped; a finding is an input there.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::cmd::{Cmd, step};
use crate::setup;

/// Crates of fuzz targets; no two have a target of the same name.
const CRATES: &[&str] = &["cri-shim/fuzz", "cni-plugins/fuzz"];

/// What `fuzz` takes.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Targets to run (all when none is named).
    targets: Vec<String>,
    /// Seconds for each target.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Runs of one target beside each other.
    #[arg(long, default_value_t = 1)]
    jobs: u32,
    /// Build with nightly Rust's address sanitizer, for the C code beside (zlib, zstd); needs rustup.
    #[arg(long)]
    sanitize: bool,
    /// Only name the targets.
    #[arg(long)]
    list: bool,
}

/// Most bytes of an input: what is to be found is found in small ones, and quickly.
const MAX_INPUT: u32 = 4096;
/// Seconds that one input may take: more is a finding.
const SLOW: u32 = 20;
/// MiB that a target may take: more is a finding. A sanitizer's own books are part of it.
const MEMORY: u32 = 2048;

/// Runs the targets; the first finding ends it with an error that says how to see it again.
pub(crate) fn run(repo: &Path, options: &Options) -> Result<()> {
    let all = targets(repo)?;
    if options.list {
        for name in all.keys() {
            println!("{name}");
        }
        return Ok(());
    }
    let names: Vec<&String> =
        if options.targets.is_empty() { all.keys().collect() } else { options.targets.iter().collect() };
    let mut chosen = Vec::new();
    for name in names {
        let Some(directory) = all.get(name) else {
            let known: Vec<&str> = all.keys().map(String::as_str).collect();
            bail!("there is no fuzz target {name:?}; there are {}", known.join(", "));
        };
        chosen.push((name.as_str(), directory.as_path()));
    }
    setup::fuzzing(options.sanitize)?;
    let place = repo.join("target/fuzz");
    // All are built before the first one runs.
    for (name, directory) in &chosen {
        step(&format!("building fuzz target {name}"), || {
            cargo_fuzz(directory, &place, options, "build").args([name]).run()
        })?;
    }
    for (name, directory) in chosen {
        step(&format!("fuzzing {name} for {} s", options.seconds), || {
            fuzz(directory, &place, name, options)
        })?;
    }
    Ok(())
}

fn fuzz(directory: &Path, place: &Path, target: &str, options: &Options) -> Result<()> {
    let (corpus, findings) = (place.join("corpus").join(target), place.join("findings").join(target));
    for directory in [&corpus, &findings] {
        fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
    }
    let mut cmd = cargo_fuzz(directory, place, options, "run").args([target]).args([&corpus]);
    let seeds = directory.join("seeds").join(target);
    if seeds.is_dir() {
        cmd = cmd.args([seeds]);
    }
    // With its last slash it is a directory to put findings in.
    let prefix = format!("-artifact_prefix={}/", findings.display());
    let mut flags = vec![
        "--".to_owned(),
        prefix,
        format!("-max_total_time={}", options.seconds),
        format!("-max_len={MAX_INPUT}"),
        format!("-timeout={SLOW}"),
        format!("-rss_limit_mb={MEMORY}"),
        "-print_final_stats=1".to_owned(),
    ];
    if options.jobs > 1 {
        flags.push(format!("-fork={}", options.jobs));
    }
    cmd.args(flags)
        .run()
        .with_context(|| format!("{target} found something; its input is in {}", findings.display()))
}

/// Built with optimisation, overflow checks and assertions.
fn cargo_fuzz(directory: &Path, place: &Path, options: &Options, command: &str) -> Cmd {
    let (toolchain, sanitizer) =
        if options.sanitize { (Some("+nightly"), "address") } else { (None, "none") };
    Cmd::new("cargo")
        .args(toolchain)
        .args(["fuzz", command, "--fuzz-dir", ".", "--sanitizer", sanitizer])
        .dir(directory)
        .env("CARGO_TARGET_DIR", place)
}

/// Every target with the crate it is in.
fn targets(repo: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    for directory in CRATES {
        let directory = repo.join(directory);
        let sources = directory.join("fuzz_targets");
        let entries = fs::read_dir(&sources).with_context(|| format!("reading {}", sources.display()))?;
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                found.insert(name, directory.clone());
            }
        }
    }
    Ok(found)
}
