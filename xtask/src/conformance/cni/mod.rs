//! `cargo xtask conformance cni`: the CNI specification 0.3.1 to 1.1.0 as cases, for any plugin executable.
//!
//! A case runs the executable as a runtime would, in network namespaces of its own, and looks at what it answered and at
//! what it left in the kernel (by iproute2, never by our own code). In reading order: [`subject`] (what is checked),
//! [`context`] (what a case works with), [`answer`], [`fake`] (a delegate that misbehaves), [`traffic`], `cases`.

#![allow(clippy::unused_self, reason = "a case reads as what it does with its context")]

mod answer;
mod cases;
mod context;
mod fake;
mod subject;
mod traffic;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use self::context::Suite;
use self::subject::{Kind, Subject};
use super::{list, report, runner};
use crate::cmd::{Cmd, step};
use crate::paths::Layout;

/// How to check CNI plugins.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// Executables to check; an IPAM plugin that a main plugin needs is looked for beside it (keelson-ipam, host-local).
    #[arg(long)]
    plugin: Vec<PathBuf>,
    /// What the plugin is, where its name does not tell.
    #[arg(long, value_enum)]
    name: Option<Kind>,
    /// A whole set of plugins instead: ours, built from this checkout, or Debian's.
    #[arg(long, value_enum, conflicts_with = "plugin")]
    set: Option<Set>,
    /// Only cases whose id holds these words; `|` separates alternatives.
    #[arg(long, default_value = "")]
    filter: String,
    /// Print the cases and end.
    #[arg(long)]
    list: bool,
    /// Write JUnit XML.
    #[arg(long)]
    junit: Option<PathBuf>,
    /// Cases beside each other.
    #[arg(long, default_value_t = 4)]
    parallel: usize,
    /// How often a case may be tried; its failures are printed. For a reference whose races are not ours to mend.
    #[arg(long, default_value_t = 1)]
    attempts: u32,
    /// Cases not to run: lines of `group: name = reason`.
    #[arg(long)]
    skip_list: Option<PathBuf>,
    /// Cases that are known to fail: lines of `group: name = reason`.
    #[arg(long)]
    known: Option<PathBuf>,
    /// Seconds that one case may take.
    #[arg(long, default_value_t = 120)]
    deadline: u64,
    /// With --set keelson: take the release binary as it is.
    #[arg(long)]
    no_build: bool,
}

/// Plugins that are checked together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Set {
    /// Ours.
    Keelson,
    /// Debian's package containernetworking-plugins, the reference.
    Debian,
}

/// Where Debian puts them.
const DEBIAN: &str = "/usr/lib/cni";

/// Runs what was asked for; `false` when a case failed.
pub(crate) fn run(layout: &Layout, options: &Options) -> Result<bool> {
    let ids = cases::ids();
    if options.list {
        for id in ids.iter().filter(|id| list::matches(id, &options.filter)) {
            println!("{id}");
        }
        return Ok(true);
    }
    crate::preflight::require_root()?;
    let dir = PathBuf::from(format!("/tmp/kcni-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let result = check(layout, options, &ids, &dir);
    std::fs::remove_dir_all(&dir).with_context(|| format!("removing {}", dir.display()))?;
    result
}

fn check(layout: &Layout, options: &Options, ids: &[String], dir: &Path) -> Result<bool> {
    let subjects = subjects(layout, options, dir)?;
    let default_known = options.set.map(|set| {
        let name = match set {
            Set::Keelson => "keelson.txt",
            Set::Debian => "debian.txt",
        };
        layout.repo.join("xtask/src/conformance/cni").join(name)
    });
    let load = |file: Option<&PathBuf>| file.map_or(Ok(list::List::new()), |file| list::load(file, ids));
    let known = load(options.known.as_ref().or(default_known.as_ref()))?;
    let skipped = load(options.skip_list.as_ref())?;
    let manner = runner::Manner { parallel: options.parallel, attempts: options.attempts, bar: false };
    let begun = Instant::now();
    let mut done = Vec::new();
    let runtime = super::runtime()?;
    for subject in &subjects {
        let cases: Vec<_> = cases::of(subject.kind)
            .into_iter()
            .filter(|case| list::matches(&case.id(), &options.filter))
            .collect();
        if cases.is_empty() {
            continue;
        }
        println!("checking {} ({} cases)", subject.file.display(), cases.len());
        let deadline = Duration::from_secs(options.deadline);
        let suite = Arc::new(Suite::new(subject.clone(), dir.join(subject.kind.word()), deadline)?);
        done.extend(runtime.block_on(runner::run(&suite, cases, manner, &known, &skipped)));
    }
    if done.is_empty() {
        bail!("no case matches {:?}; `--list` prints them", options.filter);
    }
    let title = title(&subjects);
    if let Some(file) = &options.junit {
        let file = if file.is_absolute() { file.clone() } else { layout.repo.join(file) };
        report::junit(&file, &format!("CNI: {title}"), &done)?;
        println!("JUnit: {}", file.display());
    }
    Ok(report::table(&title, &done, begun.elapsed()))
}

fn title(subjects: &[Subject]) -> String {
    let names: Vec<&str> = subjects.iter().map(|subject| subject.name.as_str()).collect();
    let dir = subjects.first().map(|subject| subject.dir.display().to_string()).unwrap_or_default();
    format!("{} of {dir}", names.join(", "))
}

fn subjects(layout: &Layout, options: &Options, dir: &Path) -> Result<Vec<Subject>> {
    let files = match options.set {
        Some(Set::Debian) => debian()?,
        Some(Set::Keelson) => keelson(layout, options.no_build, &dir.join("keelson"))?,
        None if options.plugin.is_empty() => {
            bail!("name an executable (`--plugin /opt/cni/bin/bridge`) or a set (`--set keelson`)")
        }
        None => options.plugin.clone(),
    };
    files.iter().map(|file| Subject::new(file, options.name)).collect()
}

fn debian() -> Result<Vec<PathBuf>> {
    let names = ["bridge", "host-local", "portmap", "bandwidth", "tuning", "loopback"];
    if !Path::new(DEBIAN).join("bridge").is_file() {
        step("installing Debian's reference CNI plugins", || {
            Cmd::new("apt-get")
                .args(["install", "-y", "-qq", "--no-install-recommends", "containernetworking-plugins"])
                .output()
        })?;
    }
    Ok(names.iter().map(|name| Path::new(DEBIAN).join(name)).collect())
}

/// Ours, linked into a directory; those that this checkout has.
fn keelson(layout: &Layout, no_build: bool, dir: &Path) -> Result<Vec<PathBuf>> {
    if !no_build {
        step("building keelson-cni", || crate::binaries::build_only(&layout.repo, &["keelson-cni"]))?;
    }
    Cmd::new(layout.binary("keelson-cni")).args(["install"]).args([dir]).output()?;
    let files = Kind::ALL.iter().map(|kind| kind.word()).map(|word| dir.join(format!("keelson-{word}")));
    Ok(files.filter(|file| file.is_file()).collect())
}
