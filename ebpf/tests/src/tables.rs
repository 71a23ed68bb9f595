//! Service tables in few words.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use ebpf_common::Protocol;
use ebpf_loader::{
    DesiredBackend, DesiredFrontend, DesiredService, Family, Listen, Place, ServiceKey, ServiceTable,
};

/// A service on these addresses, answered by these backends.
pub fn service(protocol: Protocol, frontends: &[SocketAddr], backends: &[SocketAddr]) -> DesiredService {
    let frontend =
        |address: &SocketAddr| DesiredFrontend::new(Listen::Address(address.ip()), address.port(), protocol);
    let backend = |address: &SocketAddr| DesiredBackend { place: Place::Far, address: *address };
    DesiredService {
        frontends: frontends.iter().map(frontend).collect(),
        backends: backends.iter().map(backend).collect(),
        ..DesiredService::default()
    }
}

/// The same, on a NodePort too.
pub fn with_node_port(mut service: DesiredService, port: u16, protocol: Protocol) -> DesiredService {
    service.frontends.push(DesiredFrontend::new(Listen::Node(Family::V4), port, protocol));
    service
}

/// An address and port written in the test.
pub fn at(text: &str) -> SocketAddr {
    text.parse().expect("tests write addresses as they should be")
}

/// Addresses written in the test.
pub fn ips(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().expect("tests write addresses as they should be")).collect()
}

/// A service's name.
pub fn key(name: &str) -> ServiceKey {
    ServiceKey(name.to_owned())
}

/// `count` services with `endpoints` backends each, none of which is ever dialled.
pub fn filler(count: u32, endpoints: u32) -> ServiceTable {
    (0..count)
        .map(|n| {
            let vip = SocketAddr::new(address(0x0a61_0000 + n), 80);
            let backends: Vec<_> = (0..endpoints)
                .map(|m| SocketAddr::new(address(0x0af5_0000 + n * endpoints + m), 8080))
                .collect();
            (key(&format!("filler/{n}")), service(Protocol::Tcp, &[vip], &backends))
        })
        .collect()
}

fn address(bits: u32) -> IpAddr {
    IpAddr::V4(Ipv4Addr::from(bits))
}
