//! What a program in a served cgroup sees when it dials a service.

use std::{
    collections::BTreeSet,
    io,
    net::{TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::Result;
use ebpf_common::Protocol::{Tcp, Udp};
use ebpf_loader::{Change, DataPlane, ServiceTable};
use ebpf_tests::{
    arena::Arena,
    servers::{DEADLINE, Server, ask_tcp, ask_udp},
    tables::{at, filler, ips, key, service, with_node_port},
};

/// Fills and attaches; every service must be accepted.
fn run(arena: &Arena, table: &ServiceTable) -> Result<DataPlane> {
    let mut plane = arena.open()?;
    let report = plane.replace_all(table);
    assert!(report.refused.is_empty(), "{:?}", report.refused);
    plane.attach()?;
    Ok(plane)
}

/// These are the node's addresses, and NodePorts answer there.
fn serve_node_ports(plane: &mut DataPlane, addresses: &[&str]) -> Result<()> {
    let addresses = ips(addresses).into_iter().collect();
    Ok(plane.set_node_addresses(&addresses, &addresses)?)
}

#[test]
fn a_cluster_ip_spreads_over_its_backends_and_getpeername_shows_it() -> Result<()> {
    let arena = Arena::enter(&ips(&["10.244.0.1", "10.244.0.2", "10.244.0.3"]))?;
    let backends = [at("10.244.0.1:8080"), at("10.244.0.2:8080"), at("10.244.0.3:8080")];
    let _servers = backends.map(|address| Server::tcp(address).unwrap());
    let vip = at("10.96.0.10:80");
    let plane = run(&arena, &ServiceTable::from([(key("web"), service(Tcp, &[vip], &backends))]))?;
    let mut answered = std::collections::BTreeMap::<String, u32>::new();
    for _ in 0..300 {
        let (who, peer) = ask_tcp(vip)?;
        assert_eq!(peer, vip, "the socket must show what was dialled");
        *answered.entry(who).or_default() += 1;
    }
    assert_eq!(answered.len(), 3, "{answered:?}");
    assert!(answered.values().all(|n| *n > 50), "uneven: {answered:?}");
    let stats = plane.stats(&key("web")).unwrap();
    assert_eq!((stats.forwarded, stats.refused), (300, 0));
    let (_, direct) = ask_tcp(backends[0])?;
    assert_eq!(direct, backends[0], "a direct connection is left alone");
    Ok(())
}

#[test]
fn a_service_counts_from_nothing_whoever_had_its_number_before() -> Result<()> {
    let arena = Arena::enter(&ips(&["10.244.0.1"]))?;
    let backend = at("10.244.0.1:8080");
    let _server = Server::tcp(backend)?;
    let vip = at("10.96.0.10:80");
    let of = |name: &str| ServiceTable::from([(key(name), service(Tcp, &[vip], &[backend]))]);
    let mut plane = run(&arena, &of("first"))?;
    let ask = |times: u64| (0..times).try_for_each(|_| ask_tcp(vip).map(drop));
    ask(3)?;
    assert_eq!(plane.stats(&key("first")).unwrap().forwarded, 3);
    // The numbers of those that are gone are given again.
    for name in ["second", "third"] {
        assert!(plane.replace_all(&of(name)).refused.is_empty());
        assert_eq!(plane.stats(&key(name)).unwrap().forwarded, 0, "{name}");
        ask(2)?;
        assert_eq!(plane.stats(&key(name)).unwrap().forwarded, 2, "{name}");
    }
    // Another process goes on counting, and gives the number of what goes meanwhile to a new one.
    drop(plane);
    let mut plane = run(&arena, &of("third"))?;
    assert_eq!(plane.stats(&key("third")).unwrap().forwarded, 2);
    for name in ["fourth", "fifth"] {
        assert!(plane.replace_all(&of(name)).refused.is_empty());
        assert_eq!(plane.stats(&key(name)).unwrap().forwarded, 0, "{name}");
        ask(1)?;
    }
    Ok(())
}

#[test]
fn a_v6_socket_reaches_v4_and_v6_services() -> Result<()> {
    let arena = Arena::enter(&ips(&["10.244.0.1", "fd00::1"]))?;
    let _v4 = Server::tcp(at("10.244.0.1:8080"))?;
    let _v6 = Server::tcp(at("[fd00::1]:8080"))?;
    let (vip4, vip6) = (at("10.96.0.10:80"), at("[fd00:96::10]:80"));
    let _plane = run(
        &arena,
        &ServiceTable::from([
            (key("four"), service(Tcp, &[vip4], &[at("10.244.0.1:8080")])),
            (key("six"), service(Tcp, &[vip6], &[at("[fd00::1]:8080")])),
        ]),
    )?;
    assert_eq!(ask_tcp(vip6)?, ("[fd00::1]:8080".to_owned(), vip6));
    let mapped = at("[::ffff:10.96.0.10]:80");
    assert_eq!(ask_tcp(mapped)?, ("10.244.0.1:8080".to_owned(), mapped));
    Ok(())
}

#[test]
fn unconnected_udp_gets_its_answers_from_the_address_it_asked() -> Result<()> {
    let arena = Arena::enter(&ips(&["10.244.0.1", "10.244.0.2"]))?;
    let backends = [at("10.244.0.1:5353"), at("10.244.0.2:5353")];
    let _servers = backends.map(|address| Server::udp(address).unwrap());
    let (one, two) = (at("10.96.0.10:53"), at("10.96.0.11:53"));
    let mut plane = run(
        &arena,
        &ServiceTable::from([
            (key("one"), service(Udp, &[one], &backends)),
            (key("two"), service(Udp, &[two], &backends[..1])),
        ]),
    )?;
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    let (first, from) = ask_udp(&socket, one)?;
    assert_eq!(from, one);
    for _ in 0..20 {
        assert_eq!(ask_udp(&socket, one)?, (first.clone(), one), "one socket stays with one backend");
    }
    let spread: BTreeSet<String> =
        (0..50).map(|_| ask_udp(&UdpSocket::bind("0.0.0.0:0").unwrap(), one).unwrap().0).collect();
    assert_eq!(spread.len(), 2, "sockets spread");
    // The backend goes: the same socket is healed to the other one.
    let other: Vec<_> = backends.iter().copied().filter(|address| address.to_string() != first).collect();
    plane.apply(&[Change::Upsert(key("one"), service(Udp, &[one], &other))]);
    assert_eq!(ask_udp(&socket, one)?, (other[0].to_string(), one));
    Ok(())
}

#[test]
fn connected_udp_shows_the_service_and_receives() -> Result<()> {
    let arena = Arena::enter(&ips(&["10.244.0.1"]))?;
    let _server = Server::udp(at("10.244.0.1:5353"))?;
    let vip = at("10.96.0.10:53");
    let _plane =
        run(&arena, &ServiceTable::from([(key("dns"), service(Udp, &[vip], &[at("10.244.0.1:5353")]))]))?;
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(DEADLINE))?;
    socket.connect(vip)?;
    assert_eq!(socket.peer_addr()?, vip);
    socket.send(b"who")?;
    let mut buffer = [0; 100];
    let (len, from) = socket.recv_from(&mut buffer)?;
    assert_eq!((&buffer[..len], from), (&b"10.244.0.1:5353"[..], vip));
    // Reconnected to the endpoint itself, the socket shows the endpoint.
    socket.connect("10.244.0.1:5353")?;
    assert_eq!(socket.peer_addr()?, at("10.244.0.1:5353"));
    Ok(())
}

#[test]
fn a_node_port_answers_on_node_addresses_and_on_the_hosts_loopback_only() -> Result<()> {
    let arena = Arena::enter(&ips(&["10.244.0.1", "192.0.2.10", "192.0.2.11"]))?;
    let _server = Server::tcp(at("10.244.0.1:80"))?;
    let web = with_node_port(service(Tcp, &[at("10.96.0.10:80")], &[at("10.244.0.1:80")]), 30000, Tcp);
    let mut plane = run(&arena, &ServiceTable::from([(key("web"), web)]))?;
    serve_node_ports(&mut plane, &["192.0.2.10", "127.0.0.1"])?;
    for dialled in ["127.0.0.1:30000", "127.0.0.9:30000", "192.0.2.10:30000"] {
        assert_eq!(ask_tcp(at(dialled))?, ("10.244.0.1:80".to_owned(), at(dialled)), "{dialled}");
    }
    assert!(ask_tcp(at("[::1]:30000")).is_err(), "an IPv4 service listens on IPv4 addresses");
    let refused = ask_tcp(at("192.0.2.11:30000")).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused, "not an address of the node");
    serve_node_ports(&mut plane, &["192.0.2.11"])?;
    assert!(ask_tcp(at("192.0.2.11:30000")).is_ok());
    assert!(ask_tcp(at("192.0.2.10:30000")).is_err());
    // In a pod, that is another network namespace of the same cgroup, loopback is the pod's own.
    let in_pod = std::thread::spawn(|| -> Result<io::ErrorKind> {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
        ebpf_tests::arena::ip(&["link", "set", "lo", "up"])?;
        Ok(ask_tcp(at("127.0.0.1:30000")).unwrap_err().kind())
    });
    assert_eq!(in_pod.join().unwrap()?, io::ErrorKind::ConnectionRefused);
    Ok(())
}

