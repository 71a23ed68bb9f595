//! The few `bpf(2)` commands, and other system calls, that aya does not offer: links of cgroup programs that are
//! created, updated in place, inspected and detached by hand, and program statistics.

#![allow(unsafe_code, reason = "raw system calls with structures of our own")]

use std::{
    ffi::CString,
    io,
    mem::size_of,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_PROG_TEST_RUN: libc::c_long = 10;
const BPF_PROG_GET_NEXT_ID: libc::c_long = 11;
const BPF_PROG_GET_FD_BY_ID: libc::c_long = 13;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_PROG_QUERY: libc::c_long = 16;
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
const BPF_MAP_UPDATE_BATCH: libc::c_long = 26;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_ENABLE_STATS: libc::c_long = 32;
const BPF_LINK_DETACH: libc::c_long = 34;
const BPF_STATS_RUN_TIME: u32 = 0;
const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;

#[repr(C)]
#[derive(Default)]
struct ObjAttr {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct LinkCreateAttr {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct LinkUpdateAttr {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

#[repr(C)]
#[derive(Default)]
struct InfoAttr {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

#[repr(C)]
#[derive(Default)]
struct OneWordAttr {
    value: u32,
}

#[repr(C)]
#[derive(Default)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct IdAttr {
    id: u32,
    next_id: u32,
    open_flags: u32,
}

/// The start of the kernel's `bpf_link_info`, as far as a cgroup link fills it.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct CgroupLinkInfo {
    pub(crate) link_type: u32,
    pub(crate) id: u32,
    pub(crate) prog_id: u32,
    padding: u32,
    pub(crate) cgroup_id: u64,
    pub(crate) attach_type: u32,
    tail: u32,
}

/// The start of the kernel's `bpf_prog_info`, up to the run counters.
#[repr(C)]
#[derive(Clone, Copy)]
struct ProgInfo {
    head: [u8; 64],
    name: [u8; 16],
    middle: [u8; 112],
    run_time_ns: u64,
    run_cnt: u64,
}

/// How often a program ran, and how long in all, while statistics were on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProgramRuns {
    /// The program's name.
    pub name: String,
    /// Its kernel id.
    pub id: u32,
    /// Runs.
    pub count: u64,
    /// Nanoseconds in all.
    pub nanos: u64,
}

fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is a `repr(C)` prefix of `union bpf_attr` whose size is passed along; the kernel zero-extends
    // what is shorter than its own union, and every pointer inside it is valid for the call (see the callers).
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    u32::try_from(fd.as_raw_fd()).unwrap_or(u32::MAX)
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    let fd = libc::c_int::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel just returned this descriptor to us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from)
}

/// Pins an object.
pub(crate) fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    bpf(BPF_OBJ_PIN, &mut ObjAttr { pathname: path.as_ptr() as u64, bpf_fd: raw(fd), file_flags: 0 })
        .map(drop)
}

/// Opens a pinned object.
pub(crate) fn get_pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    owned(bpf(BPF_OBJ_GET, &mut ObjAttr { pathname: path.as_ptr() as u64, bpf_fd: 0, file_flags: 0 })?)
}

/// Attaches a program to a cgroup.
pub(crate) fn link_create(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    attach_type: u32,
) -> io::Result<OwnedFd> {
    let mut attr = LinkCreateAttr { prog_fd: raw(program), target_fd: raw(cgroup), attach_type, flags: 0 };
    owned(bpf(BPF_LINK_CREATE, &mut attr)?)
}

/// Attaches a packet program to a network device.
pub(crate) fn link_create_on_device(
    program: BorrowedFd<'_>,
    device: u32,
    attach_type: u32,
    flags: u32,
) -> io::Result<OwnedFd> {
    let mut attr = LinkCreateAttr { prog_fd: raw(program), target_fd: device, attach_type, flags };
    owned(bpf(BPF_LINK_CREATE, &mut attr)?)
}

/// Device and attach type of a link of a packet program; device 0 once it has gone.
#[allow(clippy::many_single_char_names, reason = "the bytes of two words")]
pub(crate) fn device_link_info(link: BorrowedFd<'_>) -> io::Result<(u32, u32)> {
    let info = link_info(link)?;
    // What a cgroup link calls its cgroup's id are two words here.
    let [a, b, c, d, e, f, g, h] = info.cgroup_id.to_ne_bytes();
    Ok((u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h])))
}

