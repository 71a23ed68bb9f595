//! Virtual machines for tests: a kernel of Debian 12 (6.1, cgroup v2 only) under QEMU's own processor, without KVM.
//!
//! Two lanes. *vm-light*: the kernel, an initramfs that we pack, and test programs as they come out of cargo; it boots in
//! seconds. *vm-debian*: a guest with systemd, containerd, runc and crun, in which keelson-cri runs as a service.
//! In reading order: [`suites`] (the table to which a package's root tests are added), [`kernel`] and [`modules`] (Debian's
//! kernel package, unpacked), [`programs`], [`cpio`] and [`libraries`] (what goes into an initramfs), [`qemu`] (one run,
//! from boot to result), [`guest`] (our program inside, as the first process or as a service), [`light`] and [`debian`]
//! (the lanes), [`disks`] (what the Debian guest boots from), [`node`] and [`logind`] (a whole node inside it).
//!
//! Kept between runs: the kernel and the image below `.cache/vm`; consoles and results are below `target/vm`.

mod cpio;
mod debian;
mod disks;
pub(crate) mod guest;
mod kernel;
mod libraries;
mod light;
mod logind;
mod modules;
pub(crate) mod node;
pub(crate) mod programs;
mod qemu;
mod suites;

pub(crate) use debian::run as debian;
pub(crate) use light::run as light;

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;

use anyhow::{Context, Result, bail};

use self::cpio::Archive;
use self::guest::Outcome;
use self::kernel::Kernel;
use self::qemu::Run;

/// Names another place for kernels and images, which several checkouts may share.
const CACHE: &str = "KEELSON_VM_CACHE";

/// What of a lane is run, and how.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct Choice {
    /// Root, compat, virtual machines: only jobs whose name holds these words; `|` separates alternatives.
    #[arg(long, default_value = "")]
    only: String,
    /// Virtual machines: run these cases of the conformance suite in each chosen run of it, instead of its own choice.
    #[arg(long)]
    cases: Option<String>,
    /// Root, compat, virtual machines: take the release executables as they are; only the chosen tests are built.
    #[arg(long)]
    pub(crate) no_build: bool,
    /// Virtual machines: how many guests run at once, each with two processors and about 3 GiB.
    #[arg(long, default_value_t = 2)]
    together: usize,
    /// Virtual machines: print the names of the jobs and end.
    #[arg(long)]
    pub(crate) list: bool,
}

impl Choice {
    /// Whether a job is chosen.
    pub(crate) fn takes(&self, name: &str) -> bool {
        let words = |part: &str| part.split_whitespace().all(|word| name.contains(word));
        self.only.split('|').any(words)
    }
}

/// Where kernels and images are kept.
fn cache(repo: &Path) -> PathBuf {
    std::env::var_os(CACHE).map_or_else(|| repo.join(".cache/vm"), PathBuf::from)
}

/// Where the console and the results of a lane are left.
fn output(repo: &Path, lane: &str) -> PathBuf {
    repo.join("target/vm").join(lane)
}

/// Waits until no other process holds the lock; `does` says what one that holds it does.
fn lock(path: &Path, does: &str) -> Result<File> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
    }
    let file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
    if matches!(file.try_lock(), Err(TryLockError::WouldBlock)) {
        println!("    another process {does} and holds {}: waiting for its end", path.display());
        file.lock().with_context(|| format!("locking {}", path.display()))?;
    }
    Ok(file)
}

/// Guests of several checkouts take turns: they would slow each other beyond their deadlines.
fn alone() -> Result<File> {
    lock(&std::env::temp_dir().join("keelson-vm.lock"), "runs guests")
}

