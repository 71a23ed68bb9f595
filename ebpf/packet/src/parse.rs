//! Headers of a packet: where they are, and changing them with their checksums.

use ebpf_common::{NetAddr, NetPort};

/// A packet's bytes, as the kernel's helpers or a test's vector give them. Offsets count from the frame's start.
pub trait Packet {
    /// Reads bytes; nothing where the packet ends before.
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;
    /// Replaces bytes.
    fn store<const N: usize>(&mut self, offset: u32, bytes: &[u8; N]) -> Option<()>;
    /// Accounts for replaced words in the checksum of an IPv4 header.
    fn fix_header(&mut self, checksum: u32, by: Difference) -> Option<()>;
    /// Accounts for replaced words in a transport checksum.
    fn fix_transport(&mut self, checksum: u32, by: Difference, fix: Fix) -> Option<()>;
}

/// What kind of change a transport checksum sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fix {
    /// They stand in the pseudo header.
    pub pseudo: bool,
    /// A checksum of zero means that there is none (UDP).
    pub may_be_absent: bool,
}

/// `EtherType` of IPv4, in host order.
pub const ETHERTYPE_V4: u16 = 0x0800;
/// `EtherType` of IPv6, in host order.
pub const ETHERTYPE_V6: u16 = 0x86dd;
/// Bytes of an Ethernet header.
pub const ETHERNET: u32 = 14;

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const SCTP: u8 = 132;
pub(crate) const ICMP: u8 = 1;
pub(crate) const ICMP_V6: u8 = 58;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;
/// Extension headers that are skipped, at most.
const EXTENSIONS: usize = 4;
/// TCP's flags.
pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const ACK: u8 = 16;

/// Which part of a packet this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All of it.
    Whole,
    /// The first fragment, which has the ports.
    First,
    /// A later one, which has none.
    Later,
}

/// What a packet's headers say.
#[derive(Clone, Copy, Debug)]
pub struct Headers {
    /// Source address.
    pub src: NetAddr,
    /// Destination address.
    pub dst: NetAddr,
    /// Source port; 0 in later fragments and protocols without ports.
    pub src_port: NetPort,
    /// Destination port.
    pub dst_port: NetPort,
    /// Where the network header starts.
    pub network: u32,
    /// Where the transport header starts.
    pub transport: u32,
    /// Identification of a packet in fragments.
    pub id: u32,
    /// Bytes from the network header on.
    pub len: u32,
    /// IPv4.
    pub v4: bool,
    /// IP protocol number.
    pub proto: u8,
    /// TCP's flags, 0 elsewhere.
    pub flags: u8,
    /// Hops that are left.
    pub hops: u8,
    /// Whole, or which fragment.
    pub part: Part,
}

/// Reads the headers at `network`. `quoted` stands for a packet inside an ICMP error, of which little may be there.
#[inline(always)]
pub fn parse<P: Packet>(packet: &P, network: u32, ethertype: u16, quoted: bool) -> Option<Headers> {
    let mut headers = match ethertype {
        ETHERTYPE_V4 => parse_v4(packet, network)?,
        ETHERTYPE_V6 => parse_v6(packet, network)?,
        _ => return None,
    };
    if headers.part != Part::Later && matches!(headers.proto, TCP | UDP | SCTP) {
        let ports = if headers.proto == TCP && !quoted {
            let start = packet.load::<14>(headers.transport)?;
            headers.flags = start[13];
            [start[0], start[1], start[2], start[3]]
        } else {
            packet.load::<4>(headers.transport)?
        };
        headers.src_port = NetPort(u16::from_ne_bytes([ports[0], ports[1]]));
        headers.dst_port = NetPort(u16::from_ne_bytes([ports[2], ports[3]]));
    }
    Some(headers)
}

/// The protocol that the network header names; an extension header of IPv6 counts as one.
#[inline(always)]
pub(crate) fn protocol_of<P: Packet>(packet: &P, network: u32, ethertype: u16) -> Option<u8> {
    let at = if ethertype == ETHERTYPE_V4 { 9 } else { 6 };
    packet.load::<1>(network + at).map(|[proto]| proto)
}

#[inline(always)]
fn parse_v4<P: Packet>(packet: &P, network: u32) -> Option<Headers> {
    let b = packet.load::<20>(network)?;
    let words = u32::from(b[0] & 15);
    if b[0] >> 4 != 4 || words < 5 {
        return None;
    }
    let fragment = u16::from_be_bytes([b[6], b[7]]);
    let (offset, more) = (fragment & 0x1fff, fragment & 0x2000 != 0);
    Some(Headers {
        src: NetAddr::from_v4_word(u32::from_ne_bytes([b[12], b[13], b[14], b[15]])),
        dst: NetAddr::from_v4_word(u32::from_ne_bytes([b[16], b[17], b[18], b[19]])),
        src_port: NetPort(0),
        dst_port: NetPort(0),
        network,
        transport: network + words * 4,
        id: u32::from(u16::from_ne_bytes([b[4], b[5]])),
        len: u32::from(u16::from_be_bytes([b[2], b[3]])),
        v4: true,
        proto: b[9],
        flags: 0,
        hops: b[8],
        part: part(offset, more),
    })
}

