//! What programming many services occupies: the kernel's maps, and the process that writes them.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use serde::Serialize;

/// Bytes by holder.
#[derive(Clone, Debug, Serialize)]
pub struct Memory {
    /// All maps in the kernel.
    pub maps: u64,
    /// Each map, the largest first.
    pub each_map: Vec<(String, u64)>,
    /// The process's own share of memory (PSS), without the maps that it has mapped: the kernel's figure holds them.
    pub process: u64,
    /// The most that the process ever had resident.
    pub process_peak: u64,
}

impl Memory {
    /// Of the maps below a pin directory and of a process.
    pub fn of(pin_dir: &Path, pid: u32) -> Result<Self> {
        let mut each_map = ebpf_loader::map_memory(pin_dir).context("read the maps' memory")?;
        each_map.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).context("read the process's memory")?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let peak = status.lines().find_map(|line| kib(line, "VmHWM:")).unwrap_or_default();
        Ok(Self {
            maps: each_map.iter().map(|(_, bytes)| bytes).sum(),
            each_map,
            process: own_pss(&smaps),
            process_peak: peak,
        })
    }

    /// Maps and process together.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.maps + self.process
    }
}

/// The share of all mappings that are no BPF maps.
fn own_pss(smaps: &str) -> u64 {
    let (mut sum, mut counted) = (0, true);
    for line in smaps.lines() {
        let first = line.split(' ').next().unwrap_or_default();
        if first.contains('-') && !first.ends_with(':') {
            counted = !line.ends_with("bpf-map");
        } else if counted {
            sum += kib(line, "Pss:").unwrap_or_default();
        }
    }
    sum
}

/// `Name:   123 kB` in bytes.
fn kib(line: &str, name: &str) -> Option<u64> {
    let figure = line.strip_prefix(name)?.trim().strip_suffix(" kB")?;
    Some(figure.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_maps_are_not_counted_twice() {
        let smaps = "55d0-55e0 r-xp 00000000 fe:01 1 /usr/bin/agent\nSize: 64 kB\nPss: 12 kB\nPss_Dirty: 3 kB\n\
                     7f00-7f10 rw-s 00000000 00:0f 2 anon_inode:bpf-map\nPss: 4096 kB\n\
                     7f20-7f30 rw-p 00000000 00:00 0\nPss: 8 kB\nVmFlags: rd wr\n";
        assert_eq!(own_pss(smaps), 20 * 1024);
    }
}
