//! Figures of a container's processes.

/// What the processes of a container hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessUsage {
    /// Open file descriptors.
    pub file_descriptors: u64,
    /// Those that are sockets.
    pub sockets: u64,
    /// Processes.
    pub processes: u64,
    /// How many files the first process may open; nothing when unlimited or not known.
    pub max_open_files: Option<u64>,
}

/// The soft limit of open files from `/proc/<pid>/limits`.
pub fn soft_open_files(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_is_the_first_number() {
        let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
            Max open files            1024                 4096                 files     \n";
        assert_eq!(soft_open_files(text), Some(1024));
        assert_eq!(soft_open_files("Max open files unlimited unlimited files"), None);
    }
}
