//! Which device packets to an address leave by, from the kernel's main table in `/proc`: for people's questions alone.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// A route is in use.
const UP: u32 = 1;
/// A route to the machine itself, in the table of IPv6 routes.
const LOCAL: u32 = 0x8000_0000;
/// Nothing goes there.
const REJECT: u32 = 0x200;

/// Name of the device; nothing where no route leads there.
pub(super) fn device_to(address: IpAddr) -> Option<String> {
    match address {
        IpAddr::V4(v4) => v4_device(&fs::read_to_string("/proc/thread-self/net/route").ok()?, v4),
        IpAddr::V6(v6) => v6_device(&fs::read_to_string("/proc/thread-self/net/ipv6_route").ok()?, v6),
    }
}

/// Rows: device, destination, gateway, flags, three counters' worth of nothing, metric at 6, mask at 7. Addresses are
/// words as the machine stores them.
fn v4_device(table: &str, address: Ipv4Addr) -> Option<String> {
    let wanted = u32::from_ne_bytes(address.octets());
    let rows = table.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let word = |index: usize| u32::from_str_radix(fields.get(index)?, 16).ok();
        let (network, flags, mask) = (word(1)?, word(3)?, word(7)?);
        let metric: u32 = fields.get(6)?.parse().ok()?;
        let leads = flags & UP != 0 && flags & REJECT == 0 && wanted & mask == network;
        leads.then(|| (mask.count_ones(), std::cmp::Reverse(metric), fields[0].to_owned()))
    });
    rows.max().map(|(_, _, device)| device)
}

/// Rows: destination, its prefix, source, its prefix, gateway, metric, references, uses, flags, device.
fn v6_device(table: &str, address: Ipv6Addr) -> Option<String> {
    let rows = table.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let number = |index: usize| u32::from_str_radix(fields.get(index)?, 16).ok();
        let network = u128::from_str_radix(fields.first()?, 16).ok()?;
        let (bits, metric, flags) = (number(1)?, number(5)?, number(8)?);
        let kept = u128::MAX.checked_shl(128 - bits).unwrap_or(0);
        let leads = flags & UP != 0 && flags & (REJECT | LOCAL) == 0 && address.to_bits() & kept == network;
        leads.then(|| (bits, std::cmp::Reverse(metric), (*fields.get(9).unwrap_or(&"")).to_owned()))
    });
    rows.max().map(|(_, _, device)| device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_prefix_wins() {
        let table = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n\
                     eth0 00000000 0100000A 0003 0 0 100 00000000 0 0 0\n\
                     kl-pods0 0000F40A 00000000 0001 0 0 0 00FFFFFF 0 0 0\n\
                     * 0000600A 00000000 0201 0 0 0 0000F0FF 0 0 0\n";
        assert_eq!(v4_device(table, [192, 0, 2, 1].into()).as_deref(), Some("eth0"));
        assert_eq!(v4_device(table, [10, 244, 0, 9].into()).as_deref(), Some("kl-pods0"));
        let table = "20010db8000000000000000000000000 40 00000000000000000000000000000000 00 \
                     00000000000000000000000000000000 00000100 00000001 00000000 00000001 eth0\n\
                     00000000000000000000000000000000 00 00000000000000000000000000000000 00 \
                     00000000000000000000000000000000 ffffffff 00000001 00000000 00200200 lo\n";
        assert_eq!(v6_device(table, "2001:db8::5".parse().unwrap()).as_deref(), Some("eth0"));
        assert_eq!(v6_device(table, "2001:db9::5".parse().unwrap()), None);
    }
}
