//! What pods of one node gain by handing their packets straight to each other: connections and requests through a
//! ClusterIP with everything of ours on, over those straight to the pod on a bridge without any of our programs.
//!
//! ```text
//! client ─ veth ─ bridge "plain" ─ veth ─ server     the bridge alone, in a namespace of its own
//!        └ veth ─ bridge "short" ─ veth ─┘           the arena's: hooks, and a program on both ports
//! ```
//! Rounds go A B B A as for [`super::connections`]; a second plain one is the control.

use std::{net::SocketAddrV4, time::Duration};

use anyhow::{Result, ensure};
use ebpf_common::Protocol;
use ebpf_loader::{PodPort, ServiceTable};

use super::{
    client::Work,
    connections::{WorkReport, race},
    lanes::{CLIENT_POD, Ground, Port, SERVER_POD},
    namespaces::Namespace,
};
use crate::{
    arena::Arena,
    tables::{key, service},
};

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Stop when the 95 % interval of our ratio is within this fraction.
    pub precision: f64,
    /// Stop a kind of work anyway after this long.
    pub limit: Duration,
    /// Repetitions per block.
    pub block: u32,
}

/// Measures both kinds: "direct" is over the plain bridge, "ours" through the ClusterIP. Needs root, and a kernel with TCX.
pub fn measure(options: &Options) -> Result<Vec<WorkReport>> {
    let arena = Arena::enter(&[])?;
    let mut ground = Ground::new(&arena)?;
    let plain = Namespace::start(None)?;
    let plain_server = ground.pods(Some(&plain), "plain", 1)?;
    let short_server = ground.pods(None, "short", 2)?;
    let at = |server: SocketAddrV4, port: Port| SocketAddrV4::new(*server.ip(), port.number());
    let vip = |port: Port| SocketAddrV4::new([10, 96, 200, 10].into(), port.number());
    let mut table = ServiceTable::new();
    for port in [Port::Byte, Port::Echo] {
        let one = service(Protocol::Tcp, &[vip(port).into()], &[at(short_server, port).into()]);
        table.insert(key(&format!("bench/pods:{}/TCP/IPv4", port.number())), one);
    }
    let mut plane = arena.open()?;
    let report = plane.replace_all(&table);
    ensure!(report.refused.is_empty(), "not programmed: {:?}", report.refused);
    plane.attach()?;
    let pod = |name: &str, host: u8| -> Result<PodPort> {
        Ok(PodPort { index: nix::net::if_::if_nametoindex(name)?, address: [2, 0, 0, 0, 2, host] })
    };
    let served =
        plane.shortcut_pods_until(&[pod("client", CLIENT_POD)?, pod("server", SERVER_POD)?], u64::MAX);
    ensure!(served == 2, "the kernel has no short way between pods (TCX, Linux 6.6)");
    race_both(&mut ground, options, |port| at(plain_server, port), vip)
}

/// Both kinds of work: straight to the server's pod over the plain bridge, and through the ClusterIP.
pub(super) fn race_both(
    ground: &mut Ground,
    options: &Options,
    plain: impl Fn(Port) -> SocketAddrV4,
    vip: impl Fn(Port) -> SocketAddrV4,
) -> Result<Vec<WorkReport>> {
    let works = [(Work::Connections, Port::Byte), (Work::Requests, Port::Echo)];
    let mut reports = Vec::new();
    for (work, port) in works {
        let direct = (ground.plain.clone(), plain(port));
        let ours = (ground.served.clone(), vip(port));
        let order = [direct.clone(), ours, direct];
        let until = (options.precision, options.limit);
        let (peers, task) = (std::iter::empty(), (work, options.block));
        reports.push(race(&mut ground.dialler, &order, peers, task, until)?);
    }
    Ok(reports)
}
