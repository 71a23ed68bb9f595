//! How much stack the programs of an object take, by the rule of Linux 6.1.
//!
//! There the frames of a chain of calls share 512 bytes, and each counts at least 32 and in steps of 32. Newer kernels count
//! in steps of 16, so that an object may load on the machine that built it and be refused by the oldest kernel that is
//! served. Takes the bytes of an ELF object for BPF; a frame is what its instructions reach below the frame pointer.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};

/// What all frames of a chain may take.
const LIMIT: u32 = 512;
/// Steps in which frames count.
const STEP: u32 = 32;
/// Frames of a chain.
const FRAMES: usize = 8;

const STT_FUNC: u8 = 2;
const SHT_SYMTAB: u32 = 2;
const SHT_REL: u32 = 9;
/// A relocation of a call.
const R_BPF_64_32: u64 = 10;

/// The frame pointer.
const R10: u8 = 10;
const CALL: u8 = 0x85;
const PSEUDO_CALL: u8 = 1;
const LOAD_WIDE: u8 = 0x18;
const MOVE: u8 = 0xbf;
const ADD: u8 = 0x07;

/// A place of the object: section, and byte in it.
type Place = (usize, u64);

/// One function.
#[derive(Debug, Default)]
struct Function {
    name: String,
    /// Bytes of its frame.
    frame: u32,
    /// Whom it calls.
    calls: Vec<Place>,
}

/// The deepest chain of a program.
#[derive(Debug, PartialEq, Eq)]
struct Chain {
    /// Names and frames, the program first.
    frames: Vec<(String, u32)>,
}

impl Chain {
    /// Bytes, as Linux 6.1 counts them.
    fn bytes(&self) -> u32 {
        self.frames.iter().map(|(_, frame)| (*frame).max(1).next_multiple_of(STEP)).sum()
    }
}

/// Fails when a program of the object takes more than Linux 6.1 allows; returns the most that one takes, and its name.
pub(super) fn check(object: &[u8]) -> Result<(String, u32)> {
    let functions =
        functions(object).context("the object is not what was expected of an ELF file for BPF")?;
    let mut most = (String::new(), 0);
    // A chain of all functions holds that of every program.
    for place in functions.keys() {
        let chain = deepest(&functions, *place, FRAMES)?;
        let bytes = chain.bytes();
        let (name, _) = &chain.frames[0];
        if bytes > LIMIT {
            bail!(
                "{name} needs {bytes} bytes of stack, and Linux 6.1 allows {LIMIT}: the frames {:?}, each in steps of \
                 {STEP}, must get smaller or fewer",
                chain.frames
            );
        }
        if bytes > most.1 {
            most = (name.clone(), bytes);
        }
    }
    Ok(most)
}

/// The deepest chain that begins with a function.
fn deepest(functions: &BTreeMap<Place, Function>, from: Place, left: usize) -> Result<Chain> {
    let function = functions.get(&from).context("a call leads to no function")?;
    ensure!(left > 0, "{} stands in a chain of more than {FRAMES} calls", function.name);
    let mut below = Chain { frames: Vec::new() };
    for callee in &function.calls {
        let chain = deepest(functions, *callee, left - 1)?;
        if chain.bytes() > below.bytes() {
            below = chain;
        }
    }
    below.frames.insert(0, (function.name.clone(), function.frame));
    Ok(below)
}

/// A section's header.
struct Section {
    kind: u32,
    offset: u64,
    size: u64,
    link: u32,
    info: u32,
}

/// A symbol.
struct Symbol {
    name: String,
    function: bool,
    section: usize,
    value: u64,
    size: u64,
}

