//! Packet programs in the kernel, frame by frame (BPF_PROG_TEST_RUN): each case is a frame in, a verdict and a frame out.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use ebpf_common::Protocol::{Sctp, Tcp, Udp};
use ebpf_loader::{
    DataPlane, DesiredService, DesiredWay, Device, PacketHook, Place, Policy, ServiceTable, Side,
    SourcePrefix, View,
};
use ebpf_tests::{
    arena::{Arena, ip},
    frames::{ACK, Carried, SYN, error, frame, is_sound, quoted, read},
    tables::{at, key, service, with_node_port},
};

/// Verdicts of packet hooks: on to the next program, to the stack, nowhere, elsewhere.
const NEXT: u32 = u32::MAX;
const STACK: u32 = 0;
const NOWHERE: u32 = 2;
const ELSEWHERE: u32 = 7;
/// Verdicts of the driver's hook.
const XDP_PASS: u32 = 2;
const XDP_TX: u32 = 3;
const XDP_REDIRECT: u32 = 4;

const CLIENT: &str = "203.0.113.2:40000";
const NODE: [&str; 2] = ["192.0.2.1", "2001:db8::1"];

struct World {
    _arena: Arena,
    plane: DataPlane,
    pin_dir: std::path::PathBuf,
    outer: u32,
}

fn with(mut service: DesiredService, change: impl FnOnce(&mut DesiredService)) -> DesiredService {
    change(&mut service);
    service
}

fn table() -> ServiceTable {
    let v4 = |protocol, vip: &str| service(protocol, &[at(vip)], &[at("10.244.1.2:8080")]);
    ServiceTable::from([
        (key("tcp"), with_node_port(v4(Tcp, "198.51.100.1:80"), 30000, Tcp)),
        (key("udp"), v4(Udp, "198.51.100.1:53")),
        (key("six"), service(Tcp, &[at("[2001:db8:1::1]:80")], &[at("[fd00:244::2]:8080")])),
        (key("six-udp"), service(Udp, &[at("[2001:db8:1::1]:53")], &[at("[fd00:244::2]:8080")])),
        (key("sctp"), service(Sctp, &[at("198.51.100.2:9")], &[at("10.244.1.2:9")])),
        (key("sctp-moved"), service(Sctp, &[at("198.51.100.2:10")], &[at("10.244.1.2:9")])),
        (
            key("local"),
            with(v4(Tcp, "198.51.100.3:80"), |service| {
                service.frontends[0].external = Policy::Local;
                service.backends[0].place = Place::Local;
            }),
        ),
        (
            key("elsewhere"),
            with(v4(Tcp, "198.51.100.4:80"), |service| service.frontends[0].external = Policy::Local),
        ),
        (
            key("ranged"),
            with(v4(Tcp, "198.51.100.5:80"), |service| {
                service.frontends[0].ranged = true;
                service.source_ranges = vec![SourcePrefix { address: [192, 0, 2, 0].into(), bits: 24 }];
            }),
        ),
        (key("nobody"), service(Tcp, &[at("198.51.100.6:80")], &[])),
        (
            key("direct"),
            with(v4(Tcp, "198.51.100.7:80"), |service| {
                service.consistent = true;
                service.frontends[0].direct = true;
            }),
        ),
    ])
}

impl World {
    fn make() -> Result<Self> {
        let arena = Arena::enter(&[])?;
        ip(&["link", "add", "outer", "type", "veth", "peer", "name", "wire"])?;
        ip(&["link", "set", "outer", "up"])?;
        ip(&["link", "set", "wire", "up"])?;
        let mut plane = arena.open()?;
        let report = plane.replace_all(&table());
        ensure!(report.refused.is_empty(), "{:?}", report.refused);
        let own = NODE.map(|text| text.parse().expect("an address")).into();
        plane.set_node_addresses(&own, &own)?;
        plane.hide_clients(Some(NODE[0].parse()?), Some(NODE[1].parse()?))?;
        let outer = nix::net::if_::if_nametoindex("outer")?;
        let device = Device {
            index: outer,
            name: "outer".to_owned(),
            side: Side::Outer,
            ethernet: true,
            source_v4: None,
            source_v6: None,
            early: true,
        };
        let failed = plane.serve_devices(vec![device]);
        ensure!(failed.is_empty(), "{failed:?}");
        let pin_dir = arena.pin_dir.clone();
        Ok(Self { _arena: arena, plane, pin_dir, outer })
    }

