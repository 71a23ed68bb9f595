//! Rules in the shape of kube-proxy's nftables mode: one verdict map of all services, a chain per service with a
//! numbered choice, a chain per endpoint, written by one `nft -f -`.

use std::{fmt::Write, net::SocketAddrV4};

use anyhow::Result;

use super::{POD_RANGE, Peer, feed, version_of};
use crate::bench::scene::{Scene, SceneService};

/// `nft`.
pub(super) struct Nftables;

impl Peer for Nftables {
    fn name(&self) -> &'static str {
        "nftables"
    }

    fn version(&self) -> Result<String> {
        version_of("nft")
    }

    fn load(&self, scene: &Scene) -> Result<()> {
        let all: Vec<SceneService> = scene.services().collect();
        feed("nft", &["-f", "-"], &whole(&all))
    }

    fn change(&self, _scene: &Scene, old: &SceneService, new: &SceneService) -> Result<()> {
        feed("nft", &["-f", "-"], &changed(old, new))
    }
}

const FRAME: &str = "add table ip kube-proxy
add chain ip kube-proxy mark-for-masquerade
add chain ip kube-proxy masquerading
add chain ip kube-proxy services
add chain ip kube-proxy service-endpoints-check
add chain ip kube-proxy firewall-check
add chain ip kube-proxy cluster-ips-check
add chain ip kube-proxy nodeport-endpoints-check
add chain ip kube-proxy filter-prerouting { type filter hook prerouting priority -110 ; }
add chain ip kube-proxy filter-input { type filter hook input priority -110 ; }
add chain ip kube-proxy filter-forward { type filter hook forward priority -110 ; }
add chain ip kube-proxy filter-output { type filter hook output priority -110 ; }
add chain ip kube-proxy filter-output-post-dnat { type filter hook output priority -90 ; }
add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority -100 ; }
add chain ip kube-proxy nat-output { type nat hook output priority -100 ; }
add chain ip kube-proxy nat-postrouting { type nat hook postrouting priority 100 ; }
add set ip kube-proxy cluster-ips { type ipv4_addr ; }
add set ip kube-proxy nodeport-ips { type ipv4_addr ; }
add map ip kube-proxy firewall-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy no-endpoint-nodeports { type inet_proto . inet_service : verdict ; }
add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy service-nodeports { type inet_proto . inet_service : verdict ; }
add rule ip kube-proxy mark-for-masquerade mark set mark or 0x4000
add rule ip kube-proxy masquerading mark and 0x4000 == 0 return
add rule ip kube-proxy masquerading mark set mark xor 0x4000
add rule ip kube-proxy masquerading masquerade fully-random
add rule ip kube-proxy filter-prerouting ct state new jump firewall-check
add rule ip kube-proxy filter-input ct state new jump nodeport-endpoints-check
add rule ip kube-proxy filter-input ct state new jump service-endpoints-check
add rule ip kube-proxy filter-forward ct state new jump service-endpoints-check
add rule ip kube-proxy filter-forward ct state new jump cluster-ips-check
add rule ip kube-proxy filter-output ct state new jump service-endpoints-check
add rule ip kube-proxy filter-output ct state new jump firewall-check
add rule ip kube-proxy filter-output-post-dnat ct state new jump cluster-ips-check
add rule ip kube-proxy nat-prerouting jump services
add rule ip kube-proxy nat-output jump services
add rule ip kube-proxy nat-postrouting jump masquerading
add rule ip kube-proxy service-endpoints-check ip daddr . meta l4proto . th dport vmap @no-endpoint-services
add rule ip kube-proxy firewall-check ip daddr . meta l4proto . th dport vmap @firewall-ips
add rule ip kube-proxy cluster-ips-check ip daddr @cluster-ips reject
add rule ip kube-proxy nodeport-endpoints-check ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips
add rule ip kube-proxy services ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
";

