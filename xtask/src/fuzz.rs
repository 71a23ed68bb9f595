//! `cargo xtask fuzz [TARGET…]`: builds the fuzz targets of [`CRATES`], runs each for a while, and tells what each did.
//!
//! Stable Rust is enough: the parsers have no unsafe code, so what is looked for are panics, overflows, broken assertions, and
//! inputs that take too long or too much. Corpora are kept below `target/fuzz`, so that a later run goes on where the last
//! one stopped; a finding is an input there, and the first thing that the next run tries. A finding of one target does not
//! keep the others from running.

mod build;
mod outcome;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use self::build::Build;
use self::outcome::Outcome;
use crate::cmd::step;
use crate::process::ProcessId;
use crate::{lanes, setup};

/// Crates of fuzz targets; no two have a target of the same name.
const CRATES: &[&str] = &["cni-plugins/fuzz", "cri-shim/fuzz"];

/// What `fuzz` takes.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Targets to run (all when none is named).
    targets: Vec<String>,
    /// Seconds for each target.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// Targets that run beside each other (as many as there are processors when not given).
    #[arg(long)]
    jobs: Option<usize>,
    /// Build with nightly Rust's address sanitizer, for the C code beside (zstd); needs rustup.
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
/// What a target may take beside its time: reading its corpus, and the input that it is at when its time is over.
const GRACE: Duration = Duration::from_secs(120);

/// Runs the targets; findings are told at the end, and make it an error.
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
    let mut chosen = BTreeMap::new();
    for name in names {
        let Some(directory) = all.get(name) else {
            let known: Vec<&str> = all.keys().map(String::as_str).collect();
            bail!("there is no fuzz target {name:?}; there are {}", known.join(", "));
        };
        chosen.insert(name.as_str(), directory.as_path());
    }
    setup::fuzzing(options.sanitize)?;
    let place = repo.join("target/fuzz");
    let build = Build::new(&place, options.sanitize)?;
    // All are built before the first one runs, each crate once.
    for krate in CRATES {
        let directory = repo.join(krate);
        let bins: Vec<&str> =
            chosen.iter().filter(|(_, of)| **of == directory).map(|(name, _)| *name).collect();
        if !bins.is_empty() {
            step(&format!("building {} of {krate}", bins.join(", ")), || build.run(&directory, &bins))?;
        }
    }
    let jobs = options
        .jobs
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
        .clamp(1, chosen.len());
    let fuzzing = format!("fuzzing {} targets for {} s each, {jobs} at once", chosen.len(), options.seconds);
    let outcomes = step(&fuzzing, || {
        let targets: Vec<(&str, &Path)> = chosen.into_iter().collect();
        let done = lanes::run(
            targets,
            jobs,
            |_| None,
            |(name, directory)| {
                let outcome = fuzz(&build.program(name), directory, &place, name, options.seconds);
                match &outcome {
                    Ok(outcome) => println!("    {name:<14} {outcome}"),
                    Err(error) => println!("    {name:<14} {error:#}"),
                }
                outcome
            },
        );
        let named = done.into_iter().map(|((name, _), outcome)| (name, outcome));
        Ok(named.collect::<BTreeMap<&str, Result<Outcome>>>())
    })?;
    let failed: Vec<&str> = outcomes
        .iter()
        .filter(|(_, outcome)| !outcome.as_ref().is_ok_and(|outcome| outcome.finding.is_none()))
        .map(|(name, _)| *name)
        .collect();
    if !failed.is_empty() {
        bail!(
            "{} of {} targets have findings: {}; inputs are below {}, what was printed below {}",
            failed.len(),
            outcomes.len(),
            failed.join(", "),
            place.join("findings").display(),
            place.join("logs").display()
        );
    }
    let inputs: u64 = outcomes.values().flatten().map(|outcome| outcome.inputs).sum();
    println!("{} targets, {inputs} inputs, no findings", outcomes.len());
    Ok(())
}

/// Runs one target to its end. The program ends by itself: after its time, or by its own alarm at an input that is too slow.
fn fuzz(program: &Path, directory: &Path, place: &Path, target: &str, seconds: u32) -> Result<Outcome> {
    let (corpus, findings) = (place.join("corpus").join(target), place.join("findings").join(target));
    let log = place.join("logs").join(target);
    for directory in [&corpus, &findings, &place.join("logs")] {
        fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
    }
    let output = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
    // New inputs go to the first directory; the others are only read.
    let mut cmd = Command::new(program);
    cmd.arg(&corpus).arg(&findings);
    let seeds = directory.join("seeds").join(target);
    if seeds.is_dir() {
        cmd.arg(seeds);
    }
    let words = directory.join("words").join(target);
    if words.is_file() {
        cmd.arg(format!("-dict={}", words.display()));
    }
    // With its last slash it is a directory to put findings in.
    cmd.arg(format!("-artifact_prefix={}/", findings.display()))
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-max_len={MAX_INPUT}"))
        .arg(format!("-timeout={SLOW}"))
        .arg(format!("-rss_limit_mb={MEMORY}"))
        .arg("-print_final_stats=1");
    let mut child = cmd
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let process = ProcessId::of(child.id().cast_signed());
    let limit = Duration::from_secs(seconds.into()) + GRACE;
    if process.is_some_and(|process| !process.wait_gone(limit)) {
        child.kill().ok();
        child.wait().ok();
        bail!("did not end within {} s, and was ended; see {}", limit.as_secs(), log.display());
    }
    let status = child.wait()?;
    // What a target prints need not be text.
    let said = fs::read(&log).with_context(|| format!("reading {}", log.display()))?;
    let outcome = Outcome::read(&String::from_utf8_lossy(&said));
    if !status.success() && outcome.finding.is_none() {
        bail!("ended with {status} and no finding; see {}", log.display());
    }
    Ok(outcome)
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
                if let Some(other) = found.insert(name.clone(), directory.clone()) {
                    bail!("{} and {} both have a target {name}", other.display(), directory.display());
                }
            }
        }
    }
    Ok(found)
}
