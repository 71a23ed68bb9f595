//! A network namespace, a child cgroup and a pin directory, made for one test and removed with it.
//!
//! The calling thread moves into the namespace and the whole process into the cgroup, so every socket that the test
//! makes afterwards, on this thread or threads it starts, is one of the clients. Never touches the machine's own
//! interfaces, and attaches to its own cgroup only.

#![allow(unsafe_code, reason = "a child that ends with its parent is told so between fork and exec")]

use std::{
    fs,
    net::IpAddr,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use anyhow::{Context, Result, bail, ensure};
use ebpf_loader::{Capacity, Config, DataPlane};
use nix::sched::{CloneFlags, unshare};

/// A process has one cgroup, so arenas of one process take turns.
static TURN: Mutex<()> = Mutex::new(());
/// Where every arena has its pin directory.
const PINS: &str = "/sys/fs/bpf/keelson";
static SERIAL: AtomicU32 = AtomicU32::new(0);

/// The cgroups of threads that are served, and of those that are not.
const SERVED: &str = "served";
const STRANGERS: &str = "strangers";

/// The place of one test.
pub struct Arena {
    /// Pin directory.
    pub pin_dir: PathBuf,
    /// The cgroup whose processes are served.
    pub cgroup: PathBuf,
    home: PathBuf,
    /// What holds [`Self::cgroup`] and the cgroup beside it, where there is one.
    domain: Option<PathBuf>,
    _turn: MutexGuard<'static, ()>,
}

impl Arena {
    /// Makes one whose loopback device carries the given addresses beside 127.0.0.1.
    pub fn enter(addresses: &[IpAddr]) -> Result<Self> {
        ensure!(nix::unistd::geteuid().is_root(), "this test needs root: namespaces, cgroups and BPF");
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let name = format!("keelson-test-{}-{}", std::process::id(), SERIAL.fetch_add(1, Ordering::Relaxed));
        let root = cgroup2_root()?;
        sweep(&root);
        let home = root.join(own_cgroup()?.trim_start_matches('/'));
        let arena = Self {
            pin_dir: Path::new(PINS).join(&name),
            cgroup: root.join(&name),
            home,
            domain: None,
            _turn: turn,
        };
        unshare(CloneFlags::CLONE_NEWNET).context("unshare the network namespace")?;
        ip(&["link", "set", "lo", "up"])?;
        for address in addresses {
            crate::places::add("lo", &address.to_string())?;
        }
        fs::create_dir(&arena.cgroup).with_context(|| format!("create cgroup {}", arena.cgroup.display()))?;
        move_process(&arena.cgroup)?;
        Ok(arena)
    }

    /// One in which threads of this process can be clients that no socket hook sees, as other machines' are:
    /// [`Self::step_out`].
    pub fn with_strangers() -> Result<Self> {
        let mut arena = Self::enter(&[])?;
        let domain = arena.cgroup.clone();
        arena.domain = Some(domain.clone());
        for name in [SERVED, STRANGERS] {
            fs::create_dir(domain.join(name))?;
            fs::write(domain.join(name).join("cgroup.type"), "threaded")
                .with_context(|| format!("make threads of {} cgroups of their own", domain.display()))?;
        }
        arena.cgroup = domain.join(SERVED);
        move_process(&arena.cgroup)?;
        Ok(arena)
    }

    /// What a thread calls that shall be no client of the socket hooks any more.
    pub fn step_out(&self) -> impl Fn() -> Result<()> + Send + 'static {
        let cgroup = self.domain.clone().unwrap_or_default().join(STRANGERS);
        move || fs::write(cgroup.join("cgroup.threads"), "0").context("leave the served cgroup")
    }

    /// Configuration of a data plane here, sized for tests.
    pub fn config(&self) -> Config {
        let capacity = Capacity { frontends: 16_384, services: 8192, backends: 32_768, extent_words: 65_536 };
        Config { pin_dir: self.pin_dir.clone(), cgroup_dir: self.cgroup.clone(), capacity }
    }

    /// A data plane here.
    pub fn open(&self) -> Result<DataPlane> {
        Ok(DataPlane::open(self.config())?)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // Each step is tried whatever became of the others; what fails is shown by the machine's own state.
        drop(ebpf_loader::unload(&self.pin_dir));
        drop(move_process(&self.home));
        if let Some(domain) = &self.domain {
            for dir in [domain.join(SERVED), domain.join(STRANGERS), domain.clone()] {
                drop(fs::remove_dir(dir));
            }
            return;
        }
        drop(fs::remove_dir(&self.cgroup));
    }
}

/// Removes what a process left that was killed: its cgroups, and its pins.
fn sweep(root: &Path) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix("keelson-test-").and_then(|rest| rest.split('-').next());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // Whoever still lives there keeps the cgroup.
            drop(ebpf_loader::unload(&Path::new(PINS).join(&name)));
            drop(fs::remove_dir(entry.path()));
        }
    }
}

/// Whether the kernel has TCX (Linux 6.6); without it all packets of pods take bridge and stack.
pub fn has_tcx() -> Result<bool> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("the kernel's version")?;
    let mut numbers = release.split(['.', '-']).map_while(|part| part.trim().parse::<u32>().ok());
    Ok((numbers.next(), numbers.next()) >= (Some(6), Some(6)))
}

/// Has the kernel end the child when the thread that starts it ends, however that ends.
pub fn end_with_us(command: &mut Command) -> &mut Command {
    // SAFETY: between fork and exec the closure makes one system call and touches no memory of the parent.
    unsafe {
        command.pre_exec(|| {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) == 0 {
                Ok(())
            } else {
                Err(std::io::Error::last_os_error())
            }
        })
    }
}

/// Runs iproute2.
pub fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(arguments).output().context("run ip")?;
    if !output.status.success() {
        bail!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// Where cgroup2 is mounted.
pub fn cgroup2_root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mut points = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let point = fields.next()?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(point))
    });
    points.next().context("no cgroup2 file system is mounted")
}

fn own_cgroup() -> Result<String> {
    let groups = fs::read_to_string("/proc/self/cgroup")?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::"));
    Ok(own.context("this process has no cgroup2")?.to_owned())
}

fn move_process(cgroup: &Path) -> Result<()> {
    fs::write(cgroup.join("cgroup.procs"), "0").with_context(|| format!("join cgroup {}", cgroup.display()))
}
