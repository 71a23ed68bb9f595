//! What pods of two nodes gain where packets go between pod and tunnel without bridge and stack: connections and requests
//! through a ClusterIP with everything of ours on both nodes, over those straight to the pod's address through the same
//! bridges and the same tunnel without any of our programs.
//!
//! ```text
//! client ─ veth ─ bridge ─ tunnel ═ wire ═ tunnel ─ bridge ─ veth ─ server    twice: two nodes without programs, two with
//! ```
//! Rounds go A B B A as for [`super::connections`]; a second plain one is the control.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddrV4},
    path::PathBuf,
};

use anyhow::{Context, Result, ensure};
use ebpf_common::Protocol;
use ebpf_loader::{DataPlane, DesiredWay, PodPort, ServiceTable, SourcePrefix, Tunnel};

use super::{
    connections::WorkReport,
    lanes::{CLIENT_POD, Ground, Port, SERVER_POD},
    namespaces::Namespace,
    shortcut::{Options, race_both},
};
use crate::{
    arena::{Arena, ip},
    tables::{key, service},
};

/// Numbers of the two pairs of nodes.
const PLAIN: u8 = 3;
const SHORT: u8 = 4;
/// Bytes that a packet may have in the tunnel, which its headers leave of the wire's.
const MTU: u32 = 1450;

/// One of a pair of nodes.
#[derive(Clone, Copy)]
struct Side {
    /// The pair.
    pair: u8,
    /// The client's, or the server's.
    clients: bool,
}

impl Side {
    fn other(self) -> Self {
        Self { clients: !self.clients, ..self }
    }

    fn net(self) -> u8 {
        if self.clients { 200 } else { 201 }
    }

    fn range(self) -> String {
        format!("10.{}.{}.0/24", self.net(), self.pair)
    }

    /// The address of its tunnel's device, the first of its range.
    fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::new(10, self.net(), self.pair, 0)
    }

    /// The address of its bridge.
    fn router(self) -> Ipv4Addr {
        Ipv4Addr::new(10, self.net(), self.pair, 1)
    }

    fn pod(self) -> Ipv4Addr {
        Ipv4Addr::new(10, self.net(), self.pair, if self.clients { CLIENT_POD } else { SERVER_POD })
    }

    fn wire(self) -> Ipv4Addr {
        Ipv4Addr::new(192, 168, self.pair, if self.clients { 1 } else { 2 })
    }

    fn mac(self, what: u8) -> [u8; 6] {
        [2, 0, what, self.net(), self.pair, 1]
    }

    fn pod_mac(self) -> String {
        shown(self.mac(3))
    }

    /// Bridge and tunnel, in the calling thread's namespace, where the wire is.
    fn build(self) -> Result<()> {
        let other = self.other();
        ip(&["link", "add", "pods", "address", &shown(self.mac(1)), "type", "bridge"])?;
        ip(&["addr", "add", &format!("{}/24", self.router()), "dev", "pods"])?;
        ip(&["link", "set", "pods", "up"])?;
        let (local, mtu) = (self.wire().to_string(), MTU.to_string());
        let device = ["link", "add", "tunnel", "address", &shown(self.mac(2)), "mtu", &mtu, "type", "vxlan"];
        ip(&[&device[..], &["id", "75", "dev", "wire", "local", &local, "dstport", "4789", "nolearning"]]
            .concat())?;
        ip(&["addr", "add", &format!("{}/32", self.gateway()), "dev", "tunnel"])?;
        ip(&["link", "set", "tunnel", "up"])?;
        let (via, mac) = (other.gateway().to_string(), shown(other.mac(2)));
        ip(&["neigh", "add", &via, "lladdr", &mac, "dev", "tunnel", "nud", "permanent"])?;
        let remote = other.wire().to_string();
        let bridge = std::process::Command::new("bridge")
            .args(["fdb", "add", &mac, "dev", "tunnel", "dst", &remote])
            .status()?;
        ensure!(bridge.success(), "bridge fdb add: {bridge}");
        ip(&["route", "add", &other.range(), "via", &via, "dev", "tunnel", "onlink"])?;
        Ok(fs::write("/proc/sys/net/ipv4/ip_forward", "1")?)
    }

    /// Has packets leave bridge and stack out, in the calling thread's namespace.
    fn shorten(self, plane: &mut DataPlane) -> Result<()> {
        let index = |name: &str| nix::net::if_::if_nametoindex(name);
        let other = self.other();
        plane.set_ways(&[DesiredWay {
            to: SourcePrefix { address: IpAddr::V4(other.gateway()), bits: 24 },
            device: index("tunnel")?,
            via: Some(IpAddr::V4(other.gateway())),
            link: None,
            mtu: MTU,
        }])?;
        let link = index("port")?;
        let served = plane.shortcut_pods_until(&[PodPort { index: link, address: self.mac(3) }], u64::MAX);
        let pods = BTreeMap::from([(IpAddr::V4(self.pod()), link)]);
        let tunnel = Tunnel { index: index("tunnel")?, bridge: self.mac(1), mtu: MTU, pods };
        let routed = plane.route_pods(Some(&tunnel));
        ensure!((served, routed) == (1, 1), "the kernel has no short way between nodes (TCX, Linux 6.6)");
        Ok(())
    }
}

