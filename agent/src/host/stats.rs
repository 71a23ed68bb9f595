//! The node's own figures, from `/proc` and its file systems.
//!
//! Output: [`NodeFigures`] at one moment. Used for node conditions, capacity and the kubelet API's statistics.
//! Blocking, but short: small files of the kernel and one statvfs per file system.

use std::io;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::time::Duration;

use nix::sys::statvfs::statvfs;
use nix::unistd::{SysconfVar, sysconf};

/// Figures of the node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeFigures {
    /// CPU time used since boot, all CPUs.
    pub cpu_used: Duration,
    /// Memory.
    pub memory: MemoryFigures,
    /// The file system of the kubelet's root directory.
    pub node_fs: FsFigures,
    /// Processes and threads.
    pub pids: PidFigures,
    /// The interface of the default route.
    pub network: Option<NetworkFigures>,
    /// When the node was booted, in seconds since 1970.
    pub boot_time: i64,
}

/// Memory in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryFigures {
    /// All of it.
    pub total: u64,
    /// In use, caches included.
    pub usage: u64,
    /// In use without what the kernel can drop at once.
    pub working_set: u64,
    /// Anonymous memory.
    pub rss: u64,
    /// Swap.
    pub swap: u64,
    /// … that is free.
    pub swap_free: u64,
}

impl MemoryFigures {
    /// What pods can still get, the `memory.available` signal.
    pub fn available(&self) -> u64 {
        self.total.saturating_sub(self.working_set)
    }
}

/// A file system.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FsFigures {
    /// Bytes.
    pub capacity: u64,
    /// Bytes free for users without privileges.
    pub available: u64,
    /// Bytes used.
    pub used: u64,
    /// Inodes; 0 where the file system has no fixed number.
    pub inodes: u64,
    /// Free inodes.
    pub inodes_free: u64,
}

/// Tasks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PidFigures {
    /// The kernel's limit.
    pub max: u64,
    /// Threads that exist.
    pub current: u64,
}

/// Counters of an interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NetworkFigures {
    /// Its name.
    pub name: String,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Receive errors.
    pub rx_errors: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Send errors.
    pub tx_errors: u64,
}

/// Reads everything; `root_dir` chooses the node's file system.
pub fn read(root_dir: &Path) -> io::Result<NodeFigures> {
    let stat = std::fs::read_to_string("/proc/stat")?;
    let ticks_per_second =
        sysconf(SysconfVar::CLK_TCK)?.and_then(|ticks| u64::try_from(ticks).ok()).unwrap_or(100);
    Ok(NodeFigures {
        cpu_used: cpu_used(&stat, ticks_per_second),
        memory: memory(&std::fs::read_to_string("/proc/meminfo")?),
        node_fs: file_system(root_dir)?,
        pids: pids()?,
        network: network(
            &std::fs::read_to_string("/proc/self/net/route")?,
            &std::fs::read_to_string("/proc/self/net/dev")?,
        ),
        boot_time: field(&stat, "btime").and_then(|text| text.parse().ok()).unwrap_or_default(),
    })
}

/// The file system that holds `path`, or its nearest parent that exists.
pub fn file_system(path: &Path) -> io::Result<FsFigures> {
    let existing = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let stat = statvfs(existing)?;
    let block = stat.fragment_size();
    Ok(FsFigures {
        capacity: stat.blocks().saturating_mul(block),
        available: stat.blocks_available().saturating_mul(block),
        used: stat.blocks().saturating_sub(stat.blocks_free()).saturating_mul(block),
        inodes: stat.files(),
        inodes_free: stat.files_free(),
    })
}

/// A process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ProcessFigures {
    /// CPU time since it began.
    pub cpu_used: Duration,
    /// Resident memory in bytes.
    pub rss: u64,
    /// When it began, in seconds since 1970.
    pub started: i64,
}

/// The process that listens on a Unix socket.
pub fn peer(socket: &Path) -> Option<i32> {
    use nix::sys::socket::sockopt::PeerCredentials;
    use nix::sys::socket::{
        AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, socket as open,
    };
    // A server that does not accept must not hold anybody up.
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let descriptor = open(AddressFamily::Unix, SockType::Stream, flags, None).ok()?;
    connect(descriptor.as_raw_fd(), &UnixAddr::new(socket).ok()?).ok()?;
    Some(getsockopt(&descriptor, PeerCredentials).ok()?.pid())
}

/// Figures of a process; `None` when it is gone.
pub fn process(pid: i32, boot_time: i64) -> Option<ProcessFigures> {
    let ticks = sysconf(SysconfVar::CLK_TCK).ok()?.and_then(|ticks| u64::try_from(ticks).ok()).unwrap_or(100);
    let page = sysconf(SysconfVar::PAGE_SIZE).ok()?.and_then(|page| u64::try_from(page).ok()).unwrap_or(4096);
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    process_of(&stat, ticks.max(1), page, boot_time)
}

/// Fields are counted from behind the name, which may contain anything.
fn process_of(stat: &str, ticks: u64, page: u64, boot_time: i64) -> Option<ProcessFigures> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    let used = field(14)?.saturating_add(field(15)?);
    Some(ProcessFigures {
        cpu_used: Duration::from_millis(used.saturating_mul(1000) / ticks),
        rss: field(24)?.saturating_mul(page),
        started: boot_time.saturating_add_unsigned(field(22)? / ticks),
    })
}