#[repr(C)]
#[derive(Default)]
struct QueryAttr {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    programs: u64,
    count: u32,
    padding: u32,
    program_flags: u64,
    links: u64,
    link_flags: u64,
    revision: u64,
}

/// Links of the packet programs on a device's hook (TCX), in their order; 0 for a program without a link.
pub(crate) fn links_on_device(device: u32, attach_type: u32) -> io::Result<Vec<u32>> {
    /// The kernel takes no more.
    const MOST: usize = 64;
    let (mut programs, mut links) = ([0_u32; MOST], [0_u32; MOST]);
    // The kernel writes at most `count` numbers into each array, which both live during the call.
    let mut attr = QueryAttr {
        target: device,
        attach_type,
        programs: programs.as_mut_ptr() as u64,
        count: u32::try_from(MOST).map_err(io::Error::other)?,
        links: links.as_mut_ptr() as u64,
        ..QueryAttr::default()
    };
    match bpf(BPF_PROG_QUERY, &mut attr) {
        Ok(_) => Ok(links.into_iter().take(attr.count as usize).collect()),
        // Nobody ever attached one.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Replaces the program of a link, without a moment in which none runs.
pub(crate) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr =
        LinkUpdateAttr { link_fd: raw(link), new_prog_fd: raw(program), ..LinkUpdateAttr::default() };
    bpf(BPF_LINK_UPDATE, &mut attr).map(drop)
}

/// Detaches a link at once, whoever else holds it.
pub(crate) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    bpf(BPF_LINK_DETACH, &mut OneWordAttr { value: raw(link) }).map(drop)
}

/// Writes many elements with one call.
pub(crate) fn map_update_batch<K: aya::Pod, V: aya::Pod>(
    map: BorrowedFd<'_>,
    keys: &[K],
    values: &[V],
) -> io::Result<()> {
    let count = u32::try_from(keys.len().min(values.len())).map_err(io::Error::other)?;
    // The kernel reads `count` keys and values, which both slices hold, at the map's own sizes, which the typed map
    // that the descriptor belongs to has checked.
    let mut attr = BatchAttr {
        keys: keys.as_ptr() as u64,
        values: values.as_ptr() as u64,
        count,
        map_fd: raw(map),
        ..BatchAttr::default()
    };
    bpf(BPF_MAP_UPDATE_BATCH, &mut attr).map(drop)
}

/// Reads many elements of a hash with one call, from a position on; how many, and where the rest begins, if there is one.
pub(crate) fn map_lookup_batch<K: aya::Pod, V: aya::Pod>(
    map: BorrowedFd<'_>,
    position: Option<u64>,
    keys: &mut [K],
    values: &mut [V],
) -> io::Result<(usize, Option<u64>)> {
    let count = keys.len().min(values.len());
    lookup_batch(map, position, (&mut keys[..count], values), count)
}

/// Reads all elements of an array that has a value for each of so many CPUs, and adds each one's up.
pub(crate) fn sums_of_array<V: aya::Pod + Default>(
    map: BorrowedFd<'_>,
    len: u32,
    cpus: usize,
    add: fn(&mut V, &V),
) -> io::Result<Vec<V>> {
    /// Elements that are read with one call.
    const CHUNK: usize = 512;
    // The kernel puts values at multiples of eight bytes.
    const { assert!(size_of::<V>().is_multiple_of(8)) };
    let mut sums = vec![V::default(); usize::try_from(len).map_err(io::Error::other)?];
    let (mut keys, mut values) = (vec![0_u32; CHUNK], vec![V::default(); CHUNK * cpus.max(1)]);
    let mut position = None;
    loop {
        let (read, next) = lookup_batch(map, position, (&mut keys, &mut values), CHUNK)?;
        for (key, each) in keys.iter().zip(values.chunks(cpus.max(1))).take(read) {
            if let Some(sum) = sums.get_mut(*key as usize) {
                for one in each {
                    add(sum, one);
                }
            }
        }
        position = next;
        if position.is_none() {
            return Ok(sums);
        }
    }
}

