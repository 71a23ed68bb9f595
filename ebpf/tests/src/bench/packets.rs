//! What the packet programs cost, frame by frame and without a network: BPF_PROG_TEST_RUN on frames from a client outside.
//!
//! A translated frame is another frame, so each run gets a fresh one, and what is told is the median of many single runs:
//! the kernel's own two readings of the clock are in it, and `clock_ns` is what they cost.
//! A frame that no service wants is left as it is; the kernel repeats that run itself, and tells the mean.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use ebpf_common::Protocol;
use ebpf_loader::{Config, DataPlane, DesiredWay, Device, PacketHook, Side, SourcePrefix};
use serde::Serialize;

use super::{scene::Scene, statistics::median};
use crate::{
    arena::{Arena, ip},
    frames::{ACK, Carried, SYN, frame},
    tables::{key, service},
};

/// Runs that the kernel repeats itself.
const REPEAT: u32 = 200_000;
const NODE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const CLIENT: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
const BALANCER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1)), 80);
const BACKEND: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 244, 1, 2)), 8080);
/// Nobody's service.
const ELSEWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(198, 51, 100, 99)), 80);
/// The driver's verdicts for a frame that it has sent on itself.
const SENT_ON: [u32; 2] = [3, 4];

/// What to measure.
#[derive(Clone, Debug)]
pub struct Options {
    /// Services in all, one measurement each.
    pub services: Vec<u32>,
    /// Endpoints of each of the others.
    pub endpoints: u32,
    /// Single runs of each kind.
    pub runs: u16,
}

/// One number of services; nanoseconds of one run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Services in all.
    pub services: u32,
    /// What reading the clock adds to a single run: one run for no service less the mean of many.
    pub clock_ns: f64,
    /// TCX: the first packet of a connection.
    pub tcx_first_ns: f64,
    /// TCX: a later packet.
    pub tcx_later_ns: f64,
    /// TCX: a packet for no service, without the clock.
    pub tcx_other_ns: f64,
    /// XDP: a later packet, sent on to the next node; nothing where the kernel does not load the program.
    pub xdp_later_ns: Option<f64>,
    /// XDP: a packet for no service, without the clock.
    pub xdp_other_ns: Option<f64>,
}

/// Measures all numbers of services. Needs root.
pub fn measure(options: &Options) -> Result<Vec<Report>> {
    options.services.iter().map(|services| measure_one(*services, options)).collect()
}

/// A data plane with the service under test behind all others, and a device that leads outside.
struct World {
    plane: DataPlane,
    device: u32,
    _arena: Arena,
}

impl World {
    fn make(services: u32, endpoints: u32) -> Result<Self> {
        let arena = Arena::enter(&[])?;
        ip(&["link", "add", "outer", "type", "veth", "peer", "name", "wire"])?;
        ip(&["link", "set", "outer", "up"])?;
        ip(&["link", "set", "wire", "up"])?;
        let mut table = Scene { others: services.saturating_sub(1), endpoints, tested: Vec::new() }.table();
        table.insert(key("bench/z-tested:80/TCP/IPv4"), service(Protocol::Tcp, &[BALANCER], &[BACKEND]));
        let config = arena.config();
        let backends = table.values().map(|desired| desired.backends.len()).sum();
        let capacity =
            config.capacity.grown_for(table.len(), table.len(), backends).context("too many services")?;
        let mut plane = DataPlane::open(Config { capacity, ..config })?;
        let report = plane.replace_all(&table);
        ensure!(report.refused.is_empty(), "{:?}", report.refused);
        let own = [IpAddr::V4(NODE)].into();
        plane.set_node_addresses(&own, &own)?;
        plane.hide_clients(Some(NODE), None)?;
        let device = nix::net::if_::if_nametoindex("outer")?;
        let failed = plane.serve_devices(vec![Device {
            index: device,
            name: "outer".to_owned(),
            side: Side::Outer,
            ethernet: true,
            source_v4: None,
            source_v6: None,
            early: true,
        }]);
        ensure!(failed.is_empty(), "{failed:?}");
        // The endpoint is on another node, whose link address is known: the driver's program sends frames there itself.
        let to = SourcePrefix { address: [10, 244, 1, 0].into(), bits: 24 };
        let (link, via) = (Some(([2, 0, 0, 0, 9, 9], [2, 0, 0, 0, 8, 8])), Some([192, 0, 2, 77].into()));
        plane.set_ways(&[DesiredWay { to, device, via, link, mtu: 1500 }])?;
        Ok(Self { plane, device, _arena: arena })
    }

    fn packet(port: u16, to: SocketAddr, flags: u8) -> Vec<u8> {
        frame(SocketAddr::new(CLIENT.into(), port), to, Carried::Tcp(flags), b"x")
    }

    /// The median of one run for each of these ports, whose verdict must be right.
    fn median(
        &mut self,
        hook: PacketHook,
        options: &Options,
        flags: u8,
        right: &dyn Fn(u32) -> bool,
    ) -> Result<f64> {
        let mut taken = Vec::new();
        for port in ports(options) {
            let run = self.plane.try_packet(hook, self.device, &Self::packet(port, BALANCER, flags), 1)?;
            ensure!(right(run.verdict), "a frame for the service under test met verdict {}", run.verdict);
            taken.push(f64::from(run.nanos));
        }
        Ok(median(&taken))
    }

    /// The mean of many runs on a frame for nobody's service.
    fn other(&mut self, hook: PacketHook) -> Result<f64> {
        let frame = Self::packet(1024, ELSEWHERE, ACK);
        Ok(f64::from(self.plane.try_packet(hook, self.device, &frame, REPEAT)?.nanos))
    }
}

fn ports(options: &Options) -> impl Iterator<Item = u16> + use<> {
    1024..1024_u16.saturating_add(options.runs)
}

fn measure_one(services: u32, options: &Options) -> Result<Report> {
    let mut world = World::make(services, options.endpoints)
        .with_context(|| format!("{services} services with {} endpoints", options.endpoints))?;
    // Both ways, the stack's and the neighbour's: neither drops the frame nor leaves it to the next program.
    let taken = |verdict: u32| verdict != 2 && verdict != u32::MAX;
    let tcx_first_ns = world.median(PacketHook::Outer, options, SYN, &taken)?;
    let tcx_later_ns = world.median(PacketHook::Outer, options, ACK, &taken)?;
    let tcx_other_ns = world.other(PacketHook::Outer)?;
    // A kernel that refuses the driver's program has the others.
    let xdp_other_ns = world.other(PacketHook::Early).ok();
    let xdp_later_ns = match xdp_other_ns {
        Some(_) => {
            Some(world.median(PacketHook::Early, options, ACK, &|verdict| SENT_ON.contains(&verdict))?)
        }
        None => None,
    };
    let mut clock = Vec::new();
    for port in ports(options) {
        let frame = World::packet(port, ELSEWHERE, ACK);
        clock.push(f64::from(world.plane.try_packet(PacketHook::Outer, world.device, &frame, 1)?.nanos));
    }
    let clock_ns = (median(&clock) - tcx_other_ns).max(0.0);
    Ok(Report { services, clock_ns, tcx_first_ns, tcx_later_ns, tcx_other_ns, xdp_later_ns, xdp_other_ns })
}
