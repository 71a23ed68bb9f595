//! Many services, many endpoints: all are programmed, the maps grow under clients, and what does not fit is told before
//! anything is written.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use ebpf_common::Protocol::Tcp;
use ebpf_loader::{Capacity, Change, DataPlane, Refused, ServiceTable};
use ebpf_tests::{
    arena::Arena,
    bench::scene::Scene,
    servers::{Server, ask_tcp},
    tables::{at, ips, key, service},
};

/// 25,000 services with ten endpoints each.
fn many() -> ServiceTable {
    Scene { others: 25_000, endpoints: 10, tested: Vec::new() }.table()
}

#[test]
fn a_quarter_of_a_million_endpoints_are_programmed_and_the_maps_grow_under_clients() -> Result<()> {
    let arena = Arena::enter(&ips(&["10.244.0.1"]))?;
    let _server = Server::tcp(at("10.244.0.1:8080"))?;
    let vip = at("10.96.0.10:80");
    let mut config = arena.config();
    config.capacity = Capacity::default();
    let mut plane = DataPlane::open(config)?;
    let mut table = ServiceTable::from([(key("a-web"), service(Tcp, &[vip], &[at("10.244.0.1:8080")]))]);
    plane.replace_all(&table);
    plane.attach()?;
    table.extend(many());
    // One service with ten thousand endpoints, the one that answers among them.
    let endpoints: Vec<SocketAddr> =
        (0..10_000).map(|n| at(&format!("10.200.{}.{}:8080", n / 250, 1 + n % 250))).collect();
    table.insert(key("wide"), service(Tcp, &[at("10.96.0.11:80")], &endpoints));
    let upserts: Vec<Change> =
        table.iter().map(|(key, desired)| Change::Upsert(key.clone(), desired.clone())).collect();
    let report = plane.apply(&upserts);
    let (_, why) = report.refused.first().context("131,072 endpoints is what there is room for")?;
    assert!(matches!(why, Refused::Full { .. }), "{why}");
    assert_eq!(ask_tcp(vip)?.1, vip, "what was there goes on");
    let usage = plane.usage();
    let backends = table.values().map(|desired| desired.backends.len()).sum();
    let grown = usage.capacity.grown_for(table.len(), table.len(), backends).context("a size that fits")?;
    let report = plane.grow(grown, table.clone())?.context("the kernel has the memory")?;
    assert!(report.refused.is_empty(), "{:?}", report.refused.first());
    let usage = plane.usage();
    assert_eq!((usage.services, usage.refused, usage.backends), (25_002, 0, 260_001));
    assert_eq!(ask_tcp(vip)?.1, vip);
    // One endpoint more among ten thousand.
    let mut more = endpoints;
    more.push(at("10.201.0.1:8080"));
    let report = plane.apply(&[Change::Upsert(key("wide"), service(Tcp, &[at("10.96.0.11:80")], &more))]);
    assert!(report.refused.is_empty() && report.written == 1, "{report:?}");
    assert_eq!(plane.usage().backends, 260_002);
    Ok(())
}

#[test]
fn what_an_earlier_process_left_stays_until_it_is_let_go() -> Result<()> {
    let arena = Arena::enter(&ips(&["10.244.0.1"]))?;
    let _server = Server::tcp(at("10.244.0.1:8080"))?;
    let (known, forgotten, unsure) = (at("10.96.0.10:80"), at("10.96.0.11:80"), at("10.96.0.12:80"));
    let endpoint = [at("10.244.0.1:8080")];
    let all = [("known", known), ("forgotten", forgotten), ("unsure", unsure)];
    let table: ServiceTable =
        all.iter().map(|(name, vip)| (key(name), service(Tcp, &[*vip], &endpoint))).collect();
    let mut first = arena.open()?;
    first.replace_all(&table);
    first.attach()?;
    drop(first);
    let mut next = arena.open()?;
    assert!(next.adopted());
    // The API server names two of them, and one of these without endpoints.
    let listed = ServiceTable::from([
        (key("known"), service(Tcp, &[known], &endpoint)),
        (key("unsure"), service(Tcp, &[unsure], &[])),
    ]);
    let report = next.add_all(listed.clone(), &[key("unsure")].into());
    next.attach()?;
    assert!(report.refused.is_empty() && report.removed == 0, "{report:?}");
    assert_eq!(next.unclaimed(), 2);
    for vip in [known, forgotten, unsure] {
        assert_eq!(ask_tcp(vip)?.1, vip);
    }
    // Growth takes all of them along.
    let usage = next.usage();
    let larger = Capacity { services: usage.capacity.services * 2, ..usage.capacity };
    next.grow(larger, listed_only(&listed, "known"))?.context("room")?;
    for vip in [known, forgotten, unsure] {
        assert_eq!(ask_tcp(vip)?.1, vip);
    }
    next.apply(&[Change::Upsert(key("unsure"), service(Tcp, &[unsure], &[]))]);
    let report = next.remove_unclaimed();
    assert_eq!((report.removed, next.unclaimed()), (1, 0));
    assert_eq!(ask_tcp(known)?.1, known);
    assert!(ask_tcp(forgotten).is_err());
    assert_eq!(ask_tcp(unsure).unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
    Ok(())
}

fn listed_only(table: &ServiceTable, name: &str) -> ServiceTable {
    table
        .iter()
        .filter(|(key, _)| key.0 == name)
        .map(|(key, desired)| (key.clone(), desired.clone()))
        .collect()
}
