//! What rules are made of: loads into registers, comparisons, lookups, verdicts.
//!
//! Names and numbers are those of linux/netfilter/nf_tables.h. Registers are the sixteen of four bytes; a key of several
//! fields lies in consecutive ones, each field padded to four bytes, as `nft` lays out its concatenations.

use super::{
    TABLE,
    attributes::Attributes,
    wire::{Message, flag, kind},
};

/// `NFT_REG32_00`.
const FIRST_REGISTER: u32 = 8;
/// `IPS_DST_NAT`.
const DST_NAT: u32 = 1 << 5;
/// `RTN_LOCAL` of linux/rtnetlink.h.
const ROUTE_LOCAL: u32 = 2;
/// `NF_DROP`, `NFT_JUMP`, `NFT_RETURN`.
const DROP: i32 = 0;
pub(super) const JUMP: i32 = -3;
const RETURN: i32 = -5;

/// What `meta` loads.
#[derive(Debug, Clone, Copy)]
pub(super) enum Meta {
    Mark = 3,
    InputName = 6,
    Family = 15,
    Protocol = 16,
}

/// Address family of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    V4 = 2,
    V6 = 10,
}

impl Family {
    /// Bytes of an address.
    pub(super) fn length(self) -> u32 {
        match self {
            Family::V4 => 4,
            Family::V6 => 16,
        }
    }

    /// Where source and destination are in the header.
    fn offsets(self) -> (u32, u32) {
        match self {
            Family::V4 => (12, 16),
            Family::V6 => (8, 24),
        }
    }
}

/// A rule in the making.
#[derive(Debug, Clone, Default)]
pub(super) struct Rule {
    expressions: Attributes,
}

impl Rule {
    /// The message that appends it to a chain.
    pub(super) fn append_to(&self, chain: &str) -> Message {
        let mut message = Message::nft(kind::NEW_RULE, flag::CREATE | flag::APPEND);
        message.body.text(1, TABLE).text(2, chain).nest(4, |list| list.0.extend(&self.expressions.0));
        message
    }

    /// Its expressions.
    pub(super) fn expressions(&self) -> &Attributes {
        &self.expressions
    }

    /// Loads a fact about the packet.
    pub(super) fn meta(self, register: u32, key: Meta) -> Self {
        self.push("meta", |data| {
            data.be32(1, FIRST_REGISTER + register).be32(2, key as u32);
        })
    }

    /// Sets bits of the packet's mark.
    pub(super) fn set_mark_bits(self, bits: u32) -> Self {
        self.meta(0, Meta::Mark)
            .push("bitwise", |data| {
                data.be32(1, FIRST_REGISTER).be32(2, FIRST_REGISTER).be32(3, 4);
                value(data, 4, &(!bits).to_ne_bytes());
                value(data, 5, &bits.to_ne_bytes());
            })
            .push("meta", |data| {
                data.be32(2, Meta::Mark as u32).be32(3, FIRST_REGISTER);
            })
    }

    /// Goes on when some of these bits of register 0 are set.
    fn any_bit(self, bits: u32) -> Self {
        self.push("bitwise", |data| {
            data.be32(1, FIRST_REGISTER).be32(2, FIRST_REGISTER).be32(3, 4);
            value(data, 4, &bits.to_ne_bytes());
            value(data, 5, &0_u32.to_ne_bytes());
        })
        .compare(0, false, &0_u32.to_ne_bytes())
    }

    /// Goes on when the mark has one of these bits.
    pub(super) fn marked(self, bits: u32) -> Self {
        self.meta(0, Meta::Mark).any_bit(bits)
    }

    /// The same, as `iptables` writes it.
    pub(super) fn marked_by_iptables(self, bits: u32) -> Self {
        self.push("match", |data| {
            data.text(1, "mark").be32(2, 1).put(3, &Self::mark_info(bits));
        })
    }

    /// `struct xt_mark_mtinfo1`: mark, mask, and not inverted; as long as the kernel pads it.
    pub(super) fn mark_info(bits: u32) -> [u8; 16] {
        let mut info = [0; 16];
        info[..4].copy_from_slice(&bits.to_ne_bytes());
        info[4..8].copy_from_slice(&bits.to_ne_bytes());
        info
    }

    /// Keeps the packet out of connection tracking.
    pub(super) fn untracked(self) -> Self {
        self.push("notrack", |_| {})
    }

    /// Ends with a verdict.
    pub(super) fn verdict_alone(self, code: i32) -> Self {
        self.verdict(code, None)
    }

    /// Goes on when the connection's destination was rewritten.
    pub(super) fn destination_rewritten(self) -> Self {
        self.push("ct", |data| {
            data.be32(1, FIRST_REGISTER).be32(2, 2);
        })
        .any_bit(DST_NAT)
    }

    /// Goes on when the destination is an address of this host.
    pub(super) fn for_this_host(self) -> Self {
        self.push("fib", |data| {
            // By destination address; the kind of address.
            data.be32(1, FIRST_REGISTER).be32(2, 3).be32(3, 2);
        })
        .compare(0, true, &ROUTE_LOCAL.to_ne_bytes())
    }

    /// Goes on for packets of a family.
    pub(super) fn family(self, family: Family) -> Self {
        self.meta(0, Meta::Family).compare(0, true, &[family as u8])
    }

    /// Loads the source address.
    pub(super) fn source(self, register: u32, family: Family) -> Self {
        self.load(register, 1, family.offsets().0, family.length())
    }

