//! Frontends, services, extents and backends.

use crate::{NetAddr, NetPort};

/// What a client dials: the key of the frontend hash.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrontendKey {
    /// The service's address; [`NetAddr::ANY_V4`] or [`NetAddr::ANY_V6`] in scope [`Self::SCOPE_NODE`].
    pub addr: NetAddr,
    /// The service's port.
    pub port: NetPort,
    /// IP protocol number.
    pub proto: u8,
    /// [`Self::SCOPE_ADDRESS`] or [`Self::SCOPE_NODE`].
    pub scope: u8,
}

impl FrontendKey {
    /// Matches exactly its address.
    pub const SCOPE_ADDRESS: u8 = 0;
    /// Matches every address of the node: NodePorts.
    pub const SCOPE_NODE: u8 = 1;
}

/// Which service answers a frontend, and how.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct FrontendValue {
    /// Index into the service array; never 0.
    pub service: u32,
    /// `FLAG_*` bits.
    pub flags: u32,
}

impl FrontendValue {
    /// Only backends of this node may answer clients inside (internal traffic policy `Local`).
    pub const FLAG_LOCAL: u32 = 1;
    /// Only backends of this node may answer clients outside, who keep their address (external traffic policy
    /// `Local`).
    pub const FLAG_EXTERNAL_LOCAL: u32 = 2;
    /// Clients outside must be in one of the service's source ranges.
    pub const FLAG_SOURCE_RANGES: u32 = 4;
    /// Clients inside are served only where the address is this node's: an external IP that anybody could have
    /// written into a Service must not catch what pods send to its true owner.
    pub const FLAG_GUARDED: u32 = 8;
    /// Clients outside are sent on, as they are, to the node of their endpoint, which answers them itself.
    pub const FLAG_DIRECT: u32 = 16;
}

/// A frontend's value as the map holds it: one word, which says itself to which key it belongs.
///
/// A kernel may give the memory of an element that was removed to another one at once, while a program still reads it
/// (hashes without preallocation have an allocator of their own from 6.1 on). One load, and what it says of its key, tell
/// the two apart. Bits 0..32 hold the service, 32..40 the flags, 40..64 what tells the key.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrontendWord(pub u64);

impl FrontendWord {
    /// The value of this key.
    #[inline(always)]
    #[must_use]
    pub const fn new(key: &FrontendKey, value: FrontendValue) -> Self {
        Self(value.service as u64 | (value.flags as u64 & 0xff) << 32 | (print(key) as u64) << 40)
    }

    /// The value, if it is this key's.
    #[inline(always)]
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "the parts of the word are what is asked for")]
    pub const fn value_for(self, key: &FrontendKey) -> Option<FrontendValue> {
        if (self.0 >> 40) as u32 == print(key) {
            Some(FrontendValue { service: self.0 as u32, flags: (self.0 >> 32 & 0xff) as u32 })
        } else {
            None
        }
    }
}

/// A key in twenty-four bits.
#[inline(always)]
const fn print(key: &FrontendKey) -> u32 {
    let [a, b, c, d] = key.addr.0;
    let address = a ^ b.rotate_left(8) ^ c.rotate_left(16) ^ d;
    let rest = key.port.0 as u32 | (key.proto as u32) << 16 | (key.scope as u32) << 24;
    (address.wrapping_mul(0x9e37_79b1) ^ rest.wrapping_mul(0x85eb_ca6b)) >> 8
}

/// The one word that publishes a service: where its extent starts, and its affinity timeout.
///
/// Bits 0..32 hold the offset of the extent in the backend index (0: no endpoints), bits 32..64 the ClientIP
/// affinity timeout in seconds (0: none). One store of this word moves every client to the new list of backends.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct ServiceSlot(pub u64);

impl ServiceSlot {
    /// Packs a slot.
    #[must_use]
    pub const fn new(extent: u32, affinity_secs: u32) -> Self {
        Self(extent as u64 | (affinity_secs as u64) << 32)
    }

