//! A file system that hangs when it is told to, as one of a server does that is gone: FUSE, spoken with the kernel directly
//! (<https://docs.kernel.org/filesystems/fuse.html>, `include/uapi/linux/fuse.h`).
//!
//! It has an empty directory `dir` and a file `file` of one line, and has the kernel ask it each time. Once it hangs it takes
//! requests and answers none: whoever asked waits in the kernel, and no signal ends him. When it is dropped, or this process
//! ends in whatever way, the kernel answers for it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Room for any request: none writes much, since nothing can be written.
const REQUEST: usize = 256 << 10;
const HEADER: usize = 40;

const ROOT: u64 = 1;
const DIR: u64 = 2;
const FILE: u64 = 3;
/// What is in the file.
const CONTENT: &[u8] = b"there\n";

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const RELEASEDIR: u32 = 29;
const INTERRUPT: u32 = 36;
const DESTROY: u32 = 38;
const BATCH_FORGET: u32 = 42;

/// The file system, mounted.
pub(crate) struct Hanging {
    point: PathBuf,
    shared: Arc<Shared>,
    /// Its end tells the server to end.
    stop: Option<UnixStream>,
    server: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    hangs: AtomicBool,
    unanswered: AtomicU64,
}

impl Hanging {
    /// Mounts it at a directory, which is made where it is missing.
    pub(crate) fn mount(point: &Path) -> Result<Self> {
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open("/dev/fuse")
            .context("/dev/fuse")?;
        std::fs::create_dir_all(point)?;
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("hanging"), point, Some("fuse"), flags, Some(options.as_str()))
            .with_context(|| format!("mounting FUSE at {}", point.display()))?;
        let (stop, stopped) = UnixStream::pair()?;
        let shared = Arc::<Shared>::default();
        let known = Arc::clone(&shared);
        let server = std::thread::spawn(move || serve(&device, &stopped, &known));
        Ok(Self { point: point.to_owned(), shared, stop: Some(stop), server: Some(server) })
    }

    /// Where it is.
    pub(crate) fn point(&self) -> &Path {
        &self.point
    }

    /// Answers nobody from now on.
    pub(crate) fn hang(&self) {
        self.shared.hangs.store(true, Ordering::SeqCst);
    }

    /// How many wait for an answer in vain.
    pub(crate) fn unanswered(&self) -> u64 {
        self.shared.unanswered.load(Ordering::SeqCst)
    }
}

impl Drop for Hanging {
    fn drop(&mut self) {
        // With the server goes the device, and with it everybody's wait.
        drop(self.stop.take());
        if let Some(server) = self.server.take() {
            server.join().ok();
        }
        umount2(&self.point, MntFlags::MNT_DETACH).ok();
        std::fs::remove_dir(&self.point).ok();
    }
}

fn serve(mut device: &File, stopped: &UnixStream, shared: &Shared) {
    let mut buffer = vec![0_u8; REQUEST];
    loop {
        let mut ready =
            [PollFd::new(device.as_fd(), PollFlags::POLLIN), PollFd::new(stopped.as_fd(), PollFlags::POLLIN)];
        let waited = poll(&mut ready, PollTimeout::NONE);
        if ready[1].any().unwrap_or(true) || !matches!(waited, Ok(_) | Err(Errno::EINTR)) {
            return;
        }
        let request = match device.read(&mut buffer) {
            Ok(length) => &buffer[..length],
            Err(error) if error.raw_os_error() == Some(Errno::ENODEV as i32) => return,
            // Taken back, or interrupted.
            Err(_) => continue,
        };
        let Some((opcode, unique, node)) = head(request) else { continue };
        if matches!(opcode, FORGET | BATCH_FORGET | INTERRUPT | DESTROY) {
            continue;
        }
        if opcode != INIT && shared.hangs.load(Ordering::SeqCst) {
            shared.unanswered.fetch_add(1, Ordering::SeqCst);
            continue;
        }
        let told = tell(device, unique, answer(opcode, node, &request[HEADER..]));
        // Nobody waits for it any more.
        drop(told);
    }
}

