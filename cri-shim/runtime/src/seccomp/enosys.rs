//! The beginning of a filter: calls above the last one that the profile knows get ENOSYS. Pure.

use std::collections::BTreeMap;

const LOAD: u16 = 0x20; // A = word at k
const JUMP: u16 = 0x05; // by k
const JUMP_EQUAL: u16 = 0x15;
const JUMP_ABOVE: u16 = 0x25;
const JUMP_IF_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;

const NUMBER_AT: u32 = 0;
const ARCH_AT: u32 = 4;
/// SECCOMP_RET_ERRNO with ENOSYS.
const ANSWER: u32 = 0x0005_0026;

const X86_64: u32 = 0xc000_003e;
/// libseccomp's own name; the kernel tells x32 from x86-64 by a bit of the call's number.
const X32: u32 = 0x4000_003e;
const X32_BIT: u32 = 0x4000_0000;

fn insn(code: u16, yes: u8, no: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt: yes, jf: no, k }
}

/// Instructions that end with ENOSYS, or fall through to what comes after them. `last` has the highest number by
/// architecture, as libseccomp names them.
pub(crate) fn prologue(last: &BTreeMap<u32, u32>) -> Vec<libc::sock_filter> {
    let mut program = Vec::new();
    for (arch, highest) in last.iter().filter(|(arch, _)| **arch != X32) {
        let block = if *arch == X86_64 { x86_64(*highest, last.get(&X32).copied()) } else { plain(*highest) };
        // Not this architecture: over the block. Blocks are a few instructions long.
        let over = u8::try_from(block.len()).unwrap_or(u8::MAX);
        program.push(insn(JUMP_EQUAL, 0, over, *arch));
        program.extend(block);
    }
    if program.is_empty() {
        return program;
    }
    program.insert(0, insn(LOAD, 0, 0, ARCH_AT));
    // What leads on leads to the end.
    let length = program.len();
    for (at, instruction) in program.iter_mut().enumerate() {
        if instruction.code == JUMP {
            instruction.k = u32::try_from(length - at - 1).unwrap_or(0);
        }
    }
    program
}

fn plain(highest: u32) -> Vec<libc::sock_filter> {
    vec![
        insn(LOAD, 0, 0, NUMBER_AT),
        insn(JUMP_ABOVE, 0, 1, highest),
        insn(RETURN, 0, 0, ANSWER),
        insn(JUMP, 0, 0, 0),
    ]
}

fn x86_64(highest: u32, highest_x32: Option<u32>) -> Vec<libc::sock_filter> {
    let mut block = vec![
        insn(LOAD, 0, 0, NUMBER_AT),
        insn(JUMP_IF_BIT, 3, 0, X32_BIT),
        insn(JUMP_ABOVE, 0, 1, highest),
        insn(RETURN, 0, 0, ANSWER),
        insn(JUMP, 0, 0, 0),
    ];
    if let Some(highest) = highest_x32 {
        block.extend([insn(JUMP_ABOVE, 0, 1, highest | X32_BIT), insn(RETURN, 0, 0, ANSWER)]);
    }
    block.push(insn(JUMP, 0, 0, 0));
    block
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Whether the kernel would answer ENOSYS.
    fn refused(program: &[libc::sock_filter], arch: u32, number: u32) -> bool {
        let (mut at, mut a) = (0, 0);
        while let Some(insn) = program.get(at) {
            at += 1;
            let jump = |yes: bool| usize::from(if yes { insn.jt } else { insn.jf });
            match insn.code {
                LOAD => a = if insn.k == ARCH_AT { arch } else { number },
                JUMP => at += insn.k as usize,
                JUMP_EQUAL => at += jump(a == insn.k),
                JUMP_ABOVE => at += jump(a > insn.k),
                JUMP_IF_BIT => at += jump(a & insn.k != 0),
                RETURN => return true,
                code => panic!("{code:#x}"),
            }
        }
        assert_eq!(at, program.len(), "falls through to exactly the end");
        false
    }

    const I386: u32 = 0x4000_0003;

    #[test]
    fn nothing_known_nothing_added() {
        assert!(prologue(&BTreeMap::new()).is_empty());
    }

    proptest! {
        #[test]
        fn only_calls_above_the_last_are_refused(
            number in 0_u32..600,
            x32 in any::<bool>(),
            highest in prop::option::of(0_u32..500),
            highest_x32 in prop::option::of(0_u32..600),
            highest_386 in prop::option::of(0_u32..500),
        ) {
            let last: BTreeMap<u32, u32> = [(X86_64, highest), (X32, highest_x32), (I386, highest_386)]
                .into_iter()
                .filter_map(|(arch, highest)| Some((arch, highest?)))
                .collect();
            let program = prologue(&last);
            prop_assert_eq!(refused(&program, I386, number), highest_386.is_some_and(|highest| number > highest));
            let asked = if x32 { number | X32_BIT } else { number };
            let expected = match (highest, x32) {
                (None, _) => false,
                (Some(highest), false) => number > highest,
                (Some(_), true) => highest_x32.is_some_and(|highest| number > highest),
            };
            prop_assert_eq!(refused(&program, X86_64, asked), expected);
            prop_assert!(!refused(&program, 0xc000_00b7, number));
        }
    }
}
