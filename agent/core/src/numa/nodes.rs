//! Sets of NUMA nodes.

use std::fmt;

/// NUMA nodes by number, below 64; the kernel's limit where one is set is far above, machines are far below.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Nodes(u64);

impl FromIterator<u32> for Nodes {
    fn from_iter<T: IntoIterator<Item = u32>>(numbers: T) -> Self {
        let bits = numbers.into_iter().filter_map(|number| 1_u64.checked_shl(number));
        Self(bits.fold(0, |all, bit| all | bit))
    }
}

impl Nodes {
    /// How many.
    pub fn len(self) -> usize {
        self.iter().count()
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether a node is in it.
    pub fn contains(self, node: u32) -> bool {
        1_u64.checked_shl(node).is_some_and(|bit| self.0 & bit != 0)
    }

    /// In rising order.
    pub fn iter(self) -> impl Iterator<Item = u32> {
        (0..u64::BITS).filter(move |node| self.contains(*node))
    }

    /// What is in both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// What is in either.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of it is in the other.
    pub fn is_subset(self, other: Self) -> bool {
        self.0 & !other.0 == 0
    }

    /// Every set of some of these, in the order of their numbers.
    pub fn subsets(self) -> impl Iterator<Item = Self> {
        let mut last = 0_u64;
        std::iter::from_fn(move || {
            // Counts within the bits of this set: those between them are skipped by the borrow.
            last = last.wrapping_sub(self.0) & self.0;
            (last != 0).then_some(Self(last))
        })
    }

    /// Whether it has fewer nodes than the other, or as many with lower numbers.
    pub fn is_narrower(self, other: Self) -> bool {
        (self.len(), self.0) < (other.len(), other.0)
    }
}

impl fmt::Display for Nodes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.iter().collect::<crate::cpus::CpuSet>().fmt(f)
    }
}

impl fmt::Debug for Nodes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{{self}}}")
    }
}
