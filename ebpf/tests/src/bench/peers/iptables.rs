//! Rules in the shape of kube-proxy's iptables mode: one chain of all services, a chain per service, a chain per
//! endpoint, written by one `iptables-restore`.

use std::{fmt::Write, net::SocketAddrV4};

use anyhow::Result;

use super::{POD_RANGE, Peer, feed, version_of};
use crate::bench::scene::{Scene, SceneService};

/// One of the two programs that speak iptables.
pub(super) struct Iptables {
    pub(super) restore: &'static str,
    pub(super) name: &'static str,
}

impl Peer for Iptables {
    fn name(&self) -> &'static str {
        self.name
    }

    fn version(&self) -> Result<String> {
        version_of(self.restore)
    }

    fn load(&self, scene: &Scene) -> Result<()> {
        let all: Vec<SceneService> = scene.services().collect();
        feed(self.restore, &["--noflush", "--counters"], &whole(&all))
    }

    fn change(&self, scene: &Scene, old: &SceneService, new: &SceneService) -> Result<()> {
        feed(self.restore, &["--noflush", "--counters"], &changed(scene, old, new))
    }
}

const FILTER: &str = "*filter
:KUBE-FORWARD - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
-A INPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment \"kubernetes health check service ports\" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES
-A FORWARD -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -j KUBE-SERVICES
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
";

const NAT_HEAD: &str = "*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
";

const NAT_FRAME: &str = "-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
";

const NODE_PORTS: &str =
    "-A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports; NOTE: this must be the \
last rule in this chain\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
COMMIT
";

/// Everything, on empty tables.
fn whole(all: &[SceneService]) -> String {
    let mut text = format!("{FILTER}{NAT_HEAD}");
    for one in all {
        chains(&mut text, one);
    }
    text += NAT_FRAME;
    for one in all {
        portal(&mut text, one);
        rules(&mut text, one);
    }
    text + NODE_PORTS
}

/// What a partial sync of kube-proxy writes: the chain of all services anew, the changed service's chains, and the end
/// of the endpoint's chain that went.
fn changed(scene: &Scene, old: &SceneService, new: &SceneService) -> String {
    let mut text = "*nat\n:KUBE-SERVICES - [0:0]\n".to_owned();
    chains(&mut text, new);
    let gone: Vec<SocketAddrV4> =
        old.endpoints.iter().copied().filter(|one| !new.endpoints.contains(one)).collect();
    for endpoint in &gone {
        // Writing to a string cannot fail, here and below.
        writeln!(text, ":{} - [0:0]", endpoint_chain(old, *endpoint)).ok();
    }
    for one in scene.services() {
        portal(&mut text, &one);
    }
    rules(&mut text, new);
    text += NODE_PORTS.strip_suffix("COMMIT\n").unwrap_or(NODE_PORTS);
    for endpoint in gone {
        writeln!(text, "-X {}", endpoint_chain(old, endpoint)).ok();
    }
    text + "COMMIT\n"
}

fn chains(text: &mut String, one: &SceneService) {
    writeln!(text, ":{} - [0:0]", service_chain(one)).ok();
    if one.node_port.is_some() {
        writeln!(text, ":{} - [0:0]", external_chain(one)).ok();
    }
    for endpoint in &one.endpoints {
        writeln!(text, ":{} - [0:0]", endpoint_chain(one, *endpoint)).ok();
    }
}

fn portal(text: &mut String, one: &SceneService) {
    writeln!(
        text,
        "-A KUBE-SERVICES -m comment --comment \"{} cluster IP\" -m tcp -p tcp -d {} --dport {} -j {}",
        name(one),
        one.vip.ip(),
        one.vip.port(),
        service_chain(one)
    )
    .ok();
}

fn rules(text: &mut String, one: &SceneService) {
    let (chain, name) = (service_chain(one), name(one));
    writeln!(
        text,
        "-A {chain} -m comment --comment \"{name} cluster IP\" -m tcp -p tcp -d {} --dport {} ! -s {POD_RANGE} -j \
         KUBE-MARK-MASQ",
        one.vip.ip(),
        one.vip.port()
    )
    .ok();
    if let Some(at) = one.node_port {
        let (external, port) = (external_chain(one), at.port());
        writeln!(
            text,
            "-A KUBE-NODEPORTS -m comment --comment \"{name}\" -m tcp -p tcp --dport {port} -j {external}\n\
             -A {external} -m comment --comment \"masquerade traffic for {name} external destinations\" -j KUBE-MARK-MASQ\n\
             -A {external} -j {chain}"
        )
        .ok();
    }
    let count = one.endpoints.len();
    for (index, endpoint) in one.endpoints.iter().enumerate() {
        let comment = format!("-m comment --comment \"{name} -> {endpoint}\"");
        let left = u32::try_from(count - index).unwrap_or(1);
        let chance = if left == 1 {
            String::new()
        } else {
            format!(" -m statistic --mode random --probability {:.10}", 1.0 / f64::from(left))
        };
        let target = endpoint_chain(one, *endpoint);
        writeln!(text, "-A {chain} {comment}{chance} -j {target}").ok();
        writeln!(text, "-A {target} {comment} -s {} -j KUBE-MARK-MASQ", endpoint.ip()).ok();
        writeln!(text, "-A {target} {comment} -m tcp -p tcp -j DNAT --to-destination {endpoint}").ok();
    }
}

fn name(one: &SceneService) -> String {
    format!("bench/service-{:06}:http", one.number)
}

fn service_chain(one: &SceneService) -> String {
    format!("KUBE-SVC-{:016}", one.number)
}

fn external_chain(one: &SceneService) -> String {
    format!("KUBE-EXT-{:016}", one.number)
}

fn endpoint_chain(one: &SceneService, endpoint: SocketAddrV4) -> String {
    format!("KUBE-SEP-{:06}{:010}", one.number, u32::from(*endpoint.ip()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_is_not_there_makes_its_peer_absent() {
        let absent = Iptables { restore: "keelson-no-such-restore", name: "absent" };
        let why = format!("{:#}", absent.version().unwrap_err());
        assert!(why.contains("keelson-no-such-restore is not installed"), "{why}");
    }

    #[test]
    fn the_last_endpoint_takes_what_is_left() {
        let scene = Scene::new(1, 3, Vec::new());
        let text = whole(&scene.services().collect::<Vec<_>>());
        assert_eq!(text.matches("--probability").count(), 2);
        assert!(text.contains("--probability 0.3333333333 ") && text.contains("--probability 0.5000000000 "));
        assert_eq!(text.matches("DNAT --to-destination").count(), 3);
        assert!(
            text.lines()
                .all(|line| line.split(' ').all(|word| !word.starts_with("KUBE-") || word.len() <= 28))
        );
    }

    #[test]
    fn a_change_names_what_goes_and_what_comes() {
        let scene = Scene::new(3, 2, Vec::new());
        let (old, new) = (scene.other(1, 0), scene.other(1, 1));
        let text = changed(&scene, &old, &new);
        assert!(text.contains(&format!("-X {}", endpoint_chain(&old, old.endpoints[1]))));
        assert!(text.contains(&format!("--to-destination {}", new.endpoints[1])));
        assert_eq!(
            text.matches("cluster IP\" -m tcp").count(),
            4,
            "all portals, and the changed service's own rule"
        );
    }
}
