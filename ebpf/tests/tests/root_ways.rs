//! The ways of packets from outside: narrow links on either side, drivers that send on.
//! Real packets between network namespaces; the socket hooks are left off, as clients are other machines.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use ebpf_common::Protocol::{Tcp, Udp};
use ebpf_loader::{DataPlane, DesiredWay, Device, ServiceTable, Side, SourcePrefix, View};
use ebpf_tests::{
    arena::{Arena, has_tcx, ip},
    places::{Place as Elsewhere, forward, without_offload},
    tables::{at, key, service, with_node_port},
};

const PATIENCE: Duration = Duration::from_secs(20);
const LARGE: usize = 1 << 20;

fn device(name: &str, side: Side, early: bool) -> Result<Device> {
    let index = nix::net::if_::if_nametoindex(name)?;
    let name = name.to_owned();
    Ok(Device { index, name, side, ethernet: true, source_v4: None, source_v6: None, early })
}

fn way(to: &str, device: &str, via: Option<&str>, link: Option<([u8; 6], [u8; 6])>) -> Result<DesiredWay> {
    let (address, bits) = to.split_once('/').context("an address and its bits")?;
    Ok(DesiredWay {
        to: SourcePrefix { address: address.parse()?, bits: bits.parse()? },
        device: nix::net::if_::if_nametoindex(device)?,
        via: via.map(str::parse).transpose()?,
        link,
        mtu: 1500,
    })
}

fn open(plane: &mut DataPlane, table: &ServiceTable, own: &[&str], devices: Vec<Device>) -> Result<()> {
    let report = plane.replace_all(table);
    ensure!(report.refused.is_empty(), "{:?}", report.refused);
    let own = own.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
    plane.set_node_addresses(&own, &own)?;
    let failed = plane.serve_devices(devices);
    ensure!(failed.is_empty(), "{failed:?}");
    Ok(())
}

/// A server that takes everything, and then sends as much.
fn echo_server(place: &Elsewhere, address: &'static str) -> Result<()> {
    place.run(move || -> Result<()> {
        let listener = TcpListener::bind(address)?;
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                let mut all = Vec::new();
                drop(stream.read_to_end(&mut all));
                drop(stream.write_all(&all));
            }
        });
        Ok(())
    })?
}

/// Sends a large amount and gets it back.
fn transfer(place: &Elsewhere, address: SocketAddr) -> Result<()> {
    place.run(move || -> Result<()> {
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.write_all(&vec![7; LARGE]).context("send")?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut all = Vec::new();
        stream.read_to_end(&mut all).context("receive")?;
        ensure!(all.len() == LARGE, "{} bytes came back", all.len());
        Ok(())
    })?
}