fn functions(object: &[u8]) -> Result<BTreeMap<Place, Function>> {
    let sections = sections(object)?;
    let table = sections.iter().find(|section| section.kind == SHT_SYMTAB).context("no symbols")?;
    let symbols = symbols(object, &sections, table)?;
    let mut calls: BTreeMap<Place, &Symbol> = BTreeMap::new();
    for section in sections.iter().filter(|section| section.kind == SHT_REL) {
        for entry in content(object, section)?.chunks_exact(16) {
            let info = word(entry, 8)?;
            if info & 0xffff_ffff == R_BPF_64_32 {
                let symbol =
                    symbols.get(usize::try_from(info >> 32)?).context("a relocation names no symbol")?;
                calls.insert((section.info as usize, word(entry, 0)?), symbol);
            }
        }
    }
    let mut found = BTreeMap::new();
    for symbol in symbols.iter().filter(|symbol| symbol.function && symbol.size > 0) {
        let section = sections.get(symbol.section).context("a function is in no section")?;
        let code = slice(content(object, section)?, symbol.value, symbol.size)?;
        let mut function = Function { name: symbol.name.clone(), frame: frame(code), calls: Vec::new() };
        for (at, relative) in local_calls(code) {
            let at = symbol.value + at;
            let (section, base) = match calls.get(&(symbol.section, at)) {
                Some(callee) => (callee.section, callee.value),
                None => (symbol.section, at),
            };
            // Counted in instructions, from the one behind the call.
            let target =
                base.checked_add_signed((i64::from(relative) + 1) * 8).context("a call leads nowhere")?;
            function.calls.push((section, target));
        }
        found.insert((symbol.section, symbol.value), function);
    }
    Ok(found)
}

/// Bytes below the frame pointer that the instructions reach.
fn frame(code: &[u8]) -> u32 {
    let mut lowest = 0_i64;
    // Registers that hold the frame pointer and something.
    let mut aliases = [None; 16];
    aliases[usize::from(R10)] = Some(0_i64);
    let mut instructions = code.chunks_exact(8);
    while let Some(instruction) = instructions.next() {
        let (opcode, to, from) = (instruction[0], instruction[1] & 15, instruction[1] >> 4);
        let offset = i64::from(i16::from_le_bytes([instruction[2], instruction[3]]));
        let (to, from) = (usize::from(to), usize::from(from));
        // Loads are class 1 and take the address from the second register, stores (2 and 3) from the first.
        let class = opcode & 7;
        let address = match class {
            1 => aliases[from],
            2 | 3 => aliases[to],
            _ => None,
        };
        if let Some(base) = address {
            lowest = lowest.min(base + offset);
        }
        match opcode {
            MOVE => aliases[to] = aliases[from],
            ADD => {
                let add = i64::from(immediate(instruction));
                aliases[to] = aliases[to].map(|base| base + add);
                lowest = lowest.min(aliases[to].unwrap_or(0));
            }
            CALL => aliases[..6].fill(None),
            LOAD_WIDE => {
                aliases[to] = None;
                // Its second half is no instruction.
                instructions.next();
            }
            _ if matches!(class, 0 | 1 | 4 | 7) => aliases[to] = None,
            _ => {}
        }
    }
    u32::try_from(-lowest).unwrap_or(u32::MAX)
}

/// Calls of other functions: where they stand, and their operand.
fn local_calls(code: &[u8]) -> Vec<(u64, i32)> {
    let mut found = Vec::new();
    let mut wide = false;
    for (at, instruction) in (0..).step_by(8).zip(code.chunks_exact(8)) {
        if wide {
            wide = false;
        } else if instruction[0] == LOAD_WIDE {
            wide = true;
        } else if instruction[0] == CALL && instruction[1] >> 4 == PSEUDO_CALL {
            found.push((at, immediate(instruction)));
        }
    }
    found
}

fn immediate(instruction: &[u8]) -> i32 {
    i32::from_le_bytes([instruction[4], instruction[5], instruction[6], instruction[7]])
}

fn sections(object: &[u8]) -> Result<Vec<Section>> {
    ensure!(
        object.get(..6) == Some(b"\x7fELF\x02\x01"),
        "it does not begin as ELF of 64 bits, little-endian"
    );
    let (table, size, count) = (word(object, 0x28)?, half(object, 0x3a)?, half(object, 0x3c)?);
    (0..u64::from(count))
        .map(|index| {
            let header = slice(object, table + index * u64::from(size), 64)?;
            Ok(Section {
                kind: number(header, 4)?,
                offset: word(header, 0x18)?,
                size: word(header, 0x20)?,
                link: number(header, 0x28)?,
                info: number(header, 0x2c)?,
            })
        })
        .collect()
}

