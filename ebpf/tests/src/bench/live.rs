//! Frames that the kernel makes itself, as fast as one processor can: BPF_PROG_TEST_RUN with live frames, and what takes
//! them off a wire again at little cost.
//!
//! The generator is an XDP program of a few instructions, made here for one frame: it writes the frame anew into whatever
//! page it gets, since pages come back as somebody left them, and has it sent by the device that it is said to have come
//! from. Nothing of it depends on who forwards the frame.

#![allow(unsafe_code, reason = "system calls with structures of our own")]

use std::{
    io,
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use anyhow::{Context, Result, ensure};

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_TEST_RUN: libc::c_long = 10;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_XDP: u32 = 37;
const BPF_F_TEST_XDP_LIVE_FRAMES: u32 = 1 << 1;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
const XDP_DROP: i32 = 1;
const XDP_TX: i32 = 3;
/// Frames of one batch: what a driver takes off its ring at once.
const BATCH: u32 = 64;

/// Classes, sizes and operations of the instructions used.
const LOAD_WORD: u8 = 0x61;
const STORE_WORD: u8 = 0x62;
const MOVE: u8 = 0xbf;
const MOVE_NUMBER: u8 = 0xb7;
const ADD_NUMBER: u8 = 0x07;
const ADD: u8 = 0x0f;
const SUBTRACT: u8 = 0x1f;
const AND_NUMBER: u8 = 0x57;
const SHIFT_RIGHT: u8 = 0x77;
const TO_BIG_ENDIAN: u8 = 0xdc;
const STORE_HALF: u8 = 0x6b;
const CALL: u8 = 0x85;
/// Helper that gives a random number.
const RANDOM: i32 = 7;
const JUMP_IF_GREATER: u8 = 0x2d;
const EXIT: u8 = 0x95;

/// An instruction.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high one.
    registers: u8,
    offset: i16,
    number: i32,
}

impl Instruction {
    const fn new(code: u8, (to, from): (u8, u8), offset: i16, number: i32) -> Self {
        Self { code, registers: to | from << 4, offset, number }
    }
}

#[repr(C)]
#[derive(Default)]
struct LoadAttr {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    device: u32,
    attach_type: u32,
}

#[repr(C)]
#[derive(Default)]
struct RunAttr {
    program: u32,
    verdict: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_size_in: u32,
    context_size_out: u32,
    context_in: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
    batch: u32,
    padding: u32,
}

#[repr(C)]
#[derive(Default)]
struct LinkAttr {
    program: u32,
    device: u32,
    attach_type: u32,
    flags: u32,
}

/// Sends one frame, again and again, by one device.
#[derive(Debug)]
pub struct Generator {
    program: OwnedFd,
    frame: Vec<u8>,
    device: u32,
}

impl Generator {
    /// For this frame, whose length is a multiple of four, and the device of this number.
    pub fn new(frame: Vec<u8>, device: u32) -> Result<Self> {
        let program = load(&sender(&frame, &[])?).context("load the program that makes frames")?;
        Ok(Self { program, frame, device })
    }

    /// The same with another client for each frame, which is a first packet of TCP over IPv4 from [`MANY_FROM`]: one of
    /// 8,192 addresses with one of 32,768 ports.
    pub fn of_many(mut frame: Vec<u8>, device: u32) -> Result<Self> {
        // Padding, as on a real wire.
        frame.resize(frame.len().next_multiple_of(4), 0);
        let program = sender(&frame, &another_client()).and_then(|program| load(&program));
        Ok(Self { program: program.context("load the program that makes frames")?, frame, device })
    }

    /// Sends so many; the caller's thread is in the device's network namespace. Returns when they have been worked off as
    /// far as the kernel does it at once.
    pub fn send(&self, count: u32) -> Result<()> {
        let len = u32::try_from(self.frame.len())?;
        // The start of the context: where the data begins and ends, and the device.
        let context = [0, len, 0, self.device, 0, 0];
        let mut attr = RunAttr {
            program: raw(self.program.as_fd()),
            data_size_in: len,
            data_in: self.frame.as_ptr() as u64,
            repeat: count,
            context_size_in: u32::try_from(size_of_val(&context))?,
            context_in: context.as_ptr() as u64,
            flags: BPF_F_TEST_XDP_LIVE_FRAMES,
            batch: BATCH,
            ..RunAttr::default()
        };
        // The kernel reads frame and context, both alive during the call, of the sizes told here.
        bpf(BPF_PROG_TEST_RUN, &mut attr)
            .map(drop)
            .context("have the kernel make frames (BPF_F_TEST_XDP_LIVE_FRAMES, Linux 5.18)")
    }
}

/// Takes every frame that arrives at a device of the calling thread's namespace, and drops it, for as long as what is
/// returned lives.
pub(super) fn swallow(device: &str) -> Result<OwnedFd> {
    let index = nix::net::if_::if_nametoindex(device)?;
    let verdict = [Instruction::new(MOVE_NUMBER, (0, 0), 0, XDP_DROP), Instruction::new(EXIT, (0, 0), 0, 0)];
    let program = load(&verdict).context("load the program that drops frames")?;
    let mut attr = LinkAttr {
        program: raw(program.as_fd()),
        device: index,
        attach_type: BPF_XDP,
        flags: XDP_FLAGS_DRV_MODE,
    };
    let link = bpf(BPF_LINK_CREATE, &mut attr).with_context(|| format!("drop what arrives at {device}"))?;
    owned(link)
}

