//! Watch steps in, data-plane changes out.

use ebpf_common::Protocol;
use proptest::prelude::*;

use super::*;
use crate::proxy::choices::Choices;

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
        balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        affinity_secs: 0,
        internal_local: false,
        external_local: false,
        health_check_port: None,
        choices: Choices::default(),
        problems: Vec::new(),
    }
}

fn endpoint(last: u8, state: EndpointState) -> EndpointFacts {
    let address = [10, 244, 0, last].into();
    EndpointFacts { address, local: last.is_multiple_of(2), node: 0, state, for_node: None, for_zones: None }
}

fn slice(service: &str, endpoints: Vec<EndpointFacts>) -> SliceFacts {
    let ports = vec![("http".into(), Protocol::Tcp, 8080)];
    SliceFacts {
        service: name(service),
        family: Family::V4,
        ports,
        endpoints,
        triggered: None,
        problems: Vec::new(),
    }
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
    catalog.service(Seen::Listed(name("web"), Some(web())));
    catalog.service(Seen::Complete);
    assert!(!catalog.synced());
    catalog.slice(Seen::Restart);
    catalog.slice(Seen::Listed(name("web-1"), Some(slice("web", vec![]))));
    assert!(!catalog.synced());
    catalog.slice(Seen::Complete);
    assert!(catalog.synced());
}

#[test]
fn a_listing_of_nothing_is_not_believed() {
    let mut catalog = synced(vec![endpoint(1, EndpointState::Ready)]);
    catalog.changes();
    for _ in 0..2 {
        catalog.service(Seen::Restart);
        catalog.service(Seen::Complete);
        catalog.slice(Seen::Restart);
        catalog.slice(Seen::Complete);
    }
    assert!(catalog.take_unbelieved() && !catalog.take_unbelieved(), "told once");
    assert!(catalog.changes().is_empty());
    let mut fresh = Catalog::default();
    fresh.service(Seen::Restart);
    fresh.service(Seen::Complete);
    fresh.slice(Seen::Restart);
    fresh.slice(Seen::Complete);
    assert!(!fresh.synced());
    fresh.service(Seen::Changed(name("web"), Some(web())));
    fresh.slice(Seen::Changed(name("web-1"), Some(slice("web", vec![]))));
    assert!(fresh.synced(), "it tells something now");
}

#[test]
fn a_service_that_no_slice_names_is_unsure() {
    let mut catalog = synced(vec![]);
    catalog.service(Seen::Changed(name("new"), Some(web())));
    catalog.changes();
    assert_eq!(catalog.without_slices(), [ServiceKey("ns/new:80/TCP/IPv4".into())].into());
    catalog.touch_without_slices();
    assert_eq!(backends(&catalog.changes()), Vec::<String>::new());
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
    catalog.slice(Seen::Listed(name("else-1"), Some(slice("else", vec![]))));
    catalog.slice(Seen::Complete);
    catalog.service(Seen::Gone(name("else")));
    assert_eq!(backends(&catalog.changes()), Vec::<String>::new());
}

#[test]
fn hints_are_followed_only_when_every_endpoint_has_them_and_one_is_for_us() {
    let hinted = |last, node: Option<bool>, zones: &[&str]| {
        let zones: Vec<String> = zones.iter().map(|zone| (*zone).to_owned()).collect();
        let for_zones = (!zones.is_empty()).then_some(zones);
        EndpointFacts { for_node: node, for_zones, ..endpoint(last, EndpointState::Ready) }
    };
    let chosen = |endpoints: Vec<EndpointFacts>| {
        let mut catalog = synced(endpoints);
        catalog.set_zone(Some("z1".into()));
        let table = catalog.table();
        let desired = table.values().next().unwrap();
        let cluster = desired.backends.iter().filter(|backend| backend.place != Place::LocalOnly);
        cluster.map(|backend| backend.address.ip().to_string()).collect::<Vec<_>>()
    };
    let (one, three, five) = ("10.244.0.1", "10.244.0.3", "10.244.0.5");
    assert_eq!(chosen(vec![hinted(1, Some(true), &[]), hinted(3, Some(false), &[])]), [one]);
    assert_eq!(chosen(vec![hinted(1, Some(true), &[]), hinted(3, None, &[])]), [one, three]);
    assert_eq!(chosen(vec![hinted(1, Some(false), &[]), hinted(3, Some(false), &[])]), [one, three]);
    assert_eq!(chosen(vec![hinted(1, None, &["z1"]), hinted(3, None, &["z2"])]), [one]);
    assert_eq!(chosen(vec![hinted(1, None, &["z2"]), hinted(3, None, &["z2"])]), [one, three]);
    // Hints for nodes that name nobody here fall back to the zone.
    let both = vec![
        hinted(1, Some(false), &["z2"]),
        hinted(3, Some(false), &["z1"]),
        hinted(5, Some(false), &["z1"]),
    ];
    assert_eq!(chosen(both), [three, five]);
}

