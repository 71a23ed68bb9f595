//! Ports of the node that lead to pods (hostPort), as the CNI plugin asked for them: what they are in the data plane.

use std::collections::BTreeSet;

use ebpf_common::Protocol;
use ebpf_loader::{
    Change, DesiredBackend, DesiredFrontend, DesiredService, Family, Listen, Place, Policy, ServiceKey,
    ServiceTable,
};

use crate::host_ports::{HostPort, HostPorts};

/// How keys of host ports begin; a namespace cannot have this name, since Services' keys have one slash.
const PREFIX: &str = "hostport/";

/// Whether a key stands for a host port.
pub(super) fn is_host_port(key: &ServiceKey) -> bool {
    key.0.starts_with(PREFIX)
}

/// The owner in a key.
pub(super) fn owner_of(key: &ServiceKey) -> Option<&str> {
    let rest = key.0.strip_prefix(PREFIX)?;
    // Owners may have slashes; what follows has three.
    let mut parts = rest.rsplitn(4, '/');
    parts.nth(3)
}

/// What the data plane shall hold for them. Those that it cannot serve are left out.
pub(super) fn table(wanted: &HostPorts, every_address: bool) -> ServiceTable {
    let each = wanted.iter().flat_map(|(owner, ports)| ports.iter().map(move |port| (owner, port)));
    let served = each.filter(|(_, port)| can_serve(port, every_address));
    served.map(|(owner, port)| (key(owner, port), desired(port))).collect()
}

/// The owners all of whose ports can be served and were not refused.
pub(super) fn answered(
    wanted: &HostPorts,
    every_address: bool,
    refused: &BTreeSet<ServiceKey>,
) -> BTreeSet<String> {
    let whole = wanted.iter().filter(|(owner, ports)| {
        ports.iter().all(|port| can_serve(port, every_address) && !refused.contains(&key(owner, port)))
    });
    whole.map(|(owner, _)| owner.clone()).collect()
}

/// From one table to another.
pub(super) fn changes(before: &ServiceTable, now: &ServiceTable) -> Vec<Change> {
    let removed = before.keys().filter(|key| !now.contains_key(*key)).cloned().map(Change::Remove);
    let written = now.iter().filter(|(key, desired)| before.get(*key) != Some(*desired));
    removed.chain(written.map(|(key, desired)| Change::Upsert(key.clone(), desired.clone()))).collect()
}

/// A port on all addresses would follow the NodePorts' where those are narrowed.
fn can_serve(port: &HostPort, every_address: bool) -> bool {
    (every_address || port.host_ip.is_some())
        && port.host_ip.is_none_or(|ip| ip.is_ipv4() == port.target.is_ipv4())
}

fn key(owner: &str, port: &HostPort) -> ServiceKey {
    let family = if port.target.is_ipv4() { "IPv4" } else { "IPv6" };
    let address = port.host_ip.map(|ip| format!("@{ip}")).unwrap_or_default();
    ServiceKey(format!(
        "{PREFIX}{owner}/{}/{}{address}/{family}",
        Protocol::from(port.protocol).name(),
        port.port
    ))
}

fn desired(port: &HostPort) -> DesiredService {
    let family = if port.target.is_ipv4() { Family::V4 } else { Family::V6 };
    let listen = port.host_ip.map_or(Listen::Node(family), Listen::Address);
    DesiredService {
        // The pod is on this node, and sees its clients' own addresses, as it does behind the plugin's rules.
        frontends: vec![DesiredFrontend {
            external: Policy::Local,
            ..DesiredFrontend::new(listen, port.port, port.protocol.into())
        }],
        backends: vec![DesiredBackend { place: Place::Local, address: port.target }],
        ..DesiredService::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host_ports::HostProtocol;

    fn port(protocol: HostProtocol, host_ip: Option<&str>, port: u16, target: &str) -> HostPort {
        let host_ip = host_ip.map(|ip| ip.parse().unwrap());
        HostPort { protocol, host_ip, port, target: target.parse().unwrap() }
    }

    fn wanted() -> HostPorts {
        let tcp = port(HostProtocol::Tcp, None, 8080, "10.244.0.2:80");
        let udp = port(HostProtocol::Udp, Some("192.0.2.1"), 53, "10.244.0.2:5353");
        let mixed = port(HostProtocol::Tcp, Some("::1"), 9, "10.244.0.3:9");
        HostPorts::from([("net,a,eth0.json".to_owned(), [tcp, udp].into()), ("c".to_owned(), [mixed].into())])
    }

    #[test]
    fn a_host_port_is_a_service_with_one_endpoint_of_this_node() {
        let table = table(&wanted(), true);
        let keys: Vec<&str> = table.keys().map(|key| key.0.as_str()).collect();
        let expected =
            ["hostport/net,a,eth0.json/TCP/8080/IPv4", "hostport/net,a,eth0.json/UDP/53@192.0.2.1/IPv4"];
        assert_eq!(keys, expected, "no address of another family");
        let first = table.values().next().unwrap();
        assert_eq!(first.frontends[0].listen, Listen::Node(Family::V4));
        assert_eq!(first.frontends[0].external, Policy::Local, "the pod sees its clients");
        assert_eq!(owner_of(table.keys().next().unwrap()), Some("net,a,eth0.json"));
        assert!(table.keys().all(is_host_port));
    }

    #[test]
    fn owners_are_told_what_is_served_as_a_whole() {
        let wanted = wanted();
        let none = BTreeSet::new();
        assert_eq!(answered(&wanted, true, &none), ["net,a,eth0.json".to_owned()].into());
        assert!(answered(&wanted, false, &none).is_empty(), "NodePorts are narrowed to some addresses");
        let refused = [ServiceKey("hostport/net,a,eth0.json/UDP/53@192.0.2.1/IPv4".into())].into();
        assert!(answered(&wanted, true, &refused).is_empty());
    }

    #[test]
    fn a_step_writes_what_differs_alone() {
        let mut wanted = wanted();
        let before = table(&wanted, true);
        assert_eq!(changes(&before, &before), []);
        wanted.clear();
        let gone = changes(&before, &table(&wanted, true));
        assert!(gone.iter().all(|change| matches!(change, Change::Remove(_))) && gone.len() == 2);
    }
}