fn shown(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Programs of the server's node; its pins go with it.
struct Other {
    node: Namespace,
    pin_dir: PathBuf,
}

impl Drop for Other {
    fn drop(&mut self) {
        let pins = self.pin_dir.clone();
        // What fails is shown by the machine's own state.
        drop(self.node.run(move || drop(ebpf_loader::unload(&pins))));
    }
}

/// Measures both kinds: "direct" is without programs, "ours" through the ClusterIP. Needs root, and a kernel with TCX.
pub fn measure(options: &Options) -> Result<Vec<WorkReport>> {
    let arena = Arena::enter(&[])?;
    let mut ground = Ground::new(&arena)?;
    let (near, far) = (Namespace::start(None)?, Namespace::start(None)?);
    join(Some(&near), &far, PLAIN, &ground)?;
    let other = Namespace::start(None)?;
    join(None, &other, SHORT, &ground)?;
    let (client, server) = (Side { pair: SHORT, clients: true }, Side { pair: SHORT, clients: false });
    let at = |pair: u8, port: Port| SocketAddrV4::new(Side { pair, clients: false }.pod(), port.number());
    let vip = |port: Port| SocketAddrV4::new([10, 96, 201, 10].into(), port.number());
    let mut table = ServiceTable::new();
    for port in [Port::Byte, Port::Echo] {
        let one = service(Protocol::Tcp, &[vip(port).into()], &[at(SHORT, port).into()]);
        table.insert(key(&format!("bench/far:{}/TCP/IPv4", port.number())), one);
    }
    let mut plane = arena.open()?;
    let report = plane.replace_all(&table);
    ensure!(report.refused.is_empty(), "not programmed: {:?}", report.refused);
    plane.attach()?;
    client.shorten(&mut plane)?;
    let mut config = arena.config();
    config.pin_dir.as_mut_os_string().push("-other");
    let _other = Other { node: other.handle(), pin_dir: config.pin_dir.clone() };
    other
        .run(move || -> Result<()> {
            let mut plane = DataPlane::open(config)?;
            server.shorten(&mut plane)
        })?
        .context("the server's node")?;
    race_both(&mut ground, options, |port| at(PLAIN, port), vip)
}

/// Two nodes, the first one perhaps the calling thread's namespace, with a wire between them and a pod each.
fn join(near: Option<&Namespace>, far: &Namespace, pair: u8, ground: &Ground) -> Result<()> {
    let (client, server) = (Side { pair, clients: true }, Side { pair, clients: false });
    let address = |side: Side| format!("{}/24", side.wire());
    match near {
        Some(near) => near.join(("wire", &address(client)), far, ("wire", &address(server)))?,
        None => far.join_caller(("wire", &address(client)), ("wire", &address(server)))?,
    }
    let (client_pod, server_pod) = ground.both();
    let plug = move |pod: Namespace, side: Side| -> Result<()> {
        side.build()?;
        let device = format!("pod{pair}");
        pod.plug(("pods", "port"), &device, &side.pod_mac(), &[&format!("{}/24", side.pod())])?;
        let mtu = MTU.to_string();
        ip(&["link", "set", "pods", "mtu", &mtu])?;
        let name = device.clone();
        pod.run(move || ip(&["link", "set", &name, "mtu", &mtu]))??;
        pod.route(&side.other().range(), &side.router().to_string())
    };
    match near {
        Some(near) => near.run(move || plug(client_pod, client))??,
        None => plug(client_pod, client)?,
    }
    far.run(move || plug(server_pod, server))?
}
