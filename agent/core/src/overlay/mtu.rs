//! What fits through the underlay: the largest packet of a pod, so that what it becomes on the wire needs no fragments.

use std::net::IpAddr;

use super::node::Mode;

/// IPv6 forwards no link below it, and pods with IPv6 addresses need as much.
pub const SMALLEST: u32 = 1280;

/// Octets that the mode adds to a pod's packet on an underlay of this family.
pub fn overhead(mode: Mode, underlay: IpAddr) -> u32 {
    let outer = if underlay.is_ipv4() { 20 } else { 40 };
    match mode {
        Mode::HostGw => 0,
        // Outer IP, UDP 8, VXLAN 8, inner Ethernet 14.
        Mode::Vxlan => outer + 30,
        // Outer IP, UDP 8, WireGuard's header 16 and tag 16.
        Mode::Wireguard => outer + 40,
    }
}

/// The MTU of pods: what the underlay's device or the narrowest known path carries, less the overhead, never below
/// the smallest that works.
pub fn for_pods(mode: Mode, underlay: IpAddr, device: u32, paths: impl IntoIterator<Item = u32>) -> u32 {
    let narrowest = paths.into_iter().filter(|mtu| *mtu != 0).fold(device, u32::min);
    narrowest.saturating_sub(overhead(mode, underlay)).max(SMALLEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_narrowest_path_counts_and_the_overhead_is_taken_off() {
        let (v4, v6) = (IpAddr::from([192, 0, 2, 1]), "2001:db8::1".parse().unwrap());
        assert_eq!(for_pods(Mode::Vxlan, v4, 1500, []), 1450);
        assert_eq!(for_pods(Mode::Vxlan, v6, 1500, []), 1430);
        assert_eq!(for_pods(Mode::Wireguard, v4, 1500, []), 1440);
        assert_eq!(for_pods(Mode::HostGw, v4, 9000, []), 9000);
        assert_eq!(for_pods(Mode::Vxlan, v4, 9000, [0, 1500, 1400]), 1350);
        assert_eq!(for_pods(Mode::Vxlan, v4, 600, []), SMALLEST);
    }
}
