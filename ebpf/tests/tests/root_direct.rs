//! Endpoints on another node that answer their clients directly, for balancers' addresses and NodePorts: two data planes in
//! two network namespaces, real packets of both families and protocols.
//!
//! ```text
//! client eth0 ── outer │ first node │ fabric ── eth0 │ second node │ pod ── eth0 pod
//!        eth1 ────────────────────────────── wayout ─┘
//! ```
//! The second node's way out does not lead through the first: what the client gets, the second one sent.

use std::{collections::BTreeSet, net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use ebpf_common::{Protocol, ServiceStats};
use ebpf_loader::{
    DataPlane, DesiredFrontend, DesiredService, DesiredWay, Device, Family, Listen, Place, ServiceTable,
    Side, SourcePrefix,
};
use ebpf_tests::{
    arena::{Arena, ip},
    places::{Place as Elsewhere, add, forward},
    tables::{at, ips, key, service},
};

const PATIENCE: Duration = Duration::from_secs(20);
const NODE_PORT: u16 = 30_001;
const FIRST: [&str; 4] = ["203.0.113.1", "2001:db8:1::1", "10.250.0.1", "fd00:250::1"];
const SECOND: [&str; 4] = ["203.0.114.1", "2001:db8:2::1", "10.250.0.2", "fd00:250::2"];
const CLIENT: [&str; 2] = ["203.0.113.2", "2001:db8:1::2"];
const VIP: [&str; 2] = ["198.51.100.1:53", "[2001:db8:9::1]:53"];
const POD: [&str; 2] = ["10.244.2.2:8080", "[fd00:244:2::2]:8081"];
const PROTOCOLS: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];

struct World {
    client: Elsewhere,
    other: Elsewhere,
    _pod: Elsewhere,
    first: DataPlane,
    second: Option<DataPlane>,
    pins: PathBuf,
    /// Goes last: what it removes must not be in use.
    _arena: Arena,
}

fn device(name: &str, side: Side) -> Result<Device> {
    let index = nix::net::if_::if_nametoindex(name)?;
    let (name, ethernet, early) = (name.to_owned(), true, false);
    Ok(Device { index, name, side, ethernet, source_v4: None, source_v6: None, early })
}

/// The service, on balancers' addresses and a NodePort; its one endpoint is here or elsewhere.
fn table(place: Place) -> ServiceTable {
    let mut table = ServiceTable::new();
    for (index, family) in [Family::V4, Family::V6].into_iter().enumerate() {
        for protocol in PROTOCOLS {
            let mut direct: DesiredService = service(protocol, &[at(VIP[index])], &[at(POD[index])]);
            direct.consistent = true;
            direct.backends[0].place = place;
            direct.frontends.push(DesiredFrontend::new(Listen::Node(family), NODE_PORT, protocol));
            for frontend in &mut direct.frontends {
                frontend.direct = true;
            }
            table.insert(key(&format!("{index}-{}", protocol.name())), direct);
        }
    }
    table
}

fn fill(plane: &mut DataPlane, place: Place, own: &[&str], devices: Vec<Device>) -> Result<()> {
    let report = plane.replace_all(&table(place));
    ensure!(report.refused.is_empty(), "{:?}", report.refused);
    let own = ips(own).into_iter().collect();
    plane.set_node_addresses(&own, &own)?;
    let failed = plane.serve_devices(devices);
    ensure!(failed.is_empty(), "{failed:?}");
    Ok(())
}

impl World {
    fn make() -> Result<Self> {
        let arena = Arena::enter(&[])?;
        forward()?;
        let prefixed = |ip: &str| format!("{ip}/{}", if ip.contains(':') { 64 } else { 24 });
        let [outer, fabric] = [[FIRST[0], FIRST[1]], [FIRST[2], FIRST[3]]].map(|pair| pair.map(prefixed));
        let (theirs, clients) = ([SECOND[2], SECOND[3]].map(prefixed), CLIENT.map(prefixed));
        let texts = |pair: &[String; 2]| -> Vec<String> { pair.to_vec() };
        let joined = |device: &str, node: &[String; 2], own: &[String; 2]| -> Result<Elsewhere> {
            let (node, own) = (texts(node), texts(own));
            let (node, own): (Vec<&str>, Vec<&str>) =
                (node.iter().map(String::as_str).collect(), own.iter().map(String::as_str).collect());
            Elsewhere::joined(device, &node, &own)
        };
        let client = joined("outer", &outer, &clients)?;
        let other = joined("fabric", &fabric, &theirs)?;
        let pod = Elsewhere::empty()?;
        second_node(&client, &other, &pod)?;
        ip(&["route", "add", "10.244.2.0/24", "via", SECOND[2]])?;
        ip(&["route", "add", "fd00:244:2::/64", "via", SECOND[3]])?;
        for address in ["0.0.0.0:8080", "[::]:8081"] {
            pod.serve(address, "pod")?;
        }
        let mut first = arena.open()?;
        first.hide_clients(Some(FIRST[0].parse()?), Some(FIRST[1].parse()?))?;
        let index = nix::net::if_::if_nametoindex("fabric")?;
        let way = |to: &str, bits: u8, via: &str| -> Result<DesiredWay> {
            let to = SourcePrefix { address: to.parse()?, bits };
            Ok(DesiredWay { to, device: index, via: Some(via.parse()?), link: None, mtu: 1500 })
        };
        first.set_ways(&[way("10.244.2.0", 24, SECOND[2])?, way("fd00:244:2::", 64, SECOND[3])?])?;
        let devices = vec![device("outer", Side::Outer)?, device("fabric", Side::Inner)?];
        fill(&mut first, Place::Far, &FIRST, devices)?;
        let mut config = arena.config();
        let name = arena.pin_dir.file_name().context("a name")?.to_string_lossy().into_owned();
        config.pin_dir = arena.pin_dir.with_file_name(format!("{name}-other"));
        let pins = config.pin_dir.clone();
        let second = other.run(move || -> Result<DataPlane> {
            let mut plane = DataPlane::open(config)?;
            let devices = vec![
                device("eth0", Side::Inner)?,
                device("pod", Side::Inner)?,
                device("wayout", Side::Outer)?,
            ];
            let own = [&SECOND[..], &["10.244.2.1", "fd00:244:2::1"]].concat();
            fill(&mut plane, Place::Local, &own, devices)?;
            Ok(plane)
        })??;
        Ok(Self { client, other, _pod: pod, first, second: Some(second), pins, _arena: arena })
    }

