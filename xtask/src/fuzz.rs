//! `cargo xtask fuzz [TARGET…]`: builds the fuzz targets of `cri-shim/fuzz` and runs each for a while.
//!
//! Stable Rust is enough: the parsers have no unsafe code, so what is looked for are panics, overflows, broken assertions, and
//! inputs that take too long or too much. Corpora are kept below `target/fuzz`, so that a later run goes on where the last one stopped; a finding is an input there.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::cmd::{Cmd, step};
use crate::setup;

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
        println!("{}", all.join("\n"));
        return Ok(());
    }
    for wanted in &options.targets {
        if !all.contains(wanted) {
            bail!("there is no fuzz target {wanted:?}; there are {}", all.join(", "));
        }
    }
    let chosen = if options.targets.is_empty() { &all } else { &options.targets };
    setup::fuzzing(options.sanitize)?;
    let place = repo.join("target/fuzz");
    step("building the fuzz targets", || {
        cargo_fuzz(repo, &place, options, "build").args(named(options)).run()
    })?;
    for target in chosen {
        step(&format!("fuzzing {target} for {} s", options.seconds), || fuzz(repo, &place, target, options))?;
    }
    Ok(())
}

/// One target is built alone; several, or all, together.
fn named(options: &Options) -> Option<&String> {
    options.targets.first().filter(|_| options.targets.len() == 1)
}

fn fuzz(repo: &Path, place: &Path, target: &str, options: &Options) -> Result<()> {
    let (corpus, findings) = (place.join("corpus").join(target), place.join("findings").join(target));
    for directory in [&corpus, &findings] {
        fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
    }
    let seeds = repo.join("cri-shim/fuzz/seeds").join(target);
    let mut cmd = cargo_fuzz(repo, place, options, "run").args([target]).args([&corpus]);
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
fn cargo_fuzz(repo: &Path, place: &Path, options: &Options, command: &str) -> Cmd {
    let (toolchain, sanitizer) =
        if options.sanitize { (Some("+nightly"), "address") } else { (None, "none") };
    Cmd::new("cargo")
        .args(toolchain)
        .args(["fuzz", command, "--sanitizer", sanitizer])
        .dir(&repo.join("cri-shim/fuzz"))
        .env("CARGO_TARGET_DIR", place)
}

fn targets(repo: &Path) -> Result<Vec<String>> {
    let directory: PathBuf = repo.join("cri-shim/fuzz/fuzz_targets");
    let entries = fs::read_dir(&directory).with_context(|| format!("reading {}", directory.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            names.push(path.file_stem().unwrap_or_default().to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}
