//! Finds processes of the node that listen on a port which a Service wants as its NodePort.
//!
//! Such a process keeps its clients from outside the node, while local clients reach the Service: nothing breaks, but
//! somebody should know. Reads `/proc` only.

use std::{collections::BTreeMap, fs, path::Path};

use ebpf_common::Protocol;

/// State numbers of `/proc/net/*`: a TCP listener, and a UDP socket without a peer.
const TCP_LISTEN: &str = "0A";
const UDP_UNCONNECTED: &str = "07";

/// Who holds a port: a process's name and pid where it can be found, else the kernel's word for it.
pub(super) type Holders = BTreeMap<u16, String>;

/// Which of these ports are held by sockets of this network namespace.
pub(super) fn holders(protocol: Protocol, ports: &[u16]) -> Holders {
    let tables: [&str; 2] = match protocol {
        Protocol::Tcp => ["/proc/self/net/tcp", "/proc/self/net/tcp6"],
        Protocol::Udp => ["/proc/self/net/udp", "/proc/self/net/udp6"],
        // The kernel's list of SCTP listeners looks otherwise; nobody is named.
        Protocol::Sctp => return BTreeMap::new(),
    };
    let mut found = Holders::new();
    for table in tables {
        // A machine without IPv6 has no second table.
        let text = fs::read_to_string(table).unwrap_or_default();
        for (port, inode) in listeners(&text, protocol) {
            if ports.contains(&port) && !found.contains_key(&port) {
                let holder = process_of(&inode).unwrap_or_else(|| format!("socket {inode}"));
                found.insert(port, holder);
            }
        }
    }
    found
}

/// Port and socket inode of every listener in a table of `/proc/net`.
fn listeners(table: &str, protocol: Protocol) -> Vec<(u16, String)> {
    let wanted = if protocol == Protocol::Tcp { TCP_LISTEN } else { UDP_UNCONNECTED };
    let rows = table.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (_, port) = fields.get(1)?.rsplit_once(':')?;
        let port = u16::from_str_radix(port, 16).ok()?;
        (*fields.get(3)? == wanted).then(|| Some((port, (*fields.get(9)?).to_owned())))?
    });
    rows.collect()
}

/// Name and pid of a process that has the socket open.
fn process_of(inode: &str) -> Option<String> {
    let link = format!("socket:[{inode}]");
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let numbered = processes.filter(|entry| entry.file_name().to_string_lossy().parse::<u32>().is_ok());
    let holder = numbered.map(|entry| entry.path()).find(|process| has_open(process, &link))?;
    let name = fs::read_to_string(holder.join("comm")).unwrap_or_default();
    Some(format!("{} (pid {})", name.trim(), holder.file_name()?.to_string_lossy()))
}

fn has_open(process: &Path, link: &str) -> bool {
    let Ok(descriptors) = fs::read_dir(process.join("fd")) else {
        return false;
    };
    descriptors.flatten().any(|fd| fs::read_link(fd.path()).is_ok_and(|target| target.as_os_str() == link))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_of_this_process_is_found_by_name() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let found = holders(Protocol::Tcp, &[port]);
        assert!(found[&port].contains(&format!("pid {}", std::process::id())), "{found:?}");
        drop(listener);
        assert!(holders(Protocol::Tcp, &[port]).is_empty());
    }
}
