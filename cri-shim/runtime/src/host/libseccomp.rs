//! libseccomp, loaded when a profile has to be compiled and not before: most processes find theirs compiled already.
#![allow(unsafe_code, reason = "functions of a C library")]

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use rustix::fs::MemfdFlags;
use rustix::io::Errno;

use crate::error::Error;

/// The library's own name for its current interface.
const NAME: &CStr = c"libseccomp.so.2";
/// Its attribute for how the program looks for a call, and the value for a binary tree.
const OPTIMIZE: c_uint = 8;
const BINARY_TREE: u32 = 2;

/// A comparison of an argument; laid out as `struct scmp_arg_cmp`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Compare {
    pub(crate) arg: c_uint,
    pub(crate) op: c_uint,
    pub(crate) a: u64,
    pub(crate) b: u64,
}

/// The loaded library.
pub(crate) struct Library {
    handle: NonNull<c_void>,
    init: unsafe extern "C" fn(u32) -> *mut c_void,
    release: unsafe extern "C" fn(*mut c_void),
    arch_add: unsafe extern "C" fn(*mut c_void, u32) -> c_int,
    arch_native: unsafe extern "C" fn() -> u32,
    attr_set: unsafe extern "C" fn(*mut c_void, c_uint, u32) -> c_int,
    resolve: unsafe extern "C" fn(*const c_char) -> c_int,
    resolve_arch: unsafe extern "C" fn(u32, *const c_char) -> c_int,
    rule_add: unsafe extern "C" fn(*mut c_void, u32, c_int, c_uint, *const Compare) -> c_int,
    export: unsafe extern "C" fn(*const c_void, c_int) -> c_int,
}

/// What an unknown name resolves to.
const UNKNOWN: c_int = -1;

impl Library {
    /// Loads it.
    pub(crate) fn load() -> Result<Self, Error> {
        let missing = |reason: &str| Error::Unavailable {
            feature: "linux.seccomp",
            reason: format!("{}: {reason} (Debian: apt-get install libseccomp2)", NAME.to_string_lossy()),
        };
        // SAFETY: a C string; the library has no constructors that rely on anything.
        let handle = unsafe { libc::dlopen(NAME.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        let handle = NonNull::new(handle).ok_or_else(|| missing("cannot be loaded"))?;
        let find = |name: &CStr| {
            // SAFETY: an open handle and a C string.
            let symbol = unsafe { libc::dlsym(handle.as_ptr(), name.as_ptr()) };
            NonNull::new(symbol).ok_or_else(|| missing(&format!("has no {}", name.to_string_lossy())))
        };
        // SAFETY: the symbols are functions of these types in every libseccomp 2.x (seccomp.h).
        unsafe {
            Ok(Self {
                init: std::mem::transmute::<NonNull<c_void>, unsafe extern "C" fn(u32) -> *mut c_void>(find(
                    c"seccomp_init",
                )?),
                release: std::mem::transmute::<NonNull<c_void>, unsafe extern "C" fn(*mut c_void)>(find(
                    c"seccomp_release",
                )?),
                arch_add: std::mem::transmute::<
                    NonNull<c_void>,
                    unsafe extern "C" fn(*mut c_void, u32) -> c_int,
                >(find(c"seccomp_arch_add")?),
                arch_native: std::mem::transmute::<NonNull<c_void>, unsafe extern "C" fn() -> u32>(find(
                    c"seccomp_arch_native",
                )?),
                attr_set: std::mem::transmute::<
                    NonNull<c_void>,
                    unsafe extern "C" fn(*mut c_void, c_uint, u32) -> c_int,
                >(find(c"seccomp_attr_set")?),
                resolve: std::mem::transmute::<NonNull<c_void>, unsafe extern "C" fn(*const c_char) -> c_int>(
                    find(c"seccomp_syscall_resolve_name")?,
                ),
                resolve_arch: std::mem::transmute::<
                    NonNull<c_void>,
                    unsafe extern "C" fn(u32, *const c_char) -> c_int,
                >(find(c"seccomp_syscall_resolve_name_arch")?),
                rule_add: std::mem::transmute::<
                    NonNull<c_void>,
                    unsafe extern "C" fn(*mut c_void, u32, c_int, c_uint, *const Compare) -> c_int,
                >(find(c"seccomp_rule_add_array")?),
                export: std::mem::transmute::<
                    NonNull<c_void>,
                    unsafe extern "C" fn(*const c_void, c_int) -> c_int,
                >(find(c"seccomp_export_bpf")?),
                handle,
            })
        }
    }

    /// An empty filter with a default action.
    pub(crate) fn context(&self, default: u32) -> Result<Context<'_>, Error> {
        // SAFETY: takes an action.
        let context = NonNull::new(unsafe { (self.init)(default) });
        let context =
            context.ok_or_else(|| Error::spec("linux.seccomp.defaultAction", "libseccomp refuses it"))?;
        let context = Context { library: self, context };
        // An older library does not know it; then the program is a long list, and right all the same.
        // SAFETY: a live context.
        let _older = unsafe { (self.attr_set)(context.context.as_ptr(), OPTIMIZE, BINARY_TREE) };
        Ok(context)
    }

    /// The architecture of this machine.
    pub(crate) fn native_arch(&self) -> u32 {
        // SAFETY: no conditions.
        unsafe { (self.arch_native)() }
    }

    /// The number by which rules name a call.
    pub(crate) fn number(&self, name: &str) -> Option<c_int> {
        let name = CString::new(name).ok()?;
        // SAFETY: a C string.
        Some(unsafe { (self.resolve)(name.as_ptr()) }).filter(|number| *number != UNKNOWN)
    }

    /// The number of a call on an architecture.
    pub(crate) fn number_on(&self, arch: u32, name: &str) -> Option<c_int> {
        let name = CString::new(name).ok()?;
        // SAFETY: a C string.
        Some(unsafe { (self.resolve_arch)(arch, name.as_ptr()) }).filter(|number| *number != UNKNOWN)
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: opened by us; contexts borrow the library and are gone.
        unsafe {
            libc::dlclose(self.handle.as_ptr());
        }
    }
}

/// A filter that is being made.
pub(crate) struct Context<'a> {
    library: &'a Library,
    context: NonNull<c_void>,
}

