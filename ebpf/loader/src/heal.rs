//! Connected datagram sockets whose backend is gone: each is connected again, in place, to what its program dialled.
//!
//! The kernel runs no hook when a program sends on a connected socket, so such a socket would talk to a dead address
//! until its program gives up. Here its descriptor is borrowed from the process that has it and connected to the
//! service again: the connect hook, which belongs to the socket's own cgroup, picks a live backend. The socket, its
//! local port and what it has received stay; the program notices nothing. Sockets that were connected to the endpoint
//! itself, not to a service, are left alone.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
};

use nix::sys::socket::{SockaddrStorage, connect, getpeername};

use crate::sys;

/// State of a connected socket in `/proc/net/udp`.
const CONNECTED: &str = "01";

/// What became of the sockets that were found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Healed {
    /// Connected to a live backend.
    pub healed: usize,
    /// Their service has no backend now; they keep the dead one.
    pub waiting: usize,
    /// Could not be reached, or have ended meanwhile.
    pub failed: usize,
}

/// Connects every datagram socket that still talks to one of these endpoints through a service again. Reads `/proc`:
/// call it where blocking is allowed.
pub fn reconnect_datagrams(gone: &BTreeSet<SocketAddr>) -> Healed {
    let mut outcome = Healed::default();
    for processes in processes_by_netns().into_values() {
        let Some(inodes) = processes.iter().find_map(|pid| connected_to(*pid, gone)) else {
            continue;
        };
        if inodes.is_empty() {
            continue;
        }
        for (pid, fd, inode) in descriptors(&processes, &inodes) {
            match reconnect(pid, fd, inode, gone) {
                Ok(true) => outcome.healed += 1,
                Ok(false) => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => outcome.waiting += 1,
                Err(error) => {
                    tracing::debug!(pid, fd, %error, "cannot reconnect a datagram socket");
                    outcome.failed += 1;
                }
            }
        }
    }
    outcome
}

/// Processes by the inode of their network namespace. Those that end meanwhile are left out.
fn processes_by_netns() -> BTreeMap<u64, Vec<i32>> {
    let mut found: BTreeMap<u64, Vec<i32>> = BTreeMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // Threads can live in other namespaces than their process; one of each is enough.
        let mut seen = BTreeSet::new();
        for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            if let Ok(netns) = fs::metadata(task.path().join("ns/net"))
                && seen.insert(netns.ino())
                && let Some(tid) = task.file_name().to_str().and_then(|name| name.parse().ok())
            {
                found.entry(netns.ino()).or_default().push(tid);
            }
        }
    }
    found
}

/// Inodes of the sockets in a task's network namespace that are connected to one of these; nothing if the task is
/// gone.
fn connected_to(tid: i32, gone: &BTreeSet<SocketAddr>) -> Option<BTreeSet<u64>> {
    let v4 = fs::read_to_string(format!("/proc/{tid}/net/udp")).ok()?;
    // A kernel without IPv6 has no second table.
    let v6 = fs::read_to_string(format!("/proc/{tid}/net/udp6")).unwrap_or_default();
    Some(v4.lines().chain(v6.lines()).filter_map(|line| connected_row(line, gone)).collect())
}

fn connected_row(line: &str, gone: &BTreeSet<SocketAddr>) -> Option<u64> {
    let mut fields = line.split_whitespace().skip(2);
    let remote = fields.next()?;
    if fields.next()? != CONNECTED || !gone.contains(&parse_address(remote)?) {
        return None;
    }
    fields.nth(5)?.parse().ok()
}

