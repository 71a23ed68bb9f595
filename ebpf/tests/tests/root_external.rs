//! Clients outside the node: real packets between network namespaces, through the node's devices.
//!
//! ```text
//! client 203.0.113.2 ── outer │ node 203.0.113.1 │ inner ── pod 10.244.2.2
//! ```

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::mpsc::{Sender, channel},
    time::Duration,
};

use anyhow::{Context, Result};
use ebpf_common::Protocol::{Tcp, Udp};
use ebpf_loader::{
    Change, DataPlane, DesiredService, Device, Place, Policy, ServiceTable, Side, SourcePrefix,
};
use ebpf_tests::{
    arena::{Arena, ip},
    tables::{at, key, service, with_node_port},
};
use nix::{
    sched::{CloneFlags, unshare},
    unistd::gettid,
};

const DEADLINE: Duration = Duration::from_secs(10);
const NODE: &str = "203.0.113.1";
const CLIENT: &str = "203.0.113.2";
const POD: &str = "10.244.2.2";

/// A thread in a network namespace of its own that does what it is asked.
struct Somewhere {
    jobs: Sender<Box<dyn FnOnce() + Send>>,
}

impl Somewhere {
    /// Joined to the caller's namespace by a device of this name there.
    fn start(device: &str, node: [&str; 2], own: [&str; 2]) -> Result<Self> {
        let (jobs, work) = channel::<Box<dyn FnOnce() + Send>>();
        let (ready, started) = channel();
        std::thread::spawn(move || {
            let made = unshare(CloneFlags::CLONE_NEWNET).map(|()| gettid());
            if ready.send(made).is_ok() {
                for job in work {
                    job();
                }
            }
        });
        let thread = started.recv()??;
        ip(&["link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", &thread.to_string()])?;
        ip(&["addr", "add", &format!("{}/24", node[0]), "dev", device])?;
        ip(&["addr", "add", &format!("{}/64", node[1]), "dev", device, "nodad"])?;
        ip(&["link", "set", device, "up"])?;
        let place = Self { jobs };
        let (node, own) = (node.map(str::to_owned), own.map(str::to_owned));
        place.run(move || -> Result<()> {
            ip(&["link", "set", "lo", "up"])?;
            ip(&["addr", "add", &format!("{}/24", own[0]), "dev", "eth0"])?;
            ip(&["addr", "add", &format!("{}/64", own[1]), "dev", "eth0", "nodad"])?;
            ip(&["link", "set", "eth0", "up"])?;
            ip(&["route", "add", "default", "via", &node[0]])?;
            ip(&["-6", "route", "add", "default", "via", &node[1]])
        })??;
        Ok(place)
    }

    fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let (done, outcome) = channel();
        self.spawn(move || drop(done.send(job())));
        outcome.recv_timeout(DEADLINE * 3).context("a namespace's thread does not answer")
    }

    fn spawn(&self, job: impl FnOnce() + Send + 'static) {
        drop(self.jobs.send(Box::new(job)));
    }
}

/// Node, client outside, and a pod with a server that says whom it sees.
struct World {
    arena: Arena,
    client: Somewhere,
    _pod: Somewhere,
}

impl World {
    fn make() -> Result<Self> {
        let arena = Arena::enter(&[])?;
        let client = Somewhere::start("outer", [NODE, "2001:db8::1"], [CLIENT, "2001:db8::2"])?;
        let pod = Somewhere::start("inner", ["10.244.2.1", "fd00:244::1"], [POD, "fd00:244::2"])?;
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
        std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")?;
        for address in ["0.0.0.0:8080", "[::]:8081"] {
            pod.run(move || -> Result<()> {
                let listener = TcpListener::bind(address)?;
                std::thread::spawn(move || {
                    while let Ok((mut stream, from)) = listener.accept() {
                        drop(write!(stream, "{from}"));
                    }
                });
                let socket = UdpSocket::bind(address)?;
                std::thread::spawn(move || {
                    let mut buffer = [0; 9000];
                    while let Ok((len, from)) = socket.recv_from(&mut buffer) {
                        drop(socket.send_to(format!("{from} {len}").as_bytes(), from));
                    }
                });
                Ok(())
            })??;
        }
        Ok(Self { arena, client, _pod: pod })
    }

