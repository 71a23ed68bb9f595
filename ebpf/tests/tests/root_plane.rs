//! What the data plane does beside translating: it heals datagram sockets, keeps NodePorts free, grows, and shows
//! itself.

use std::{
    collections::BTreeSet,
    io,
    net::{SocketAddr, TcpListener, UdpSocket},
    time::Duration,
};

use anyhow::{Context, Result};
use ebpf_common::Protocol::{Tcp, Udp};
use ebpf_loader::{
    Change, DataPlane, DesiredFrontend, Listen, Place, Policy, ServiceTable, Source, Trace, View,
    reconnect_datagrams,
};
use ebpf_tests::{
    arena::Arena,
    servers::{Server, ask_tcp, ask_udp},
    tables::{at, filler, ips, key, service, with_node_port},
};

fn run(arena: &Arena, table: &ServiceTable) -> Result<DataPlane> {
    let mut plane = arena.open()?;
    let report = plane.replace_all(table);
    assert!(report.refused.is_empty(), "{:?}", report.refused);
    plane.attach()?;
    Ok(plane)
}

/// Asks as a resolver does: on its one connected socket, again after a short wait, three times.
fn resolve(socket: &UdpSocket) -> io::Result<String> {
    let mut last = io::Error::other("never asked");
    for _ in 0..3 {
        let mut buffer = [0; 100];
        match socket.send(b"who").and_then(|_| socket.recv(&mut buffer)) {
            Ok(len) => return Ok(String::from_utf8_lossy(&buffer[..len]).into_owned()),
            Err(error) => last = error,
        }
    }
    Err(last)
}

#[test]
fn a_resolver_with_one_connected_socket_survives_the_replacement_of_all_backends() -> Result<()> {
    let addresses: Vec<String> = (1..=6).map(|n| format!("10.244.0.{n}")).collect();
    let arena = Arena::enter(&ips(&addresses.iter().map(String::as_str).collect::<Vec<_>>()))?;
    let backends: Vec<SocketAddr> = addresses.iter().map(|text| at(&format!("{text}:5353"))).collect();
    let vip = at("10.96.0.10:53");
    let mut servers: Vec<Server> =
        backends[..3].iter().map(|address| Server::udp(*address).unwrap()).collect();
    let mut plane = run(&arena, &ServiceTable::from([(key("dns"), service(Udp, &[vip], &backends[..3]))]))?;
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    socket.connect(vip)?;
    let port = socket.local_addr()?.port();
    resolve(&socket)?;
    let mut healed = 0;
    for next in 3..6 {
        servers.push(Server::udp(backends[next])?);
        let chosen = &backends[next - 2..=next];
        let report = plane.apply(&[Change::Upsert(key("dns"), service(Udp, &[vip], chosen))]);
        assert_eq!(report.retired_datagram, [backends[next - 3]]);
        servers.remove(0);
        healed += reconnect_datagrams(&report.retired_datagram.into_iter().collect()).healed;
        let answer = resolve(&socket)?;
        assert!(
            chosen.iter().any(|address| address.to_string() == answer),
            "{answer} is not one of {chosen:?}"
        );
        assert_eq!((socket.peer_addr()?, socket.local_addr()?.port()), (vip, port), "the socket is the same");
    }
    assert!(healed >= 1, "all three former backends are gone, so the socket was moved at least once");
    Ok(())
}

#[test]
fn a_socket_without_any_backend_is_healed_when_one_comes_back_and_a_direct_one_is_left_alone() -> Result<()> {
    let arena = Arena::enter(&ips(&["10.244.0.1", "10.244.0.2"]))?;
    let (old, new, vip) = (at("10.244.0.1:5353"), at("10.244.0.2:5353"), at("10.96.0.10:53"));
    let mut plane = run(&arena, &ServiceTable::from([(key("dns"), service(Udp, &[vip], &[old]))]))?;
    let (through, direct) = (UdpSocket::bind("0.0.0.0:0")?, UdpSocket::bind("0.0.0.0:0")?);
    through.set_read_timeout(Some(Duration::from_secs(2)))?;
    through.connect(vip)?;
    direct.connect(old)?;
    let gone: BTreeSet<SocketAddr> = plane
        .apply(&[Change::Upsert(key("dns"), service(Udp, &[vip], &[]))])
        .retired_datagram
        .into_iter()
        .collect();
    let outcome = reconnect_datagrams(&gone);
    assert_eq!((outcome.healed, outcome.waiting), (0, 1), "{outcome:?}");
    let _server = Server::udp(new)?;
    plane.apply(&[Change::Upsert(key("dns"), service(Udp, &[vip], &[new]))]);
    assert_eq!(reconnect_datagrams(&gone).healed, 1);
    assert_eq!(resolve(&through)?, new.to_string());
    assert_eq!(direct.peer_addr()?, old, "who dialled the endpoint itself keeps it");
    Ok(())
}

