//! The tier `root`: test programs and conformance suites, several beside each other.
//!
//! Most of a root test is waiting for processes and kernels, so on two processors two lanes take little more than half the
//! time of one. Every test has names of its own for what it makes; within a program one test runs at a time, and what
//! measures the machine runs alone. A job's output is printed in one piece when it has ended.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cmd::step;
use crate::lanes;
use crate::process::ProcessId;
use crate::vm::Choice;
use crate::vm::programs::{self, Program};

/// Folder of keelson-cri, whose tests run with more than one handler.
pub(super) const CRI: &str = "cri-shim";
/// Its tests in which a handler runs nothing, or nothing that the test is about: they run with the default one.
const OF_IMAGES: &[&str] =
    &["root_equal", "root_images", "root_images_bad", "root_images_net", "root_layers", "root_pulls"];
/// What measures, and so has the machine for itself.
const ALONE: &[&str] = &["root_idle", "root_scale", "root_stats"];
/// What takes longest, so that no lane begins it when the others have ended.
const LONG: &[&str] =
    &["root_faults", "root_service_matrix", "root_service_cli", "root_network", "root_outside"];
/// Longest that a job may take.
const LIMIT: Duration = Duration::from_secs(1800);
/// Most lines that say again, at the end, why a job failed.
const REASONS: usize = 20;
/// Jobs that may be tried a second time; when more fail, something is wrong.
const SECOND_TRIES: usize = 2;

/// A program to run.
pub(super) struct Job {
    name: String,
    program: PathBuf,
    args: Vec<String>,
    dir: PathBuf,
    env: Vec<(String, std::ffi::OsString)>,
    alone: bool,
    group: String,
}

impl Job {
    /// A root test in its package's folder, as cargo runs it. It never runs twice at once.
    pub(super) fn test(repo: &Path, program: &Program) -> Self {
        Self {
            name: format!("{} of {}", program.name, program.folder),
            program: program.file.clone(),
            args: vec!["--test-threads=1".to_owned()],
            dir: repo.join(&program.folder),
            env: Vec::new(),
            alone: ALONE.contains(&program.name.as_str()),
            group: program.name.clone(),
        }
    }

    /// With an environment variable, which its name tells.
    pub(super) fn with(mut self, key: &str, value: impl AsRef<std::ffi::OsStr>, told: &str) -> Self {
        self.env.push((key.to_owned(), value.as_ref().to_owned()));
        self.name = format!("{}, {told}", self.name);
        self
    }

    /// A run of this program. One of a group runs at a time.
    pub(super) fn xtask(repo: &Path, name: String, group: &str, args: &[&str]) -> Result<Self> {
        Ok(Self {
            name,
            program: std::env::current_exe()?,
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            dir: repo.to_owned(),
            env: Vec::new(),
            alone: false,
            group: group.to_owned(),
        })
    }

    /// The file with what it said.
    fn log(&self, logs: &Path) -> PathBuf {
        let name = self.name.replace(|c: char| !c.is_ascii_alphanumeric() && c != '-' && c != '_', "-");
        logs.join(name).with_extension("log")
    }
}

/// All of the tier, or what is chosen of it.
pub(super) fn run(repo: &Path, choice: &Choice) -> Result<()> {
    if !choice.no_build {
        crate::binaries::build(repo)?;
    }
    let wanted = |folder: &str, name: &str| choice.takes(&format!("{name} of {folder}"));
    let tests = step("building the root tests", || build(repo, wanted))?;
    let mut jobs: Vec<Job> = tests.iter().map(|test| Job::test(repo, test)).collect();
    let handled = tests.iter().filter(|test| test.folder == CRI && !OF_IMAGES.contains(&test.name.as_str()));
    jobs.extend(handled.map(|test| with_handler(repo, test, "runc")));
    for (target, handler) in
        [("keelson", "keelson"), ("keelson", "runc"), ("containerd", ""), ("containerd", "keelson")]
    {
        let file = format!("{target}-{handler}");
        let junit = format!("target/conformance/{}.xml", file.trim_end_matches('-'));
        let args =
            ["conformance", "cri", "--no-build", "--start", target, "--handler", handler, "--junit", &junit];
        let args =
            [&args[..], &["--attempts", attempts((target, handler) == ("keelson", "keelson"))]].concat();
        let name = format!("CRI conformance of {target} {handler}");
        jobs.push(Job::xtask(repo, name.trim_end().to_owned(), target, &args)?);
    }
    for set in ["keelson", "debian"] {
        let junit = format!("target/conformance/cni-{set}.xml");
        let args = ["conformance", "cni", "--no-build", "--set", set, "--junit", &junit];
        let args = [&args[..], &["--attempts", attempts(set == "keelson")]].concat();
        jobs.push(Job::xtask(repo, format!("CNI conformance of {set}'s plugins"), "cni", &args)?);
    }
    all(repo, choice, jobs)
}

/// What is ours passes at once; a race of the reference, or of containerd's shim for runc, must only not be the rule.
fn attempts(is_ours: bool) -> &'static str {
    if is_ours { "1" } else { "3" }
}

/// A test of keelson-cri with one of its handlers.
pub(super) fn with_handler(repo: &Path, test: &Program, handler: &str) -> Job {
    Job::test(repo, test).with("KEELSON_TEST_HANDLER", handler, &format!("handler {handler}"))
}

