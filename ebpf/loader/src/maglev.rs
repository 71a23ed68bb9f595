//! Tables for consistent hashing (Maglev, NSDI 2016), with weights. Pure.
//!
//! The table depends on the backends' addresses and weights alone, so every node makes the same one, and a backend that
//! comes or goes moves few slots of the others.

use ebpf_common::{SLOTS_PER_WORD, TABLE_SLOTS};

use crate::room::BackendKey;

/// Slots per backend, so that shares differ by about one per cent.
const SLOTS_PER_BACKEND: usize = 100;

/// A table: its kind as extents say it, and its words.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) kind: u16,
    pub(crate) words: Vec<u64>,
}

/// The kind of table for so many backends: the smallest with room enough, else the largest.
pub(crate) fn kind_for(backends: usize) -> u16 {
    let wanted = backends.saturating_mul(SLOTS_PER_BACKEND);
    let place = TABLE_SLOTS.iter().position(|slots| *slots as usize >= wanted);
    u16::try_from(place.unwrap_or(TABLE_SLOTS.len() - 1) + 1).unwrap_or(1)
}

/// Words that a table of this kind takes.
pub(crate) fn words_of(kind: u16) -> u32 {
    kind.checked_sub(1).map_or(0, |place| TABLE_SLOTS[usize::from(place)].div_ceil(SLOTS_PER_WORD))
}

/// The table of backends, given in the order of their positions, each with its weight.
pub(crate) fn build(backends: &[(BackendKey, u16)]) -> Table {
    let kind = kind_for(backends.len());
    let slots = TABLE_SLOTS[usize::from(kind - 1)];
    let mut turns: Vec<Turn> = backends
        .iter()
        .zip(0_u16..)
        .filter(|((_, weight), _)| *weight > 0)
        .map(|((key, weight), position)| Turn::new(key, *weight, position, slots))
        .collect();
    // Every node takes turns in the same order, whatever its own positions are.
    turns.sort_by_key(|turn| turn.key);
    let heaviest = turns.iter().map(|turn| u32::from(turn.weight)).max().unwrap_or(1);
    let mut table: Vec<Option<u16>> = vec![None; slots as usize];
    let mut free = if turns.is_empty() { 0 } else { slots };
    while free > 0 {
        for turn in &mut turns {
            turn.credit += u32::from(turn.weight);
            if turn.credit < heaviest {
                continue;
            }
            turn.credit -= heaviest;
            let slot = turn.next_free(&table, slots);
            table[slot] = Some(turn.position);
            free -= 1;
            if free == 0 {
                break;
            }
        }
    }
    let words = table.chunks(SLOTS_PER_WORD as usize).map(|slots| {
        let shifts = (0..).step_by(16);
        slots
            .iter()
            .zip(shifts)
            .fold(0, |word, (slot, shift): (_, u32)| word | u64::from(slot.unwrap_or_default()) << shift)
    });
    Table { kind, words: words.collect() }
}

/// A backend's walk through the slots.
struct Turn {
    key: BackendKey,
    weight: u16,
    position: u16,
    credit: u32,
    next: u32,
    step: u32,
}

impl Turn {
    fn new(key: &BackendKey, weight: u16, position: u16, slots: u32) -> Self {
        let (start, step) = (hash(key, 0x9e37_79b9_7f4a_7c15), hash(key, 0xc2b2_ae3d_27d4_eb4f));
        let within = |number: u64, below: u32| u32::try_from(number % u64::from(below)).unwrap_or(0);
        Self {
            key: *key,
            weight,
            position,
            credit: 0,
            next: within(start, slots),
            step: within(step, slots - 1) + 1,
        }
    }

    fn next_free(&mut self, table: &[Option<u16>], slots: u32) -> usize {
        // A prime number of slots: the walk meets each of them.
        loop {
            let slot = self.next as usize;
            self.next = (self.next + self.step) % slots;
            if table[slot].is_none() {
                return slot;
            }
        }
    }
}

/// FNV-1a over address and port, finished so that every bit counts.
fn hash((addr, port): &BackendKey, seed: u64) -> u64 {
    let bytes = addr.octets().into_iter().chain(port.to_host().to_be_bytes());
    let mut state =
        bytes.fold(seed, |state, byte| (state ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    state ^= state >> 33;
    state = state.wrapping_mul(0xff51_afd7_ed55_8ccd);
    state ^ state >> 33
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ebpf_common::{NetAddr, NetPort};
    use proptest::prelude::*;

    use super::*;

    fn key(n: u16) -> BackendKey {
        let [high, low] = n.to_be_bytes();
        (NetAddr::from_v4_word(u32::from_ne_bytes([10, 244, high, low])), NetPort::from_host(8080))
    }

    /// The backend of each slot.
    fn owners(backends: &[(BackendKey, u16)]) -> Vec<BackendKey> {
        let table = build(backends);
        let slots = TABLE_SLOTS[usize::from(table.kind - 1)] as usize;
        let of = |slot: usize| (table.words[slot / 4] >> (slot % 4 * 16) & 0xffff) as usize;
        (0..slots).map(|slot| backends[of(slot)].0).collect()
    }

    fn shares(owners: &[BackendKey]) -> BTreeMap<BackendKey, usize> {
        owners.iter().fold(BTreeMap::new(), |mut shares, owner| {
            *shares.entry(*owner).or_default() += 1;
            shares
        })
    }

    #[test]
    fn a_backend_that_goes_moves_few_others() {
        let all: Vec<_> = (1..=10).map(|n| (key(n), 1)).collect();
        let before = owners(&all);
        let after = owners(&all[1..]);
        let moved = before.iter().zip(&after).filter(|(a, b)| **a != key(1) && a != b).count();
        assert!(moved * 100 < before.len() * 5, "{moved} of {} slots moved without need", before.len());
    }

    #[test]
    fn weights_are_shares() {
        let owners = owners(&[(key(1), 3), (key(2), 1), (key(3), 0)]);
        let shares = shares(&owners);
        let part = |n| *shares.get(&key(n)).unwrap_or(&0) * 1000 / owners.len();
        assert!((740..=760).contains(&part(1)), "{shares:?}");
        assert!((240..=260).contains(&part(2)), "{shares:?}");
        assert_eq!(part(3), 0, "weight 0 takes no new clients");
    }

    #[test]
    fn a_service_whose_weights_are_all_0_has_a_table_all_the_same() {
        assert_eq!(u32::try_from(build(&[(key(1), 0)]).words.len()), Ok(words_of(1)));
    }

    proptest! {
        #[test]
        fn every_node_makes_the_same_table(count in 1_u16..80, seed: u64) {
            let ordered: Vec<_> = (1..=count).map(|n| (key(n), n % 5 + 1)).collect();
            let mut shuffled = ordered.clone();
            shuffled.sort_by_key(|(key, _)| hash(key, seed));
            prop_assert_eq!(owners(&ordered), owners(&shuffled));
        }

        #[test]
        fn shares_are_even(count in 1_u16..60) {
            let owners = owners(&(1..=count).map(|n| (key(n), 1)).collect::<Vec<_>>());
            let shares = shares(&owners);
            let even = owners.len() / usize::from(count);
            prop_assert!(shares.values().all(|share| share.abs_diff(even) <= 1), "{:?}", shares);
        }
    }
}
