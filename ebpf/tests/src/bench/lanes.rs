//! The ground of a measurement: one client, one server, and between them a node for each way of forwarding.
//!
//! ```text
//! client ─ veth ─ node "direct"   ─ veth ─ server
//!        ├ veth ─ node "iptables" ─ veth ─┤
//!        └ veth ─ node "nftables" ─ veth ─┘
//! ```
//! Each node is a network namespace of its own that routes, so that all rule sets stay loaded while rounds go around.
//! Our hooks need no node: a connection through them takes the node "direct".

use std::{
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream},
    path::PathBuf,
};

use anyhow::{Context, Result};

use super::{client::Client, namespaces::Namespace, scene::Tested};
use crate::arena::{Arena, ip};

/// Where the server gives everybody one byte.
const BYTE: u16 = 8080;
/// Where it sends back what it gets.
const ECHO: u16 = 8081;

/// Client and server as pods of a bridge: the last byte of their addresses.
pub(super) const CLIENT_POD: u8 = 2;
pub(super) const SERVER_POD: u8 = 3;

/// The link address of a pod, as `ip` takes it.
fn link_address(number: u8, host: u8) -> String {
    format!("02:00:00:00:{number:02x}:{host:02x}")
}

/// Client and server.
pub(super) struct Ground {
    client: Namespace,
    server: Namespace,
    /// The dialling process.
    pub(super) dialler: Client,
    /// The cgroup with hooks.
    pub(super) served: PathBuf,
    /// The cgroup without.
    pub(super) plain: PathBuf,
    lanes: u8,
}

/// One node and the addresses beyond it.
pub(super) struct Lane {
    pub(super) node: Namespace,
    number: u8,
}

impl Ground {
    /// Client and server, not joined yet. The client starts where no hook is.
    pub(super) fn new(arena: &Arena) -> Result<Self> {
        let client = Namespace::start(Some(0))?;
        let server = Namespace::start(Some(1))?;
        listen(&server, BYTE, |mut stream| drop(stream.write_all(b"x")))?;
        listen(&server, ECHO, echo)?;
        let mut plain = arena.cgroup.clone().into_os_string();
        plain.push("-plain");
        let plain = PathBuf::from(plain);
        fs::create_dir(&plain).with_context(|| format!("create cgroup {}", plain.display()))?;
        let dialler = Client::start(&client)?;
        let mut ground = Self { client, server, dialler, served: arena.cgroup.clone(), plain, lanes: 0 };
        ground.dialler.live_in(&ground.plain)?;
        Ok(ground)
    }

    /// Where the client is, and the server.
    pub(super) fn both(&self) -> (Namespace, Namespace) {
        (self.client.handle(), self.server.handle())
    }

    /// Joins both as pods to a bridge of a node, or of the calling thread's namespace, as the pods of this number;
    /// the server there.
    pub(super) fn pods(&self, node: Option<&Namespace>, bridge: &str, number: u8) -> Result<SocketAddrV4> {
        let device = format!("pod{number}");
        let (name, bridge_of) = (device.clone(), bridge.to_owned());
        let (client, server) = self.both();
        let join = move || -> Result<()> {
            ip(&["link", "add", &bridge_of, "type", "bridge"])?;
            ip(&["link", "set", &bridge_of, "up"])?;
            for (pod, port, host) in [(client, "client", CLIENT_POD), (server, "server", SERVER_POD)] {
                let address = format!("10.200.{number}.{host}/24");
                pod.plug((&bridge_of, port), &name, &link_address(number, host), &[&address])?;
            }
            Ok(())
        };
        match node {
            Some(node) => node.run(join)??,
            None => join()?,
        }
        Ok(SocketAddrV4::new(Ipv4Addr::new(10, 200, number, SERVER_POD), BYTE))
    }

    /// One more node between them.
    pub(super) fn lane(&mut self) -> Result<Lane> {
        self.lanes += 1;
        let number = self.lanes;
        let lane = Lane { node: Namespace::start(None)?, number };
        lane.node.forward()?;
        let address = |subnet: u8, host: u8| format!("10.{number}.{subnet}.{host}/24");
        let device = format!("eth{number}");
        lane.node.join(("client", &address(1, 1)), &self.client, (&device, &address(1, 2)))?;
        lane.node.join(("server", &address(2, 1)), &self.server, (&device, &address(2, 2)))?;
        self.client.route(&format!("10.{number}.2.0/24"), &format!("10.{number}.1.1"))?;
        self.client.route(&format!("10.96.{number}.0/24"), &format!("10.{number}.1.1"))?;
        self.server.route(&format!("10.{number}.1.0/24"), &format!("10.{number}.2.1"))?;
        Ok(lane)
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        // The dialler must be gone before its cgroup can go.
        drop(self.dialler.stop());
        drop(fs::remove_dir(&self.plain));
    }
}

impl Lane {
    /// A port of the server, dialled straight.
    pub(super) fn direct(&self, port: Port) -> SocketAddrV4 {
        SocketAddrV4::new(Ipv4Addr::new(10, self.number, 2, 2), port.number())
    }

    /// The service in front of it.
    pub(super) fn vip(&self, port: Port) -> SocketAddrV4 {
        SocketAddrV4::new(Ipv4Addr::new(10, 96, self.number, 10), port.number())
    }

    /// Both services.
    pub(super) fn tested(&self) -> Vec<Tested> {
        let both = [Port::Echo, Port::Byte].map(|port| Tested {
            vip: self.vip(port),
            backend: self.direct(port),
            node_port: None,
        });
        both.to_vec()
    }
}

/// A port of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Port {
    Byte,
    Echo,
}

impl Port {
    pub(super) fn number(self) -> u16 {
        match self {
            Self::Byte => BYTE,
            Self::Echo => ECHO,
        }
    }
}

/// Serves one connection after the other, on a thread of its own in the server's namespace and on its CPU.
fn listen(server: &Namespace, port: u16, serve: impl Fn(TcpStream) + Send + 'static) -> Result<()> {
    server.run(move || -> Result<()> {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
        std::thread::spawn(move || listener.incoming().map_while(Result::ok).for_each(serve));
        Ok(())
    })?
}

fn echo(mut stream: TcpStream) {
    if stream.set_nodelay(true).is_err() {
        return;
    }
    let mut byte = [0];
    // The client ends the connection.
    while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
}
