//! The lane *vm-light*: root tests of single packages on Debian's kernel, cgroup v2 only, without systemd.
//!
//! Which ones is said in [`super::suites`]. Each package has a guest of its own; two run at once.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::cpio::Archive;
use super::guest::{self, Job};
use super::kernel::Kernel;
use super::programs::{self, Program};
use super::qemu::{Machine, Run as Ended};
use super::suites::{Lane, Run, Suite};
use super::{Choice, cache, output};
use crate::cmd::{Cmd, step, which};
use crate::images::deb::Packages;

/// Needed by all.
const MODULES: &[&str] = &["virtio_pci", "virtio_rng"];
/// Longest that one test program may take, under QEMU's own processor on a busy machine.
const TEST_LIMIT: u64 = 900;
/// Longest that one of our own suites may take there.
const RUN_LIMIT: u64 = 2400;
/// Longest that a machine may run.
const DEADLINE: Duration = Duration::from_secs(5400);
/// Memory in MiB, beside what the initramfs takes.
const MEMORY: u32 = 2048;

/// One job of the guest.
struct Chosen {
    suite: &'static Suite,
    what: What,
}

/// What a job runs.
enum What {
    /// The root test of this name.
    Test(String),
    /// `xtask` with these words.
    Run(&'static Run),
}

impl Chosen {
    fn name(&self) -> String {
        match &self.what {
            What::Test(test) => format!("{} {test}", self.suite.folder),
            What::Run(run) => {
                let words: Vec<_> = run.words.iter().copied().take(2).collect();
                format!("{} {}", self.suite.folder, words.join(" "))
            }
        }
    }
}

/// Builds the tests, boots a guest for each package, and tells the outcome of each test.
pub(crate) fn run(repo: &Path, choice: &Choice) -> Result<()> {
    let chosen = chosen(repo, choice)?;
    if choice.list {
        for job in &chosen {
            println!("{}", job.name());
        }
        return Ok(());
    }
    let kernel = {
        let _alone = super::lock(&cache(repo).join("lock"), "makes the guest's disks")?;
        step("fetching Debian's kernel for clouds", || Kernel::fetch(&cache(repo)))?
    };
    let programs = step("building the tests for the guests", || build(repo, &chosen))?;
    let mut guests: Vec<Guest> = Vec::new();
    for job in chosen {
        match guests.iter_mut().find(|guest| guest.name() == guest_name(job.suite)) {
            Some(guest) => guest.jobs.push(job),
            None => guests.push(Guest { jobs: vec![job] }),
        }
    }
    super::run_guests(&guests, choice.together, Guest::name, |guest| {
        println!("==> {} test programs of {} on Linux {}", guest.jobs.len(), guest.name(), kernel.version);
        guest.run(repo, &kernel, &programs)
    })
}

/// One start of the guest: the jobs of a package.
struct Guest {
    jobs: Vec<Chosen>,
}

fn guest_name(suite: &Suite) -> String {
    suite.folder.replace('/', "-")
}

impl Guest {
    fn name(&self) -> String {
        self.jobs.first().map(|job| guest_name(job.suite)).unwrap_or_default()
    }