fn lookup_batch<K, V>(
    map: BorrowedFd<'_>,
    position: Option<u64>,
    (keys, values): (&mut [K], &mut [V]),
    count: usize,
) -> io::Result<(usize, Option<u64>)> {
    let count = u32::try_from(count).map_err(io::Error::other)?;
    let (from, mut next) = (position.unwrap_or_default(), 0_u64);
    // The kernel writes at most `count` keys and values, for which both slices have room, at the map's own sizes, which
    // the typed map that the descriptor belongs to has checked; a position is a word of four bytes.
    let mut attr = BatchAttr {
        in_batch: if position.is_some() { std::ptr::from_ref(&from) as u64 } else { 0 },
        out_batch: std::ptr::from_mut(&mut next) as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count,
        map_fd: raw(map),
        ..BatchAttr::default()
    };
    let outcome = bpf(BPF_MAP_LOOKUP_BATCH, &mut attr);
    let read = usize::try_from(attr.count).map_err(io::Error::other)?;
    match outcome {
        Ok(_) => Ok((read, Some(next))),
        // The last elements.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok((read, None)),
        Err(error) => Err(error),
    }
}

/// What a cgroup link is attached to.
pub(crate) fn link_info(link: BorrowedFd<'_>) -> io::Result<CgroupLinkInfo> {
    let mut info = CgroupLinkInfo::default();
    object_info(link, &mut info)?;
    Ok(info)
}

fn object_info<T>(fd: BorrowedFd<'_>, info: &mut T) -> io::Result<()> {
    let info_len = u32::try_from(size_of::<T>()).unwrap_or(0);
    // `info` outlives the call, and the kernel writes at most `info_len` bytes of it.
    bpf(
        BPF_OBJ_GET_INFO_BY_FD,
        &mut InfoAttr { bpf_fd: raw(fd), info_len, info: std::ptr::from_mut(info) as u64 },
    )
    .map(drop)
}

#[repr(C)]
#[derive(Default)]
struct TestRunAttr {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    padding: u32,
}

/// What a program made of a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestRun {
    /// Its verdict.
    pub verdict: u32,
    /// The frame afterwards.
    pub frame: Vec<u8>,
    /// Nanoseconds of one run.
    pub nanos: u32,
}

/// Room behind a frame, for programs that make it longer.
const SPARE: usize = 256;

/// Runs a packet program on a frame as if it had arrived at a device, so many times.
pub(crate) fn test_run(
    program: BorrowedFd<'_>,
    frame: &[u8],
    context: &[u8],
    repeat: u32,
) -> io::Result<TestRun> {
    let size = |len: usize| u32::try_from(len).map_err(io::Error::other);
    let mut out = vec![0_u8; frame.len() + SPARE];
    // The kernel reads frame and context, and writes the frame into `out`, all of the sizes told here.
    let mut attr = TestRunAttr {
        prog_fd: raw(program),
        data_size_in: size(frame.len())?,
        data_size_out: size(out.len())?,
        data_in: frame.as_ptr() as u64,
        data_out: out.as_mut_ptr() as u64,
        repeat,
        ctx_size_in: size(context.len())?,
        ctx_in: if context.is_empty() { 0 } else { context.as_ptr() as u64 },
        ..TestRunAttr::default()
    };
    bpf(BPF_PROG_TEST_RUN, &mut attr)?;
    out.truncate(attr.data_size_out as usize);
    Ok(TestRun { verdict: attr.retval, frame: out, nanos: attr.duration })
}

/// Turns the kernel's run-time statistics on for as long as the returned descriptor lives.
pub fn run_time_stats() -> io::Result<OwnedFd> {
    owned(bpf(BPF_ENABLE_STATS, &mut OneWordAttr { value: BPF_STATS_RUN_TIME })?)
}

/// Counters of every loaded program whose name starts with `prefix`.
pub fn program_runs(prefix: &str) -> io::Result<Vec<ProgramRuns>> {
    let mut found = Vec::new();
    let mut attr = IdAttr::default();
    while bpf(BPF_PROG_GET_NEXT_ID, &mut attr).is_ok() {
        attr.id = attr.next_id;
        // A program may be gone before it is opened.
        let Ok(fd) = bpf(BPF_PROG_GET_FD_BY_ID, &mut IdAttr { id: attr.id, ..IdAttr::default() }) else {
            continue;
        };
        let fd = owned(fd)?;
        let mut info =
            ProgInfo { head: [0; 64], name: [0; 16], middle: [0; 112], run_time_ns: 0, run_cnt: 0 };
        object_info(fd.as_fd(), &mut info)?;
        let name = info.name.split(|byte| *byte == 0).next().unwrap_or_default();
        let name = String::from_utf8_lossy(name).into_owned();
        if name.starts_with(prefix) {
            found.push(ProgramRuns { name, id: attr.id, count: info.run_cnt, nanos: info.run_time_ns });
        }
    }
    Ok(found)
}