#[test]
fn the_nodes_own_programs_cannot_bind_a_node_port() -> Result<()> {
    let arena = Arena::enter(&ips(&["10.244.0.1", "192.0.2.10", "192.0.2.99"]))?;
    let web = with_node_port(service(Tcp, &[at("10.96.0.10:80")], &[at("10.244.0.1:80")]), 30000, Tcp);
    let mut plane = run(&arena, &ServiceTable::from([(key("web"), web)]))?;
    let node = ips(&["192.0.2.10", "127.0.0.1"]).into_iter().collect();
    plane.set_node_addresses(&node, &node)?;
    for taken in ["0.0.0.0:30000", "[::]:30000", "192.0.2.10:30000", "127.0.0.1:30000"] {
        let error = TcpListener::bind(taken).err().with_context(|| format!("{taken} was bound"))?;
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{taken}");
    }
    for free in ["192.0.2.99:30000", "0.0.0.0:30001"] {
        TcpListener::bind(free).with_context(|| format!("{free} leads to no NodePort"))?;
    }
    UdpSocket::bind("0.0.0.0:30000").context("the other protocol is free")?;
    // A pod's ports are its own.
    let in_pod = std::thread::spawn(|| -> Result<()> {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
        TcpListener::bind("0.0.0.0:30000")?;
        Ok(())
    });
    in_pod.join().unwrap()?;
    plane.apply(&[Change::Remove(key("web"))]);
    TcpListener::bind("0.0.0.0:30000").context("the NodePort is gone")?;
    Ok(())
}

#[test]
fn an_external_ip_is_followed_only_on_the_node_that_has_it() -> Result<()> {
    let arena = Arena::enter(&ips(&["10.244.0.1", "192.0.2.10"]))?;
    let _server = Server::tcp(at("10.244.0.1:80"))?;
    let mut web = service(Tcp, &[at("192.0.2.10:80")], &[at("10.244.0.1:80")]);
    web.frontends[0].guarded = true;
    let mut plane = run(&arena, &ServiceTable::from([(key("web"), web)]))?;
    assert!(ask_tcp(at("192.0.2.10:80")).is_err(), "anybody could have written this address into a Service");
    plane.set_node_addresses(&ips(&["192.0.2.10"]).into_iter().collect(), &BTreeSet::new())?;
    assert_eq!(ask_tcp(at("192.0.2.10:80"))?.0, "10.244.0.1:80");
    Ok(())
}

#[test]
fn each_traffic_policy_meets_its_own_backends() -> Result<()> {
    let arena = Arena::enter(&ips(&["10.244.0.1", "10.244.0.2"]))?;
    let (local, far) = (at("10.244.0.1:8080"), at("10.244.0.2:8080"));
    let _servers = [Server::tcp(local)?, Server::tcp(far)?];
    let (any, own) = (at("10.96.0.10:80"), at("10.96.0.11:80"));
    let table = |place| {
        let mut web = service(Tcp, &[any], &[local, far]);
        web.backends[0].place = place;
        let listen = Listen::Address(own.ip());
        web.frontends
            .push(DesiredFrontend { policy: Policy::Local, ..DesiredFrontend::new(listen, 80, Tcp) });
        web
    };
    let mut plane = run(&arena, &ServiceTable::from([(key("web"), table(Place::Local))]))?;
    let answers = |address| (0..40).map(|_| ask_tcp(address).unwrap().0).collect::<BTreeSet<_>>();
    assert_eq!(answers(any).len(), 2);
    assert_eq!(answers(own), BTreeSet::from([local.to_string()]));
    // The local one drains: policy Local keeps it, everybody else has a better one.
    plane.apply(&[Change::Upsert(key("web"), table(Place::LocalOnly))]);
    assert_eq!(answers(any), BTreeSet::from([far.to_string()]));
    assert_eq!(answers(own), BTreeSet::from([local.to_string()]));
    plane.apply(&[Change::Upsert(key("web"), table(Place::Far))]);
    assert_eq!(ask_tcp(own).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    Ok(())
}

#[test]
fn full_maps_grow_under_load_and_ids_stay() -> Result<()> {
    let arena = Arena::enter(&ips(&["10.244.0.1"]))?;
    let _server = Server::tcp(at("10.244.0.1:8080"))?;
    let vip = at("10.96.0.10:80");
    let mut config = arena.config();
    (config.capacity.services, config.capacity.backends) = (64, 128);
    let mut plane = DataPlane::open(config.clone())?;
    let mut table = ServiceTable::from([(key("web"), service(Tcp, &[vip], &[at("10.244.0.1:8080")]))]);
    plane.replace_all(&table);
    plane.attach()?;
    let id = |name: &str| -> Result<u32> {
        let seen = View::open(&arena.pin_dir)?.services().into_iter().find(|service| service.name == name);
        Ok(seen.context("not programmed")?.id)
    };
    let before = id("web")?;
    let open = std::net::TcpStream::connect(vip)?;
    table.extend(filler(500, 3));
    let report = plane.replace_all(&table);
    assert!(!report.refused.is_empty(), "this does not fit");
    let usage = plane.usage();
    let grown = usage.capacity.grown_for(501, 501, 1501).context("there are larger maps")?;
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| -> Result<()> {
        let load = scope.spawn(|| -> io::Result<u32> {
            let mut connects = 0;
            while !done.load(std::sync::atomic::Ordering::Acquire) {
                ask_tcp(vip)?;
                connects += 1;
            }
            Ok(connects)
        });
        let report = plane.grow(grown, table.clone())?.context("the kernel has memory for this")?;
        done.store(true, std::sync::atomic::Ordering::Release);
        assert!(report.refused.is_empty(), "{:?}", report.refused);
        load.join().unwrap()?;
        Ok(())
    })?;
    assert_eq!(plane.usage().services, 501);
    assert_eq!(id("web")?, before, "growing renumbers nothing");
    assert_eq!(open.peer_addr()?, vip);
    drop(plane);
    // The next process is configured for the small size, and takes the grown maps as they are.
    let again = DataPlane::open(config)?;
    assert!(again.adopted());
    assert_eq!(again.usage().capacity, grown);
    Ok(())
}