    fn run(&self, repo: &Path, kernel: &Kernel, programs: &[Program]) -> Result<(Ended, PathBuf)> {
        let (mut archive, mut jobs) = (Archive::default(), Vec::new());
        for job in &self.jobs {
            add_needs(job.suite, &mut archive)?;
            match &job.what {
                What::Test(test) => add_test(job, test, programs, &mut archive, &mut jobs)?,
                What::Run(run) => add_run(repo, job, run, &mut archive, &mut jobs)?,
            }
        }
        add_system(repo, kernel, &self.jobs, &mut archive)?;
        archive.content(guest::JOBS, 0o644, &serde_json::to_vec_pretty(&jobs)?)?;
        let directory = output(repo, "light").join(self.name());
        let initramfs = directory.join("initramfs.cpio");
        let bytes = archive.finish()?;
        let size = u32::try_from(bytes.len() >> 20).context("the initramfs is too large")?;
        crate::process::write_atomic(&initramfs, &bytes)?;
        let machine = Machine {
            kernel: &kernel.image,
            initramfs: &initramfs,
            command_line: &format!("quiet rdinit={} -- vm-init", guest::SELF),
            disks: &[],
            // The archive, what is unpacked from it, and that copied to the new root.
            memory: MEMORY + 3 * size,
            deadline: DEADLINE,
            output: &directory,
        };
        Ok((machine.run()?, directory))
    }
}

/// The chosen jobs.
fn chosen(repo: &Path, choice: &Choice) -> Result<Vec<Chosen>> {
    let mut found = Vec::new();
    for suite in Suite::of(Lane::Light) {
        let tests = suite.names(repo)?.into_iter().map(What::Test);
        let all = tests.chain(suite.runs.iter().map(What::Run)).map(|what| Chosen { suite, what });
        found.extend(all.filter(|job| choice.takes(&job.name())));
    }
    anyhow::ensure!(!found.is_empty(), "no test is chosen; `--list` prints their names");
    Ok(found)
}

/// The test programs, and what the runs call.
fn build(repo: &Path, chosen: &[Chosen]) -> Result<Vec<Program>> {
    let runs = chosen.iter().filter_map(|job| match &job.what {
        What::Run(run) => Some(run.executables),
        What::Test(_) => None,
    });
    let executables: BTreeSet<&str> = runs.flatten().copied().collect();
    if !executables.is_empty() {
        crate::binaries::build_only(repo, &executables.into_iter().collect::<Vec<_>>())?;
    }
    let wanted: BTreeSet<(String, String)> = chosen
        .iter()
        .filter_map(|job| match &job.what {
            What::Test(test) => Some((job.suite.folder.to_owned(), test.clone())),
            What::Run(_) => None,
        })
        .collect();
    programs::root_tests(repo, &wanted)
}

/// What a suite takes along from this machine.
fn add_needs(suite: &Suite, archive: &mut Archive) -> Result<()> {
    for program in suite.programs {
        let file =
            which(program).with_context(|| format!("{program} is missing: run `cargo xtask setup`"))?;
        archive.program(&format!("/bin/{program}"), &file)?;
    }
    let there = suite.files.iter().map(Path::new).filter(|file| file.exists());
    for file in there {
        if file.is_file() {
            archive.program(&file.to_string_lossy(), file)?;
        } else {
            archive.tree(file)?;
        }
    }
    Ok(())
}

/// A test program as a job, with the executables of its package.
fn add_test(
    job: &Chosen,
    test: &str,
    programs: &[Program],
    archive: &mut Archive,
    jobs: &mut Vec<Job>,
) -> Result<()> {
    for program in programs.iter().filter(|program| program.folder == job.suite.folder) {
        if program.is_test && program.name != test {
            continue;
        }
        let path = program.file.to_string_lossy().into_owned();
        archive.program(&path, &program.file)?;
        if program.is_test {
            let mut command = vec![path];
            command.extend(guest::TEST_ARGUMENTS.iter().map(|argument| (*argument).to_owned()));
            command.extend(job.suite.arguments.iter().map(|argument| (*argument).to_owned()));
            jobs.push(planned(job, command, PathBuf::from("/"), Vec::new()));
        }
    }
    Ok(())
}

/// A run of one of our own suites as a job, in what looks like this checkout.
fn add_run(repo: &Path, job: &Chosen, run: &Run, archive: &mut Archive, jobs: &mut Vec<Job>) -> Result<()> {
    let inside = |path: &str| repo.join(path).to_string_lossy().into_owned();
    for path in ["Cargo.toml", "xtask/Cargo.toml"] {
        archive.content(&inside(path), 0o644, b"")?;
    }
    for path in run.files {
        archive.file(&inside(path), &repo.join(path))?;
    }
    for name in run.executables {
        let path = crate::binaries::file(repo, name);
        archive.program(&path.to_string_lossy(), &path)?;
    }
    let junit = format!("/tmp/{}.xml", job.name().replace([' ', '/'], "-"));
    let mut command = vec![guest::SELF.to_owned()];
    command.extend(run.words.iter().map(|word| (*word).to_owned()));
    command.extend(["--junit".to_owned(), junit.clone()]);
    jobs.push(planned(job, command, repo.to_owned(), vec![PathBuf::from(junit)]));
    Ok(())
}

fn planned(job: &Chosen, command: Vec<String>, directory: PathBuf, collect: Vec<PathBuf>) -> Job {
    let mut env = BTreeMap::from([("KEELSON_VM".to_owned(), "light".to_owned())]);
    env.extend(job.suite.env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
    Job {
        name: job.name(),
        command,
        env,
        directory,
        modules: Vec::new(),
        links: BTreeMap::new(),
        seconds: match job.what {
            What::Test(_) => TEST_LIMIT,
            What::Run(_) => RUN_LIMIT,
        },
        collect,
    }
}

/// Kernel modules, busybox under its usual names, and this program.
fn add_system(repo: &Path, kernel: &Kernel, chosen: &[Chosen], archive: &mut Archive) -> Result<()> {
    let wanted: Vec<&str> =
        MODULES.iter().copied().chain(chosen.iter().flat_map(|job| job.suite.modules())).collect();
    super::add_modules(kernel, &wanted, archive)?;
    archive.program(guest::SELF, &std::env::current_exe()?)?;
    let packages = Packages::fetch(&cache(repo).join("debs"), &["busybox-static"])?;
    let busybox = packages.tree("busybox-static").join("bin/busybox");
    archive.file(guest::BUSYBOX, &busybox)?;
    for applet in Cmd::new(&busybox).args(["--list"]).output()?.lines() {
        // A program that a suite brings is there already, and stays.
        archive.link(&format!("/bin/{applet}"), "busybox")?;
    }
    for directory in ["/dev", "/proc", "/sys", "/root", "/run", "/tmp", "/var", "/etc"] {
        archive.directory(directory)?;
    }
    archive.content("/etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n")?;
    archive.content("/etc/group", 0o644, b"root:x:0:\n")?;
    archive.content("/etc/hostname", 0o644, b"keelson-vm\n")?;
    archive.content("/etc/hosts", 0o644, b"127.0.0.1 localhost\n")
}
