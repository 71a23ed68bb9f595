//! What is forwarded in a measurement: many services that nobody dials, and those under test behind them.

use std::net::{Ipv4Addr, SocketAddrV4};

use ebpf_common::Protocol;
use ebpf_loader::ServiceTable;

use crate::tables::{key, service, with_node_port};

/// Where the services under test are, and who answers.
#[derive(Clone, Copy, Debug)]
pub struct Tested {
    /// What clients dial.
    pub vip: SocketAddrV4,
    /// Who answers.
    pub backend: SocketAddrV4,
    /// The same on this address and port of the node, for clients outside.
    pub node_port: Option<SocketAddrV4>,
}

/// All services of one measurement.
#[derive(Clone, Debug)]
pub struct Scene {
    /// Services that nobody dials; they come first in every chain.
    pub others: u32,
    /// Endpoints of each of those.
    pub endpoints: u32,
    /// Those under test, last.
    pub tested: Vec<Tested>,
}

/// One service of a scene.
#[derive(Clone, Debug)]
pub struct SceneService {
    /// Its number.
    pub number: u32,
    /// What clients dial.
    pub vip: SocketAddrV4,
    /// Who answers.
    pub endpoints: Vec<SocketAddrV4>,
    /// The same on this address and port of the node, for clients outside.
    pub node_port: Option<SocketAddrV4>,
}

impl Scene {
    /// So many services in all, the tested ones included.
    #[must_use]
    pub fn new(services: u32, endpoints: u32, tested: Vec<Tested>) -> Self {
        let count = u32::try_from(tested.len()).unwrap_or(u32::MAX);
        Self { others: services.saturating_sub(count), endpoints, tested }
    }

    /// All services in the order in which a chain holds them.
    pub fn services(&self) -> impl Iterator<Item = SceneService> + '_ {
        let others = (0..self.others).map(|number| self.other(number, 0));
        let tested = (self.others..).zip(&self.tested).map(|(number, tested)| SceneService {
            number,
            vip: tested.vip,
            endpoints: vec![tested.backend],
            node_port: tested.node_port,
        });
        others.chain(tested)
    }

    /// One of those that nobody dials, after its last endpoint was exchanged so often.
    #[must_use]
    pub fn other(&self, number: u32, exchanged: u32) -> SceneService {
        let endpoint = |index: u32| {
            let last = index + 1 == self.endpoints;
            // 10.245.0.0 and up; exchanged endpoints beyond all of them.
            let offset = if last && exchanged > 0 {
                self.others * self.endpoints + exchanged
            } else {
                number * self.endpoints + index
            };
            SocketAddrV4::new(Ipv4Addr::from(0x0af5_0000 + offset), 8080)
        };
        SceneService {
            number,
            vip: SocketAddrV4::new(Ipv4Addr::from(0x0a61_0000 + number), 80),
            endpoints: (0..self.endpoints).map(endpoint).collect(),
            node_port: None,
        }
    }

    /// The same as our data plane takes it.
    #[must_use]
    pub fn table(&self) -> ServiceTable {
        let entry = |one: SceneService| {
            let backends: Vec<_> = one.endpoints.into_iter().map(Into::into).collect();
            let name = key(&format!("bench/service-{:06}:{}/TCP/IPv4", one.number, one.vip.port()));
            let desired = service(Protocol::Tcp, &[one.vip.into()], &backends);
            let desired = match one.node_port {
                Some(at) => with_node_port(desired, at.port(), Protocol::Tcp),
                None => desired,
            };
            (name, desired)
        };
        self.services().map(entry).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tested_services_come_last_and_count() {
        let tested = Tested {
            vip: "10.96.0.10:80".parse().unwrap(),
            backend: "10.1.2.2:8080".parse().unwrap(),
            node_port: None,
        };
        let scene = Scene::new(10, 3, vec![tested]);
        let all: Vec<SceneService> = scene.services().collect();
        assert_eq!(all.len(), 10);
        assert_eq!(all[9].vip, tested.vip);
        assert_eq!(scene.table().len(), 10);
        assert_eq!(Scene::new(1, 3, vec![tested]).services().count(), 1);
    }

    #[test]
    fn an_exchanged_endpoint_is_nobody_elses() {
        let scene = Scene::new(10, 3, Vec::new());
        let mut seen: Vec<SocketAddrV4> = scene.services().flat_map(|one| one.endpoints).collect();
        let changed = scene.other(4, 1);
        assert_eq!(changed.endpoints[..2], scene.other(4, 0).endpoints[..2]);
        seen.push(changed.endpoints[2]);
        let count = seen.len();
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), count);
    }
}
