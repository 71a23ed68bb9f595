//! Our program inside a guest: the first process that makes the root file system, and the one that runs the jobs.
//!
//! Input: `/modules.list`, the kernel's command line and `jobs.json`. Output: one JSON line per job on the second serial
//! line, whose last line says that nothing is missing. Both stages are this very executable, so that host and guest
//! cannot disagree about the format.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// Where the initramfs has its tools.
pub(super) const BUSYBOX: &str = "/bin/busybox";
/// Where the initramfs has this program.
pub(super) const SELF: &str = "/bin/xtask";
/// Modules to load, one path a line, in their order.
pub(super) const MODULES: &str = "/modules.list";
/// What to run, where no parameter names another file.
pub(super) const JOBS: &str = "/jobs.json";
/// Arguments of every test program: one test at a time, and its words also when it passes.
pub(super) const TEST_ARGUMENTS: &[&str] = &["--test-threads=1", "--show-output"];
/// Name of the kernel parameter that tells the disk to continue on.
pub(super) const ROOT_PARAMETER: &str = "keelson.root=";
/// Name of the kernel parameter that tells the list of jobs.
pub(super) const JOBS_PARAMETER: &str = "keelson.jobs=";
/// The serial line for results.
const RESULTS: &str = "/dev/ttyS1";
/// The new root before it is one.
const NEW_ROOT: &str = "/new";

/// One program to run in the guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Job {
    /// Name in the report.
    pub(super) name: String,
    /// Program and arguments.
    pub(super) command: Vec<String>,
    /// Environment beside the usual.
    pub(super) env: BTreeMap<String, String>,
    /// Working directory.
    pub(super) directory: PathBuf,
    /// Kernel modules to load first, where modprobe finds them.
    pub(super) modules: Vec<String>,
    /// Symbolic links to make first: where, and where to.
    pub(super) links: BTreeMap<PathBuf, PathBuf>,
    /// Longest it may take.
    pub(super) seconds: u64,
    /// Files to send to the host afterwards, such as JUnit reports.
    pub(super) collect: Vec<PathBuf>,
}

/// How a job ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Outcome {
    /// Name of the job.
    pub(super) name: String,
    /// Exit status; none when it was killed or could not be started.
    pub(super) status: Option<i32>,
    /// How long it took.
    pub(super) seconds: f64,
    /// What went wrong beside the status.
    pub(super) problem: Option<String>,
    /// The files that were asked for, as far as there are any.
    pub(super) files: BTreeMap<PathBuf, String>,
}

impl Outcome {
    /// Whether the job did what it should.
    pub(super) fn passed(&self) -> bool {
        self.status == Some(0) && self.problem.is_none()
    }
}

/// A line on the result line.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Line {
    Outcome(Outcome),
    End { end: bool },
}

/// Reads what a guest wrote; the second value tells whether it got to its end.
pub(super) fn read_outcomes(text: &str) -> Result<(Vec<Outcome>, bool)> {
    let mut outcomes = Vec::new();
    for line in text.split_inclusive('\n').filter(|line| !line.trim().is_empty()) {
        match serde_json::from_str(line.trim()) {
            Ok(Line::Outcome(outcome)) => outcomes.push(outcome),
            Ok(Line::End { end }) => return Ok((outcomes, end)),
            // The guest was ended while it wrote.
            Err(_) if !line.ends_with('\n') => break,
            Err(error) => {
                return Err(error).with_context(|| format!("a result line that is none: {line:.200}"));
            }
        }
    }
    Ok((outcomes, false))
}

