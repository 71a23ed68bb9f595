//! Files of a cgroup that stay open between two requests for its figures.
//!
//! Opening one costs about ten times what reading it does, and the figures of a full node come from thousands of them. An open
//! file pins a removed cgroup in the kernel: so they are let go when the container ends, and when the kernel says that the
//! cgroup has gone. Each also keeps a page of the kernel's memory; so how many are kept is limited, and others are opened for
//! each reading.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::files::kernel_text;

/// Opened for each reading: in version 1 an open one may tell a list again that it made a second ago.
const LISTS: &[&str] = &["cgroup.procs", "tasks"];
/// What a file of the kernel's hands out at once, as a rule.
const PIECE: usize = 4096;

/// Most files that are kept: 10 MiB of the kernel's memory.
const MOST: u64 = 2560;

/// Files that are kept open at present, in the whole process.
static KEPT: AtomicU64 = AtomicU64::new(0);

/// The open files of one cgroup.
#[derive(Debug, Default)]
pub struct CgroupFiles(Mutex<Open>);

/// The same while somebody reads.
#[derive(Debug, Default)]
pub(super) struct Open {
    cgroup: String,
    files: Vec<Entry>,
    /// Where to look first: the same files are read in the same order each time.
    next: usize,
    /// Nothing is kept any more: whoever still reads has begun before the end.
    is_closed: bool,
}

#[derive(Debug)]
struct Entry {
    controller: String,
    name: String,
    file: File,
    _place: Place,
}

/// One of the files that may be kept.
#[derive(Debug)]
struct Place;

impl Place {
    fn take() -> Option<Self> {
        let place = Self;
        // A place that is not to be had is given back by its drop.
        (KEPT.fetch_add(1, Ordering::Relaxed) < most()).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        KEPT.fetch_sub(1, Ordering::Relaxed);
    }
}

impl CgroupFiles {
    /// Lets all files go, for good.
    pub fn close(&self) {
        *self.lock() = Open { is_closed: true, ..Open::default() };
    }

    /// The files of `cgroup`, for one reading of several.
    pub(super) fn of(&self, cgroup: &str) -> MutexGuard<'_, Open> {
        let mut open = self.lock();
        if open.cgroup != cgroup {
            *open = Open { cgroup: cgroup.to_owned(), is_closed: open.is_closed, ..Open::default() };
        }
        open
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open {
    /// The text of a controller's file in `directory` below its `root`; empty where there is none.
    pub(super) fn text(&mut self, controller: &str, name: &str, root: &Path, directory: &Path) -> String {
        let anew = || kernel_text(&root.join(directory).join(name));
        if self.is_closed || LISTS.contains(&name) {
            return anew();
        }
        let Some(file) = self.file(controller, name, root, directory) else { return anew() };
        read(file).unwrap_or_else(|error| {
            if error.raw_os_error() != Some(libc::ENODEV) {
                return String::new();
            }
            // The cgroup has gone, or a controller of it; there may be another one of its name.
            self.files.clear();
            anew()
        })
    }

    /// The file, opened when it was not; nothing when it is not there, or no more may be kept.
    fn file(&mut self, controller: &str, name: &str, root: &Path, directory: &Path) -> Option<&File> {
        let is_it = |entry: &Entry| entry.name == name && entry.controller == controller;
        let known = match self.files.get(self.next) {
            Some(entry) if is_it(entry) => Some(self.next),
            _ => self.files.iter().position(is_it),
        };
        let at = if let Some(at) = known {
            at
        } else {
            let place = Place::take()?;
            let file = File::open(root.join(directory).join(name)).ok()?;
            let (controller, name) = (controller.to_owned(), name.to_owned());
            self.files.push(Entry { controller, name, file, _place: place });
            self.files.len() - 1
        };
        self.next = at + 1;
        self.files.get(at).map(|entry| &entry.file)
    }
}

/// All of a file, from its beginning.
fn read(file: &File) -> io::Result<String> {
    let mut all = Vec::new();
    let mut piece = [0; PIECE];
    loop {
        match file.read_at(&mut piece, all.len() as u64) {
            Ok(0) => break,
            Ok(count) => all.extend_from_slice(&piece[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    String::from_utf8(all).map_err(io::Error::other)
}

/// How many files may be kept: at most half of what the process may have open.
fn most() -> u64 {
    static FOUND: OnceLock<u64> = OnceLock::new();
    *FOUND.get_or_init(|| getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| (soft / 2).min(MOST)))
}

/// Raises the limit of open files to what the process may have, as programs do that have many files open. To be called at the
/// start.
pub fn allow_open_files() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::debug!(%error, soft, "the limit of open files stays");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().expect("a directory");
        for (name, text) in files {
            std::fs::write(directory.path().join(name), text).expect("written");
        }
        directory
    }

    #[test]
    fn a_file_stays_open_and_tells_what_is_in_it_now() {
        let directory = directory(&[("cpu.stat", "1"), ("memory.stat", "2"), ("cgroup.procs", "7\n")]);
        let files = CgroupFiles::default();
        let read = |name: &str| files.of("a").text("cpu", name, directory.path(), Path::new(""));
        assert_eq!((read("cpu.stat"), read("memory.stat")), ("1".to_owned(), "2".to_owned()));
        std::fs::write(directory.path().join("cpu.stat"), "3".repeat(10_000)).expect("written");
        assert_eq!((read("memory.stat"), read("cpu.stat")), ("2".to_owned(), "3".repeat(10_000)));
        assert_eq!(files.of("a").files.len(), 2);
        assert_eq!((read("cgroup.procs"), files.of("a").files.len()), ("7\n".to_owned(), 2), "a list");
        std::fs::remove_file(directory.path().join("cpu.stat")).expect("removed");
        assert_eq!(read("cpu.stat").len(), 10_000, "the open one is read");
        assert_eq!(
            files.of("b").text("cpu", "cpu.stat", directory.path(), Path::new("")),
            "",
            "another cgroup has other files"
        );
    }

    #[test]
    fn after_the_end_nothing_is_kept() {
        let directory = directory(&[]);
        let files = CgroupFiles::default();
        let read = || files.of("a").text("cpu", "cpu.max", directory.path(), Path::new(""));
        assert_eq!(read(), "");
        std::fs::write(directory.path().join("cpu.max"), "max").expect("written");
        assert_eq!((read(), files.of("a").files.len()), ("max".to_owned(), 1), "a file that has come");
        files.close();
        assert_eq!((read(), files.of("a").files.len()), ("max".to_owned(), 0));
        assert!(files.of("b").is_closed, "and another name changes nothing");
    }

    #[test]
    fn a_file_of_the_kernel_is_read_again_from_its_beginning() {
        let files = CgroupFiles::default();
        let uptime = || files.of("a").text("", "uptime", Path::new("/"), Path::new("proc"));
        let first = uptime();
        let begun = std::time::Instant::now();
        while uptime() == first {
            assert!(begun.elapsed().as_secs() < 10, "the clock stands: {first}");
            std::thread::yield_now();
        }
        assert_eq!(uptime().split(' ').count(), 2);
    }
}