#[test]
fn large_transfers_pass_narrow_links_on_either_side() -> Result<()> {
    let arena = Arena::enter(&[])?;
    forward()?;
    let client = Elsewhere::joined(
        "outer",
        &["203.0.113.1/24", "2001:db8::1/64"],
        &["203.0.113.2/24", "2001:db8::2/64"],
    )?;
    let pod = Elsewhere::joined(
        "inner",
        &["10.244.2.1/24", "fd00:244::1/64"],
        &["10.244.2.2/24", "fd00:244::2/64"],
    )?;
    ip(&["route", "add", "default", "via", "203.0.113.2"])?;
    ip(&["route", "add", "default", "via", "2001:db8::2"])?;
    echo_server(&pod, "0.0.0.0:8080")?;
    echo_server(&pod, "[::]:8081")?;
    let vip = |n: u8| (format!("198.51.100.{n}:80"), format!("[2001:db8:1::{n}]:80"));
    let mut table = ServiceTable::new();
    for n in 1..=2 {
        let (v4, v6) = vip(n);
        let four = service(Tcp, &[at(&v4)], &[at("10.244.2.2:8080")]);
        table.insert(key(&format!("four-{n}")), with_node_port(four, 30000 + u16::from(n), Tcp));
        table.insert(key(&format!("six-{n}")), service(Tcp, &[at(&v6)], &[at("[fd00:244::2]:8081")]));
    }
    let mut plane = arena.open()?;
    let own = ["203.0.113.1", "2001:db8::1", "10.244.2.1", "fd00:244::1"];
    plane.hide_clients(Some("203.0.113.1".parse()?), Some("2001:db8::1".parse()?))?;
    plane.set_ways(&[
        way("10.244.2.0/24", "inner", None, None)?,
        way("fd00:244::/64", "inner", None, None)?,
        way("0.0.0.0/0", "outer", Some("203.0.113.2"), None)?,
        way("::/0", "outer", Some("2001:db8::2"), None)?,
    ])?;
    let devices = vec![device("outer", Side::Outer, false)?, device("inner", Side::Inner, false)?];
    open(&mut plane, &table, &own, devices)?;
    // The node's end alone is narrow: the other ends think that more fits, and must be told. First towards the pod, then
    // towards the client.
    for (n, narrow, wide) in [(1, "inner", "outer"), (2, "outer", "inner")] {
        ip(&["link", "set", narrow, "mtu", "1400"])?;
        ip(&["link", "set", wide, "mtu", "1500"])?;
        let (v4, v6) = vip(n);
        for dialled in [at(&v4), at(&v6), at(&format!("203.0.113.1:{}", 30000 + u16::from(n)))] {
            transfer_one_way(&client, dialled, narrow == "inner")
                .with_context(|| format!("{dialled} with a narrow {narrow}"))?;
        }
    }
    Ok(())
}

/// A transfer whose large packets go towards the narrow link: the kernel drops what is longer than a veth's own MTU
/// before it could be answered, so the other direction carries little.
fn transfer_one_way(client: &Elsewhere, address: SocketAddr, up: bool) -> Result<()> {
    if up {
        return client.run(move || -> Result<()> {
            let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
            stream.set_write_timeout(Some(PATIENCE))?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(&vec![7; LARGE]).context("send")?;
            // The first byte comes back once everything has arrived.
            stream.shutdown(std::net::Shutdown::Write)?;
            stream.read_exact(&mut [0]).context("receive")
        })?;
    }
    transfer(client, address)
}

#[test]
fn packets_of_known_flows_go_from_wire_to_wire_in_the_driver() -> Result<()> {
    let arena = Arena::enter(&[])?;
    forward()?;
    let client = Elsewhere::joined("outer", &["203.0.113.1/24"], &["203.0.113.2/24"])?;
    let other = Elsewhere::joined("fabric", &["10.250.0.1/24"], &["10.250.0.2/24"])?;
    for place in [&client, &other] {
        // A frame that a driver sends on must have its checksum, and its receiver must take frames from drivers.
        place.run(|| without_offload("eth0"))??;
    }
    other.serve("0.0.0.0:8080", "other")?;
    echo_server(&other, "0.0.0.0:8090")?;
    let mut plane = arena.open()?;
    let table = ServiceTable::from([
        (key("udp"), service(Udp, &[at("198.51.100.1:53")], &[at("10.250.0.2:8080")])),
        (key("tcp"), service(Tcp, &[at("198.51.100.1:80")], &[at("10.250.0.2:8090")])),
    ]);
    let mac = |device: &str| -> Result<[u8; 6]> {
        let text = std::fs::read_to_string(format!("/sys/class/net/{device}/address"));
        // Mounted for the machine's namespace, sysfs does not know this one's devices.
        let text = text.or_else(|_| link_address(device))?;
        let bytes: Result<Vec<u8>, _> =
            text.trim().split(':').map(|part| u8::from_str_radix(part, 16)).collect();
        bytes?.try_into().ok().context("six bytes")
    };
    let theirs = |place: &Elsewhere| -> Result<[u8; 6]> {
        let text = place.run(|| link_address("eth0"))??;
        let bytes: Result<Vec<u8>, _> =
            text.trim().split(':').map(|part| u8::from_str_radix(part, 16)).collect();
        bytes?.try_into().ok().context("six bytes")
    };
    plane.hide_clients(Some("10.250.0.1".parse()?), None)?;
    plane.set_ways(&[
        way("10.250.0.2/32", "fabric", None, Some((theirs(&other)?, mac("fabric")?)))?,
        way("203.0.113.2/32", "outer", None, Some((theirs(&client)?, mac("outer")?)))?,
    ])?;
    let devices = vec![device("outer", Side::Outer, true)?, device("fabric", Side::Outer, true)?];
    open(&mut plane, &table, &["203.0.113.1", "10.250.0.1"], devices)?;
    let seen = View::open(&arena.pin_dir)?.devices()?;
    let how = if has_tcx()? { ["TCX", "XDP"] } else { ["XDP", "clsact"] };
    ensure!(seen.iter().all(|device| device.how == how), "{seen:?}");
    for _ in 0..20 {
        let answer = client.ask_udp(at("198.51.100.1:53"), 100, PATIENCE)?.context("an answer")?;
        ensure!(answer.starts_with("other 10.250.0.1:"), "{answer}");
    }
    transfer(&client, at("198.51.100.1:80")).context("a large transfer")?;
    let stats = plane.stats(&key("tcp")).context("programmed")?;
    ensure!(stats.packets_in > 100 && stats.packets_out > 100, "each packet is counted: {stats:?}");
    ensure!(stats.external == 1, "one connection: {stats:?}");
    Ok(())
}

