//! Watch steps in, data-plane changes out.

use ebpf_common::Protocol;
use proptest::prelude::*;

use super::*;

fn name(text: &str) -> ObjectName {
    ObjectName { namespace: "ns".into(), name: text.into() }
}

fn web() -> ServiceFacts {
    ServiceFacts {
        uid: "u".into(),
        ports: vec![PortFacts {
            name: "http".into(),
            port: 80,
            protocol: Protocol::Tcp,
            node_port: Some(30000),
        }],
        cluster_ips: vec!["10.96.0.5".parse().unwrap()],
        external_ips: Vec::new(),
        affinity_secs: 0,
        internal_local: false,
    }
}

fn endpoint(last: u8, state: EndpointState) -> EndpointFacts {
    EndpointFacts { address: [10, 244, 0, last].into(), local: last.is_multiple_of(2), state, hinted: None }
}

fn slice(service: &str, endpoints: Vec<EndpointFacts>) -> SliceFacts {
    let ports = vec![("http".into(), Protocol::Tcp, 8080)];
    SliceFacts { service: name(service), family: Family::V4, ports, endpoints }
}

/// A catalog with one Service and one slice, both listings complete.
fn synced(endpoints: Vec<EndpointFacts>) -> Catalog {
    let mut catalog = Catalog::default();
    catalog.service(Seen::Restart);
    catalog.service(Seen::Listed(name("web"), Some(web())));
    catalog.service(Seen::Complete);
    catalog.slice(Seen::Restart);
    catalog.slice(Seen::Listed(name("web-1"), Some(slice("web", endpoints))));
    catalog.slice(Seen::Complete);
    catalog
}

#[track_caller]
fn backends(changes: &[Change]) -> Vec<String> {
    let [Change::Upsert(_, desired)] = changes else { panic!("one upsert expected: {changes:?}") };
    desired.backends.iter().map(|backend| backend.address.to_string()).collect()
}

#[test]
fn nothing_is_synced_before_both_listings_are_complete() {
    let mut catalog = Catalog::default();
    catalog.service(Seen::Restart);
    catalog.service(Seen::Complete);
    assert!(!catalog.synced());
    catalog.slice(Seen::Restart);
    assert!(!catalog.synced());
    catalog.slice(Seen::Complete);
    assert!(catalog.synced());
}

#[test]
fn a_service_listens_on_its_address_and_node_port() {
    let table = synced(vec![endpoint(1, EndpointState::Ready), endpoint(2, EndpointState::Ready)]).table();
    let desired = &table[&ServiceKey("ns/web:80/TCP/IPv4".into())];
    let frontends: Vec<_> =
        desired.frontends.iter().map(|frontend| (frontend.listen, frontend.port)).collect();
    assert_eq!(frontends, [(Listen::Address([10, 96, 0, 5].into()), 80), (Listen::Node(Family::V4), 30000)]);
    assert_eq!(desired.backends[1].place, Place::Local);
}

#[test]
fn draining_endpoints_serve_only_while_none_is_ready() {
    use EndpointState::{Draining, Ready, Unready};
    let mut catalog = synced(vec![endpoint(1, Draining), endpoint(2, Unready)]);
    assert_eq!(backends(&catalog.changes()), ["10.244.0.1:8080"]);
    let both = vec![endpoint(1, Draining), endpoint(3, Ready)];
    catalog.slice(Seen::Changed(name("web-1"), Some(slice("web", both))));
    assert_eq!(backends(&catalog.changes()), ["10.244.0.3:8080"]);
}

#[test]
fn a_slice_that_moves_to_another_service_touches_both() {
    let mut catalog = synced(vec![endpoint(1, EndpointState::Ready)]);
    catalog.service(Seen::Changed(name("other"), Some(ServiceFacts { ports: web().ports, ..web() })));
    catalog.changes();
    catalog
        .slice(Seen::Changed(name("web-1"), Some(slice("other", vec![endpoint(1, EndpointState::Ready)]))));
    let changes = catalog.changes();
    assert_eq!(changes.len(), 2, "{changes:?}");
}

#[test]
fn a_deleted_service_and_a_dropped_port_are_removed() {
    let mut catalog = synced(vec![]);
    let mut two = web();
    two.ports.push(PortFacts { name: "b".into(), port: 81, protocol: Protocol::Tcp, node_port: None });
    catalog.service(Seen::Changed(name("web"), Some(two)));
    assert_eq!(catalog.changes().len(), 2);
    catalog.service(Seen::Changed(name("web"), Some(web())));
    assert!(catalog.changes().contains(&Change::Remove(ServiceKey("ns/web:81/TCP/IPv4".into()))));
    catalog.service(Seen::Gone(name("web")));
    assert_eq!(catalog.changes(), [Change::Remove(ServiceKey("ns/web:80/TCP/IPv4".into()))]);
}

#[test]
fn what_a_new_listing_does_not_name_is_gone() {
    let mut catalog = synced(vec![endpoint(1, EndpointState::Ready)]);
    catalog.changes();
    catalog.slice(Seen::Restart);
    assert!(!catalog.is_touched(), "an unfinished listing removes nothing");
    catalog.slice(Seen::Complete);
    assert_eq!(backends(&catalog.changes()), Vec::<String>::new());
}

#[test]
fn hints_for_nodes_prefer_those_only_when_every_endpoint_has_them() {
    let mut here = endpoint(1, EndpointState::Ready);
    here.hinted = Some(true);
    let mut there = endpoint(3, EndpointState::Ready);
    there.hinted = Some(false);
    let table = synced(vec![here.clone(), there]).table();
    let desired = table.values().next().unwrap();
    assert_eq!(desired.frontends[0].policy, Policy::Near);
    let places: Vec<_> = desired.backends.iter().map(|backend| backend.place).collect();
    assert_eq!(places, [Place::Near, Place::Far]);
    let table = synced(vec![here, endpoint(5, EndpointState::Ready)]).table();
    assert_eq!(table.values().next().unwrap().frontends[0].policy, Policy::All);
}

proptest! {
    /// Whatever the order of steps, applying the changes gives what building everything anew gives.
    #[test]
    fn changes_add_up_to_the_table(steps in prop::collection::vec((0_u8..6, 0_u8..4, 0_u8..4, 0_u8..3), 1..60)) {
        let mut catalog = synced(vec![]);
        let mut applied = catalog.table();
        for (what, service, which, state) in steps {
            let service_name = format!("s{service}");
            let state = [EndpointState::Ready, EndpointState::Draining, EndpointState::Unready][usize::from(state)];
            let facts = slice(&service_name, vec![endpoint(which, state), endpoint(which + 10, EndpointState::Ready)]);
            match what {
                0 | 1 => catalog.slice(Seen::Changed(name(&format!("e{which}")), Some(facts))),
                2 => catalog.slice(Seen::Gone(name(&format!("e{which}")))),
                3 => catalog.service(Seen::Gone(name(&service_name))),
                4 => catalog.service(Seen::Changed(name(&service_name), Some(web()))),
                _ => {
                    catalog.slice(Seen::Restart);
                    catalog.slice(Seen::Listed(name("e0"), Some(facts)));
                    catalog.slice(Seen::Complete);
                }
            }
            for change in catalog.changes() {
                match change {
                    Change::Upsert(key, desired) => drop(applied.insert(key, desired)),
                    Change::Remove(key) => drop(applied.remove(&key)),
                }
            }
        }
        prop_assert_eq!(applied, catalog.table());
    }
}
