//! Remembered connections of clients outside: those that are over are forgotten, and where many are open there is room for
//! more.
//!
//! The map forgets what was least recently used, which may be a quiet connection that is still open. So it shall never be
//! full: what ended goes after a while, and the map is exchanged for a larger one before there is no room, up to a limit
//! that the machine's memory sets.

use std::{io, os::fd::AsFd, time::Duration};

use aya::maps::{HashMap, IterableMap as _, MapData};
use ebpf_common::{FLOWS_PER_SIGNAL, FlowKey, FlowValue};

use crate::sys;

/// The map of established flows.
pub(crate) type FlowMap = HashMap<MapData, FlowKey, FlowValue>;

/// Both directions of flows from outside, at first. Programs tell of every 256 new ones, so that there is more room before
/// these are full.
pub(crate) const FEWEST: u32 = 8192;
/// As many entries at most are new when programs tell of new flows: two for each.
pub(crate) const ENTRIES_PER_SIGNAL: u32 = 2 * FLOWS_PER_SIGNAL;
/// At most.
const MOST: u32 = 1 << 20;
/// Bytes of kernel memory for one entry: key, value, and what the kernel keeps beside them.
const ENTRY_BYTES: u64 = 208;
/// The part of the machine's memory that flows may take.
const MEMORY_SHARE: u64 = 256;
/// In tenths, how full the map may be before it grows.
const FULL_TENTHS: u64 = 6;
/// How much larger the next map is: growing costs the verifier's time, and where many connections come, more follow.
const GROWTH: u32 = 4;
/// Elements that are read with one call.
const CHUNK: usize = 4096;
/// TCP's protocol number.
const TCP: u8 = 6;
/// A connection that one end has closed is over when nothing was heard for this long.
const CLOSED: Duration = Duration::from_secs(120);
/// As the programs have it: a datagram flow ends so, and a connection of which nothing is heard.
const DATAGRAM_IDLE: Duration = Duration::from_secs(120);
const ESTABLISHED_IDLE: Duration = Duration::from_hours(5 * 24);

/// What is remembered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowStock {
    /// Entries, two for each connection.
    pub entries: u32,
    /// Entries that there is room for.
    pub capacity: u32,
    /// Entries that were just forgotten, since their connections are over.
    pub forgotten: u32,
}

impl FlowStock {
    /// How many entries there should be room for, where that is more than now.
    pub(crate) fn wanted(&self, limit: u32) -> Option<u32> {
        let full = u64::from(self.entries) * 10 > u64::from(self.capacity) * FULL_TENTHS;
        let more = self.capacity.saturating_mul(GROWTH).min(limit);
        (full && more > self.capacity).then_some(more)
    }
}

/// The largest map of flows for a machine with so much memory.
pub(crate) fn limit_for(memory_bytes: u64) -> u32 {
    let entries = u32::try_from(memory_bytes / MEMORY_SHARE / ENTRY_BYTES).unwrap_or(MOST).max(1);
    // The power of two below.
    (1 << entries.ilog2()).clamp(FEWEST, MOST)
}

/// Bytes of memory that the machine has.
pub(crate) fn machine_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// Forgets what is over at a moment of `CLOCK_MONOTONIC`, and counts the rest.
pub(crate) fn tidy(map: &mut FlowMap, capacity: u32, now: Duration) -> io::Result<FlowStock> {
    let mut stock = FlowStock { capacity, ..FlowStock::default() };
    let mut over = Vec::new();
    each(map, |key, flow| {
        stock.entries += 1;
        if is_over(flow, now) {
            over.push((*key, *flow));
        }
    })?;
    for (key, flow) in over {
        let partner = if key.direction == FlowKey::FORWARD { flow.reply_key() } else { flow.forward_key() };
        // One end may be silent while the other one still talks.
        let other = map.get(&partner, 0).ok();
        if other.is_some_and(|other| age(&other, now) < CLOSED) {
            continue;
        }
        for key in [key, partner] {
            // The other half may have come up itself, or have been pushed out.
            if map.remove(&key).is_ok() {
                stock.forgotten += 1;
                stock.entries = stock.entries.saturating_sub(1);
            }
        }
    }
    Ok(stock)
}

/// Puts into a map what another one holds and it does not.
pub(crate) fn copy(from: &FlowMap, to: &mut FlowMap) -> io::Result<()> {
    const ONLY_NEW: u64 = 1;
    each(from, |key, flow| {
        // What is there already is newer, and what finds no room is the least recently used one.
        drop(to.insert(key, flow, ONLY_NEW));
    })
}

/// Calls for every element; one that changes meanwhile may come twice or not at all.
fn each(map: &FlowMap, mut see: impl FnMut(&FlowKey, &FlowValue)) -> io::Result<()> {
    let blank = FlowValue::default();
    let (mut keys, mut values) = (vec![blank.forward_key(); CHUNK], vec![blank; CHUNK]);
    let mut position = None;
    loop {
        let (read, next) = sys::map_lookup_batch(map.map().fd().as_fd(), position, &mut keys, &mut values)?;
        keys.iter().zip(&values).take(read).for_each(|(key, value)| see(key, value));
        let Some(next) = next else {
            return Ok(());
        };
        position = Some(next);
    }
}

fn age(flow: &FlowValue, now: Duration) -> Duration {
    now.saturating_sub(Duration::from_nanos(flow.last_used_ns))
}

fn is_over(flow: &FlowValue, now: Duration) -> bool {
    let idle = age(flow, now);
    let closed = flow.flags & (FlowValue::FLAG_CLOSING | FlowValue::FLAG_OVER) != 0 && idle > CLOSED;
    closed || idle > if flow.proto == TCP { ESTABLISHED_IDLE } else { DATAGRAM_IDLE }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_made_before_there_is_none_and_never_too_much() {
        let stock = |entries| FlowStock { entries, capacity: FEWEST, forgotten: 0 };
        assert_eq!(stock(FEWEST * 6 / 10).wanted(MOST), None);
        assert_eq!(stock(FEWEST * 6 / 10 + 1).wanted(MOST), Some(4 * FEWEST));
        assert_eq!(stock(FEWEST).wanted(2 * FEWEST), Some(2 * FEWEST));
        assert_eq!(stock(FEWEST).wanted(FEWEST), None, "the machine has no memory for more");
    }

    #[test]
    fn a_machines_memory_sets_the_limit() {
        const GIB: u64 = 1 << 30;
        for (memory, limit) in
            [(0, FEWEST), (GIB, 16_384), (16 * GIB, 262_144), (64 * GIB, MOST), (1 << 42, MOST)]
        {
            assert_eq!(limit_for(memory), limit, "{memory} bytes");
        }
        assert!(machine_memory() > 0);
    }

    #[test]
    fn a_connection_is_over_when_it_was_closed_or_nobody_heard_of_it() {
        let now = Duration::from_hours(500);
        let flow = |proto, flags, idle: u64| FlowValue {
            proto,
            flags,
            last_used_ns: u64::try_from(now.saturating_sub(Duration::from_secs(idle)).as_nanos()).unwrap(),
            ..FlowValue::default()
        };
        for (flow, over) in [
            (flow(TCP, 0, 400_000), false),
            (flow(TCP, 0, 440_000), true),
            (flow(TCP, FlowValue::FLAG_CLOSING, 60), false),
            (flow(TCP, FlowValue::FLAG_CLOSING, 121), true),
            (flow(17, 0, 119), false),
            (flow(17, 0, 121), true),
        ] {
            assert_eq!(is_over(&flow, now), over, "{flow:?}");
        }
    }
}