/// The link address of a device of the calling thread's namespace, as `ip` tells it.
fn link_address(device: &str) -> std::io::Result<String> {
    let output = std::process::Command::new("ip").args(["-o", "link", "show", device]).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut words = text.split_whitespace().skip_while(|word| *word != "link/ether");
    words.nth(1).map(str::to_owned).ok_or_else(|| std::io::Error::other("no link address"))
}

#[test]
fn weights_decide_how_many_clients_an_endpoint_gets() -> Result<()> {
    let arena = Arena::enter(&[])?;
    forward()?;
    let client = Elsewhere::joined("outer", &["203.0.113.1/24"], &["203.0.113.2/24"])?;
    let pod = Elsewhere::joined("inner", &["10.244.2.1/24"], &["10.244.2.2/24"])?;
    for (port, name) in [(8001, "heavy"), (8002, "light"), (8003, "none")] {
        pod.serve(&format!("0.0.0.0:{port}"), name)?;
    }
    let backends = [8001, 8002, 8003].map(|port| SocketAddr::new(IpAddr::from([10, 244, 2, 2]), port));
    let mut weighed = service(Tcp, &[at("198.51.100.1:80")], &backends);
    weighed.consistent = true;
    weighed.weights = [(backends[0], 4), (backends[2], 0)].into();
    let mut plane = arena.open()?;
    plane.hide_clients(Some("203.0.113.1".parse()?), None)?;
    let devices = vec![device("outer", Side::Outer, false)?, device("inner", Side::Inner, false)?];
    open(&mut plane, &ServiceTable::from([(key("web"), weighed.clone())]), &["203.0.113.1"], devices)?;
    let ask = |times: usize| -> Result<[usize; 3]> {
        let mut met = [0; 3];
        for _ in 0..times {
            let answer = client.ask_tcp(at("198.51.100.1:80"), PATIENCE)?.context("an answer")?;
            let names = ["heavy", "light", "none"];
            let who = names.iter().position(|name| answer.starts_with(name)).context("a stranger answers")?;
            met[who] += 1;
        }
        Ok(met)
    };
    let met = ask(200)?;
    ensure!(met[2] == 0 && met[0] > met[1] * 2 && met[1] > 0, "4 : 1 : 0, but {met:?}");
    // The next process finds the table in the maps, and without it the others are equal again.
    drop(plane);
    let mut plane = arena.open()?;
    ensure!(plane.adopted(), "the maps are there");
    (weighed.consistent, weighed.weights) = (false, [].into());
    plane.replace_all(&ServiceTable::from([(key("web"), weighed)]));
    let devices = vec![device("outer", Side::Outer, false)?, device("inner", Side::Inner, false)?];
    plane.serve_devices(devices);
    let met = ask(100)?;
    ensure!(met.iter().all(|count| *count > 0), "all alike, but {met:?}");
    Ok(())
}