    /// Offset of the extent's header; 0 where the service has no backend.
    #[inline(always)]
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "the low half is what is asked for")]
    pub const fn extent(self) -> u32 {
        self.0 as u32
    }

    /// Seconds a client stays with its backend; 0 without affinity.
    #[inline(always)]
    #[must_use]
    pub const fn affinity_secs(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// First word of an extent: how many backend ids follow, and which of them each traffic policy allows.
///
/// Ids are ordered: those for policy `Local` only, those for both, those for policy `Cluster` only. So each policy is
/// a range: `Local` from the first up to `local`, `Cluster` from `cluster` to the end. The counts stand in the extent,
/// not beside its offset, so that a reader can never pair an old count with a new list.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct ExtentHeader(pub u64);

impl ExtentHeader {
    /// Packs a header. `cluster <= local <= all`, or `cluster == local` where none is for both.
    #[must_use]
    pub const fn new(all: u16, local: u16, cluster: u16) -> Self {
        Self(all as u64 | (local as u64) << 16 | (cluster as u64) << 32)
    }

    /// The same with a table for consistent hashing behind the ids; `kind` 0 is none, others count from the smallest of
    /// [`TABLE_SLOTS`].
    #[must_use]
    pub const fn with_table(self, kind: u16) -> Self {
        Self(self.0 & !(0xffff << 48) | (kind as u64) << 48)
    }

    /// Slots of the table for consistent hashing; 0 where there is none.
    #[inline(always)]
    #[must_use]
    pub const fn slots(self) -> u32 {
        match self.0 >> 48 {
            1 => TABLE_SLOTS[0],
            2 => TABLE_SLOTS[1],
            3 => TABLE_SLOTS[2],
            4 => TABLE_SLOTS[3],
            5 => TABLE_SLOTS[4],
            _ => 0,
        }
    }

    /// Words of the extent, this one included.
    #[must_use]
    pub const fn words(self) -> u32 {
        1 + self.all() + self.slots().div_ceil(SLOTS_PER_WORD)
    }

    /// Number of backends.
    #[inline(always)]
    #[must_use]
    pub const fn all(self) -> u32 {
        (self.0 & 0xffff) as u32
    }

    /// Number of backends of this node; they come first.
    #[inline(always)]
    #[must_use]
    pub const fn local(self) -> u32 {
        (self.0 >> 16 & 0xffff) as u32
    }

    /// Position of the first backend that policy `Cluster` allows.
    #[inline(always)]
    #[must_use]
    pub const fn cluster(self) -> u32 {
        (self.0 >> 32 & 0xffff) as u32
    }
}

/// Sizes of tables for consistent hashing: primes, so that every step visits every slot.
pub const TABLE_SLOTS: [u32; 5] = [251, 1021, 4093, 16_381, 65_521];
/// A slot is a position among the backends for policy `Cluster`, in sixteen bits.
pub const SLOTS_PER_WORD: u32 = 4;

/// One endpoint of one service. Endpoints are not shared between services, so that an id proves membership.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Backend {
    /// Address of the endpoint.
    pub addr: NetAddr,
    /// Port of the endpoint.
    pub port: NetPort,
    /// `FLAG_*` bits; 0 once no policy sends anybody there.
    pub flags: u16,
    /// The service it belongs to.
    pub service: u32,
}

impl Backend {
    /// Policy `Cluster` may send new connections and datagrams there.
    pub const FLAG_CLUSTER: u16 = 1;
    /// Policy `Local` may.
    pub const FLAG_LOCAL: u16 = 2;
}