#[inline(always)]
fn parse_v6<P: Packet>(packet: &P, network: u32) -> Option<Headers> {
    let b = packet.load::<8>(network)?;
    if b[0] >> 4 != 6 {
        return None;
    }
    let mut headers = Headers {
        src: NetAddr::from_octets(packet.load::<16>(network + 8)?),
        dst: NetAddr::from_octets(packet.load::<16>(network + 24)?),
        src_port: NetPort(0),
        dst_port: NetPort(0),
        network,
        transport: network + 40,
        id: 0,
        len: 40 + u32::from(u16::from_be_bytes([b[4], b[5]])),
        v4: false,
        proto: b[6],
        flags: 0,
        hops: b[7],
        part: Part::Whole,
    };
    let mut index = 0;
    while index < EXTENSIONS {
        match headers.proto {
            HOP_BY_HOP | ROUTING | DESTINATION => {
                let [next, len] = packet.load::<2>(headers.transport)?;
                headers.proto = next;
                headers.transport += (u32::from(len) + 1) * 8;
            }
            FRAGMENT => {
                let f = packet.load::<8>(headers.transport)?;
                headers.proto = f[0];
                let word = u16::from_be_bytes([f[2], f[3]]);
                headers.part = part(word >> 3, word & 1 != 0);
                headers.id = u32::from_ne_bytes([f[4], f[5], f[6], f[7]]);
                headers.transport += 8;
                if headers.part == Part::Later {
                    return Some(headers);
                }
            }
            _ => return Some(headers),
        }
        index += 1;
    }
    None
}

const fn part(offset: u16, more: bool) -> Part {
    match (offset, more) {
        (0, false) => Part::Whole,
        (0, true) => Part::First,
        _ => Part::Later,
    }
}

/// Where a header's transport checksum stands, if the packet has one that covers addresses and ports.
#[inline(always)]
pub(crate) fn checksum_of(headers: &Headers) -> Option<(u32, bool)> {
    if headers.part == Part::Later {
        return None;
    }
    match headers.proto {
        TCP => Some((headers.transport + 16, false)),
        // With IPv6 it is always there; the flag also makes a sum of zero 0xffff, as zero would say that there is none.
        UDP => Some((headers.transport + 6, true)),
        ICMP_V6 => Some((headers.transport + 2, false)),
        _ => None,
    }
}

/// What replacing words makes of a sum over them, as RFC 1624 has it. All in the order in which they stand in the packet; half
/// words in the low half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference(u64);

impl Difference {
    /// Nothing is replaced.
    pub const NONE: Self = Self(0);

    /// One more word is. No packet has so many that they would not fit.
    #[inline(always)]
    #[must_use]
    pub const fn replace(self, from: u32, to: u32) -> Self {
        Self(self.0 + !from as u64 + to as u64)
    }

    /// As the sum of one word.
    #[inline(always)]
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "two folds leave 32 bits")]
    pub const fn word(self) -> u32 {
        let once = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        ((once & 0xffff_ffff) + (once >> 32)) as u32
    }
}

/// A checksum after that.
#[inline(always)]
#[must_use]
pub const fn adjusted(checksum: u16, by: Difference) -> u16 {
    let word = by.word();
    let mut sum = !checksum as u32;
    sum += (word & 0xffff) + (word >> 16);
    // Three half words: two folds leave sixteen bits.
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    #[allow(clippy::cast_possible_truncation, reason = "folded to sixteen bits")]
    let folded = sum as u16;
    !folded
}

/// Counts a hop down.
#[inline(always)]
pub(crate) fn count_hop<P: Packet>(packet: &mut P, headers: &Headers) -> Option<()> {
    let left = headers.hops.wrapping_sub(1);
    if !headers.v4 {
        return packet.store(headers.network + 7, &[left]);
    }
    let word = |hops: u8| u32::from(u16::from_ne_bytes([hops, headers.proto]));
    let by = Difference::NONE.replace(word(headers.hops), word(left));
    packet.fix_header(headers.network + 10, by)?;
    packet.store(headers.network + 8, &[left])
}