    fn run(&mut self, hook: PacketHook, bytes: &[u8]) -> Result<(u32, Vec<u8>)> {
        let run = self.plane.try_packet(hook, self.outer, bytes, 1)?;
        Ok((run.verdict, run.frame))
    }

    /// Where a frame from outside goes.
    fn arrive(&mut self, to: &str, carried: Carried) -> Result<(u32, Vec<u8>)> {
        let to = at(to);
        let from = if to.is_ipv4() { at(CLIENT) } else { at("[2001:db8:2::2]:40000") };
        self.run(PacketHook::Outer, &frame(from, to, carried, b"hello"))
    }
}

fn back(bytes: &[u8], carried: Carried) -> Result<Vec<u8>> {
    let ends = read(bytes).context("no packet")?;
    Ok(frame(ends.to, ends.from, carried, b"answer"))
}

#[test]
fn a_table_of_frames_from_outside() -> Result<()> {
    let mut world = World::make()?;
    let syn = Carried::Tcp(SYN);
    let (hidden, hidden6) = (Some(NODE[0]), Some(NODE[1]));
    let shown = Some("203.0.113.2");
    // What is dialled, what with, the verdict, the new destination, and whom it sees.
    let cases = [
        ("198.51.100.1:80", syn, STACK, Some("10.244.1.2:8080"), hidden),
        ("192.0.2.1:30000", syn, STACK, Some("10.244.1.2:8080"), hidden),
        ("198.51.100.1:53", Carried::Udp, STACK, Some("10.244.1.2:8080"), hidden),
        ("198.51.100.1:53", Carried::UdpUnchecked, STACK, Some("10.244.1.2:8080"), hidden),
        ("[2001:db8:1::1]:80", syn, STACK, Some("[fd00:244::2]:8080"), hidden6),
        ("[2001:db8:1::1]:53", Carried::Udp, STACK, Some("[fd00:244::2]:8080"), hidden6),
        ("198.51.100.2:9", Carried::Sctp, STACK, Some("10.244.1.2:9"), hidden),
        ("198.51.100.2:10", Carried::Sctp, NOWHERE, None, None),
        ("198.51.100.3:80", syn, STACK, Some("10.244.1.2:8080"), shown),
        ("198.51.100.4:80", syn, NOWHERE, None, None),
        ("198.51.100.5:80", syn, NOWHERE, None, None),
        ("198.51.100.6:80", syn, STACK, Some("192.0.2.1:0"), shown),
        ("198.51.100.1:81", syn, NEXT, None, None),
        ("198.51.100.1:53", syn, NEXT, None, None),
        ("192.0.2.1:30001", syn, NEXT, None, None),
        ("192.0.2.9:30000", syn, NEXT, None, None),
    ];
    for (dialled, carried, verdict, to, seen) in cases {
        let what = format!("{dialled} with {carried:?}");
        let (met, out) = world.arrive(dialled, carried)?;
        assert_eq!(met, verdict, "{what}");
        let Some(to) = to else { continue };
        ensure!(is_sound(&out), "{what}: a checksum is wrong");
        let ends = read(&out).context("no packet comes out")?;
        assert_eq!(ends.to, at(to), "{what}");
        assert_eq!(
            Some(ends.from.ip()),
            seen.map(|text| text.parse::<IpAddr>().expect("an address")),
            "{what}"
        );
        if to.ends_with(":0") {
            continue;
        }
        // And the answer comes back from what was dialled.
        let answer = match carried {
            Carried::Tcp(_) => Carried::Tcp(SYN | ACK),
            other => other,
        };
        let hook = if seen == shown { PacketHook::Leave } else { PacketHook::Inner };
        let (met, out) = world.run(hook, &back(&out, answer)?)?;
        assert_eq!(met, STACK, "the answer of {what}");
        ensure!(is_sound(&out), "the answer of {what}: a checksum is wrong");
        let ends = read(&out).context("no answer comes out")?;
        assert_eq!((ends.from, ends.to.port()), (at(dialled), 40_000), "the answer of {what}");
    }
    Ok(())
}