/// All columns but idle and iowait; guest time is inside user time.
fn cpu_used(stat: &str, ticks_per_second: u64) -> Duration {
    let columns: Vec<u64> = stat
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1)
        .take(8)
        .filter_map(|text| text.parse().ok())
        .collect();
    let busy: u64 =
        columns.iter().enumerate().filter(|(index, _)| !matches!(index, 3 | 4)).map(|(_, ticks)| ticks).sum();
    Duration::from_millis(busy.saturating_mul(1000) / ticks_per_second.max(1))
}

fn memory(meminfo: &str) -> MemoryFigures {
    let bytes = |name: &str| {
        let kilobytes =
            field(meminfo, name).and_then(|text| text.trim_end_matches(" kB").trim().parse().ok());
        kilobytes.unwrap_or(0_u64).saturating_mul(1024)
    };
    let total = bytes("MemTotal:");
    let usage = total.saturating_sub(bytes("MemFree:"));
    MemoryFigures {
        total,
        usage,
        working_set: usage.saturating_sub(bytes("Inactive(file):")),
        rss: bytes("AnonPages:"),
        swap: bytes("SwapTotal:"),
        swap_free: bytes("SwapFree:"),
    }
}

fn pids() -> io::Result<PidFigures> {
    let number = |path: &str| -> io::Result<u64> {
        std::fs::read_to_string(path)?.trim().parse().map_err(io::Error::other)
    };
    let max = number("/proc/sys/kernel/pid_max")?.min(number("/proc/sys/kernel/threads-max")?);
    let load = std::fs::read_to_string("/proc/loadavg")?;
    let current =
        load.split_whitespace().nth(3).and_then(|tasks| tasks.split_once('/')).map(|(_, all)| all.parse());
    Ok(PidFigures { max, current: current.and_then(Result::ok).unwrap_or_default() })
}

fn network(routes: &str, devices: &str) -> Option<NetworkFigures> {
    let mut routes = routes.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    let default =
        routes.find(|route| route.get(1) == Some(&"00000000") && route.get(7) == Some(&"00000000"))?;
    let name = (*default.first()?).to_owned();
    let counters = devices.lines().find_map(|line| line.trim_start().strip_prefix(&format!("{name}:")))?;
    let counters: Vec<u64> = counters.split_whitespace().filter_map(|text| text.parse().ok()).collect();
    let counter = |index: usize| counters.get(index).copied().unwrap_or_default();
    Some(NetworkFigures {
        name,
        rx_bytes: counter(0),
        rx_errors: counter(2),
        tx_bytes: counter(8),
        tx_errors: counter(10),
    })
}

/// The rest of the line that starts with `name`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_files_are_understood() {
        let stat = "cpu  100 0 50 1000 30 5 5 40 0 0\ncpu0 1 1\nbtime 1700000000\n";
        assert_eq!(cpu_used(stat, 100), Duration::from_secs(2));
        let figures = memory(
            "MemTotal: 1000 kB\nMemFree: 400 kB\nInactive(file): 100 kB\nAnonPages: 50 kB\nSwapTotal: 8 kB\nSwapFree: 6 kB\n",
        );
        assert_eq!((figures.swap, figures.swap_free), (8192, 6144));
        assert_eq!((figures.usage, figures.working_set, figures.available()), (614_400, 512_000, 512_000));
        let routes = "Iface Destination Gateway Flags RefCnt Use Metric Mask\n\
                      eth0 0000A8C0 0 1 0 0 0 00FFFFFF\neth0 00000000 0100A8C0 3 0 0 0 00000000\n";
        let devices = "h1\nh2\n  eth0: 10 1 2 0 0 0 0 0 20 1 3 0 0 0 0 0\n";
        let network = network(routes, devices).unwrap();
        assert_eq!(
            (network.rx_bytes, network.rx_errors, network.tx_bytes, network.tx_errors),
            (10, 2, 20, 3)
        );
    }

    #[test]
    fn a_process_is_read_whatever_its_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 0 0 0 0 0 150 50 0 0 20 0 1 0 1000 9 25 0";
        let figures = process_of(stat, 100, 4096, 50).unwrap();
        assert_eq!(figures, ProcessFigures { cpu_used: Duration::from_secs(2), rss: 25 * 4096, started: 60 });
        assert!(process(i32::try_from(std::process::id()).unwrap(), 0).is_some_and(|own| own.rss > 0));
        assert_eq!(process(-1, 0), None);
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        assert_eq!(peer(&socket), None);
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert_eq!(peer(&socket), i32::try_from(std::process::id()).ok());
    }

    #[test]
    fn this_machine_has_figures() {
        let figures = read(Path::new("/nonexistent/dir")).unwrap();
        assert!(figures.memory.total > 0 && figures.node_fs.capacity > 0 && figures.pids.max > 0);
        assert!(figures.boot_time > 1_500_000_000 && figures.cpu_used > Duration::ZERO);
    }
}
