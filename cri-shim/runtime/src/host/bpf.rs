//! The BPF program that decides about devices on version 2: its instructions, loading and attaching.
#![allow(unsafe_code, reason = "the bpf system call has no safe wrapper")]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::error::Error;

/// Kinds of device in the program's context.
pub(crate) const BLOCK: u32 = 1;
pub(crate) const CHAR: u32 = 2;
/// Kinds of access.
pub(crate) const MKNOD: u32 = 1;
pub(crate) const READ: u32 = 2;
pub(crate) const WRITE: u32 = 4;

/// One instruction as the kernel lays it out.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Insn {
    code: u8,
    /// Destination in the low half, source in the high.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// What the kernel asks about; the program finds it where register 1 points.
#[cfg(test)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeviceContext {
    /// The kind of device in the low half, of access in the high.
    pub(crate) access_type: u32,
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

const LOAD_WORD: u8 = 0x61; // dst = *(u32 *)(src + offset)
const MOVE: u8 = 0xbc; // dst = src, 32 bits
const AND: u8 = 0x54; // dst &= immediate, 32 bits
const SHIFT_RIGHT: u8 = 0x74; // dst >>= immediate, 32 bits
const JUMP_NOT_EQUAL: u8 = 0x56; // 32 bits
const JUMP_EQUAL: u8 = 0x16; // 32 bits
const SET: u8 = 0xb4; // dst = immediate, 32 bits
const EXIT: u8 = 0x95;

const fn insn(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Insn {
    Insn { code, registers: destination | (source << 4), offset, immediate }
}

/// Puts the kind of device in register 2, the access in 3, the numbers in 4 and 5.
pub(crate) fn device_prologue() -> Vec<Insn> {
    vec![
        insn(LOAD_WORD, 2, 1, 0, 0),
        insn(AND, 2, 0, 0, 0xffff),
        insn(LOAD_WORD, 3, 1, 0, 0),
        insn(SHIFT_RIGHT, 3, 0, 0, 16),
        insn(LOAD_WORD, 4, 1, 4, 0),
        insn(LOAD_WORD, 5, 1, 8, 0),
    ]
}

/// Adds a rule: when all fits, the program ends with its answer. An allowing rule must cover all of the access that is
/// asked for, a forbidding one any of it.
pub(crate) fn device_rule(
    program: &mut Vec<Insn>,
    allow: bool,
    kind: u32,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
) {
    // Each question is followed by a jump over the rest, whose length is filled in at the end.
    let begin = program.len();
    program.push(insn(JUMP_NOT_EQUAL, 2, 0, 0, kind.cast_signed()));
    program.push(insn(MOVE, 1, 3, 0, 0));
    if allow {
        program.push(insn(AND, 1, 0, 0, (!access & 7).cast_signed()));
        program.push(insn(JUMP_NOT_EQUAL, 1, 0, 0, 0));
    } else {
        program.push(insn(AND, 1, 0, 0, access.cast_signed()));
        program.push(insn(JUMP_EQUAL, 1, 0, 0, 0));
    }
    if let Some(major) = major {
        program.push(insn(JUMP_NOT_EQUAL, 4, 0, 0, major.cast_signed()));
    }
    if let Some(minor) = minor {
        program.push(insn(JUMP_NOT_EQUAL, 5, 0, 0, minor.cast_signed()));
    }
    device_end(program, allow);
    let end = program.len();
    for (at, instruction) in program.iter_mut().enumerate().skip(begin) {
        if matches!(instruction.code, JUMP_EQUAL | JUMP_NOT_EQUAL) {
            instruction.offset = i16::try_from(end - at - 1).unwrap_or(i16::MAX);
        }
    }
}

/// Ends the program with an answer.
pub(crate) fn device_end(program: &mut Vec<Insn>, allow: bool) {
    program.push(insn(SET, 0, 0, 0, i32::from(allow)));
    program.push(insn(EXIT, 0, 0, 0, 0));
}

/// `union bpf_attr` for BPF_PROG_LOAD, as far as it is used.
#[repr(C)]
#[derive(Default)]
struct LoadAttr {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
}

/// `union bpf_attr` for BPF_PROG_ATTACH.
#[repr(C)]
#[derive(Default)]
struct AttachAttr {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
    replace: u32,
    relative: u32,
    revision: u64,
}

const BPF_PROG_LOAD: i32 = 5;
const BPF_PROG_ATTACH: i32 = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

fn bpf<T>(command: i32, attr: &mut T) -> Result<i64, Errno> {
    // SAFETY: `attr` is laid out as the command's part of `union bpf_attr`, and the size says how much of it there is.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 {
        // SAFETY: errno of this thread; reading it has no conditions.
        return Err(Errno::from_raw_os_error(unsafe { *libc::__errno_location() }));
    }
    Ok(result)
}