#[test]
fn errors_are_rewritten_outside_and_inside() -> Result<()> {
    let mut world = World::make()?;
    // Too long, and nobody there, of both families.
    for (dialled, pod, errors) in [
        ("198.51.100.1:53", "10.244.1.2", [(3, 4), (3, 3)]),
        ("[2001:db8:1::1]:53", "fd00:244::2", [(2, 0), (1, 4)]),
    ] {
        for (kind, code) in errors {
            let (_, sent) = world.arrive(dialled, Carried::Udp)?;
            let about = error(pod.parse()?, &sent, kind, code);
            ensure!(is_sound(&about), "the test's own error");
            let (verdict, out) = world.run(PacketHook::Inner, &about)?;
            assert_eq!(verdict, STACK, "{dialled}, {kind}/{code}");
            ensure!(is_sound(&out), "{dialled}: the error's checksum");
            let (outer, inner) = (read(&out).context("outer")?, read(&quoted(&out)).context("inner")?);
            let client = if dialled.starts_with('[') { "[2001:db8:2::2]:40000" } else { CLIENT };
            assert_eq!((outer.from.ip(), outer.to.ip()), (at(dialled).ip(), at(client).ip()));
            assert_eq!((inner.from, inner.to), (at(client), at(dialled)), "what it quotes is what was sent");
        }
    }
    Ok(())
}

#[test]
fn a_packet_for_an_endpoint_elsewhere_is_relayed_or_sent_on_by_the_driver() -> Result<()> {
    let mut world = World::make()?;
    let mac = [2, 0, 0, 0, 9, 9];
    let way = |address: [u8; 4], bits, link| DesiredWay {
        to: SourcePrefix { address: address.into(), bits },
        device: world.outer,
        via: Some([192, 0, 2, 77].into()),
        link,
        mtu: 1500,
    };
    let ways = [way([10, 244, 1, 0], 24, Some((mac, [2, 0, 0, 0, 8, 8]))), way([0, 0, 0, 0], 0, None)];
    world.plane.set_ways(&ways)?;
    let (verdict, out) = world.arrive("198.51.100.7:80", Carried::Tcp(SYN))?;
    assert_eq!(verdict, ELSEWHERE);
    let ends = read(&out).context("no packet")?;
    assert_eq!((ends.from, ends.to, ends.hops), (at(CLIENT), at("198.51.100.7:80"), 63));
    ensure!(is_sound(&out), "the header's checksum");
    // The driver's hook: a new flow is not its business, a known one is.
    let packet = |flags| frame(at(CLIENT), at("198.51.100.1:80"), Carried::Tcp(flags), b"x");
    assert_eq!(world.run(PacketHook::Early, &packet(SYN))?, (XDP_PASS, packet(SYN)));
    assert_eq!(world.run(PacketHook::Outer, &packet(SYN))?.0, STACK);
    let (verdict, out) = world.run(PacketHook::Early, &packet(ACK))?;
    ensure!(matches!(verdict, XDP_TX | XDP_REDIRECT), "verdict {verdict}");
    ensure!(is_sound(&out), "a checksum is wrong");
    let ends = read(&out).context("no packet")?;
    assert_eq!((ends.to, ends.hops), (at("10.244.1.2:8080"), 63));
    assert_eq!(out[..6], mac, "to the next neighbour");
    // Nobody knows the neighbour towards the client.
    let answer = back(&out, Carried::Tcp(ACK))?;
    assert_eq!(world.run(PacketHook::Early, &answer)?, (XDP_PASS, answer.clone()));
    assert_eq!(world.run(PacketHook::Outer, &answer)?.0, STACK);
    Ok(())
}