/// Everything, where nothing is.
fn whole(all: &[SceneService]) -> String {
    let mut text = FRAME.to_owned();
    for one in all {
        // Writing to a string cannot fail, here and below.
        writeln!(text, "add chain ip kube-proxy {}", service_chain(one)).ok();
        for endpoint in &one.endpoints {
            writeln!(text, "add chain ip kube-proxy {}", endpoint_chain(one, *endpoint)).ok();
            endpoint_rules(&mut text, one, *endpoint);
        }
        service_rules(&mut text, one);
        let (ip, port) = (one.vip.ip(), one.vip.port());
        writeln!(text, "add element ip kube-proxy cluster-ips {{ {ip} }}").ok();
        let chain = service_chain(one);
        writeln!(text, "add element ip kube-proxy service-ips {{ {ip} . tcp . {port} : goto {chain} }}").ok();
        if let Some(at) = one.node_port {
            let (external, node, port) = (external_chain(one), at.ip(), at.port());
            writeln!(
                text,
                "add chain ip kube-proxy {external}\n\
                 add rule ip kube-proxy {external} jump mark-for-masquerade\n\
                 add rule ip kube-proxy {external} goto {chain}\n\
                 add element ip kube-proxy nodeport-ips {{ {node} }}\n\
                 add element ip kube-proxy service-nodeports {{ tcp . {port} : goto {external} }}"
            )
            .ok();
        }
    }
    text
}

/// What a sync of one service writes.
fn changed(old: &SceneService, new: &SceneService) -> String {
    let mut text = String::new();
    for endpoint in new.endpoints.iter().filter(|one| !old.endpoints.contains(one)) {
        writeln!(text, "add chain ip kube-proxy {}", endpoint_chain(new, *endpoint)).ok();
        endpoint_rules(&mut text, new, *endpoint);
    }
    writeln!(text, "flush chain ip kube-proxy {}", service_chain(new)).ok();
    service_rules(&mut text, new);
    for endpoint in old.endpoints.iter().filter(|one| !new.endpoints.contains(one)) {
        let chain = endpoint_chain(old, *endpoint);
        writeln!(text, "flush chain ip kube-proxy {chain}\ndelete chain ip kube-proxy {chain}").ok();
    }
    text
}

fn service_rules(text: &mut String, one: &SceneService) {
    let (chain, ip, port) = (service_chain(one), one.vip.ip(), one.vip.port());
    writeln!(
        text,
        "add rule ip kube-proxy {chain} ip daddr {ip} tcp dport {port} ip saddr != {POD_RANGE} jump mark-for-masquerade"
    )
    .ok();
    let choices: Vec<String> = one
        .endpoints
        .iter()
        .enumerate()
        .map(|(index, endpoint)| format!("{index} : goto {}", endpoint_chain(one, *endpoint)))
        .collect();
    writeln!(
        text,
        "add rule ip kube-proxy {chain} numgen random mod {} vmap {{ {} }}",
        choices.len(),
        choices.join(" , ")
    )
    .ok();
}

fn endpoint_rules(text: &mut String, one: &SceneService, endpoint: SocketAddrV4) {
    let chain = endpoint_chain(one, endpoint);
    writeln!(text, "add rule ip kube-proxy {chain} ip saddr {} jump mark-for-masquerade", endpoint.ip()).ok();
    writeln!(text, "add rule ip kube-proxy {chain} meta l4proto tcp dnat to {endpoint}").ok();
}

fn service_chain(one: &SceneService) -> String {
    format!("service-{:08}-bench/service-{:06}/tcp/http", one.number, one.number)
}

fn external_chain(one: &SceneService) -> String {
    format!("external-{:08}-bench/service-{:06}/tcp/http", one.number, one.number)
}

fn endpoint_chain(one: &SceneService, endpoint: SocketAddrV4) -> String {
    format!(
        "endpoint-{:08}-bench/service-{:06}/tcp/http__{}/{}",
        one.number,
        one.number,
        endpoint.ip(),
        endpoint.port()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_chooses_among_its_endpoints() {
        let scene = Scene::new(2, 3, Vec::new());
        let text = whole(&scene.services().collect::<Vec<_>>());
        assert_eq!(text.matches("numgen random mod 3 vmap").count(), 2);
        assert_eq!(text.matches("dnat to").count(), 6);
        assert_eq!(text.matches("add element ip kube-proxy service-ips").count(), 2);
    }

    #[test]
    fn a_change_touches_one_service() {
        let scene = Scene::new(3, 2, Vec::new());
        let text = changed(&scene.other(1, 0), &scene.other(1, 1));
        assert!(
            text.contains("delete chain") && text.contains("dnat to") && text.lines().count() == 8,
            "{text}"
        );
    }
}
