//! The C library's allocator, kept small: one arena for all threads, and memory given back after bursts of work.
#![allow(unsafe_code, reason = "functions of the C library's allocator, and advice to the kernel")]

use std::{fs, io, ops::Range, time::Duration};

use tokio_util::sync::CancellationToken;

/// What is larger has a mapping of its own, which is gone when it is freed: pages of a listing, the kernel's types. Left
/// to itself the library raises this with the largest block it has seen freed, and keeps as much as that.
const OWN_MAPPING: libc::c_int = 128 * 1024;

/// Between two looks at what the agent occupies; the kernel tells nobody when that grows.
const LOOK: Duration = Duration::from_secs(10);
/// Pages of its own more than after the last time that memory was given back, from which on it is given back again: a burst of
/// pods leaves many times as much.
const GROWTH: u64 = 3 * 1024 * 1024 / PAGE;
/// The same of pages that hold the program. What goes on all the time needs less; the kernel maps sixteen pages for each that is
/// touched, so a little work here and there has most of a large program in memory before long.
const PROGRAM_GROWTH: u64 = 6 * 1024 * 1024 / PAGE;
const PAGE: u64 = 4096;

/// Gives memory back after bursts of work, until `cancel`.
pub async fn keep_small(cancel: CancellationToken) {
    let mut floor = Pages { own: u64::MAX, file: 0 };
    loop {
        // Cancel-safe: nothing is under way between two looks.
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(LOOK) => {}
        }
        let Some(now) = Pages::now() else { continue };
        if !now.have_grown(floor) {
            floor = Pages { own: floor.own.min(now.own), file: floor.file.min(now.file) };
            continue;
        }
        // Reads the list of mappings, and may wait for the allocator.
        if let Err(error) = tokio::task::spawn_blocking(trim).await {
            tracing::debug!(%error, "memory is not given back");
        }
        floor = Pages::now().unwrap_or(now);
    }
}

/// What the agent occupies, in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pages {
    /// That hold something of its own.
    own: u64,
    /// That hold a file: the program, above all.
    file: u64,
}

impl Pages {
    /// From proc_pid_statm(5): resident and shared.
    fn now() -> Option<Self> {
        let text = fs::read_to_string("/proc/self/statm").ok()?;
        let mut fields = text.split_ascii_whitespace().skip(1).map(|field| field.parse::<u64>().ok());
        let (resident, file) = (fields.next()??, fields.next()??);
        Some(Self { own: resident.saturating_sub(file), file })
    }

    fn have_grown(self, floor: Self) -> bool {
        self.own > floor.own.saturating_add(GROWTH) || self.file > floor.file.saturating_add(PROGRAM_GROWTH)
    }
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
        let before = Pages::now().unwrap();
        let block = vec![1_u8; 64 << 20];
        let grown = Pages::now().unwrap();
        assert!(
            grown.own >= before.own + (32 << 20) / PAGE,
            "{before:?}, then {grown:?}, {} bytes",
            block.len()
        );
        assert!(grown.have_grown(before) && !before.have_grown(before) && grown.file > 0);
        let loaded = Pages { file: before.file + (8 << 20) / PAGE, ..before };
        assert!(loaded.have_grown(before));
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
