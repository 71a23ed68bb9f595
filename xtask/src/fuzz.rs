//! `cargo xtask fuzz [TARGET…]`: builds the fuzz targets of [`CRATES`] with nightly Rust and runs each for a while.
//!
//! Corpora are kept below `target/fuzz`, so that a later run goes on where the last one stopped; a finding is an input there.

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
    /// Only name the targets.
    #[arg(long)]
    list: bool,
}

/// The crates that hold fuzz targets; no two targets have the same name.
const CRATES: [&str; 2] = ["cri-shim/fuzz", "cni-plugins/fuzz"];
/// Most bytes of an input: what is to be found is found in small ones, and quickly.
const MAX_INPUT: u32 = 4096;
/// Seconds that one input may take: more is a finding.
const SLOW: u32 = 20;
/// MiB that a target may take: more is a finding. The sanitizer's own books are part of it.
const MEMORY: u32 = 2048;

/// Runs the targets; the first finding ends it with an error that says how to see it again.
pub(crate) fn run(repo: &Path, options: &Options) -> Result<()> {
    let all = targets(repo)?;
    let names: Vec<&str> = all.iter().map(|target| target.name.as_str()).collect();
    if options.list {
        println!("{}", names.join("\n"));
        return Ok(());
    }
    for wanted in &options.targets {
        if !names.contains(&wanted.as_str()) {
            bail!("there is no fuzz target {wanted:?}; there are {}", names.join(", "));
        }
    }
    let is_chosen = |target: &&Target| options.targets.is_empty() || options.targets.contains(&target.name);
    let chosen: Vec<&Target> = all.iter().filter(is_chosen).collect();
    if !setup::fuzzing()? {
        bail!("fuzzing needs nightly Rust, and there is no rustup to install it (https://rustup.rs)");
    }
    let place = repo.join("target/fuzz");
    for home in CRATES.into_iter().filter(|home| chosen.iter().any(|target| target.home == *home)) {
        step(&format!("building the fuzz targets of {home}"), || {
            cargo_fuzz(repo, home, &place).args(["build"]).args(named(options)).run()
        })?;
    }
    for target in chosen {
        let name = &target.name;
        step(&format!("fuzzing {name} for {} s", options.seconds), || fuzz(repo, &place, target, options))?;
    }
    Ok(())
}

/// One target is built alone; several, or all, together.
fn named(options: &Options) -> Option<&String> {
    options.targets.first().filter(|_| options.targets.len() == 1)
}

fn fuzz(repo: &Path, place: &Path, target: &Target, options: &Options) -> Result<()> {
    let Target { home, name: target } = target;
    let (corpus, findings) = (place.join("corpus").join(target), place.join("findings").join(target));
    for directory in [&corpus, &findings] {
        fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
    }
    let seeds = repo.join(home).join("seeds").join(target);
    let mut cmd = cargo_fuzz(repo, home, place).args(["run", target]).args([&corpus]);
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

/// Built with optimisation, overflow checks and assertions, and the address sanitizer.
fn cargo_fuzz(repo: &Path, home: &str, place: &Path) -> Cmd {
    Cmd::new("cargo")
        .args(["+nightly", "fuzz"])
        .dir(&repo.join(home))
        .env("CARGO_TARGET_DIR", place)
        // cargo tells its children which toolchain to use; here it is another one.
        .env("RUSTUP_TOOLCHAIN", "nightly")
}

/// A fuzz target and the crate it is in.
struct Target {
    home: &'static str,
    name: String,
}

fn targets(repo: &Path) -> Result<Vec<Target>> {
    let mut targets = Vec::new();
    for home in CRATES {
        let directory: PathBuf = repo.join(home).join("fuzz_targets");
        let entries = fs::read_dir(&directory).with_context(|| format!("reading {}", directory.display()))?;
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                targets.push(Target { home, name });
            }
        }
    }
    targets.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(targets)
}