    fn serve(&self, table: &ServiceTable) -> Result<DataPlane> {
        let mut plane = self.arena.open()?;
        let report = plane.replace_all(table);
        assert!(report.refused.is_empty(), "{:?}", report.refused);
        let own = [NODE, "2001:db8::1", "10.244.2.1", "fd00:244::1"];
        let own = own.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
        plane.set_node_addresses(&own, &own)?;
        plane.hide_clients(Some(NODE.parse()?), Some("2001:db8::1".parse()?))?;
        let device = |name: &str, side| -> Result<Device> {
            let index = nix::net::if_::if_nametoindex(name)?;
            let name = name.to_owned();
            Ok(Device { index, name, side, ethernet: true, source_v4: None, source_v6: None, early: false })
        };
        let failed = plane.serve_devices(vec![device("outer", Side::Outer)?, device("inner", Side::Inner)?]);
        assert!(failed.is_empty(), "{failed:?}");
        // The socket hooks are left off: they would translate before the client's packets exist.
        Ok(plane)
    }

    /// Whom the pod sees when the client dials over TCP.
    fn tcp(&self, address: SocketAddr) -> Result<std::io::Result<String>> {
        self.client.run(move || {
            let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(3))?;
            stream.set_read_timeout(Some(DEADLINE))?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        })
    }

    /// The same for a datagram of so many bytes.
    fn udp(&self, address: SocketAddr, len: usize) -> Result<std::io::Result<String>> {
        self.client.run(move || {
            let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = UdpSocket::bind(any)?;
            socket.set_read_timeout(Some(Duration::from_secs(3)))?;
            socket.connect(address)?;
            socket.send(&vec![7; len])?;
            let mut buffer = [0; 100];
            let len = socket.recv(&mut buffer)?;
            Ok(String::from_utf8_lossy(&buffer[..len]).into_owned())
        })
    }
}

fn external(vip: &str, backend: &str, node_port: u16) -> DesiredService {
    with_node_port(service(Tcp, &[at(vip)], &[at(backend)]), node_port, Tcp)
}

#[test]
fn a_node_port_and_a_balancer_address_answer_clients_outside() -> Result<()> {
    let world = World::make()?;
    let mut plane = world.serve(&ServiceTable::from([
        (key("four"), external("198.51.100.1:80", "10.244.2.2:8080", 30000)),
        (key("six"), service(Tcp, &[at("[2001:db8:1::1]:80")], &[at("[fd00:244::2]:8081")])),
    ]))?;
    // The route that a load balancer's announcement would make.
    for dialled in [at("203.0.113.1:30000"), at("198.51.100.1:80"), at("[2001:db8:1::1]:80")] {
        for _ in 0..5 {
            let seen = world.tcp(dialled)?.with_context(|| format!("dial {dialled}"))?;
            let node = if dialled.is_ipv4() { NODE } else { "[2001:db8::1]" };
            assert!(seen.starts_with(&format!("{node}:")), "{dialled}: the pod sees {seen}");
        }
    }
    assert_eq!(plane.stats(&key("four")).context("programmed")?.external, 10);
    // Policy Local: the pod sees the client itself.
    let mut local = external("198.51.100.1:80", "10.244.2.2:8080", 30000);
    for frontend in &mut local.frontends {
        frontend.external = Policy::Local;
    }
    local.backends[0].place = Place::Local;
    plane.apply(&[Change::Upsert(key("four"), local.clone())]);
    let seen = world.tcp(at("203.0.113.1:30000"))??;
    assert!(seen.starts_with(&format!("{CLIENT}:")), "the pod sees {seen}");
    // No endpoint here, one elsewhere: silence, so that the balancer tries another node.
    local.backends[0].place = Place::Far;
    plane.apply(&[Change::Upsert(key("four"), local.clone())]);
    assert_eq!(world.tcp(at("198.51.100.1:80"))?.unwrap_err().kind(), std::io::ErrorKind::TimedOut);
    // None at all: refused at once, on an address of the node and on any other.
    local.backends.clear();
    plane.apply(&[Change::Upsert(key("four"), local)]);
    for dialled in [at("203.0.113.1:30000"), at("198.51.100.1:80")] {
        let refused = world.tcp(dialled)?.unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused, "{dialled}");
    }
    Ok(())
}

