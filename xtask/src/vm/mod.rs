//! Virtual machines for tests: a kernel of Debian 12 (6.1, cgroup v2 only) under QEMU's own processor, without KVM.
//!
//! Two lanes. *vm-light*: the kernel, an initramfs that we pack, and test programs as they come out of cargo; it boots in
//! seconds. *vm-debian*: a guest with systemd, containerd, runc and crun, in which keelson-cri runs as a service.
//! In reading order: [`kernel`] and [`modules`] (Debian's kernel package, unpacked), [`programs`], [`cpio`] and [`libraries`] (what
//! goes into an initramfs), [`qemu`] (one run, from boot to result), [`guest`] (our program inside, as the first process
//! or as a service), [`light`] and [`debian`] (the lanes, with the tables to which a test is added).
//!
//! Kept between runs: the kernel and the image below `.cache/vm`; consoles and results are below `target/vm`.

mod cpio;
mod debian;
pub(crate) mod guest;
mod kernel;
mod libraries;
mod light;
mod modules;
mod programs;
mod qemu;

pub(crate) use debian::run as debian;
pub(crate) use light::run as light;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};

use self::cpio::Archive;
use self::guest::Outcome;
use self::kernel::Kernel;

/// Where kernels and images are kept.
fn cache(repo: &Path) -> PathBuf {
    repo.join(".cache/vm")
}

/// Where the console and the results of a lane are left.
fn output(repo: &Path, lane: &str) -> PathBuf {
    repo.join("target/vm").join(lane)
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

/// Prints the outcomes, keeps the files that came back, and fails when a job did.
fn report(outcomes: &[Outcome], took: Duration, directory: &Path) -> Result<()> {
    for outcome in outcomes {
        let state = if outcome.passed() { "ok" } else { "FAILED" };
        let problem = outcome.problem.as_deref().unwrap_or_default();
        println!("    {:<60} {state:<7} {:>6.1} s {problem}", outcome.name, outcome.seconds);
        for (path, content) in &outcome.files {
            let name = path.file_name().unwrap_or_default();
            crate::process::write_atomic(&directory.join(name), content.as_bytes())?;
        }
    }
    println!("    boot to power-off: {:.1} s", took.as_secs_f64());
    let failed = outcomes.iter().filter(|outcome| !outcome.passed()).count();
    if failed > 0 || outcomes.is_empty() {
        bail!(
            "{failed} of {} failed in the guest; see {}",
            outcomes.len(),
            directory.join("console.log").display()
        );
    }
    Ok(())
}
