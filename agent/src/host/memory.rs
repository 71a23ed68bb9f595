//! The C library's allocator, kept small: one arena for all threads, and memory given back after bursts of work.
#![allow(unsafe_code, reason = "functions of the C library's allocator, and advice to the kernel")]

use std::{fs, io, ops::Range, time::Duration};

use tokio_util::sync::CancellationToken;

/// What is larger has a mapping of its own, which is gone when it is freed: pages of a listing, the kernel's types. Left
/// to itself the library raises this with the largest block it has seen freed, and keeps as much as that.
const OWN_MAPPING: libc::c_int = 128 * 1024;

/// Between two looks at what the agent occupies; the kernel tells nobody when that grows.
const LOOK: Duration = Duration::from_secs(10);
/// Pages more than after the last time that memory was given back, from which on it is given back again: a burst of pods leaves
/// many times as much.
const GROWTH: u64 = 3 * 1024 * 1024 / PAGE;
const PAGE: u64 = 4096;

/// Gives memory back after bursts of work, until `cancel`.
pub async fn keep_small(cancel: CancellationToken) {
    let mut floor = own_pages().unwrap_or(u64::MAX);
    loop {
        // Cancel-safe: nothing is under way between two looks.
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(LOOK) => {}
        }
        let Some(now) = own_pages() else { continue };
        if now <= floor.saturating_add(GROWTH) {
            floor = floor.min(now);
            continue;
        }
        // Reads the list of mappings, and may wait for the allocator.
        if let Err(error) = tokio::task::spawn_blocking(trim).await {
            tracing::debug!(%error, "memory is not given back");
        }
        floor = own_pages().unwrap_or(now);
    }
}

/// Pages that hold something of the agent's own, not of files (proc_pid_statm(5): resident less shared).
fn own_pages() -> Option<u64> {
    let text = fs::read_to_string("/proc/self/statm").ok()?;
    let mut fields = text.split_ascii_whitespace().skip(1).map(|field| field.parse::<u64>().ok());
    let (resident, shared) = (fields.next()??, fields.next()??);
    Some(resident.saturating_sub(shared))
}

/// Uses one arena for all threads, and keeps no large blocks. To be called before there are other threads.
pub fn economize() {
    for (option, value) in
        [(libc::M_ARENA_MAX, 1), (libc::M_MMAP_THRESHOLD, OWN_MAPPING), (libc::M_TRIM_THRESHOLD, OWN_MAPPING)]
    {
        // SAFETY: mallopt takes two numbers and may be called at any time; no other thread allocates yet.
        unsafe { libc::mallopt(option, value) };
    }
}

/// Gives memory back to the kernel after a burst of work, such as a listing of many objects that was read and forgotten:
/// what is free, and the pages of the program that the work used. Those that are used again come back from the cache.
pub fn trim() {
    // SAFETY: malloc_trim takes a number, locks the allocator itself and touches only memory that is free.
    unsafe { libc::malloc_trim(0) };
    if let Err(error) = let_go_of_program() {
        tracing::debug!(%error, "the program's pages stay");
    }
}

/// Unmaps the pages of the program's file that hold nothing but what the file holds.
fn let_go_of_program() -> io::Result<()> {
    let program = fs::read_link("/proc/self/exe")?;
    let smaps = fs::read_to_string("/proc/self/smaps")?;
    for range in unchanged(&smaps, &program.to_string_lossy()) {
        let start = std::ptr::with_exposed_provenance_mut(range.start);
        // SAFETY: the kernel has just told that no page of this mapping was ever changed, and it is not writable: what is
        // unmapped is read from the file again as soon as it is touched, with the same bytes.
        if unsafe { libc::madvise(start, range.len(), libc::MADV_DONTNEED) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// The mappings of a file that are not writable and in which no page was ever changed.
fn unchanged(smaps: &str, file: &str) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut candidate: Option<Range<usize>> = None;
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (first, second) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        if let Some((start, end)) = first.split_once('-').filter(|_| !first.ends_with(':')) {
            let address = |text| usize::from_str_radix(text, 16).ok();
            let whole = address(start).zip(address(end)).map(|(start, end)| start..end);
            candidate = whole.filter(|_| line.ends_with(file) && !second.contains('w'));
        } else if first == "Anonymous:" && second != "0" {
            candidate = None;
        } else if first == "Swap:" && second == "0" {
            // Comes after it: pages that were changed and are swapped out count there only.
            found.extend(candidate.take());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_pages_are_counted() {
        let before = own_pages().unwrap();
        let block = vec![1_u8; 64 << 20];
        let grown = own_pages().unwrap();
        assert!(grown >= before + (32 << 20) / PAGE, "{before}, then {grown} with {} bytes", block.len());
    }

    #[test]
    fn only_what_is_as_in_the_file_is_let_go() {
        let smaps = "1000-3000 r--p 00000000 fe:01 1   /usr/bin/agent\nSize: 8 kB\nAnonymous:             0 kB\n\
                     Swap: 0 kB\n\
                     3000-5000 r-xp 00002000 fe:01 1   /usr/bin/agent\nAnonymous:             0 kB\nSwap: 0 kB\n\
                     VmFlags: rd ex\n\
                     5000-6000 r--p 00004000 fe:01 1   /usr/bin/agent\nAnonymous:             4 kB\nSwap: 0 kB\n\
                     6000-7000 r--p 00004000 fe:01 1   /usr/bin/agent\nAnonymous:             0 kB\nSwap: 4 kB\n\
                     7000-8000 rw-p 00005000 fe:01 1   /usr/bin/agent\nAnonymous:             0 kB\nSwap: 0 kB\n\
                     8000-9000 r-xp 00000000 fe:01 2   /usr/lib/libc.so.6\nAnonymous:             0 kB\nSwap: 0 kB\n";
        assert_eq!(unchanged(smaps, "/usr/bin/agent"), [0x1000..0x3000, 0x3000..0x5000]);
    }

    #[test]
    fn a_program_goes_on_without_its_pages() {
        trim();
        assert_eq!("still here".len(), 10);
    }
}