#[test]
fn datagrams_fragments_and_errors_find_their_way() -> Result<()> {
    let world = World::make()?;
    let mut dns = service(Udp, &[at("198.51.100.1:53"), at("198.51.100.1:54")], &[at("10.244.2.2:8080")]);
    dns.backends.truncate(1);
    let dead = service(Udp, &[at("198.51.100.1:55")], &[at("10.244.2.2:9")]);
    let _plane = world.serve(&ServiceTable::from([(key("dns"), dns), (key("dead"), dead)]))?;
    let seen = world.udp(at("198.51.100.1:53"), 100)??;
    assert!(seen.starts_with(NODE) && seen.ends_with(" 100"), "{seen}");
    let seen = world.udp(at("198.51.100.1:54"), 4000)??;
    assert!(seen.ends_with(" 4000"), "in fragments: {seen}");
    // Nobody listens on the endpoint's port: its ICMP error reaches the client's own socket.
    let refused = world.udp(at("198.51.100.1:55"), 10)?.unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    Ok(())
}

#[test]
fn source_ranges_let_in_whom_they_name() -> Result<()> {
    let world = World::make()?;
    let mut web = service(Tcp, &[at("198.51.100.1:80")], &[at("10.244.2.2:8080")]);
    web.frontends[0].ranged = true;
    web.source_ranges = vec![SourcePrefix { address: "192.0.2.0".parse()?, bits: 24 }];
    let mut plane = world.serve(&ServiceTable::from([(key("web"), web.clone())]))?;
    assert_eq!(world.tcp(at("198.51.100.1:80"))?.unwrap_err().kind(), std::io::ErrorKind::TimedOut);
    assert!(plane.stats(&key("web")).context("programmed")?.denied > 0);
    web.source_ranges.push(SourcePrefix { address: "203.0.113.0".parse()?, bits: 24 });
    plane.apply(&[Change::Upsert(key("web"), web)]);
    world.tcp(at("198.51.100.1:80"))??;
    Ok(())
}

#[test]
fn connections_from_outside_survive_their_agent_and_their_endpoints_end() -> Result<()> {
    let world = World::make()?;
    let table = ServiceTable::from([(key("web"), external("198.51.100.1:80", "10.244.2.2:8080", 30000))]);
    let plane = world.serve(&table)?;
    drop(plane);
    world.tcp(at("203.0.113.1:30000"))??;
    let mut again = world.serve(&table)?;
    assert!(again.adopted());
    assert!(world.tcp(at("203.0.113.1:30000"))?.is_ok());
    again.serve_devices(Vec::new());
    assert!(world.tcp(at("203.0.113.1:30000"))?.is_err(), "no device is served any more");
    Ok(())
}

#[test]
fn the_nodes_own_connections_get_their_answers_whatever_port_they_have() -> Result<()> {
    let world = World::make()?;
    let mut both = external("198.51.100.1:80", "10.244.2.2:8080", 30000);
    both.frontends.extend(with_node_port(service(Udp, &[], &[]), 30000, Udp).frontends);
    let plane = world.serve(&ServiceTable::from([(key("web"), both)]))?;
    world.client.run(|| -> Result<()> {
        let listener = TcpListener::bind("0.0.0.0:7000")?;
        std::thread::spawn(move || {
            while let Ok((mut stream, from)) = listener.accept() {
                drop(write!(stream, "server {from}"));
            }
        });
        let socket = UdpSocket::bind("0.0.0.0:7000")?;
        std::thread::spawn(move || {
            let mut buffer = [0; 100];
            while let Ok((_, from)) = socket.recv_from(&mut buffer) {
                drop(socket.send_to(format!("server {from}").as_bytes(), from));
            }
        });
        Ok(())
    })??;
    // The kernel itself gives the node's connections the port of the service.
    std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "30000 30000")?;
    let server = at("203.0.113.2:7000");
    let mut stream = TcpStream::connect_timeout(&server, DEADLINE)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    assert_eq!(text, "server 203.0.113.1:30000");
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(DEADLINE))?;
    for _ in 0..3 {
        socket.send_to(b"question", server)?;
        let mut buffer = [0; 100];
        let (len, from) = socket.recv_from(&mut buffer)?;
        assert_eq!((&buffer[..len], from), (b"server 203.0.113.1:30000".as_slice(), server));
    }
    // Clients are served all the same.
    for _ in 0..3 {
        let seen = world.tcp(at("203.0.113.1:30000"))??;
        assert!(seen.starts_with(&format!("{NODE}:")), "the pod sees {seen}");
        let seen = world.udp(at("203.0.113.1:30000"), 10)??;
        assert!(seen.starts_with(&format!("{NODE}:")), "the pod sees {seen}");
    }
    drop(plane);
    Ok(())
}