    fn second(&mut self) -> Result<&mut DataPlane> {
        self.second.as_mut().context("there until the end")
    }

    /// What the pod says of the client, over both protocols.
    fn ask(&self, address: SocketAddr) -> Result<()> {
        let client = if address.is_ipv4() { CLIENT[0] } else { CLIENT[1] };
        let expected = SocketAddr::new(client.parse()?, 0).to_string();
        let expected = format!("pod {}", expected.trim_end_matches('0'));
        let over_tcp = self.client.ask_tcp(address, PATIENCE)?.context("TCP")?;
        let over_udp = self.client.ask_udp(address, 100, PATIENCE)?.context("UDP")?;
        for answer in [over_tcp, over_udp] {
            ensure!(answer.starts_with(&expected), "the pod sees its client: {answer}, not {expected}");
        }
        Ok(())
    }

    /// Counters of all services of one node together.
    fn sums(plane: &DataPlane) -> (u64, u64) {
        let all = table(Place::Far);
        let stats: Vec<ServiceStats> = all.keys().filter_map(|key| plane.stats(key)).collect();
        (stats.iter().map(|one| one.packets_in).sum(), stats.iter().map(|one| one.packets_out).sum())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // The arena removes its own pins only.
        drop(self.second.take());
        let pins = self.pins.clone();
        drop(self.other.run(move || ebpf_loader::unload(&pins)));
    }
}

/// The other node's own way out, and its pod.
fn second_node(client: &Elsewhere, other: &Elsewhere, pod: &Elsewhere) -> Result<()> {
    let (client_thread, pod_thread) = (client.thread, pod.thread);
    other.run(move || -> Result<()> {
        forward()?;
        for family in ["-4", "-6"] {
            ip(&[family, "route", "del", "default"])?;
        }
        let to = |device: &str, inside: &str, thread: i32| {
            ip(&["link", "add", device, "type", "veth", "peer", "name", inside, "netns", &thread.to_string()])
        };
        to("wayout", "eth1", client_thread)?;
        to("pod", "eth0", pod_thread)?;
        for (address, device) in [
            ("203.0.114.1/24", "wayout"),
            ("2001:db8:2::1/64", "wayout"),
            ("10.244.2.1/24", "pod"),
            ("fd00:244:2::1/64", "pod"),
        ] {
            add(device, address)?;
            ip(&["link", "set", device, "up"])?;
        }
        Ok(())
    })??;
    client.run(|| -> Result<()> {
        add("eth1", "203.0.114.2/24")?;
        add("eth1", "2001:db8:2::2/64")?;
        ip(&["link", "set", "eth1", "up"])
    })??;
    pod.run(|| -> Result<()> {
        add("eth0", "10.244.2.2/24")?;
        add("eth0", "fd00:244:2::2/64")?;
        ip(&["link", "set", "eth0", "up"])?;
        ip(&["route", "add", "default", "via", "10.244.2.1"])?;
        ip(&["route", "add", "default", "via", "fd00:244:2::1"])
    })??;
    other.run(|| -> Result<()> {
        ip(&["route", "add", "default", "via", "203.0.114.2"])?;
        ip(&["route", "add", "default", "via", "2001:db8:2::2"])
    })?
}

#[test]
fn an_endpoint_on_another_node_answers_directly() -> Result<()> {
    let mut world = World::make()?;
    for vip in VIP {
        world.ask(at(vip)).with_context(|| vip.to_owned())?;
    }
    let (in_first, out_first) = World::sums(&world.first);
    ensure!(in_first > 4 && out_first == 0, "answers do not pass the first node: {in_first}, {out_first}");
    let (in_second, out_second) = World::sums(world.second()?);
    ensure!(in_second == in_first && out_second > 4, "{in_second} of {in_first} packets, {out_second}");
    // A NodePort of the first node. It knows last that all know its address: nobody sends what the other one would not take.
    let nodes: BTreeSet<_> = ips(&[FIRST[0], FIRST[1], SECOND[0], SECOND[1]]).into_iter().collect();
    world.second()?.share_node_ports(nodes.clone())?;
    world.first.share_node_ports(nodes)?;
    for node in [FIRST[0], FIRST[1]] {
        let dialled = SocketAddr::new(node.parse()?, NODE_PORT);
        world.ask(dialled).with_context(|| dialled.to_string())?;
    }
    let (more, out_first) = World::sums(&world.first);
    ensure!(more > in_first && out_first == 0, "answers do not pass the first node: {more}, {out_first}");
    let (in_second, out_second) = World::sums(world.second()?);
    ensure!(in_second == more && out_second > 8, "{in_second} of {more} packets, {out_second}");
    Ok(())
}