/// The client that a frame for [`Generator::of_many`] is from.
pub const MANY_FROM: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(11, 0, 255, 255), 1024);

/// Writes other addresses and ports into a frame. What is added to one half of the address is taken from the other, and what is
/// added to the port from the acknowledgement, which nobody reads in a first packet: so all checksums stay right.
fn another_client() -> Vec<Instruction> {
    let halves = |(shift_by, mask): (i32, i32), (more, more_at): (i32, i16), (less, less_at): (i32, i16)| {
        vec![
            Instruction::new(MOVE, (4, 7), 0, 0),
            Instruction::new(SHIFT_RIGHT, (4, 0), 0, shift_by),
            Instruction::new(AND_NUMBER, (4, 0), 0, mask),
            Instruction::new(MOVE_NUMBER, (5, 0), 0, more),
            Instruction::new(ADD, (5, 4), 0, 0),
            Instruction::new(TO_BIG_ENDIAN, (5, 0), 0, 16),
            Instruction::new(STORE_HALF, (2, 5), more_at, 0),
            Instruction::new(MOVE_NUMBER, (5, 0), 0, less),
            Instruction::new(SUBTRACT, (5, 4), 0, 0),
            Instruction::new(TO_BIG_ENDIAN, (5, 0), 0, 16),
            Instruction::new(STORE_HALF, (2, 5), less_at, 0),
        ]
    };
    let address = halves((0, 0x1fff), (0x0b00, 26), (0xffff, 28));
    let port = halves((16, 0x7fff), (i32::from(MANY_FROM.port()), 34), (0xffff, 44));
    [address, port].concat()
}

/// The program that writes a frame, changes it by `change` (data in register 2, a random number in 7), and sends it.
fn sender(frame: &[u8], change: &[Instruction]) -> Result<Vec<Instruction>> {
    let (words, rest) = frame.as_chunks::<4>();
    ensure!(rest.is_empty() && words.len() <= 64, "a frame of {} bytes", frame.len());
    let to_the_end = i16::try_from(words.len() + change.len() + 2)?;
    let mut program = vec![Instruction::new(MOVE, (6, 1), 0, 0)];
    if !change.is_empty() {
        program.push(Instruction::new(CALL, (0, 0), 0, RANDOM));
        program.push(Instruction::new(MOVE, (7, 0), 0, 0));
    }
    program.extend([
        // Where the data begins and ends.
        Instruction::new(LOAD_WORD, (2, 6), 0, 0),
        Instruction::new(LOAD_WORD, (3, 6), 4, 0),
        Instruction::new(MOVE, (4, 2), 0, 0),
        Instruction::new(ADD_NUMBER, (4, 0), 0, i32::try_from(frame.len())?),
        Instruction::new(JUMP_IF_GREATER, (4, 3), to_the_end, 0),
    ]);
    for (at, word) in (0_i16..).step_by(4).zip(words) {
        program.push(Instruction::new(STORE_WORD, (2, 0), at, i32::from_ne_bytes(*word)));
    }
    program.extend(change);
    for verdict in [XDP_TX, XDP_DROP] {
        program.push(Instruction::new(MOVE_NUMBER, (0, 0), 0, verdict));
        program.push(Instruction::new(EXIT, (0, 0), 0, 0));
    }
    Ok(program)
}

fn load(instructions: &[Instruction]) -> Result<OwnedFd> {
    let mut attr = LoadAttr {
        kind: BPF_PROG_TYPE_XDP,
        count: u32::try_from(instructions.len())?,
        instructions: instructions.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        attach_type: BPF_XDP,
        ..LoadAttr::default()
    };
    // The kernel reads the instructions and the licence, both alive during the call.
    owned(bpf(BPF_PROG_LOAD, &mut attr)?)
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    u32::try_from(fd.as_raw_fd()).unwrap_or(u32::MAX)
}

fn owned(fd: libc::c_long) -> Result<OwnedFd> {
    let fd = i32::try_from(fd)?;
    // SAFETY: the kernel has just returned this descriptor to us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is a structure of integers laid out as this command's part of `union bpf_attr`, alive during the
    // call, and its size is told; what its pointers lead to is alive too, as each caller says.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

const _: () = assert!(size_of::<Instruction>() == 8);
const _: () = assert!(size_of::<LoadAttr>() == 72);
const _: () = assert!(size_of::<RunAttr>() == 80);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_page_is_dropped_before_it_is_written() {
        let program = sender(&[7; 64], &[]).unwrap();
        let jump = program.iter().position(|one| one.code == JUMP_IF_GREATER).unwrap();
        let to = jump + 1 + usize::try_from(program[jump].offset).unwrap();
        assert_eq!(program[to].number, XDP_DROP);
        assert_eq!(program[to - 1].code, EXIT);
        assert_eq!(program[jump + 1].code, STORE_WORD);
        assert_eq!(program.iter().filter(|one| one.code == STORE_WORD).count(), 16);
        assert!(sender(&[0; 63], &[]).is_err());
    }
}