/// Gives the frame another link's addresses.
#[inline(always)]
#[allow(clippy::many_single_char_names, reason = "one store of both addresses; a copy of slices could panic")]
pub(crate) fn set_link<P: Packet>(packet: &mut P, to: &[u8; 6], from: &[u8; 6]) -> Option<()> {
    let [a, b, c, d, e, f] = *to;
    let [g, h, i, j, k, l] = *from;
    packet.store(0, &[a, b, c, d, e, f, g, h, i, j, k, l])
}

/// Which end of a packet is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Source,
    Destination,
}

/// Replaces an address, in the header and in the checksums that cover it: the IPv4 header's own, and `transport`'s.
#[inline(always)]
pub(crate) fn set_address<P: Packet>(
    packet: &mut P,
    headers: &Headers,
    end: End,
    new: &NetAddr,
    transport: Option<(u32, Fix)>,
) -> Option<()> {
    let old = if end == End::Source { headers.src } else { headers.dst };
    if old == *new {
        return Some(());
    }
    if headers.v4 {
        let at = headers.network + if end == End::Source { 12 } else { 16 };
        let (from, to) = (old.v4_word(), new.v4_word());
        let by = Difference::NONE.replace(from, to);
        if let Some((checksum, fix)) = transport {
            packet.fix_transport(checksum, by, fix)?;
        }
        packet.fix_header(headers.network + 10, by)?;
        return packet.store(at, &to.to_ne_bytes());
    }
    let at = headers.network + if end == End::Source { 8 } else { 24 };
    if let Some((checksum, fix)) = transport {
        packet.fix_transport(checksum, replaced(Difference::NONE, &old, new), fix)?;
    }
    packet.store(at, &new.octets())
}

/// An address for another.
#[inline(always)]
#[allow(clippy::many_single_char_names, reason = "the words of two addresses; a loop would index")]
fn replaced(by: Difference, old: &NetAddr, new: &NetAddr) -> Difference {
    let ([a, b, c, d], [e, f, g, h]) = (old.0, new.0);
    by.replace(a, e).replace(b, f).replace(c, g).replace(d, h)
}

/// Source and destination as one: addresses stand beside each other, and so do ports, and each helper of the kernel takes its time.
#[inline(always)]
#[allow(clippy::many_single_char_names, reason = "one store of both; a copy of slices could panic")]
pub(crate) fn set_ends<P: Packet>(
    packet: &mut P,
    headers: &Headers,
    source: (&NetAddr, NetPort),
    destination: (&NetAddr, NetPort),
) -> Option<()> {
    let checksum = checksum_of(headers);
    let (from, to) = ((headers.src, headers.dst), (*source.0, *destination.0));
    if from != to {
        // Neither family's address stands in the other's place.
        let by = replaced(replaced(Difference::NONE, &from.0, &to.0), &from.1, &to.1);
        if let Some((checksum, may_be_absent)) = checksum {
            packet.fix_transport(checksum, by, Fix { pseudo: true, may_be_absent })?;
        }
        if headers.v4 {
            packet.fix_header(headers.network + 10, by)?;
            let ([a, b, c, d], [e, f, g, h]) = (to.0.v4_word().to_ne_bytes(), to.1.v4_word().to_ne_bytes());
            packet.store(headers.network + 12, &[a, b, c, d, e, f, g, h])?;
        } else {
            packet.store(headers.network + 8, &to.0.octets())?;
            packet.store(headers.network + 24, &to.1.octets())?;
        }
    }
    let ports = |source: NetPort, destination: NetPort| {
        let ([a, b], [c, d]) = (source.0.to_ne_bytes(), destination.0.to_ne_bytes());
        [a, b, c, d]
    };
    let (from, to) = (ports(headers.src_port, headers.dst_port), ports(source.1, destination.1));
    if from == to || headers.part == Part::Later {
        return Some(());
    }
    if let Some((checksum, may_be_absent)) = checksum {
        let by = Difference::NONE.replace(u32::from_ne_bytes(from), u32::from_ne_bytes(to));
        packet.fix_transport(checksum, by, Fix { pseudo: false, may_be_absent })?;
    }
    packet.store(headers.transport, &to)
}

/// Replaces a port, and accounts for it in a checksum.
#[inline(always)]
pub(crate) fn set_port<P: Packet>(
    packet: &mut P,
    headers: &Headers,
    end: End,
    new: NetPort,
    checksum: Option<(u32, bool)>,
) -> Option<()> {
    let old = if end == End::Source { headers.src_port } else { headers.dst_port };
    if old == new || headers.part == Part::Later {
        return Some(());
    }
    if let Some((checksum, may_be_absent)) = checksum {
        let by = Difference::NONE.replace(u32::from(old.0), u32::from(new.0));
        packet.fix_transport(checksum, by, Fix { pseudo: false, may_be_absent })?;
    }
    let at = headers.transport + if end == End::Source { 0 } else { 2 };
    packet.store(at, &new.0.to_ne_bytes())
}