    /// Loads the destination address.
    pub(super) fn destination(self, register: u32, family: Family) -> Self {
        self.load(register, 1, family.offsets().1, family.length())
    }

    /// Loads the destination port.
    pub(super) fn destination_port(self, register: u32) -> Self {
        self.load(register, 2, 2, 2)
    }

    fn load(self, register: u32, base: u32, offset: u32, length: u32) -> Self {
        self.push("payload", |data| {
            data.be32(1, FIRST_REGISTER + register).be32(2, base).be32(3, offset).be32(4, length);
        })
    }

    /// Puts bytes into a register.
    pub(super) fn put(self, register: u32, bytes: &[u8]) -> Self {
        self.push("immediate", |data| {
            data.be32(1, FIRST_REGISTER + register);
            value(data, 2, bytes);
        })
    }

    /// Overwrites the source address with what is at a register. No connection tracking is involved.
    pub(super) fn overwrite_source(self, register: u32, family: Family) -> Self {
        self.overwrite(register, family.offsets().0, family.length())
    }

    /// Overwrites the destination address, likewise.
    pub(super) fn overwrite_destination(self, register: u32, family: Family) -> Self {
        self.overwrite(register, family.offsets().1, family.length())
    }

    /// For headers without a checksum of their own, which IPv6's is.
    fn overwrite(self, register: u32, offset: u32, length: u32) -> Self {
        self.push("payload", |data| {
            data.be32(5, FIRST_REGISTER + register).be32(2, 1).be32(3, offset).be32(4, length);
            // `NFT_PAYLOAD_L4CSUM_PSEUDOHDR`: the addresses count in the checksum of what is inside.
            data.be32(6, 0).be32(7, 0).be32(8, 1);
        })
    }

    /// Goes on when register 0 begins with the first `prefix` bits of these bytes.
    pub(super) fn in_subnet(self, network: &[u8], prefix: u8) -> Self {
        let mask: Vec<u8> = (0..network.len())
            .map(|index| {
                let bits = usize::from(prefix).saturating_sub(index * 8).min(8);
                u8::try_from(0xff00_u32 >> bits & 0xff).unwrap_or_default()
            })
            .collect();
        let length = u32::try_from(network.len()).unwrap_or_default();
        self.push("bitwise", |data| {
            data.be32(1, FIRST_REGISTER).be32(2, FIRST_REGISTER).be32(3, length);
            value(data, 4, &mask);
            value(data, 5, &vec![0; network.len()]);
        })
        .compare(0, true, network)
    }

    /// Goes on when a register holds these bytes, or does not.
    pub(super) fn compare(self, register: u32, equal: bool, bytes: &[u8]) -> Self {
        self.push("cmp", |data| {
            data.be32(1, FIRST_REGISTER + register).be32(2, u32::from(!equal));
            value(data, 3, bytes);
        })
    }

    /// Goes on when the key at register 0 is in a set.
    pub(super) fn in_set(self, set: &str) -> Self {
        self.push("lookup", |data| {
            data.text(1, set).be32(2, FIRST_REGISTER);
        })
    }

    /// Looks the key at register 0 up, goes on when it is there, and puts the map's data at register 0.
    pub(super) fn translate(self, map: &str) -> Self {
        self.push("lookup", |data| {
            data.text(1, map).be32(2, FIRST_REGISTER).be32(3, FIRST_REGISTER);
        })
    }

    /// Looks the key at register 0 up in a map of verdicts and obeys.
    pub(super) fn verdict_of(self, map: &str) -> Self {
        self.push("lookup", |data| {
            data.text(1, map).be32(2, FIRST_REGISTER).be32(3, 0);
        })
    }

    /// Rewrites the destination to the address and port that a map holds for the key at register 0.
    pub(super) fn rewrite_by(self, map: &str, family: Family) -> Self {
        let port = FIRST_REGISTER + family.length() / 4;
        self.translate(map).push("nat", |data| {
            data.be32(1, 1).be32(2, family as u32).be32(3, FIRST_REGISTER).be32(5, port);
        })
    }

    /// Gives the packet the source address of the link it leaves by.
    pub(super) fn masquerade(self) -> Self {
        self.push("masq", |_| {})
    }

    /// Goes through another chain.
    pub(super) fn jump(self, chain: &str) -> Self {
        self.verdict(JUMP, Some(chain))
    }

    /// Goes back to the calling chain.
    pub(super) fn back(self) -> Self {
        self.verdict(RETURN, None)
    }

    /// Drops the packet.
    pub(super) fn drop_packet(self) -> Self {
        self.verdict(DROP, None)
    }

    fn verdict(self, code: i32, chain: Option<&str>) -> Self {
        self.push("immediate", |data| {
            data.be32(1, 0).nest(2, |data| put_verdict(data, code, chain));
        })
    }

    fn push(mut self, name: &str, fill: impl FnOnce(&mut Attributes)) -> Self {
        self.expressions.nest(1, |element| {
            element.text(1, name).nest(2, fill);
        });
        self
    }
}

/// `NFTA_DATA_VERDICT` with a verdict.
pub(super) fn put_verdict(data: &mut Attributes, code: i32, chain: Option<&str>) {
    data.nest(2, |verdict| {
        verdict.be32(1, code.cast_unsigned());
        if let Some(chain) = chain {
            verdict.text(2, chain);
        }
    });
}

/// `NFTA_DATA_VALUE` inside an attribute.
pub(super) fn value(data: &mut Attributes, kind: u16, bytes: &[u8]) {
    data.nest(kind, |inner| {
        inner.put(1, bytes);
    });
}