#[test]
fn connections_that_are_over_are_forgotten_and_the_others_move_to_a_larger_map() -> Result<()> {
    const FIN: u8 = 1;
    let mut world = World::make()?;
    let dial = |port: u16, flags| {
        let client = SocketAddr::new([203, 0, 113, 2].into(), port);
        frame(client, at("198.51.100.1:80"), Carried::Tcp(flags), b"")
    };
    let mut sent = Vec::new();
    for port in 1000..1100 {
        world.run(PacketHook::Outer, &dial(port, SYN))?;
        sent.push(world.run(PacketHook::Outer, &dial(port, ACK))?.1);
    }
    // Every second one is closed by both ends.
    for (port, sent) in (1000..).zip(&sent).step_by(2) {
        world.run(PacketHook::Outer, &dial(port, ACK | FIN))?;
        world.run(PacketHook::Inner, &back(sent, Carried::Tcp(ACK | FIN))?)?;
    }
    let stock = world.plane.tidy_flows(ebpf_loader::monotonic())?;
    assert_eq!((stock.entries, stock.forgotten), (200, 0), "somebody may be late");
    let later = ebpf_loader::monotonic() + std::time::Duration::from_mins(10);
    let stock = world.plane.tidy_flows(later)?;
    assert_eq!((stock.entries, stock.forgotten), (100, 100));
    let capacity = stock.capacity;
    world.plane.attach()?;
    world.plane.grow_flows(capacity * 2)?;
    let stock = world.plane.tidy_flows(later)?;
    assert_eq!((stock.entries, stock.capacity), (100, capacity * 2));
    for (port, sent) in (1000..).zip(&sent).skip(1).step_by(2) {
        let next = world.run(PacketHook::Outer, &dial(port, ACK))?.1;
        assert_eq!(read(&next), read(sent), "the same endpoint by the same port");
        let (verdict, out) = world.run(PacketHook::Inner, &back(sent, Carried::Tcp(ACK))?)?;
        assert_eq!(verdict, STACK);
        assert_eq!(read(&out).context("no packet")?.to.port(), port, "its answers find the client");
    }
    // Who comes next finds the larger map.
    let flows = View::open(&world.pin_dir)?.flows(usize::MAX)?;
    assert_eq!(flows.iter().filter(|flow| flow.established).count(), 50);
    Ok(())
}

#[test]
fn a_flood_of_first_packets_leaves_connections_alone() -> Result<()> {
    let mut world = World::make()?;
    let dial = |port: u16, flags| {
        let client = SocketAddr::new([203, 0, 113, 2].into(), port);
        frame(client, at("198.51.100.1:80"), Carried::Tcp(flags), b"")
    };
    // A hundred connections, then more first packets than there is room for.
    let mut sent = Vec::new();
    for port in 1000..1100 {
        world.run(PacketHook::Outer, &dial(port, SYN))?;
        sent.push(world.run(PacketHook::Outer, &dial(port, ACK))?.1);
    }
    for n in 0..40_000_u32 {
        let [_, a, b, c] = n.to_be_bytes();
        let client = SocketAddr::new([198, 0x12 | a & 0x01, b, c].into(), 1024);
        let syn = frame(client, at("198.51.100.1:80"), Carried::Tcp(SYN), b"");
        assert_eq!(world.run(PacketHook::Outer, &syn)?.0, STACK);
    }
    let flows = View::open(&world.pin_dir)?.flows(usize::MAX)?;
    let established = flows.iter().filter(|flow| flow.established).count();
    assert_eq!(established, 100, "a first packet is no connection");
    for (port, sent) in (1000..).zip(&sent) {
        let (verdict, out) = world.run(PacketHook::Inner, &back(sent, Carried::Tcp(ACK))?)?;
        assert_eq!(verdict, STACK);
        assert_eq!(read(&out).context("no packet")?.to.port(), port, "its answers still find the client");
    }
    // Who dials during the flood gets through: the acknowledgement finds the same way without an entry.
    let syn = world.run(PacketHook::Outer, &dial(2000, SYN))?.1;
    let ack = world.run(PacketHook::Outer, &dial(2000, ACK))?.1;
    assert_eq!(read(&syn), read(&ack), "the same backend by the same port");
    Ok(())
}