fn checked(result: c_int) -> Result<(), Errno> {
    match result {
        0 => Ok(()),
        // The same rule again, or an architecture that is there already.
        error if -error == libc::EEXIST => Ok(()),
        error => Err(Errno::from_raw_os_error(-error)),
    }
}

impl Context<'_> {
    /// Adds an architecture.
    pub(crate) fn add_arch(&mut self, arch: u32) -> Result<(), Errno> {
        // SAFETY: a live context.
        checked(unsafe { (self.library.arch_add)(self.context.as_ptr(), arch) })
    }

    /// Adds a rule: all conditions must hold.
    pub(crate) fn add_rule(&mut self, action: u32, call: c_int, conditions: &[Compare]) -> Result<(), Errno> {
        let count = c_uint::try_from(conditions.len()).unwrap_or(0);
        // SAFETY: a live context, and as many conditions as said, which are only read.
        checked(unsafe {
            (self.library.rule_add)(self.context.as_ptr(), action, call, count, conditions.as_ptr())
        })
    }

    /// The program.
    pub(crate) fn export(&self) -> Result<Vec<libc::sock_filter>, Error> {
        let step = || Error::step("linux.seccomp: compile");
        let memory = rustix::fs::memfd_create(c"seccomp", MemfdFlags::CLOEXEC).map_err(step())?;
        // SAFETY: a live context and an open file.
        checked(unsafe { (self.library.export)(self.context.as_ptr(), memory.as_raw_fd()) })
            .map_err(step())?;
        let mut file = std::fs::File::from(memory);
        let mut bytes = Vec::new();
        let read = file.seek(SeekFrom::Start(0)).and_then(|_| file.read_to_end(&mut bytes));
        read.map_err(Error::step("linux.seccomp: read the program"))?;
        crate::seccomp::from_bytes(&bytes)
            .filter(|program| !program.is_empty())
            .ok_or_else(|| Error::spec("linux.seccomp", "libseccomp made no program of it"))
    }
}

impl Drop for Context<'_> {
    fn drop(&mut self) {
        // SAFETY: a live context, not used any more.
        unsafe { (self.library.release)(self.context.as_ptr()) }
    }
}