/// Runs guests, so many at once, and reports each when it ends. All are run, also when one fails; then the names of those
/// that failed are the error.
fn run_guests<G: Sync>(
    guests: &[G],
    at_once: usize,
    name: impl Fn(&G) -> String,
    run: impl Fn(&G) -> Result<(Run, PathBuf)> + Sync,
) -> Result<()> {
    let _alone = alone()?;
    let waiting = Mutex::new(guests.iter());
    let (tell, ended) = mpsc::channel();
    let mut failed = Vec::new();
    thread::scope(|scope| {
        for _ in 0..at_once.clamp(1, guests.len().max(1)) {
            let (tell, run, waiting) = (tell.clone(), &run, &waiting);
            scope.spawn(move || {
                let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
                while let Some(guest) = next() {
                    if tell.send((guest, run(guest))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(tell);
        for (guest, outcome) in ended {
            println!("==> {}", name(guest));
            if let Err(error) = outcome.and_then(|(run, directory)| report(&run, &directory)) {
                println!("    {error:#}");
                failed.push(name(guest));
            }
        }
    });
    if failed.is_empty() { Ok(()) } else { bail!("failed: {}", failed.join(", ")) }
}

/// Puts modules, and the list in which the guest's first process finds them, into an initramfs.
fn add_modules(kernel: &Kernel, names: &[&str], archive: &mut Archive) -> Result<()> {
    let mut list = String::new();
    for file in modules::in_order(&kernel.tree, names)? {
        let path = format!("/{}", file.strip_prefix(&kernel.tree)?.display());
        archive.file(&path, &file)?;
        list += &path;
        list.push('\n');
    }
    // busybox's switch_root empties only what looks like an initramfs: one with this file.
    archive.content("/init", 0o755, b"")?;
    archive.content(guest::MODULES, 0o644, list.as_bytes())
}

/// What a job itself said of how it went: the sums of test programs and suites, and what was skipped.
fn summary(console: &str, outcome: &Outcome) -> (String, Vec<String>) {
    let begin = format!("vm: == {}", outcome.name);
    let mut lines = console.lines().map(str::trim_end).skip_while(|line| *line != begin).skip(1);
    let section: Vec<&str> = lines.by_ref().take_while(|line| !line.starts_with(&begin)).collect();
    let results = section.iter().rev().find_map(|line| line.strip_prefix("test result: "));
    let tests = results.and_then(|rest| rest.split("; finished").next());
    let junit = outcome.files.values().find_map(|text| junit_sums(text));
    let skipped = section.iter().filter(|line| line.starts_with("skipped: ")).map(|line| (*line).to_owned());
    (junit.or_else(|| tests.map(str::to_owned)).unwrap_or_default(), skipped.collect())
}

/// The sums that a JUnit file begins with.
fn junit_sums(text: &str) -> Option<String> {
    let head = text.lines().find(|line| line.starts_with("<testsuites "))?;
    let number = |name: &str| head.split_once(&format!(" {name}=\""))?.1.split('"').next();
    Some(format!(
        "{} cases, {} failed, {} skipped",
        number("tests")?,
        number("failures")?,
        number("skipped")?
    ))
}

/// Prints the outcomes, keeps the files that came back, and fails when a job did or the guest did not get to its end.
fn report(run: &Run, directory: &Path) -> Result<()> {
    let console = fs::read(directory.join("console.log")).unwrap_or_default();
    let console = String::from_utf8_lossy(&console);
    for outcome in &run.outcomes {
        let state = if outcome.passed() { "ok" } else { "FAILED" };
        let problem = outcome.problem.as_deref().unwrap_or_default();
        let (sums, skipped) = summary(&console, outcome);
        println!("    {:<56} {state:<7} {:>6.1} s  {sums} {problem}", outcome.name, outcome.seconds);
        for line in skipped {
            println!("        {line}");
        }
        for (path, content) in &outcome.files {
            let name = path.file_name().unwrap_or_default();
            crate::process::write_atomic(&directory.join(name), content.as_bytes())?;
        }
    }
    println!("    boot to power-off: {:.1} s", run.took.as_secs_f64());
    if let Some(problem) = &run.problem {
        bail!("{problem}");
    }
    let failed = run.outcomes.iter().filter(|outcome| !outcome.passed()).count();
    if failed > 0 || run.outcomes.is_empty() {
        bail!(
            "{failed} of {} failed in the guest; see {}",
            run.outcomes.len(),
            directory.join("console.log").display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_summed_up_in_its_own_words() {
        let outcome = |name: &str, files: &[(&str, &str)]| Outcome {
            name: name.to_owned(),
            status: Some(0),
            seconds: 1.0,
            problem: None,
            files: files.iter().map(|(path, text)| (PathBuf::from(path), (*text).to_owned())).collect(),
        };
        let console = "vm: == a root_x\r\ntest one ... skipped: no SCTP\r\nskipped: no netem\r\n\
            test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s\r\n\
            vm: == a root_x: Some(0) after 1.0 s\r\nvm: == b\r\nskipped: other\r\n";
        let (sums, skipped) = summary(console, &outcome("a root_x", &[]));
        assert!(sums.starts_with("ok. 3 passed; 0 failed"), "{sums}");
        assert_eq!(skipped, ["skipped: no netem"]);
        let xml = "<?xml?>\n<testsuites name=\"x\" tests=\"9\" failures=\"1\" skipped=\"2\" time=\"3\">\n";
        let (sums, _) = summary(console, &outcome("b", &[("/tmp/x.xml", xml)]));
        assert_eq!(sums, "9 cases, 1 failed, 2 skipped");
    }

    #[test]
    fn jobs_are_chosen_by_words() {
        let choice = |only: &str| Choice { only: only.to_owned(), ..Choice::default() };
        let name = "v2: conformance cri, systemd driver, crun";
        assert!(choice("").takes(name));
        assert!(choice("v2 crun").takes(name) && choice("hybrid|systemd").takes(name));
        assert!(!choice("hybrid crun").takes(name) && !choice("hybrid|v1").takes(name));
    }
}
