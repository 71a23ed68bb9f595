//! What the maps say about themselves.

/// The single element of the meta map, written last when maps are made: a directory without it is unfinished.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Meta {
    /// [`LAYOUT_VERSION`](crate::LAYOUT_VERSION) of whoever made the maps.
    pub layout_version: u32,
    /// Capacity of the frontend hash.
    pub frontends: u32,
    /// Capacity of the service array.
    pub services: u32,
    /// Capacity of the backend array.
    pub backends: u32,
    /// Capacity of the backend index, in words.
    pub extent_words: u32,
    /// Capacity of each map of flows from outside; 0 where those are not served.
    pub flows: u32,
}

/// What an address of this node, or of another one, is for; the value of the node-address map.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct NodeAddressUse(pub u32);

impl NodeAddressUse {
    /// The node has it.
    pub const OWN: u32 = 1;
    /// NodePorts answer there.
    pub const NODE_PORTS: u32 = 2;
    /// Every node knows it as a node's, this one's or another's: what is for a NodePort there may be sent on to the node
    /// of an endpoint as it is, and may come from the node that it was sent to.
    pub const SHARED: u32 = 4;
}

/// Lowest and highest NodePort in use, in one word: lets a connection to any other port skip the NodePort lookups.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodePortBounds(pub u64);

impl NodePortBounds {
    /// No NodePort at all. The map's initial zero means nearly the same: only port 0 lies within.
    pub const NONE: Self = Self::new(u16::MAX, 0);

    /// Bounds in host order, both included.
    #[must_use]
    pub const fn new(lowest: u16, highest: u16) -> Self {
        Self(lowest as u64 | (highest as u64) << 16)
    }

    /// The lowest port.
    #[must_use]
    pub const fn lowest(self) -> u16 {
        (self.0 & 0xffff) as u16
    }

    /// The highest port.
    #[must_use]
    pub const fn highest(self) -> u16 {
        (self.0 >> 16 & 0xffff) as u16
    }

    /// Whether a port in host order lies within.
    #[inline(always)]
    #[must_use]
    pub const fn contains(self, port: u16) -> bool {
        self.lowest() <= port && port <= self.highest()
    }
}

const _: () = assert!(size_of::<Meta>() == 24);
const _: () = assert!(size_of::<NodePortBounds>() == 8);