fn symbols(object: &[u8], sections: &[Section], table: &Section) -> Result<Vec<Symbol>> {
    let names = sections.get(table.link as usize).context("the symbols have no names")?;
    let names = content(object, names)?;
    content(object, table)?
        .chunks_exact(24)
        .map(|entry| {
            let name = names.get(number(entry, 0)? as usize..).context("a symbol's name is elsewhere")?;
            let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
            Ok(Symbol {
                name: String::from_utf8_lossy(&name[..end]).into_owned(),
                function: entry[4] & 15 == STT_FUNC,
                section: usize::from(half(entry, 6)?),
                value: word(entry, 8)?,
                size: word(entry, 16)?,
            })
        })
        .collect()
}

fn content<'o>(object: &'o [u8], section: &Section) -> Result<&'o [u8]> {
    slice(object, section.offset, section.size)
}

fn slice(bytes: &[u8], offset: u64, size: u64) -> Result<&[u8]> {
    let start = usize::try_from(offset)?;
    let end = start.checked_add(usize::try_from(size)?).context("a size is too large")?;
    bytes.get(start..end).with_context(|| format!("it ends before byte {end}"))
}

fn word(bytes: &[u8], offset: u64) -> Result<u64> {
    Ok(u64::from_le_bytes(slice(bytes, offset, 8)?.try_into()?))
}

fn number(bytes: &[u8], offset: u64) -> Result<u32> {
    Ok(u32::from_le_bytes(slice(bytes, offset, 4)?.try_into()?))
}

fn half(bytes: &[u8], offset: u64) -> Result<u16> {
    Ok(u16::from_le_bytes(slice(bytes, offset, 2)?.try_into()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Opcode, first and second register, offset, operand.
    fn code(instructions: &[(u8, u8, u8, i16, i32)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (opcode, to, from, offset, operand) in instructions {
            bytes.extend([*opcode, from << 4 | to]);
            bytes.extend(offset.to_le_bytes());
            bytes.extend(operand.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn a_frame_is_what_is_reached_below_the_frame_pointer() {
        // *(u64 *)(r10 - 24) = r1
        assert_eq!(frame(&code(&[(0x7b, 10, 1, -24, 0)])), 24);
        // r2 = r10; r2 += -100; call; r6 is another register by then
        assert_eq!(frame(&code(&[(MOVE, 2, 10, 0, 0), (ADD, 2, 0, 0, -100), (CALL, 0, 0, 0, 26)])), 100);
        // r8 = r10; r8 += -40; r1 = *(u8 *)(r8 - 8)
        assert_eq!(frame(&code(&[(MOVE, 8, 10, 0, 0), (ADD, 8, 0, 0, -40), (0x71, 1, 8, -8, 0)])), 48);
        // r8 = r10; r8 = 7; r8 += -400: no address by then. The second half of a wide load is no instruction.
        assert_eq!(frame(&code(&[(MOVE, 8, 10, 0, 0), (0xb7, 8, 0, 0, 7), (ADD, 8, 0, 0, -400)])), 0);
        assert_eq!(frame(&code(&[(LOAD_WIDE, 1, 0, 0, 1), (0x7b, 10, 1, -24, 0)])), 0);
        assert_eq!(
            local_calls(&code(&[(0xb7, 1, 0, 0, 7), (CALL, 0, 1, 0, -1), (CALL, 0, 0, 0, 5)])),
            [(8, -1)]
        );
    }

    #[test]
    fn the_deepest_chain_counts_in_steps() {
        let function = |name: &str, frame, calls: &[Place]| Function {
            name: name.to_owned(),
            frame,
            calls: calls.to_vec(),
        };
        let mut functions = BTreeMap::from([
            ((1, 0), function("program", 0, &[(2, 0)])),
            ((2, 0), function("body", 456, &[(2, 8), (2, 16)])),
            ((2, 8), function("leaf", 0, &[])),
            ((2, 16), function("other", 33, &[])),
        ]);
        let chain = deepest(&functions, (1, 0), FRAMES).unwrap();
        assert_eq!(
            chain.frames.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(),
            ["program", "body", "other"]
        );
        assert_eq!(chain.bytes(), 32 + 480 + 64);
        functions.get_mut(&(2, 8)).unwrap().calls.push((2, 0));
        assert!(deepest(&functions, (1, 0), FRAMES).is_err(), "a circle");
    }

    #[test]
    fn what_is_no_object_is_refused() {
        assert!(check(b"").is_err());
        assert!(check(b"\x7fELF\x02\x01").is_err());
        assert!(check(&[0; 4096]).is_err());
    }
}
