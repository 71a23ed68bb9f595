//! Frames for BPF_PROG_TEST_RUN: built with every checksum right, and read back with every checksum looked at.

use std::net::{IpAddr, SocketAddr};

const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;

/// TCP's flags.
pub const SYN: u8 = 2;
/// An acknowledgement.
pub const ACK: u8 = 16;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carried {
    /// TCP with these flags.
    Tcp(u8),
    /// UDP.
    Udp,
    /// UDP without a checksum, as IPv4 allows.
    UdpUnchecked,
    /// SCTP, whose checksum covers no address.
    Sctp,
}

/// A frame's ends, as its headers say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// Source.
    pub from: SocketAddr,
    /// Destination.
    pub to: SocketAddr,
    /// Hops that are left.
    pub hops: u8,
}

/// A frame between two addresses.
pub fn frame(from: SocketAddr, to: SocketAddr, carried: Carried, payload: &[u8]) -> Vec<u8> {
    let mut l4 = Vec::new();
    l4.extend(from.port().to_be_bytes());
    l4.extend(to.port().to_be_bytes());
    let (proto, checksum) = match carried {
        Carried::Tcp(flags) => {
            l4.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 0x20, 0, 0, 0, 0, 0]);
            (TCP, Some(16))
        }
        Carried::Udp | Carried::UdpUnchecked => {
            l4.extend(u16::try_from(8 + payload.len()).unwrap_or(u16::MAX).to_be_bytes());
            l4.extend([0, 0]);
            (UDP, (carried == Carried::Udp).then_some(6))
        }
        Carried::Sctp => {
            // Tag, and a checksum that nobody here computes; a DATA chunk's head.
            l4.extend([1, 2, 3, 4, 5, 6, 7, 8, 0, 3, 0, 16]);
            (SCTP, None)
        }
    };
    l4.extend(payload);
    if let Some(at) = checksum {
        let sum = fold(sum(&l4, pseudo(from.ip(), to.ip(), proto, l4.len())));
        l4[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    }
    network(from.ip(), to.ip(), proto, &l4)
}

/// An ICMP error that a speaker sends about the start of a frame; `kind` and `code` of its family.
pub fn error(speaker: IpAddr, about: &[u8], kind: u8, code: u8) -> Vec<u8> {
    let (ends, v4) = (read(about), speaker.is_ipv4());
    let to = ends.map_or(speaker, |ends| ends.from.ip());
    let mut l4 = vec![kind, code, 0, 0, 0, 0, 0x05, 0x14];
    l4.extend(&about[14..about.len().min(14 + 64)]);
    let proto = if v4 { 1 } else { 58 };
    let start = if v4 { 0 } else { pseudo(speaker, to, proto, l4.len()) };
    let sum = fold(sum(&l4, start));
    l4[2..4].copy_from_slice(&sum.to_be_bytes());
    network(speaker, to, proto, &l4)
}

/// What an ICMP error quotes, as a frame of its own.
pub fn quoted(error: &[u8]) -> Vec<u8> {
    let skipped = if is_v4(error) { 14 + 20 + 8 } else { 14 + 40 + 8 };
    let mut frame = error[..14].to_vec();
    frame.extend(&error[skipped.min(error.len())..]);
    frame
}

/// The frame's ends; nothing for what is no IP, or too short.
pub fn read(frame: &[u8]) -> Option<Ends> {
    let ip = frame.get(14..)?;
    let (from, to, hops, proto, l4): (IpAddr, IpAddr, u8, u8, &[u8]) = if is_v4(frame) {
        let (from, to): ([u8; 4], [u8; 4]) =
            (ip.get(12..16)?.try_into().ok()?, ip.get(16..20)?.try_into().ok()?);
        (from.into(), to.into(), ip[8], ip[9], ip.get(20..)?)
    } else {
        let (from, to): ([u8; 16], [u8; 16]) =
            (ip.get(8..24)?.try_into().ok()?, ip.get(24..40)?.try_into().ok()?);
        (from.into(), to.into(), ip[7], ip[6], ip.get(40..)?)
    };
    let port = |at: usize| Some(u16::from_be_bytes(l4.get(at..at + 2)?.try_into().ok()?));
    let (source, destination) = if matches!(proto, 1 | 58) { (0, 0) } else { (port(0)?, port(2)?) };
    Some(Ends { from: SocketAddr::new(from, source), to: SocketAddr::new(to, destination), hops })
}

/// Whether every checksum of the frame is right.
pub fn is_sound(frame: &[u8]) -> bool {
    let Some(ends) = read(frame) else {
        return false;
    };
    let v4 = is_v4(frame);
    let (proto, l4) = if v4 { (frame[23], &frame[34..]) } else { (frame[20], &frame[54..]) };
    if v4 && fold(sum(&frame[14..34], 0)) != 0 {
        return false;
    }
    let start = match proto {
        1 => 0,
        SCTP => return true,
        UDP if l4[6..8] == [0, 0] => return v4,
        _ => pseudo(ends.from.ip(), ends.to.ip(), proto, l4.len()),
    };
    fold(sum(l4, start)) == 0
}

fn is_v4(frame: &[u8]) -> bool {
    frame.get(14).is_some_and(|byte| byte >> 4 == 4)
}

fn network(from: IpAddr, to: IpAddr, proto: u8, l4: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    let len = u16::try_from(l4.len()).unwrap_or(u16::MAX);
    if let (IpAddr::V4(from), IpAddr::V4(to)) = (from, to) {
        frame.extend([0x08, 0x00]);
        let mut header = vec![0x45, 0];
        header.extend((len + 20).to_be_bytes());
        header.extend([0, 1, 0, 0, 64, proto, 0, 0]);
        header.extend(from.octets());
        header.extend(to.octets());
        let check = fold(sum(&header, 0));
        header[10..12].copy_from_slice(&check.to_be_bytes());
        frame.extend(header);
    } else {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend(len.to_be_bytes());
        frame.extend([proto, 64]);
        frame.extend(octets(from));
        frame.extend(octets(to));
    }
    frame.extend(l4);
    frame
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn pseudo(from: IpAddr, to: IpAddr, proto: u8, len: usize) -> u32 {
    let start = u32::from(proto) + u32::try_from(len).unwrap_or(0);
    sum(&octets(to), sum(&octets(from), start))
}

fn sum(bytes: &[u8], start: u32) -> u32 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    words.fold(start, |sum, word| sum + word)
}

fn fold(mut sum: u32) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}
