//! The lane *vm-light*: root tests of single packages on Debian's kernel, cgroup v2 only, without systemd.
//!
//! Which ones is said in [`super::suites`].

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::cpio::Archive;
use super::guest::{self, Job};
use super::kernel::Kernel;
use super::programs::{self, Program};
use super::qemu::Machine;
use super::suites::{Lane, Suite};
use super::{Choice, cache, output};
use crate::cmd::{Cmd, step, which};
use crate::images::deb::Packages;

/// Needed by all.
const MODULES: &[&str] = &["virtio_pci", "virtio_rng"];
/// Longest that one test program may take, under QEMU's own processor on a busy machine.
const TEST_LIMIT: u64 = 300;
/// Longest that the machine may run.
const DEADLINE: Duration = Duration::from_secs(900);

/// Builds the tests, boots, and tells the outcome of each.
pub(crate) fn run(repo: &Path, choice: &Choice) -> Result<()> {
    let suites = chosen(repo, choice)?;
    if choice.list {
        for (suite, test) in &suites {
            println!("{}", job_name(suite, test));
        }
        return Ok(());
    }
    let kernel = {
        let _alone = super::lock(&cache(repo).join("lock"), "makes the guest's disks")?;
        step("fetching Debian's kernel for clouds", || Kernel::fetch(&cache(repo)))?
    };
    let mut archive = Archive::default();
    let mut jobs = Vec::new();
    step("building the tests for the guest", || {
        let wanted: BTreeSet<(String, String)> =
            suites.iter().map(|(suite, test)| (suite.folder.to_owned(), test.clone())).collect();
        let programs = programs::root_tests(repo, &wanted)?;
        suites.iter().try_for_each(|(suite, test)| add_test(suite, test, &programs, &mut archive, &mut jobs))
    })?;
    add_system(repo, &kernel, &suites, &mut archive)?;
    archive.content(guest::JOBS, 0o644, &serde_json::to_vec_pretty(&jobs)?)?;
    let directory = output(repo, "light");
    let initramfs = directory.join("initramfs.cpio");
    crate::process::write_atomic(&initramfs, &archive.finish()?)?;
    let run = step(&format!("{} test programs on Linux {}", jobs.len(), kernel.version), || {
        Machine {
            kernel: &kernel.image,
            initramfs: &initramfs,
            command_line: &format!("quiet rdinit={} -- vm-init", guest::SELF),
            disks: &[],
            memory: 2048,
            deadline: DEADLINE,
            output: &directory,
        }
        .run()
    })?;
    super::report(&run, &directory)
}

/// The chosen tests, each with its suite.
fn chosen(repo: &Path, choice: &Choice) -> Result<Vec<(&'static Suite, String)>> {
    let mut found = Vec::new();
    for suite in Suite::of(Lane::Light) {
        let names = suite.names(repo)?;
        found.extend(
            names.into_iter().filter(|test| choice.takes(&job_name(suite, test))).map(|test| (suite, test)),
        );
    }
    anyhow::ensure!(!found.is_empty(), "no test is chosen; `--list` prints their names");
    Ok(found)
}

fn job_name(suite: &Suite, test: &str) -> String {
    format!("{} {test}", suite.folder)
}

/// A test program as a job, with everything that it calls.
fn add_test(
    suite: &Suite,
    test: &str,
    programs: &[Program],
    archive: &mut Archive,
    jobs: &mut Vec<Job>,
) -> Result<()> {
    for program in programs.iter().filter(|program| program.folder == suite.folder) {
        if program.is_test && program.name != test {
            continue;
        }
        let path = program.file.to_string_lossy().into_owned();
        archive.program(&path, &program.file)?;
        if program.is_test {
            let mut command = vec![path, "--test-threads=1".to_owned()];
            command.extend(suite.arguments.iter().map(|argument| (*argument).to_owned()));
            jobs.push(Job {
                name: job_name(suite, test),
                command,
                env: suite
                    .env
                    .iter()
                    .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                    .collect(),
                directory: PathBuf::from("/"),
                modules: Vec::new(),
                links: BTreeMap::new(),
                seconds: TEST_LIMIT,
                collect: Vec::new(),
            });
        }
    }
    for program in suite.programs {
        let file =
            which(program).with_context(|| format!("{program} is missing: run `cargo xtask setup`"))?;
        archive.program(&format!("/bin/{program}"), &file)?;
    }
    suite.files.iter().try_for_each(|file| archive.tree(Path::new(file)))
}

/// Kernel modules, busybox under its usual names, and this program.
fn add_system(
    repo: &Path,
    kernel: &Kernel,
    suites: &[(&'static Suite, String)],
    archive: &mut Archive,
) -> Result<()> {
    let wanted: Vec<&str> =
        MODULES.iter().chain(suites.iter().flat_map(|(suite, _)| suite.modules)).copied().collect();
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