/// Builds the root tests of which `wanted` says so by their package's folder and their name.
pub(super) fn build(repo: &Path, wanted: impl Fn(&str, &str) -> bool) -> Result<Vec<Program>> {
    let metadata = cargo_metadata::MetadataCommand::new().current_dir(repo).no_deps().exec()?;
    let mut tests = BTreeSet::new();
    for package in &metadata.packages {
        let folder = package.manifest_path.parent().map(|path| path.as_std_path().to_owned());
        let Some(folder) = folder.as_deref().and_then(|folder| folder.strip_prefix(repo).ok()) else {
            continue;
        };
        let folder = folder.to_string_lossy().into_owned();
        let roots =
            package.targets.iter().filter(|target| target.is_test() && target.name.starts_with("root_"));
        let names = roots.map(|target| target.name.clone()).filter(|name| wanted(&folder, name));
        tests.extend(names.map(|name| (folder.clone(), name)));
    }
    let built = programs::root_tests(repo, &tests)?;
    let built: Vec<Program> = built.into_iter().filter(|program| program.is_test).collect();
    if built.len() != tests.len() {
        bail!("cargo built {} of {} root tests", built.len(), tests.len());
    }
    Ok(built)
}

/// Runs jobs, those that are alone after the others, and fails when one of them failed, after all have run.
///
/// A job or two that failed have another try, alone, which tells a fault that is always there from one that needs a full machine
/// or bad luck. Either is a failure.
pub(super) fn all(repo: &Path, choice: &Choice, mut jobs: Vec<Job>) -> Result<()> {
    jobs.retain(|job| choice.takes(&job.name));
    let logs = repo.join("target/root-tests");
    fs::create_dir_all(&logs).with_context(|| format!("creating {}", logs.display()))?;
    jobs.sort_by_key(|job| !LONG.iter().any(|name| job.name.starts_with(name)));
    let (alone, beside): (Vec<Job>, Vec<Job>) = jobs.into_iter().partition(|job| job.alone);
    let lanes = std::thread::available_parallelism().map_or(1, usize::from).min(4);
    let what = format!("{} jobs, {lanes} at once, then {} alone", beside.len(), alone.len());
    let done = step(&what, || {
        let mut done = lanes::run(beside, lanes, |job| Some(job.group.clone()), |job| one(job, &logs));
        done.extend(lanes::run(alone, 1, |_| None, |job| one(job, &logs)));
        Ok(done)
    })?;
    let count = done.len();
    let failed: Vec<Job> = done.into_iter().filter_map(|(job, is_done)| (!is_done).then_some(job)).collect();
    if failed.is_empty() {
        return Ok(());
    }
    // Again at the end: a reader of a long log, or of its tail alone, sees why.
    let reasons: Vec<String> =
        failed.iter().map(|job| format!("{}: {}", job.name, why(job, &logs))).collect();
    let is_flaky = |job: &Job| if failed.len() <= SECOND_TRIES && one(job, &logs) { " (flaky)" } else { "" };
    let names: Vec<String> = failed.iter().map(|job| format!("{}{}", job.name, is_flaky(job))).collect();
    println!("{}", reasons.join("\n"));
    bail!("{} of {count} failed: {}", names.len(), names.join("; "));
}

/// Runs a job to its end, prints what it said and tells whether it succeeded.
fn one(job: &Job, logs: &Path) -> bool {
    let begun = Instant::now();
    let log = job.log(logs);
    let result = carry_out(job, &log);
    let said = fs::read(&log).unwrap_or_default();
    let (took, said) = (begun.elapsed().as_secs_f64(), String::from_utf8_lossy(&said));
    let verdict = match &result {
        Ok(()) => "ok".to_owned(),
        Err(error) => format!("FAILED: {error:#}"),
    };
    // In one call, so that nothing of another lane comes between.
    println!("==> {}\n{}\n    {}: {verdict} in {took:.1} s", job.name, said.trim_end(), job.name);
    result.is_ok()
}

fn why(job: &Job, logs: &Path) -> String {
    let said = fs::read(job.log(logs)).unwrap_or_default();
    reasons(&String::from_utf8_lossy(&said)).join("\n    ")
}

/// The lines of a job's log that say what failed, each with the one after it; the last lines when none does.
fn reasons(said: &str) -> Vec<&str> {
    let lines: Vec<&str> = said.lines().filter(|line| !line.trim().is_empty()).collect();
    let tells = |line: &str| line.starts_with("FAILED ") || line.contains("panicked at ");
    let found: Vec<&str> = lines
        .iter()
        .enumerate()
        .filter(|(_, line)| tells(line))
        .flat_map(|(at, _)| lines[at..].iter().take(2).copied())
        .take(REASONS)
        .collect();
    if found.is_empty() { lines[lines.len().saturating_sub(5)..].to_vec() } else { found }
}

fn carry_out(job: &Job, log: &Path) -> Result<()> {
    let output = File::create(log).with_context(|| format!("creating {}", log.display()))?;
    let mut child = Command::new(&job.program)
        .args(&job.args)
        .current_dir(&job.dir)
        .envs(job.env.iter().map(|(key, value)| (key, value)))
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .spawn()
        .with_context(|| format!("cannot start {}", job.program.display()))?;
    let process = ProcessId::of(child.id().cast_signed());
    if process.is_some_and(|process| !process.wait_gone(LIMIT)) {
        child.kill().ok();
        child.wait().ok();
        bail!("did not end within {} s, and was ended", LIMIT.as_secs());
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("{status}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::reasons;

    #[test]
    fn why_a_job_failed_is_found_in_its_log() {
        let said =
            "ok 1\nFAILED  security: one\n        EPERM\n\n2 cases\nthread 'a' panicked at x.rs:1:5:\nno\n";
        assert_eq!(
            reasons(said),
            ["FAILED  security: one", "        EPERM", "thread 'a' panicked at x.rs:1:5:", "no"]
        );
        assert_eq!(reasons("1\n2\n3\n4\n5\n6\n"), ["2", "3", "4", "5", "6"]);
        assert!(reasons("").is_empty());
    }
}