/// Counters of one service on one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ServiceStats {
    /// Connections (or datagram peers) sent to a backend.
    pub forwarded: u64,
    /// Connections refused because no backend was usable.
    pub refused: u64,
    /// Connections that session affinity sent to the backend of the one before.
    pub affinity_hits: u64,
    /// Datagrams whose socket had a backend that is gone, and that went to a live one.
    pub healed: u64,
    /// Connections from outside.
    pub external: u64,
    /// Packets from outside that a source range forbade.
    pub denied: u64,
    /// Packets from clients outside to backends.
    pub packets_in: u64,
    /// Their bytes.
    pub bytes_in: u64,
    /// Packets from backends to clients outside.
    pub packets_out: u64,
    /// Their bytes.
    pub bytes_out: u64,
    /// Connections from outside that were open, and not known here any more.
    pub found_again: u64,
}

/// Counters of one backend, of all CPUs together: nobody has so many CPUs that hundreds of thousands of endpoints should
/// have a counter for each.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct BackendStats {
    /// Connections (or datagram peers) sent there since the id was given.
    pub connections: u64,
}

/// Counters stand in blocks of so many.
pub const COUNTER_BLOCK: u32 = 64;

/// Where a backend's counter stands. A service's backends have ids one after the other, and are used at once on every CPU:
/// so neighbours stand in different cache lines of a block, of eight counters each.
#[inline(always)]
#[must_use]
pub const fn counter_of(backend: u32) -> u32 {
    backend & !(COUNTER_BLOCK - 1) | (backend & 7) << 3 | backend >> 3 & 7
}

/// Bytes of a service's name.
pub const NAME_BYTES: usize = 160;

/// Bytes of a name that needs no element of its own.
pub const SHORT_NAME_BYTES: usize = 56;

/// How names end; in a short one, a byte stands for each, by its place from 1 on.
const ENDINGS: [&str; 6] = ["/TCP/IPv4", "/UDP/IPv4", "/SCTP/IPv4", "/TCP/IPv6", "/UDP/IPv6", "/SCTP/IPv6"];

/// What people call a service, filled with zeros; for longer names [`Self::LONG`], and they stand in a hash.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShortName(pub [u8; SHORT_NAME_BYTES]);

impl ShortName {
    /// No name.
    pub const NONE: Self = Self([0; SHORT_NAME_BYTES]);
    /// The name stands in the hash of long names; no text has this byte.
    pub const LONG: Self = Self([0xff; SHORT_NAME_BYTES]);

    /// Packs a name; nothing for one that is too long, or has bytes that no name has.
    #[must_use]
    pub fn new(text: &str) -> Option<Self> {
        if text.bytes().any(|byte| byte < b' ') {
            return None;
        }
        let known = (1_u8..).zip(ENDINGS).find_map(|(code, ending)| Some((text.strip_suffix(ending)?, code)));
        let (start, code) = known.unwrap_or((text, 0));
        let mut bytes = [0; SHORT_NAME_BYTES];
        bytes.get_mut(..start.len())?.copy_from_slice(start.as_bytes());
        if code != 0 {
            *bytes.get_mut(start.len())? = code;
        }
        Some(Self(bytes))
    }

    /// The name, in two parts; nothing where there is none, or something else than text.
    #[must_use]
    pub fn text(&self) -> Option<(&str, &'static str)> {
        let len = self.0.iter().position(|byte| *byte < b' ').unwrap_or(SHORT_NAME_BYTES);
        let code = usize::from(self.0.get(len).copied().unwrap_or_default());
        let ending = code.checked_sub(1).and_then(|place| ENDINGS.get(place).copied()).unwrap_or_default();
        let start = core::str::from_utf8(&self.0[..len]).ok()?;
        (len + code > 0).then_some((start, ending))
    }
}

/// What people call a service: `namespace/name:port/protocol/family`, cut and filled with zeros.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceName(pub [u8; NAME_BYTES]);

impl ServiceName {
    /// Packs a name; what is too long is cut.
    #[must_use]
    pub fn new(text: &str) -> Self {
        let mut bytes = [0; NAME_BYTES];
        for (to, from) in bytes.iter_mut().zip(text.bytes()) {
            *to = from;
        }
        Self(bytes)
    }

