//! Which process listens on a TCP port, read from `/proc`; for the message when a port is taken.

use std::{fs, path::Path};

/// State number of a listening socket in `/proc/net/tcp`.
const LISTEN: &str = "0A";

/// The process that listens on the port, as `name (pid N)`, where it can be found.
pub(crate) fn find(port: u16) -> Option<String> {
    let inodes: Vec<String> = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .flat_map(|table| listening_inodes(&table, port))
        .collect();
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let held = holds(&entry.path(), &inodes);
        let name = fs::read_to_string(entry.path().join("comm")).ok()?;
        held.then(|| format!("{} (pid {pid})", name.trim()))
    })
}

fn listening_inodes(table: &str, port: u16) -> Vec<String> {
    let suffix = format!(":{port:04X}");
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let listens = fields.get(1)?.ends_with(&suffix) && *fields.get(3)? == LISTEN;
            listens.then(|| format!("socket:[{}]", fields.get(9).unwrap_or(&"")))
        })
        .collect()
}

fn holds(process: &Path, inodes: &[String]) -> bool {
    let Ok(files) = fs::read_dir(process.join("fd")) else { return false };
    files.flatten().any(|file| {
        fs::read_link(file.path()).is_ok_and(|target| {
            target.to_str().is_some_and(|target| inodes.iter().any(|inode| inode == target))
        })
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn our_own_listener_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let holder = super::find(listener.local_addr().unwrap().port()).unwrap();
        assert!(holder.contains(&format!("(pid {})", std::process::id())), "{holder}");
    }
}