/// Bytes of kernel memory that a map occupies, as the kernel tells.
pub(crate) fn map_bytes(map: BorrowedFd<'_>) -> io::Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", map.as_raw_fd()))?;
    let bytes = text.lines().find_map(|line| line.strip_prefix("memlock:")?.trim().parse().ok());
    bytes.ok_or_else(|| io::Error::other("the kernel does not tell the memory of a map"))
}

/// Waits for an RCU grace period: every program that was running has finished. Falls back to nothing where the
/// kernel lacks the call; the quarantine's time then is the only protection.
pub(crate) fn wait_for_grace_period() {
    // SAFETY: the system call takes integers only.
    if unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) } != 0 {
        tracing::debug!(error = %io::Error::last_os_error(), "membarrier is not available");
    }
}

/// The moment by the clock that programs have (`CLOCK_MONOTONIC`).
#[must_use]
pub fn monotonic() -> std::time::Duration {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel fills the structure, which lives during the call; this clock is on every machine.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let part = |value: i64| u64::try_from(value).unwrap_or_default();
    std::time::Duration::from_secs(part(now.tv_sec)) + std::time::Duration::from_nanos(part(now.tv_nsec))
}

/// The start of the kernel's `ethtool_drvinfo`, and room for its rest.
#[repr(C)]
struct DriverInfo {
    command: u32,
    driver: [u8; 32],
    rest: [u8; 160],
}

/// An `ifreq` with a pointer.
#[repr(C)]
struct DriverRequest {
    name: [u8; libc::IFNAMSIZ],
    info: *mut DriverInfo,
    padding: [u64; 2],
}

/// Name of the driver of a device of the calling thread's network namespace; nothing where the kernel does not tell.
pub(crate) fn driver(device: &str) -> Option<String> {
    const SIOCETHTOOL: libc::c_ulong = 0x8946;
    const ETHTOOL_GDRVINFO: u32 = 3;
    if device.len() >= libc::IFNAMSIZ {
        return None;
    }
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::LOCALHOST, 0)).ok()?;
    let mut info = DriverInfo { command: ETHTOOL_GDRVINFO, driver: [0; 32], rest: [0; 160] };
    let mut request = DriverRequest { name: [0; libc::IFNAMSIZ], info: &raw mut info, padding: [0; 2] };
    for (to, from) in request.name.iter_mut().zip(device.bytes()) {
        *to = from;
    }
    // SAFETY: the request is an `ifreq` with a closed name and a pointer to an `ethtool_drvinfo`, both alive during the
    // call; the kernel writes the latter alone.
    if unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) } != 0 {
        return None;
    }
    let len = info.driver.iter().position(|byte| *byte == 0)?;
    Some(String::from_utf8_lossy(&info.driver[..len]).into_owned())
}

/// A handle of a process.
pub(crate) fn pidfd_open(pid: libc::pid_t) -> io::Result<OwnedFd> {
    // SAFETY: the system call takes integers only and returns a new descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 { Err(io::Error::last_os_error()) } else { owned(fd) }
}

/// A copy of another process's descriptor.
pub(crate) fn pidfd_getfd(pidfd: BorrowedFd<'_>, fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: the system call takes integers only and returns a new descriptor.
    let copy = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) };
    if copy < 0 { Err(io::Error::last_os_error()) } else { owned(copy) }
}

/// Cookie of a socket's network namespace.
pub(crate) fn socket_netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut len = libc::socklen_t::try_from(size_of::<u64>()).unwrap_or(8);
    // SAFETY: the option fills exactly eight bytes, for which `cookie` has room, and `len` says so.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            std::ptr::from_mut(&mut cookie).cast(),
            &raw mut len,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

const _: () = assert!(size_of::<CgroupLinkInfo>() == 32);
const _: () = assert!(size_of::<DriverInfo>() == 196);
const _: () = assert!(std::mem::offset_of!(ProgInfo, run_time_ns) == 192);