    /// The name; `?` where the bytes are no text.
    #[must_use]
    pub fn text(&self) -> &str {
        let len = self.0.iter().position(|byte| *byte == 0).unwrap_or(NAME_BYTES);
        core::str::from_utf8(&self.0[..len]).unwrap_or("?")
    }
}

/// Data of the source-range trie: the service, then the client's address, as far as the prefix goes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceRange {
    /// Service id, in network order: the trie compares bits from the first byte on.
    pub service: u32,
    /// First address of the range, in its mapped form.
    pub addr: NetAddr,
}

impl SourceRange {
    /// Bits in front of the address.
    pub const SERVICE_BITS: u32 = 32;
    /// Bits of a whole key.
    pub const ALL_BITS: u32 = 160;
}

const _: () = assert!(size_of::<FrontendKey>() == 20 && align_of::<FrontendKey>() == 4);
const _: () = assert!(size_of::<FrontendValue>() == 8);
const _: () = assert!(size_of::<FrontendWord>() == 8 && align_of::<FrontendWord>() == 8);
const _: () = assert!(size_of::<ShortName>() == 56);
const _: () = assert!(size_of::<ServiceSlot>() == 8 && align_of::<ServiceSlot>() == 8);
const _: () = assert!(size_of::<ExtentHeader>() == 8 && align_of::<ExtentHeader>() == 8);
// The kernel rounds array elements up to eight bytes; 24 keeps the mapped stride equal to the size.
const _: () = assert!(size_of::<Backend>() == 24 && align_of::<Backend>() == 4);
const _: () = assert!(size_of::<ServiceStats>() == 88);
const _: () = assert!(size_of::<BackendStats>() == 8);
const _: () = assert!(size_of::<SourceRange>() == 20 && align_of::<SourceRange>() == 4);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frontends_word_answers_for_its_key_alone() {
        let key = FrontendKey {
            addr: NetAddr::from_v4_word(u32::from_ne_bytes([10, 96, 0, 1])),
            port: NetPort::from_host(80),
            proto: 6,
            scope: FrontendKey::SCOPE_ADDRESS,
        };
        let value = FrontendValue { service: u32::MAX, flags: 0xff };
        let word = FrontendWord::new(&key, value);
        assert_eq!(word.value_for(&key), Some(value));
        let mut others = [key; 8];
        others[0].addr = NetAddr::from_v4_word(u32::from_ne_bytes([10, 96, 0, 2]));
        others[1].port = NetPort::from_host(81);
        others[2].proto = 17;
        others[3].scope = FrontendKey::SCOPE_NODE;
        (others[4].addr, others[4].port) = (others[0].addr, NetPort::from_host(83));
        others[5].addr.0[0] = 1;
        others[6].addr.0[1] = 1;
        others[7].addr.0[2] = 1;
        for other in others {
            assert_eq!(word.value_for(&other), None, "{other:?}");
        }
    }

    #[test]
    fn names_are_short_long_or_none() {
        let name = ShortName::new("default/web:80/TCP/IPv4").unwrap();
        assert_eq!(name.text(), Some(("default/web:80", "/TCP/IPv4")));
        assert_eq!(ShortName::new("default/web:80/SCTP/IPv6").unwrap().text().unwrap().1, "/SCTP/IPv6");
        let long = [b'x'; SHORT_NAME_BYTES + 1];
        let longest = core::str::from_utf8(&long[1..]).unwrap();
        assert_eq!(ShortName::new(longest).unwrap().text(), Some((longest, "")));
        assert_eq!(ShortName::new(core::str::from_utf8(&long).unwrap()), None);
        assert_eq!(ShortName::new("web\u{1}"), None, "a byte that stands for an ending");
        assert_eq!((ShortName::NONE.text(), ShortName::LONG.text()), (None, None));
    }
}