/// The first process of the initramfs: loads modules and continues on the real root.
pub(crate) fn init() -> Result<()> {
    for (kind, target) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        fs::create_dir_all(target)?;
        mount_fs(kind, target, None)?;
    }
    for module in fs::read_to_string(MODULES).unwrap_or_default().lines() {
        // One that does not fit this machine (no such device) is no reason not to go on.
        if let Err(error) = busybox(&["insmod", module]) {
            println!("vm: {module}: {error:#}");
        }
    }
    fs::create_dir_all(NEW_ROOT)?;
    let next: &[&str] = if let Some(disk) = parameter(ROOT_PARAMETER)? {
        wait_for(Path::new(&disk))?;
        mount(Some(disk.as_str()), NEW_ROOT, Some("ext4"), MsFlags::empty(), None::<&str>)
            .context("mounting the root")?;
        &["/sbin/init"]
    } else {
        // The initramfs itself cannot be pivoted away from, which container runtimes do.
        mount_fs("tmpfs", NEW_ROOT, Some("mode=755"))?;
        for entry in fs::read_dir("/")?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !["new", "dev", "proc", "sys"].contains(&name.as_str()) {
                busybox(&["cp", "-a", &format!("/{name}"), NEW_ROOT])?;
            }
        }
        &[SELF, "vm-guest"]
    };
    for target in ["/dev", "/proc", "/sys"] {
        let inside = format!("{NEW_ROOT}{target}");
        fs::create_dir_all(&inside)?;
        mount(Some(target), inside.as_str(), None::<&str>, MsFlags::MS_MOVE, None::<&str>)
            .with_context(|| format!("moving {target}"))?;
    }
    let error = Command::new(BUSYBOX).args(["switch_root", NEW_ROOT]).args(next).exec();
    Err(error).context("switch_root")
}

/// The value of a kernel parameter.
fn parameter(name: &str) -> Result<Option<String>> {
    let command_line = fs::read_to_string("/proc/cmdline")?;
    Ok(command_line.split_whitespace().find_map(|word| word.strip_prefix(name)).map(str::to_owned))
}

/// Runs the jobs, tells their outcomes, and switches the machine off.
pub(crate) fn run() -> Result<()> {
    if std::process::id() == 1 {
        mounts()?;
    }
    let list = parameter(JOBS_PARAMETER)?.unwrap_or_else(|| JOBS.to_owned());
    let jobs: Vec<Job> =
        serde_json::from_slice(&fs::read(&list).with_context(|| format!("reading {list}"))?)?;
    let mut results = fs::OpenOptions::new().write(true).open(RESULTS).context("opening the result line")?;
    for job in &jobs {
        println!("vm: == {}", job.name);
        let outcome = execute(job);
        println!("vm: == {}: {:?} after {:.1} s", job.name, outcome.status, outcome.seconds);
        tell(&mut results, &Line::Outcome(outcome))?;
    }
    tell(&mut results, &Line::End { end: true })?;
    power_off()
}

/// What systemd would mount; /tmp and /var are in memory already.
fn mounts() -> Result<()> {
    for (kind, target, data) in [
        ("devpts", "/dev/pts", Some("mode=620,ptmxmode=666")),
        ("tmpfs", "/dev/shm", None),
        ("mqueue", "/dev/mqueue", None),
        ("tmpfs", "/run", Some("mode=755")),
        ("cgroup2", "/sys/fs/cgroup", None),
        ("bpf", "/sys/fs/bpf", None),
        ("securityfs", "/sys/kernel/security", None),
    ] {
        fs::create_dir_all(target).ok();
        // A kernel without one of them is one that the tests get to know.
        if let Err(error) = mount_fs(kind, target, data) {
            println!("vm: {error:#}");
        }
    }
    // Mounts are shared on a host with systemd, which tests of propagation see.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SHARED, None::<&str>)?;
    busybox(&["ip", "link", "set", "lo", "up"])
}

fn execute(job: &Job) -> Outcome {
    let begin = Instant::now();
    let (status, problem) = match start_and_wait(job) {
        Ok(WaitStatus::Exited(_, status)) => (Some(status), None),
        Ok(other) => (None, Some(format!("{other:?}"))),
        Err(error) => (None, Some(format!("{error:#}"))),
    };
    let files = job.collect.iter().filter_map(|path| Some((path.clone(), fs::read_to_string(path).ok()?)));
    let files = files.collect();
    Outcome { name: job.name.clone(), status, seconds: begin.elapsed().as_secs_f64(), problem, files }
}

