//! Memory, kept small: the C library's allocator with one arena, memory given back after work, an idle program's pages.

/// Uses one arena for all threads and gives back what is freed at the top. To be called before threads are made.
pub fn economize() {
    // SAFETY: mallopt takes two numbers and may be called at any time; no other thread allocates yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 64 << 10);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 << 10);
    }
}

/// Gives memory that is free back to the kernel.
pub fn trim() {
    // SAFETY: malloc_trim takes a number, locks the allocator itself and touches only memory that is free.
    unsafe { libc::malloc_trim(0) };
}

/// The parts of this program's file that are mapped and never written to.
#[derive(Debug, Default)]
pub struct Program(Vec<(usize, usize)>);

impl Program {
    /// Looks them up; nothing is found where the kernel shows no maps.
    pub fn find() -> Self {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        Self(unwritten(&maps, Self::find as *const () as usize))
    }

    /// Lets go of their pages, which the kernel maps again from its cache when they are needed: an idle program needs few.
    pub fn unload(&self) {
        for (start, length) in &self.0 {
            // SAFETY: the range is a mapping of this program's own file, which stays mapped for as long as the program runs,
            // and none of its pages was written to (code and constants that need no relocation), so that what is mapped
            // again is the same. A failure changes nothing.
            unsafe { libc::madvise(*start as *mut libc::c_void, *length, libc::MADV_DONTNEED) };
        }
    }
}

/// Start and length of the mappings that hold code or the file's beginning (its headers and constants), of the file in
/// which `code` is.
fn unwritten(maps: &str, code: usize) -> Vec<(usize, usize)> {
    let parse = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let number = |text: &str| usize::from_str_radix(text, 16).ok();
        let (start, end) = (number(start)?, number(end)?);
        let (rights, offset) = (fields.next()?.to_owned(), number(fields.next()?)?);
        let file = (fields.next()?.to_owned(), fields.next()?.to_owned());
        Some((start, end, rights, offset, file))
    };
    let all: Vec<_> = maps.lines().filter_map(parse).collect();
    let Some(file) =
        all.iter().find(|(start, end, ..)| (*start..*end).contains(&code)).map(|one| one.4.clone())
    else {
        return Vec::new();
    };
    all.into_iter()
        .filter(|(_, _, rights, offset, own)| {
            *own == file && (rights == "r-xp" || (rights == "r--p" && *offset == 0))
        })
        .map(|(start, end, ..)| (start, end - start))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_and_constants_are_told_from_what_was_written() {
        let maps = "\
00400000-00500000 r--p 00000000 fe:00 7 /shim
00500000-00700000 r-xp 00100000 fe:00 7 /shim
00700000-00740000 r--p 002ff000 fe:00 7 /shim
00740000-00742000 rw-p 0033f000 fe:00 7 /shim
00900000-00a00000 rw-p 00000000 00:00 0 [heap]
7f000000-7f100000 r-xp 00000000 fe:00 9 /lib/libc.so.6
";
        let found = unwritten(maps, 0x0060_0000);
        assert_eq!(found, [(0x0040_0000, 0x0010_0000), (0x0050_0000, 0x0020_0000)]);
        assert_eq!(unwritten(maps, 0), []);
    }

    #[test]
    fn the_program_goes_on_without_its_pages() {
        let program = Program::find();
        assert!(program.0.len() >= 2, "{program:?}");
        program.unload();
        assert_eq!(format!("{}", 6 * 7), "42");
    }
}
