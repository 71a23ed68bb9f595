//! SCTP from end to end: between pods, and by host ports through nftables. It needs a kernel with SCTP sockets, as in
//! `cargo xtask test vm-light`; elsewhere the tests say that they were skipped.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod ground;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::thread;

use cni_plugins_host::netns;
use ground::{Ground, Pod, address};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, connect, listen,
    setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use serde_json::{Value, json};

/// Seconds that an association, or a word over it, may take.
const PATIENCE: i64 = 30;

/// A one-to-one socket, of which std's TCP types do all but making and binding it.
fn sctp_socket(family: IpAddr) -> nix::Result<OwnedFd> {
    let family = if family.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, SockProtocol::Sctp)?;
    setsockopt(&fd, sockopt::SendTimeout, &TimeVal::new(PATIENCE, 0))?;
    setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::new(PATIENCE, 0))?;
    Ok(fd)
}

/// Whether the kernel has SCTP; in a guest it must.
#[allow(clippy::print_stderr, reason = "says that a test was skipped")]
fn there_is_sctp() -> bool {
    match sctp_socket([127, 0, 0, 1].into()) {
        Ok(_) => true,
        Err(error) => {
            assert!(std::env::var_os("KEELSON_VM").is_none(), "the guest has no SCTP: {error}");
            eprintln!("skipped: this kernel has no SCTP sockets ({error}); `cargo xtask test vm-light` has");
            false
        }
    }
}

/// A listener on one address: with several, SCTP would tell its peer of all of them, which no translation sees.
fn listener(at: SocketAddr) -> TcpListener {
    let fd = sctp_socket(at.ip()).unwrap();
    bind(fd.as_raw_fd(), &SockaddrStorage::from(at)).unwrap();
    listen(&fd, Backlog::new(1).unwrap()).unwrap();
    TcpListener::from(fd)
}

/// A word from one namespace to a listener in another and back; the client's address as the server sees it.
fn talk(
    (from, own): (&Path, IpAddr),
    (to, serves): (&Path, SocketAddr),
    target: SocketAddr,
) -> Result<IpAddr, String> {
    let listener = netns::run_in(to, || listener(serves)).unwrap();
    let server = thread::spawn(move || -> std::io::Result<IpAddr> {
        let (mut stream, client) = listener.accept()?;
        let mut word = [0; 5];
        stream.read_exact(&mut word)?;
        stream.write_all(&word)?;
        Ok(client.ip())
    });
    let answer = netns::run_in(from, || -> Result<[u8; 5], String> {
        let fd = sctp_socket(own).map_err(|error| error.to_string())?;
        bind(fd.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(own, 0)))
            .map_err(|error| error.to_string())?;
        connect(fd.as_raw_fd(), &SockaddrStorage::from(target))
            .map_err(|error| format!("connect: {error}"))?;
        let mut stream = TcpStream::from(fd);
        stream.write_all(b"hello").map_err(|error| format!("write: {error}"))?;
        let mut word = [0; 5];
        stream.read_exact(&mut word).map_err(|error| format!("read: {error}"))?;
        Ok(word)
    })
    .unwrap()?;
    assert_eq!(&answer, b"hello");
    server.join().unwrap().map_err(|error| format!("server: {error}"))
}

fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), port)
}

/// A pod with host port 9000 for SCTP, and its address of either family.
fn pod_with_port(ground: &Ground, id: &str) -> (Pod, Vec<Value>, [IpAddr; 2]) {
    let mappings = json!([{"hostPort": 9000, "containerPort": 132, "protocol": "sctp"}]);
    let portmap = ground.plugin("keelson-portmap", &json!({"runtimeConfig": {"portMappings": mappings}}));
    let (pod, chain) = (ground.pod(id), vec![ground.bridge(), portmap]);
    let result = ground.add(&chain, &pod);
    let addresses = [address(&result, 0), address(&result, 1)];
    (pod, chain, addresses)
}

#[test]
fn pods_reach_each_other() {
    if !there_is_sctp() {
        return;
    }
    let ground = Ground::new();
    let (one, two) = (ground.pod("c1"), ground.pod("c2"));
    let chain = [ground.bridge()];
    let (first, second) = (ground.add(&chain, &one), ground.add(&chain, &two));
    for family in 0..2 {
        let (own, target) = (address(&first, family), SocketAddr::new(address(&second, family), 132));
        assert_eq!(talk((&one.netns, own), (&two.netns, target), target), Ok(own));
    }
}

#[test]
fn a_host_port_leads_to_the_pod_which_sees_its_client_and_goes_with_it() {
    if !there_is_sctp() {
        return;
    }
    let ground = Ground::new();
    let node = ground.outside();
    let (pod, chain, addresses) = pod_with_port(&ground, "c1");
    for (index, (host, client)) in
        [("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")].into_iter().enumerate()
    {
        let serves = SocketAddr::new(addresses[index], 132);
        let own: IpAddr = client.parse().unwrap();
        assert_eq!(talk((&node, own), (&pod.netns, serves), at(host, 9000)), Ok(own), "from another node");
        let host: IpAddr = host.parse().unwrap();
        let seen = talk((&ground.host, host), (&pod.netns, serves), SocketAddr::new(host, 9000));
        assert!(seen.is_ok(), "from the node itself: {seen:?}");
    }
    ground.del(&chain, &pod);
    assert_eq!(ground.elements(), std::collections::BTreeMap::new());
    // Nobody serves it on the host: the answer is an ABORT.
    let refused = netns::run_in(&node, || {
        let fd = sctp_socket([192, 0, 2, 2].into()).unwrap();
        connect(fd.as_raw_fd(), &SockaddrStorage::from(at("192.0.2.1", 9000)))
    })
    .unwrap();
    assert!(refused.is_err(), "the port still leads somewhere");
    // And a successor gets it, also for a client that was served before.
    let (heir, _, addresses) = pod_with_port(&ground, "c2");
    let own: IpAddr = [192, 0, 2, 2].into();
    let serves = SocketAddr::new(addresses[0], 132);
    assert_eq!(talk((&node, own), (&heir.netns, serves), at("192.0.2.1", 9000)), Ok(own));
}