#[test]
fn each_policy_falls_back_to_its_own_draining_endpoints() {
    use EndpointState::{Draining, Ready};
    // 2 runs here and drains, 1 is ready elsewhere.
    let table = synced(vec![endpoint(2, Draining), endpoint(1, Ready)]).table();
    let backends = &table.values().next().unwrap().backends;
    let places: BTreeMap<String, Place> =
        backends.iter().map(|backend| (backend.address.ip().to_string(), backend.place)).collect();
    assert_eq!(places["10.244.0.2"], Place::LocalOnly, "policy Local has nobody else");
    assert_eq!(places["10.244.0.1"], Place::Far);
}

#[test]
fn an_external_ip_in_the_service_range_is_refused_and_named() {
    let mut catalog = Catalog::new(vec!["10.96.0.0/12".parse().unwrap()], false);
    let mut facts = web();
    facts.external_ips = vec!["10.96.0.10".parse().unwrap(), "192.0.2.1".parse().unwrap()];
    facts.balancer_ips = vec!["192.0.2.1".parse().unwrap()];
    catalog.service(Seen::Changed(name("web"), Some(facts)));
    let table = catalog.table();
    let frontends = &table.values().next().unwrap().frontends;
    assert!(frontends.iter().all(|frontend| frontend.listen != Listen::Address([10, 96, 0, 10].into())));
    let twice: Vec<_> = frontends
        .iter()
        .filter(|frontend| frontend.listen == Listen::Address([192, 0, 2, 1].into()))
        .collect();
    assert_eq!(twice.len(), 1);
    assert!(!twice[0].guarded, "the cluster's own choice wins");
    assert!(catalog.problems(&name("web"))[0].contains("10.96.0.10 lies in the service range"));
}

#[test]
fn source_ranges_and_policies_reach_the_frontends_they_are_for() {
    let mut catalog = synced(vec![endpoint(2, EndpointState::Ready)]);
    let mut facts = web();
    facts.balancer_ips = vec!["198.51.100.1".parse().unwrap()];
    facts.source_ranges = vec!["203.0.113.0/24".parse().unwrap(), "2001:db8::/32".parse().unwrap()];
    (facts.external_local, facts.internal_local) = (true, false);
    catalog.service(Seen::Changed(name("web"), Some(facts)));
    let table = catalog.table();
    let desired = table.values().next().unwrap();
    assert_eq!(desired.source_ranges.len(), 1, "those of the family");
    for frontend in &desired.frontends {
        let balancer = frontend.listen == Listen::Address([198, 51, 100, 1].into());
        let cluster = frontend.listen == Listen::Address([10, 96, 0, 5].into());
        assert_eq!(frontend.ranged, balancer);
        assert_eq!(frontend.policy, Policy::All, "inside, everybody may answer");
        assert_eq!(frontend.external, if cluster { Policy::All } else { Policy::Local });
    }
    assert_eq!(catalog.local_ready(&name("web")), 1);
}

#[test]
fn node_ports_are_answered_directly_where_node_and_service_want_that() {
    for (node_wants, service_wants, local) in
        [(true, true, false), (true, true, true), (true, false, false), (false, true, false)]
    {
        let mut catalog = Catalog::new(Vec::new(), node_wants);
        let mut facts = web();
        facts.ports[0].node_port = Some(30000);
        facts.balancer_ips = vec!["198.51.100.1".parse().unwrap()];
        (facts.choices.direct, facts.choices.consistent) = (service_wants, service_wants);
        facts.external_local = local;
        catalog.service(Seen::Changed(name("web"), Some(facts)));
        let table = catalog.table();
        let of = |listen: Listen| {
            let mut all = table.values().flat_map(|desired| &desired.frontends);
            all.find(|frontend| frontend.listen == listen).unwrap().direct
        };
        let balancer = Listen::Address([198, 51, 100, 1].into());
        assert_eq!(of(balancer), service_wants && !local, "a balancer's address is the Service's own choice");
        assert_eq!(of(Listen::Node(Family::V4)), node_wants && service_wants && !local);
    }
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