#[test]
fn no_endpoints_is_refused_at_once() -> Result<()> {
    let arena = Arena::enter(&[])?;
    let vip = at("10.96.0.10:80");
    let empty = service(Tcp, &[vip], &[]);
    let udp = service(Udp, &[vip], &[]);
    let plane = run(&arena, &ServiceTable::from([(key("empty"), empty), (key("udp"), udp)]))?;
    let start = Instant::now();
    for _ in 0..100 {
        let error = TcpStream::connect_timeout(&vip, DEADLINE).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    assert_eq!(socket.send_to(b"x", vip).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    assert!(start.elapsed() < Duration::from_secs(1));
    assert_eq!(plane.stats(&key("empty")).unwrap().refused, 100);
    Ok(())
}

#[test]
fn session_affinity_keeps_a_client_with_its_backend() -> Result<()> {
    let arena = Arena::enter(&ips(&["10.244.0.1", "10.244.0.2", "10.244.0.3"]))?;
    let backends = [at("10.244.0.1:8080"), at("10.244.0.2:8080"), at("10.244.0.3:8080")];
    let _servers = backends.map(|address| Server::tcp(address).unwrap());
    let (vip, other) = (at("10.96.0.10:80"), at("10.96.0.11:80"));
    let mut sticky = service(Tcp, &[vip], &backends);
    sticky.affinity_secs = 10_800;
    let mut plane = run(&arena, &ServiceTable::from([(key("other"), service(Tcp, &[other], &backends))]))?;
    assert!(!plane.make_room_for_affinity()?, "nobody asks for it");
    plane.apply(&[Change::Upsert(key("web"), sticky.clone())]);
    let connections = plane.stats(&key("other")).map(|stats| stats.forwarded);
    assert!(plane.make_room_for_affinity()? && !plane.make_room_for_affinity()?, "once");
    assert_eq!(plane.stats(&key("other")).map(|stats| stats.forwarded), connections, "nothing else changed");
    ask_tcp(other)?;
    let (first, _) = ask_tcp(vip)?;
    for _ in 0..50 {
        assert_eq!(ask_tcp(vip)?.0, first);
    }
    sticky.backends.retain(|backend| backend.address.to_string() != first);
    plane.apply(&[Change::Upsert(key("web"), sticky)]);
    let (second, _) = ask_tcp(vip)?;
    assert_ne!(second, first);
    for _ in 0..50 {
        assert_eq!(ask_tcp(vip)?.0, second);
    }
    Ok(())
}

#[test]
fn five_thousand_services_load_fast_and_one_change_costs_one_change() -> Result<()> {
    let arena = Arena::enter(&ips(&["10.244.0.1"]))?;
    let _server = Server::tcp(at("10.244.0.1:8080"))?;
    let vip = at("10.96.0.10:80");
    let mut table = filler(5000, 3);
    table.insert(key("web"), service(Tcp, &[vip], &[at("10.244.0.1:8080")]));
    let mut plane = arena.open()?;
    let start = Instant::now();
    let report = plane.replace_all(&table);
    let loaded = start.elapsed();
    assert_eq!((report.written, report.refused.len()), (5001, 0));
    plane.attach()?;
    assert_eq!(ask_tcp(vip)?.0, "10.244.0.1:8080");
    let (name, mut changed) =
        table.iter().nth(2500).map(|(name, service)| (name.clone(), service.clone())).unwrap();
    let mut times = Vec::new();
    for _ in 0..100 {
        let port = changed.backends[0].address.port() + 1;
        changed.backends[0].address.set_port(port);
        let change = [Change::Upsert(name.clone(), changed.clone())];
        let start = Instant::now();
        assert_eq!(plane.apply(&change).written, 1);
        times.push(start.elapsed());
    }
    times.sort();
    println!(
        "5001 services x 3 endpoints loaded in {loaded:?}; one endpoint changed in {:?} (median)",
        times[50]
    );
    // A restart finds everything as it is and writes nothing but what differs.
    drop(plane);
    table.insert(name, changed);
    let mut again = arena.open()?;
    assert!(again.adopted());
    let start = Instant::now();
    let report = again.replace_all(&table);
    println!("adopted and compared in {:?}", start.elapsed());
    assert_eq!(report.removed, 0);
    assert_eq!(again.usage().services, 5001);
    again.attach()?;
    assert_eq!(ask_tcp(vip)?.0, "10.244.0.1:8080");
    Ok(())
}