/// `0100007F:0035`, or the same with four words: each word is written as the machine's own integer.
fn parse_address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let words: Option<Vec<[u8; 4]>> = (0..address.len() / 8)
        .map(|n| Some(u32::from_str_radix(address.get(n * 8..n * 8 + 8)?, 16).ok()?.to_ne_bytes()))
        .collect();
    let ip = match words?.as_slice() {
        [v4] => IpAddr::V4(Ipv4Addr::from(*v4)),
        [a, b, c, d] => {
            let octets = [*a, *b, *c, *d].concat();
            Ipv6Addr::from(<[u8; 16]>::try_from(octets).ok()?).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

/// Who has these sockets open: one task and descriptor for each socket.
fn descriptors(tasks: &[i32], inodes: &BTreeSet<u64>) -> Vec<(i32, i32, u64)> {
    let mut found = BTreeMap::new();
    for task in tasks {
        for entry in fs::read_dir(format!("/proc/{task}/fd")).into_iter().flatten().flatten() {
            if let Some(inode) =
                fs::read_link(entry.path()).ok().and_then(|link| socket_inode(&link.to_string_lossy()))
                && inodes.contains(&inode)
                && let Some(fd) = entry.file_name().to_str().and_then(|name| name.parse().ok())
            {
                found.entry(inode).or_insert((*task, fd));
            }
        }
    }
    found.into_iter().map(|(inode, (task, fd))| (task, fd, inode)).collect()
}

fn socket_inode(link: &str) -> Option<u64> {
    link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// Borrows the socket and connects it to the address that its program dialled, which the getpeername hook tells; false
/// where that is the endpoint's own, or the descriptor is another socket by now.
fn reconnect(task: i32, fd: i32, inode: u64, gone: &BTreeSet<SocketAddr>) -> io::Result<bool> {
    let socket = borrow(task, fd)?;
    if fstat_inode(&socket)? != inode {
        return Ok(false);
    }
    let dialled: SockaddrStorage = getpeername(socket.as_raw_fd())?;
    if as_socket_address(&dialled).is_none_or(|dialled| gone.contains(&dialled)) {
        return Ok(false);
    }
    connect(socket.as_raw_fd(), &dialled)?;
    Ok(true)
}

/// A copy of the descriptor. The task may be any thread of the process; the kernel wants the process.
fn borrow(task: i32, fd: i32) -> io::Result<OwnedFd> {
    let status = fs::read_to_string(format!("/proc/{task}/status"))?;
    let process = status.lines().find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok());
    let pidfd = sys::pidfd_open(process.unwrap_or(task))?;
    sys::pidfd_getfd(pidfd.as_fd(), fd)
}

fn fstat_inode(socket: &OwnedFd) -> io::Result<u64> {
    Ok(nix::sys::stat::fstat(socket)?.st_ino)
}

fn as_socket_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(SocketAddr::new(IpAddr::V4(v4.ip()), v4.port()));
    }
    let v6 = address.as_sockaddr_in6()?;
    Some(SocketAddr::new(v6.ip().to_canonical(), v6.port()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_the_kernels_tables_are_read() {
        let gone = BTreeSet::from(["10.244.0.1:53".parse().unwrap(), "[fd00::1]:53".parse().unwrap()]);
        let header = "   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops";
        let row = |remote: &str, state: &str| {
            format!(
                "  12: 0100007F:9C40 {remote} {state} 00000000:00000000 00:00000000 00000000     0        0 4711 2 0000000000000000 0"
            )
        };
        let v4 = format!("{:08X}:0035", u32::from_ne_bytes([10, 244, 0, 1]));
        let words = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1).octets();
        let v6: Vec<String> = words
            .chunks(4)
            .map(|word| format!("{:08X}", u32::from_ne_bytes([word[0], word[1], word[2], word[3]])))
            .collect();
        let v6 = v6.concat();
        assert_eq!(connected_row(header, &gone), None);
        assert_eq!(connected_row(&row(&v4, "01"), &gone), Some(4711));
        assert_eq!(connected_row(&row(&format!("{v6}:0035"), "01"), &gone), Some(4711));
        assert_eq!(connected_row(&row(&v4, "07"), &gone), None, "not connected");
        assert_eq!(connected_row(&row("0100007F:0035", "01"), &gone), None);
        let mapped = format!("0000000000000000{:08X}{}", 0xffff_u32.to_be(), v4);
        assert_eq!(connected_row(&row(&mapped, "01"), &gone), Some(4711), "an IPv4 peer of an IPv6 socket");
    }
}
