//! The lane *vm-light*: root tests of single packages on Debian's kernel, cgroup v2 only, without systemd.
//!
//! To add a test: name its package in [`SUITES`], with the modules and host programs that it needs. A test program
//! and the executables of its package are put at the very paths that cargo built them at, since tests name those.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::cpio::Archive;
use super::guest::{self, Job};
use super::kernel::Kernel;
use super::programs::{self, Program};
use super::qemu::Machine;
use super::{cache, output};
use crate::cmd::{Cmd, step, which};
use crate::images::deb::Packages;

/// The tests of one package.
struct Suite {
    /// Its folder.
    package: &'static str,
    modules: &'static [&'static str],
    programs: &'static [&'static str],
    /// Arguments for every test program of the package, such as tests to skip.
    arguments: &'static [&'static str],
}

const SUITES: &[Suite] = &[
    Suite {
        package: "cni-plugins",
        modules: &["bridge", "veth", "dummy", "br_netfilter", "8021q", "sctp", "wireguard"],
        programs: &["ip", "nft"],
        arguments: &[],
    },
    Suite { package: "cri-shim/runtime", modules: &["overlay"], programs: &["runc"], arguments: &[] },
];

/// Needed by all.
const MODULES: &[&str] = &["virtio_pci", "virtio_rng"];
/// Longest that one test program may take, under QEMU's own processor on a busy machine.
const TEST_LIMIT: u64 = 300;
/// Longest that the machine may run.
const DEADLINE: Duration = Duration::from_secs(900);

/// Builds the tests, boots, and tells the outcome of each.
pub(crate) fn run(repo: &Path) -> Result<()> {
    let kernel = step("fetching Debian's kernel for clouds", || Kernel::fetch(&cache(repo)))?;
    let mut archive = Archive::default();
    let mut jobs = Vec::new();
    step("building the tests for the guest", || {
        let folders: Vec<&str> = SUITES.iter().map(|suite| suite.package).collect();
        let programs = programs::root_tests(repo, &folders)?;
        SUITES.iter().try_for_each(|suite| add_suite(suite, &programs, &mut archive, &mut jobs))
    })?;
    add_system(repo, &kernel, &mut archive)?;
    archive.content(guest::JOBS, 0o644, &serde_json::to_vec_pretty(&jobs)?)?;
    let directory = output(repo, "light");
    let initramfs = directory.join("initramfs.cpio");
    crate::process::write_atomic(&initramfs, &archive.finish()?)?;
    let begin = Instant::now();
    let outcomes = step(&format!("{} test programs on Linux {}", jobs.len(), kernel.version), || {
        Machine {
            kernel: &kernel.image,
            initramfs: &initramfs,
            command_line: &format!("quiet rdinit={} -- vm-init", guest::SELF),
            disks: &[],
            memory: 1536,
            deadline: DEADLINE,
            output: &directory,
        }
        .run()
    })?;
    super::report(&outcomes, begin.elapsed(), &directory)
}

/// The test programs of a package, as jobs, with everything that they call.
fn add_suite(suite: &Suite, programs: &[Program], archive: &mut Archive, jobs: &mut Vec<Job>) -> Result<()> {
    for Program { name, file, is_test, .. } in programs.iter().filter(|found| found.folder == suite.package) {
        archive.program(&file.to_string_lossy(), file)?;
        if *is_test {
            let mut command = vec![file.to_string_lossy().into_owned(), "--test-threads=1".to_owned()];
            command.extend(suite.arguments.iter().map(|argument| (*argument).to_owned()));
            jobs.push(Job {
                name: format!("{} {name}", suite.package),
                command,
                env: BTreeMap::new(),
                directory: PathBuf::from("/"),
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
    Ok(())
}

/// Kernel modules, busybox under its usual names, and this program.
fn add_system(repo: &Path, kernel: &Kernel, archive: &mut Archive) -> Result<()> {
    let wanted: Vec<&str> =
        MODULES.iter().chain(SUITES.iter().flat_map(|suite| suite.modules)).copied().collect();
    super::add_modules(kernel, &wanted, archive)?;
    archive.program(guest::SELF, &std::env::current_exe()?)?;
    let packages = Packages::fetch(&cache(repo).join("debs"), &["busybox-static"])?;
    let busybox = packages.tree("busybox-static").join("bin/busybox");
    archive.file(guest::BUSYBOX, &busybox)?;
    for applet in Cmd::new(&busybox).args(["--list"]).output()?.lines() {
        if which(applet).is_none() || !SUITES.iter().any(|suite| suite.programs.contains(&applet)) {
            archive.link(&format!("/bin/{applet}"), "busybox")?;
        }
    }
    for directory in ["/dev", "/proc", "/sys", "/root", "/run", "/tmp", "/var", "/etc"] {
        archive.directory(directory)?;
    }
    archive.content("/etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n")?;
    archive.content("/etc/group", 0o644, b"root:x:0:\n")
}