/// Reaps everything that comes along, as a first process must, until the job has ended.
fn start_and_wait(job: &Job) -> Result<WaitStatus> {
    for (link, target) in &job.links {
        if link.symlink_metadata().is_err() {
            fs::create_dir_all(link.parent().context("a link at the root")?)?;
            symlink(target, link).with_context(|| format!("linking {}", link.display()))?;
        }
    }
    if !job.modules.is_empty() {
        let loaded = Command::new("modprobe").arg("-a").args(&job.modules).stdin(Stdio::null()).status();
        // One that is not there is missed by the test that needs it, which says so.
        println!("vm: modprobe {}: {loaded:?}", job.modules.join(" "));
    }
    let (program, arguments) = job.command.split_first().context("a job without a program")?;
    let child = Command::new(program)
        .args(arguments)
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", "/root")
        .envs(&job.env)
        .current_dir(&job.directory)
        .process_group(0)
        .stdin(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    let pid = Pid::from_raw(child.id().cast_signed());
    let end = Instant::now() + Duration::from_secs(job.seconds);
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG))? {
            WaitStatus::StillAlive if Instant::now() > end => {
                killpg(pid, Signal::SIGKILL).ok();
                anyhow::bail!("not done after {} s", job.seconds);
            }
            WaitStatus::StillAlive => std::thread::sleep(Duration::from_millis(10)),
            status if status.pid() == Some(pid) => return Ok(status),
            _ => {}
        }
    }
}

fn tell(results: &mut fs::File, line: &Line) -> Result<()> {
    let mut text = serde_json::to_string(line)?;
    text.push('\n');
    results.write_all(text.as_bytes()).context("writing a result")
}

/// Ends the machine; what the console and the result line were given has been sent by then.
pub(crate) fn power_off() -> Result<()> {
    for line in ["/dev/ttyS0", RESULTS] {
        if let Ok(line) = fs::File::open(line) {
            nix::sys::termios::tcdrain(&line).ok();
        }
    }
    let tool = if Path::new(BUSYBOX).is_file() { BUSYBOX } else { "poweroff" };
    let arguments: &[&str] = if tool == BUSYBOX { &["poweroff", "-f"] } else { &["-f"] };
    let status = Command::new(tool).args(arguments).status()?;
    anyhow::ensure!(status.success(), "{tool}: {status}");
    // The machine goes away under us.
    std::thread::sleep(Duration::from_secs(30));
    Ok(())
}

fn mount_fs(kind: &str, target: &str, data: Option<&str>) -> Result<()> {
    mount(Some(kind), target, Some(kind), MsFlags::empty(), data)
        .with_context(|| format!("mounting {kind} on {target}"))
}

fn busybox(arguments: &[&str]) -> Result<()> {
    let output = Command::new(BUSYBOX).args(arguments).output().context("starting busybox")?;
    anyhow::ensure!(
        output.status.success(),
        "busybox {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

fn wait_for(device: &Path) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(30);
    while !device.exists() {
        anyhow::ensure!(Instant::now() < end, "{} does not appear", device.display());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_are_read_back_and_the_end_is_noticed() {
        let good = Outcome {
            name: "a".into(),
            status: Some(0),
            seconds: 1.0,
            problem: None,
            files: BTreeMap::from([(PathBuf::from("/x.xml"), "<x/>\n".to_owned())]),
        };
        let line = serde_json::to_string(&Line::Outcome(good)).unwrap();
        let (found, complete) = read_outcomes(&format!("{line}\r\n{{\"end\":true}}\r\n")).unwrap();
        assert!(complete && found.len() == 1 && found[0].passed());
        assert_eq!(found[0].files[Path::new("/x.xml")], "<x/>\n");
        let (found, complete) = read_outcomes(&line).unwrap();
        assert!(!complete && found.len() == 1, "a guest that died midway is told from one that ended");
        let (found, complete) = read_outcomes(&format!("{line}\n{{\"name\":")).unwrap();
        assert!(!complete && found.len() == 1, "half a line is no outcome");
        assert!(read_outcomes("{\"name\":\n").is_err());
    }
}