#[test]
fn the_maps_tell_what_they_hold_and_what_differs() -> Result<()> {
    let arena = Arena::enter(&ips(&["10.244.0.1", "192.0.2.10"]))?;
    let _server = Server::tcp(at("10.244.0.1:8080"))?;
    let (vip, backend) = (at("10.96.0.10:80"), at("10.244.0.1:8080"));
    let web = with_node_port(service(Tcp, &[vip], &[backend]), 30000, Tcp);
    let name = "default/web:80/TCP/IPv4";
    let mut table = ServiceTable::from([(key(name), web.clone())]);
    let mut plane = run(&arena, &table)?;
    plane.set_node_addresses(&BTreeSet::new(), &ips(&["127.0.0.1"]).into_iter().collect())?;
    for _ in 0..5 {
        ask_tcp(vip)?;
    }
    let view = View::open(&arena.pin_dir)?;
    let seen = view.services();
    assert_eq!((seen.len(), seen[0].name.as_str()), (1, name));
    assert_eq!((seen[0].stats.forwarded, seen[0].backends[0].connections), (5, 5));
    assert_eq!(view.differences(&table), Vec::<String>::new());
    assert_eq!(view.trace(Source::Pod, vip, Tcp), Trace::Forwarded(name.into(), vec![backend]));
    assert_eq!(view.trace(Source::Pod, vip, Udp), Trace::NotAService);
    assert_eq!(view.trace(Source::Pod, at("127.0.0.1:30000"), Tcp), Trace::NotAService);
    assert_eq!(
        view.trace(Source::Host, at("127.0.0.1:30000"), Tcp),
        Trace::Forwarded(name.into(), vec![backend])
    );
    let mut other = web;
    other.backends[0].address.set_port(9090);
    other.affinity_secs = 60;
    table.insert(key(name), other);
    table.insert(key("default/missing:1/TCP/IPv4"), service(Tcp, &[at("10.96.0.11:1")], &[]));
    let differences = view.differences(&table).join("\n");
    for part in [
        "default/missing:1/TCP/IPv4: is not programmed",
        "endpoint 10.244.0.1:9090 is missing",
        "10.244.0.1:8080 still answers",
        "session affinity lasts 0 s instead of 60 s",
    ] {
        assert!(differences.contains(part), "{part} is not in:\n{differences}");
    }
    assert!(view.differences(&ServiceTable::new())[0].contains("the API has no such Service"));
    Ok(())
}

#[test]
fn datagrams_to_a_backend_that_went_are_counted_as_healed() -> Result<()> {
    let arena = Arena::enter(&ips(&["10.244.0.1", "10.244.0.2"]))?;
    let (one, two, vip) = (at("10.244.0.1:5353"), at("10.244.0.2:5353"), at("10.96.0.10:53"));
    let _servers = [Server::udp(one)?, Server::udp(two)?];
    let mut plane = run(&arena, &ServiceTable::from([(key("dns"), service(Udp, &[vip], &[one]))]))?;
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    ask_udp(&socket, vip)?;
    plane.apply(&[Change::Upsert(key("dns"), service(Udp, &[vip], &[two]))]);
    assert_eq!(ask_udp(&socket, vip)?, (two.to_string(), vip));
    assert_eq!(plane.stats(&key("dns")).context("programmed")?.healed, 1);
    Ok(())
}
