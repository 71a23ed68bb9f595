//! One run of a virtual machine: boot, watch the console for a crash, collect results from a second serial line.
//!
//! QEMU's own processor (TCG) is used, since the development machine lends no KVM; KVM is used where it works. It runs at
//! a low priority, for one command at a time on a machine, and ends with us however we end.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::guest::Outcome;

/// What the kernel prints when nothing good can follow.
const CRASHES: &[&str] =
    &["Kernel panic", "soft lockup", "BUG: unable to handle", "Out of memory: Killed process 1 "];

/// A machine before it is started.
pub(super) struct Machine<'a> {
    /// Kernel.
    pub(super) kernel: &'a Path,
    /// Its first file system.
    pub(super) initramfs: &'a Path,
    /// Kernel command line, beside what every machine gets.
    pub(super) command_line: &'a str,
    /// Disks, as /dev/vda and so on; nothing that is written to them is kept.
    pub(super) disks: &'a [PathBuf],
    /// Memory in MiB.
    pub(super) memory: u32,
    /// When it must have ended.
    pub(super) deadline: Duration,
    /// Where the console and the results are left.
    pub(super) output: &'a Path,
}

/// What came of a run.
pub(super) struct Run {
    /// The jobs that ended.
    pub(super) outcomes: Vec<Outcome>,
    /// Why there are not all of them.
    pub(super) problem: Option<String>,
    /// From boot to power-off.
    pub(super) took: Duration,
}

/// A started QEMU, ended when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended already in the good case.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

impl Machine<'_> {
    /// Boots it and waits for its end. The guest's console goes to a file, its last lines into the problem.
    pub(super) fn run(&self) -> Result<Run> {
        fs::create_dir_all(self.output).with_context(|| format!("creating {}", self.output.display()))?;
        let (console, results) = (self.output.join("console.log"), self.output.join("results.jsonl"));
        for file in [&console, &results] {
            fs::write(file, "").with_context(|| format!("emptying {}", file.display()))?;
        }
        let mut machine = Running(self.start(&console, &results)?);
        let begin = Instant::now();
        let ended = self.watch(&mut machine.0, &console);
        drop(machine);
        let (outcomes, complete) = super::guest::read_outcomes(&fs::read_to_string(&results)?)?;
        let problem = match ended {
            Err(error) => Some(format!("{error:#}")),
            Ok(()) if !complete => Some("the guest ended before its last job".to_owned()),
            Ok(()) => None,
        };
        let problem = problem.map(|problem| {
            format!("{problem}; the console's end ({}):\n{}", console.display(), tail(&console))
        });
        Ok(Run { outcomes, problem, took: begin.elapsed() })
    }

    fn start(&self, console: &Path, results: &Path) -> Result<Child> {
        let accelerator = if kvm_works() { "kvm" } else { "tcg,thread=multi" };
        let mut command = Command::new("nice");
        command
            // Killed when this process is, also without a chance to clean up.
            .args(["-n", "10", "setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64"])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", "pc"])
            .args(["-cpu", "max", "-smp", "2", "-accel", accelerator, "-m", &self.memory.to_string()])
            .args(["-device", "virtio-rng-pci"])
            .args(["-serial", &format!("file:{}", console.display())])
            .args(["-serial", &format!("file:{}", results.display())])
            .arg("-kernel")
            .arg(self.kernel)
            .arg("-initrd")
            .arg(self.initramfs)
            // Guards against other processors' faults cost an emulated one much, and guard nothing.
            .args(["-append", &format!("console=ttyS0 panic=-1 mitigations=off {}", self.command_line)]);
        for disk in self.disks {
            let drive = format!("file={},if=virtio,format=raw,snapshot=on", disk.display());
            command.args(["-drive", &drive]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.spawn().context("cannot start qemu-system-x86_64 (`cargo xtask setup` installs it)")
    }

    /// Until QEMU has ended, the kernel has crashed, or the time is up.
    fn watch(&self, machine: &mut Child, console: &Path) -> Result<()> {
        let end = Instant::now() + self.deadline;
        let mut reader = fs::File::open(console)?;
        let mut seen = String::new();
        loop {
            let ended = machine.try_wait()?;
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes)?;
            seen.push_str(&String::from_utf8_lossy(&bytes));
            if let Some(crash) = CRASHES.iter().find(|crash| seen.contains(**crash)) {
                bail!("the guest's kernel crashed: {crash}");
            }
            // Only the last line can still grow into a crash's message.
            seen = seen.rsplit('\n').next().unwrap_or_default().to_owned();
            match ended {
                Some(status) if status.success() => return Ok(()),
                Some(status) => bail!("QEMU failed: {status}"),
                None if Instant::now() > end => bail!("not done after {} s", self.deadline.as_secs()),
                None => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }
}

/// Opening the device is not enough: where virtualisation is not lent, making a machine fails.
fn kvm_works() -> bool {
    std::env::var_os("KEELSON_VM_KVM").is_some()
}

/// The end of a log.
fn tail(file: &Path) -> String {
    const LENGTH: u64 = 6000;
    let read = || -> std::io::Result<String> {
        let mut file = fs::File::open(file)?;
        let size = file.metadata()?.len();
        file.seek(SeekFrom::Start(size.saturating_sub(LENGTH)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    read().unwrap_or_else(|error| error.to_string())
}