/// Makes the program decide about devices of a version 2 cgroup. It lives as long as the cgroup.
pub(crate) fn attach_device_filter(cgroup: &Path, program: &[Insn]) -> Result<(), Error> {
    let failed = |what: &str| Error::step(format!("{what} the device filter of {}", cgroup.display()));
    let mut load = LoadAttr {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(program.len()).unwrap_or(u32::MAX),
        instructions: program.as_ptr() as u64,
        license: c"Apache".as_ptr() as u64,
        ..LoadAttr::default()
    };
    let loaded = bpf(BPF_PROG_LOAD, &mut load).map_err(failed("load"))?;
    // SAFETY: the kernel gave a new descriptor, which nobody else knows.
    let loaded = unsafe { OwnedFd::from_raw_fd(i32::try_from(loaded).unwrap_or(-1)) };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(cgroup, flags, Mode::empty()).map_err(failed("open the cgroup of"))?;
    let mut attach = AttachAttr {
        target: directory.as_raw_fd().unsigned_abs(),
        program: loaded.as_raw_fd().unsigned_abs(),
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
        ..AttachAttr::default()
    };
    bpf(BPF_PROG_ATTACH, &mut attach).map(|_| ()).map_err(failed("attach"))
}

/// What the kernel would answer: an interpreter of the instructions above, for tests.
#[cfg(test)]
pub(crate) fn run(program: &[Insn], context: DeviceContext) -> bool {
    let mut registers = [0_u32; 6];
    let mut at = 0;
    loop {
        let Insn { code, registers: pair, offset, immediate } = program[at];
        let (destination, source) = (usize::from(pair & 15), usize::from(pair >> 4));
        let value = immediate.cast_unsigned();
        let jump = |taken: bool| if taken { usize::try_from(offset).unwrap() } else { 0 };
        at += 1;
        match code {
            LOAD_WORD => {
                assert_eq!(source, 1, "only the context is read");
                registers[destination] = match offset {
                    0 => context.access_type,
                    4 => context.major,
                    8 => context.minor,
                    _ => panic!("outside the context"),
                };
            }
            MOVE => registers[destination] = registers[source],
            AND => registers[destination] &= value,
            SHIFT_RIGHT => registers[destination] >>= value,
            SET => registers[destination] = value,
            JUMP_NOT_EQUAL => at += jump(registers[destination] != value),
            JUMP_EQUAL => at += jump(registers[destination] == value),
            EXIT => return registers[0] != 0,
            _ => panic!("unknown instruction {code:#x}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_eight_bytes() {
        assert_eq!(size_of::<Insn>(), 8);
        let mut program = device_prologue();
        device_rule(&mut program, true, CHAR, Some(1), Some(3), READ | WRITE);
        device_end(&mut program, false);
        let ask = |access: u32, major, minor| {
            run(&program, DeviceContext { access_type: access << 16 | CHAR, major, minor })
        };
        assert!(ask(READ, 1, 3) && ask(READ | WRITE, 1, 3));
        assert!(!ask(READ | MKNOD, 1, 3) && !ask(READ, 1, 5) && !ask(READ, 2, 3));
    }
}