/// What is asked, the request's number, and about what.
fn head(request: &[u8]) -> Option<(u32, u64, u64)> {
    let word = |at: usize| Some(u32::from_ne_bytes(request.get(at..at + 4)?.try_into().ok()?));
    let long = |at: usize| Some(u64::from_ne_bytes(request.get(at..at + 8)?.try_into().ok()?));
    (request.len() >= HEADER).then_some(())?;
    Some((word(4)?, long(8)?, long(16)?))
}

fn tell(mut device: &File, unique: u64, answer: Result<Vec<u8>, Errno>) -> io::Result<()> {
    let (error, body) = match answer {
        Ok(body) => (0, body),
        Err(error) => (-(error as i32), Vec::new()),
    };
    let length = u32::try_from(16 + body.len()).map_err(io::Error::other)?;
    let mut message = Vec::with_capacity(16 + body.len());
    message.extend(length.to_ne_bytes());
    message.extend(error.to_ne_bytes());
    message.extend(unique.to_ne_bytes());
    message.extend(body);
    // In one piece, as the device wants it.
    device.write_all(&message)
}

/// The answer's body: structures of `fuse.h`, field by field.
fn answer(opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, Errno> {
    match opcode {
        INIT => {
            // 7.31; no features, requests of one page.
            let mut init = words(&[7, 31, 0, 0, 0, 4096, 1, 0, 0]);
            init.resize(64, 0);
            Ok(init)
        }
        LOOKUP => {
            let found = match (node, body.split(|byte| *byte == 0).next()) {
                (ROOT, Some(b"dir")) => DIR,
                (ROOT, Some(b"file")) => FILE,
                _ => return Err(Errno::ENOENT),
            };
            // Node and generation; the name and its attributes are true for no time.
            Ok([longs(&[found, 0, 0, 0]), words(&[0, 0]), attributes(found)].concat())
        }
        GETATTR => Ok([longs(&[0]), words(&[0, 0]), attributes(node)].concat()),
        // FOPEN_DIRECT_IO: each read is asked for.
        OPEN => Ok([longs(&[0]), words(&[1, 0])].concat()),
        OPENDIR => Ok([longs(&[0]), words(&[0, 0])].concat()),
        READ if node == FILE => {
            let offset =
                body.get(8..16).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_ne_bytes);
            Ok(if offset == 0 { CONTENT.to_vec() } else { Vec::new() })
        }
        READDIR | RELEASE | RELEASEDIR | FLUSH => Ok(Vec::new()),
        STATFS => {
            let mut about = [longs(&[1000, 500, 500, 10, 5]), words(&[4096, 255, 4096, 0])].concat();
            about.resize(80, 0);
            Ok(about)
        }
        _ => Err(Errno::ENOSYS),
    }
}

fn attributes(node: u64) -> Vec<u8> {
    let (mode, links, size) =
        if node == FILE { (0o100_644, 1, CONTENT.len() as u64) } else { (0o40_755, 2, 0) };
    // Number, size, blocks and times; nanoseconds, mode, links, owner, device, block size.
    [longs(&[node, size, 1, 0, 0, 0]), words(&[0, 0, 0, mode, links, 0, 0, 0, 4096, 0])].concat()
}

fn words(all: &[u32]) -> Vec<u8> {
    all.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn longs(all: &[u64]) -> Vec<u8> {
    all.iter().flat_map(|long| long.to_ne_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_have_the_sizes_of_the_kernels_structures() {
        let size = |opcode, node, body: &[u8]| answer(opcode, node, body).map(|body| body.len());
        assert_eq!(size(INIT, 0, b""), Ok(64));
        assert_eq!(size(LOOKUP, ROOT, b"dir\0"), Ok(128));
        assert_eq!(size(LOOKUP, ROOT, b"other\0"), Err(Errno::ENOENT));
        assert_eq!(size(GETATTR, ROOT, b""), Ok(104));
        assert_eq!((size(OPEN, FILE, b""), size(STATFS, ROOT, b"")), (Ok(16), Ok(80)));
        assert_eq!(size(READ, FILE, &[0; 40]), Ok(CONTENT.len()));
    }
}
