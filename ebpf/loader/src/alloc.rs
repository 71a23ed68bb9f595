//! First-fit allocation of index ranges, and the quarantine that freed ranges pass before reuse. Pure.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

/// Free ranges of `1..capacity`, merged where they touch. Index 0 is never handed out: it means "none".
#[derive(Debug)]
pub(crate) struct RangeAllocator {
    free: BTreeMap<u32, u32>,
    capacity: u32,
    available: u32,
}

/// A range of indices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    /// First index.
    pub(crate) start: u32,
    /// Number of indices.
    pub(crate) len: u32,
}

impl RangeAllocator {
    /// Everything free.
    pub(crate) fn new(capacity: u32) -> Self {
        let available = capacity.saturating_sub(1);
        let free = if available == 0 { BTreeMap::new() } else { BTreeMap::from([(1, available)]) };
        Self { free, capacity, available }
    }

    /// Takes the first range of `len` free indices; `None` where no gap is that long.
    pub(crate) fn alloc(&mut self, len: u32) -> Option<Range> {
        let (start, gap) =
            self.free.iter().find(|(_, gap)| **gap >= len).map(|(start, gap)| (*start, *gap))?;
        self.free.remove(&start);
        if gap > len {
            self.free.insert(start + len, gap - len);
        }
        self.available -= len;
        Some(Range { start, len })
    }

    /// Takes the first free indices that stand side by side, at most `len`.
    pub(crate) fn alloc_some(&mut self, len: u32) -> Option<Range> {
        let gap = self.free.first_key_value().map(|(_, gap)| *gap)?;
        self.alloc(gap.min(len.max(1)))
    }

    /// Takes exactly this range; false, and nothing taken, where any of it is not free.
    pub(crate) fn reserve(&mut self, range: Range) -> bool {
        let Some((start, gap)) =
            self.free.range(..=range.start).next_back().map(|(start, gap)| (*start, *gap))
        else {
            return false;
        };
        let (gap_end, Some(range_end)) = (start + gap, range.start.checked_add(range.len)) else {
            return false;
        };
        if range_end > gap_end || range.len == 0 {
            return false;
        }
        self.free.remove(&start);
        if range.start > start {
            self.free.insert(start, range.start - start);
        }
        if gap_end > range_end {
            self.free.insert(range_end, gap_end - range_end);
        }
        self.available -= range.len;
        true
    }

    /// Gives a range back that [`Self::alloc`] or [`Self::reserve`] took.
    pub(crate) fn release(&mut self, range: Range) {
        if range.len == 0 {
            return;
        }
        let (mut start, mut len) = (range.start, range.len);
        if let Some((before, gap)) = self.free.range(..start).next_back().map(|(before, gap)| (*before, *gap))
            && before + gap == start
        {
            self.free.remove(&before);
            (start, len) = (before, gap + len);
        }
        if let Some(after) = self.free.remove(&(start + len)) {
            len += after;
        }
        self.free.insert(start, len);
        self.available += range.len;
    }

    /// How many indices are free.
    pub(crate) fn available(&self) -> u32 {
        self.available
    }

    /// How many there are in all, index 0 included.
    pub(crate) fn capacity(&self) -> u32 {
        self.capacity
    }
}

/// Ranges that nothing points at any more, but that a program which started earlier may still be reading.
#[derive(Debug, Default)]
pub(crate) struct Quarantine {
    waiting: VecDeque<(Instant, Range)>,
}

impl Quarantine {
    /// How long a range waits. A hook runs for microseconds; this outlasts any preemption of it.
    pub(crate) const GRACE: Duration = Duration::from_secs(5);

    /// Puts a range in.
    pub(crate) fn push(&mut self, range: Range, now: Instant) {
        if range.len > 0 {
            self.waiting.push_back((now, range));
        }
    }

    /// Gives back what has waited long enough.
    pub(crate) fn drain(&mut self, allocator: &mut RangeAllocator, now: Instant) {
        while let Some((since, range)) = self.waiting.front().copied() {
            if now.saturating_duration_since(since) < Self::GRACE {
                return;
            }
            self.waiting.pop_front();
            allocator.release(range);
        }
    }

    /// Gives everything back, for a caller who has made sure that no program still runs.
    pub(crate) fn drain_all(&mut self, allocator: &mut RangeAllocator) {
        for (_, range) in self.waiting.drain(..) {
            allocator.release(range);
        }
    }

    /// Whether anything waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn index_zero_is_never_given() {
        let mut allocator = RangeAllocator::new(4);
        assert_eq!(allocator.alloc(3), Some(Range { start: 1, len: 3 }));
        assert_eq!(allocator.alloc(1), None);
    }

    #[test]
    fn a_range_is_reused_only_after_the_grace_period() {
        let mut allocator = RangeAllocator::new(4);
        let mut quarantine = Quarantine::default();
        let now = Instant::now();
        let range = allocator.alloc(3).unwrap();
        quarantine.push(range, now);
        quarantine.drain(&mut allocator, now + Quarantine::GRACE / 2);
        assert_eq!(allocator.alloc(1), None);
        quarantine.drain(&mut allocator, now + Quarantine::GRACE);
        assert!(allocator.alloc(3).is_some());
        assert!(quarantine.is_empty());
    }

    proptest! {
        #[test]
        fn ranges_never_overlap_and_nothing_is_lost(steps in prop::collection::vec((0_u8..3, 1_u32..20, 0_usize..50), 1..200)) {
            let mut allocator = RangeAllocator::new(300);
            let mut held: Vec<Range> = Vec::new();
            for (what, len, which) in steps {
                match what {
                    0 if which % 2 == 0 => held.extend(allocator.alloc(len)),
                    0 => {
                        let some = allocator.alloc_some(len);
                        prop_assert_eq!(some.is_some(), held.iter().map(|range| range.len).sum::<u32>() < 299);
                        prop_assert!(some.is_none_or(|range| (1..=len).contains(&range.len)));
                        held.extend(some);
                    }
                    1 if !held.is_empty() => {
                        let range = held.swap_remove(which % held.len());
                        allocator.release(range);
                    }
                    _ => {
                        let range = Range { start: 1 + u32::try_from(which).unwrap() * 5, len };
                        let clash = held.iter().any(|h| h.start < range.start + range.len && range.start < h.start + h.len);
                        let taken = allocator.reserve(range);
                        prop_assert_eq!(taken, !clash && range.start + range.len <= 300);
                        if taken {
                            held.push(range);
                        }
                    }
                }
                let used: u32 = held.iter().map(|range| range.len).sum();
                prop_assert_eq!(allocator.available(), 299 - used);
                let mut sorted = held.clone();
                sorted.sort_by_key(|range| range.start);
                prop_assert!(sorted.windows(2).all(|pair| pair[0].start + pair[0].len <= pair[1].start));
            }
            for range in held {
                allocator.release(range);
            }
            prop_assert_eq!(allocator.alloc(299), Some(Range { start: 1, len: 299 }));
        }
    }
}
