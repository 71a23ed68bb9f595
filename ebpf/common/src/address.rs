//! Addresses, ports and protocols in the order in which they stand on the wire.

/// An IPv6 address, or an IPv4 one in its v4-mapped form (`::ffff:a.b.c.d`), as four words in network order.
///
/// One form for both families is what the kernel itself uses for v4 peers of v6 sockets, so both hooks of a pair
/// share one path and one map.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct NetAddr(pub [u32; 4]);

/// A port in network order.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct NetPort(pub u16);

/// Transport protocols that services know here, by their IP protocol number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Protocol {
    /// TCP (MPTCP sockets count as TCP).
    Tcp = 6,
    /// UDP.
    Udp = 17,
    /// SCTP: only on packets, sockets of it have no hooks.
    Sctp = 132,
}

const MAPPED_PREFIX: u32 = 0x0000_ffff_u32.to_be();

impl NetAddr {
    /// `0.0.0.0`: the key of frontends that listen on every IPv4 address of the node.
    pub const ANY_V4: Self = Self([0, 0, MAPPED_PREFIX, 0]);
    /// `127.0.0.1`: stands for all of 127.0.0.0/8 among the node's addresses.
    pub const LOOPBACK_V4: Self = Self([0, 0, MAPPED_PREFIX, u32::from_ne_bytes([127, 0, 0, 1])]);
    /// `::1`.
    pub const LOOPBACK_V6: Self = Self([0, 0, 0, 1_u32.to_be()]);
    /// `::`: the key of frontends that listen on every IPv6 address of the node.
    pub const ANY_V6: Self = Self([0; 4]);

    /// The v4-mapped form of an IPv4 address given as a word in network order.
    #[inline(always)]
    #[must_use]
    pub const fn from_v4_word(word: u32) -> Self {
        Self([0, 0, MAPPED_PREFIX, word])
    }

    /// From the sixteen bytes of an IPv6 address.
    #[must_use]
    pub const fn from_octets(octets: [u8; 16]) -> Self {
        let o = octets;
        Self([
            u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
            u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
            u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
            u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
        ])
    }

    /// The sixteen bytes of the IPv6 form.
    #[must_use]
    pub const fn octets(self) -> [u8; 16] {
        let [a, b, c, d] = [
            self.0[0].to_ne_bytes(),
            self.0[1].to_ne_bytes(),
            self.0[2].to_ne_bytes(),
            self.0[3].to_ne_bytes(),
        ];
        [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]]
    }

    /// Whether this is an IPv4 address in its mapped form.
    #[inline(always)]
    #[must_use]
    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == MAPPED_PREFIX
    }

    /// The IPv4 word in network order; meaningful only where [`Self::is_v4`] holds.
    #[inline(always)]
    #[must_use]
    pub const fn v4_word(&self) -> u32 {
        self.0[3]
    }

    /// Whether a connection to it stays in the caller's network namespace: 127.0.0.0/8, 0.0.0.0, `::1`, `::`.
    #[inline(always)]
    #[must_use]
    pub const fn is_loopback(&self) -> bool {
        if self.is_v4() {
            let first = self.0[3].to_ne_bytes()[0];
            return first == 127 || self.0[3] == 0;
        }
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == 0 && (self.0[3] == 0 || self.0[3] == 1_u32.to_be())
    }
}

impl NetPort {
    /// From a port number in host order.
    #[inline(always)]
    #[must_use]
    pub const fn from_host(port: u16) -> Self {
        Self(port.to_be())
    }

    /// The port number in host order.
    #[inline(always)]
    #[must_use]
    pub const fn to_host(self) -> u16 {
        u16::from_be(self.0)
    }
}

impl Protocol {
    /// The number that stands in keys.
    #[inline(always)]
    #[must_use]
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// The protocol of this number, if services know it.
    #[inline(always)]
    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            132 => Some(Self::Sctp),
            _ => None,
        }
    }

    /// As the API writes it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }
}

#[cfg(feature = "user")]
mod convert {
    use core::net::{IpAddr, Ipv6Addr};

    use super::NetAddr;

    impl From<IpAddr> for NetAddr {
        fn from(address: IpAddr) -> Self {
            let v6 = match address {
                IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                IpAddr::V6(v6) => v6,
            };
            Self::from_octets(v6.octets())
        }
    }

    impl From<NetAddr> for IpAddr {
        fn from(address: NetAddr) -> Self {
            Ipv6Addr::from(address.octets()).to_canonical()
        }
    }
}

const _: () = assert!(size_of::<NetAddr>() == 16 && align_of::<NetAddr>() == 4);
const _: () = assert!(size_of::<NetPort>() == 2);
