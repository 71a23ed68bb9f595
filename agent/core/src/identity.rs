//! A pod's names and name resolution: hostname, /etc/hosts, resolver settings. Pure.

use std::fmt::Write as _;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Pod, PodSpec};

/// Resolver limits of the API's documentation.
const MAX_NAMESERVERS: usize = 3;
const MAX_SEARCHES: usize = 32;
/// Longest hostname the kernel takes, short of its terminator.
const MAX_HOSTNAME: usize = 63;

/// Resolver settings, as CRI's DNSConfig.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resolver {
    /// `nameserver` lines.
    pub servers: Vec<String>,
    /// `search` domains.
    pub searches: Vec<String>,
    /// `options`.
    pub options: Vec<String>,
}

/// Cluster DNS settings of the node.
#[derive(Debug, Clone, Copy)]
pub struct ClusterDns<'a> {
    /// Cluster DNS servers; empty: there is none.
    pub servers: &'a [IpAddr],
    /// `cluster.local`.
    pub domain: &'a str,
}

/// The pod's hostname: `hostnameOverride`, `hostname` or its name, cut to what a hostname may be.
pub fn hostname(pod: &Pod, cluster_domain: &str) -> String {
    let short = short_hostname(pod);
    let spec = pod.spec.as_ref();
    let wants_fqdn = spec.and_then(|spec| spec.set_hostname_as_fqdn).unwrap_or(false);
    match fqdn(pod, cluster_domain) {
        Some(fqdn) if wants_fqdn && fqdn.len() <= MAX_HOSTNAME => fqdn,
        _ => short,
    }
}

fn short_hostname(pod: &Pod) -> String {
    let spec = pod.spec.as_ref();
    let chosen = spec
        .and_then(|spec| spec.hostname_override.as_deref().or(spec.hostname.as_deref()))
        .filter(|name| !name.is_empty())
        .or(pod.metadata.name.as_deref())
        .unwrap_or_default();
    let cut: String = chosen.chars().take(MAX_HOSTNAME).collect();
    cut.trim_end_matches(['-', '.']).to_owned()
}

/// `<host>.<subdomain>.<namespace>.svc.<domain>` for a pod with a subdomain.
fn fqdn(pod: &Pod, cluster_domain: &str) -> Option<String> {
    let subdomain = pod.spec.as_ref()?.subdomain.as_deref().filter(|subdomain| !subdomain.is_empty())?;
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    Some(format!("{}.{subdomain}.{namespace}.svc.{cluster_domain}", short_hostname(pod)))
}

/// The managed /etc/hosts. `node_hosts` is the node's file, for pods in the host network.
pub fn hosts_file(pod: &Pod, pod_ips: &[String], cluster_domain: &str, node_hosts: Option<&str>) -> String {
    let mut text = String::from("# Kubernetes-managed hosts file");
    if let Some(node_hosts) = node_hosts {
        text.push_str(" (host network).\n");
        text.push_str(node_hosts);
        if !node_hosts.ends_with('\n') {
            text.push('\n');
        }
    } else {
        text.push_str(
            ".\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\n\
             fe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n",
        );
        let short = short_hostname(pod);
        let names =
            fqdn(pod, cluster_domain).map_or_else(|| short.clone(), |fqdn| format!("{fqdn}\t{short}"));
        for ip in pod_ips {
            // Writing to a String cannot fail.
            writeln!(text, "{ip}\t{names}").ok();
        }
    }
    let aliases = pod.spec.as_ref().and_then(|spec| spec.host_aliases.as_deref()).unwrap_or_default();
    if !aliases.is_empty() {
        text.push_str("\n# Entries added by HostAliases.\n");
    }
    for alias in aliases {
        let names = alias.hostnames.as_deref().unwrap_or_default().join("\t");
        writeln!(text, "{}\t{names}", alias.ip).ok();
    }
    text
}

/// The pod's resolver settings by its dnsPolicy and dnsConfig. `node` are the node's own.
///
/// Without cluster DNS servers, ClusterFirst falls back to the node's settings.
pub fn resolver(pod: &Pod, cluster: ClusterDns<'_>, node: &Resolver) -> Resolver {
    let default = PodSpec::default();
    let spec = pod.spec.as_ref().unwrap_or(&default);
    let host_network = spec.host_network.unwrap_or(false);
    let cluster_first = match spec.dns_policy.as_deref() {
        Some("Default" | "None") => false,
        Some("ClusterFirstWithHostNet") => true,
        _ => !host_network,
    };
    let mut resolver = if spec.dns_policy.as_deref() == Some("None") {
        Resolver::default()
    } else if cluster_first && !cluster.servers.is_empty() {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let domain = cluster.domain;
        let mut searches =
            vec![format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.to_owned()];
        searches.extend(node.searches.iter().cloned());
        Resolver {
            servers: cluster.servers.iter().map(ToString::to_string).collect(),
            searches,
            options: vec!["ndots:5".to_owned()],
        }
    } else {
        node.clone()
    };
    if let Some(extra) = &spec.dns_config {
        resolver.servers.extend(extra.nameservers.iter().flatten().cloned());
        resolver.searches.extend(extra.searches.iter().flatten().cloned());
        for option in extra.options.iter().flatten() {
            let name = option.name.as_deref().unwrap_or_default();
            resolver.options.retain(|known| known.split(':').next() != Some(name));
            resolver.options.push(match option.value.as_deref() {
                Some(value) => format!("{name}:{value}"),
                None => name.to_owned(),
            });
        }
    }
    trim(&mut resolver.servers, MAX_NAMESERVERS);
    trim(&mut resolver.searches, MAX_SEARCHES);
    resolver
}

/// Drops repetitions and what exceeds `limit`.
fn trim(values: &mut Vec<String>, limit: usize) {
    let mut kept: Vec<String> = Vec::new();
    for value in values.drain(..) {
        if !kept.contains(&value) && kept.len() < limit {
            kept.push(value);
        }
    }
    *values = kept;
}

/// Reads a resolv.conf.
pub fn parse_resolv_conf(text: &str) -> Resolver {
    let mut resolver = Resolver::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => resolver.servers.extend(words.next().map(str::to_owned)),
            // The last search line counts.
            Some("search" | "domain") => resolver.searches = words.map(str::to_owned).collect(),
            Some("options") => resolver.options.extend(words.map(str::to_owned)),
            _ => {}
        }
    }
    resolver
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(spec: serde_json::Value) -> Pod {
        let mut spec = spec;
        spec["containers"] = json!([]);
        serde_json::from_value(json!({"metadata": {"name": "web-0", "namespace": "ns"}, "spec": spec}))
            .expect("a pod")
    }

    #[test]
    fn hosts_carry_addresses_names_and_aliases() {
        let pod =
            pod(json!({"subdomain": "db", "hostAliases": [{"ip": "1.2.3.4", "hostnames": ["a", "b"]}]}));
        let text = hosts_file(&pod, &["10.244.0.5".to_owned()], "cluster.local", None);
        assert!(text.starts_with("# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n"), "{text}");
        assert!(text.contains("10.244.0.5\tweb-0.db.ns.svc.cluster.local\tweb-0\n"), "{text}");
        assert!(text.ends_with("\n# Entries added by HostAliases.\n1.2.3.4\ta\tb\n"), "{text}");
    }

    #[test]
    fn resolver_by_policy() {
        let node = parse_resolv_conf("search corp\nnameserver 9.9.9.9\noptions timeout:1\n");
        let servers = [IpAddr::from([10, 96, 0, 10])];
        let with_dns = ClusterDns { servers: &servers, domain: "cluster.local" };
        let without = ClusterDns { servers: &[], domain: "cluster.local" };
        let first = resolver(&pod(json!({})), with_dns, &node);
        assert_eq!(first.servers, ["10.96.0.10"]);
        assert_eq!(first.searches, ["ns.svc.cluster.local", "svc.cluster.local", "cluster.local", "corp"]);
        assert_eq!(first.options, ["ndots:5"]);
        assert_eq!(resolver(&pod(json!({})), without, &node), node);
        let none = resolver(
            &pod(json!({"dnsPolicy": "None", "dnsConfig": {"nameservers": ["1.1.1.1"],
                "options": [{"name": "ndots", "value": "2"}]}})),
            with_dns,
            &node,
        );
        assert_eq!((none.servers, none.options), (vec!["1.1.1.1".to_owned()], vec!["ndots:2".to_owned()]));
    }

    #[test]
    fn long_hostnames_are_cut_cleanly() {
        let mut long = pod(json!({}));
        long.metadata.name = Some(format!("{}-x", "a".repeat(62)));
        assert_eq!(hostname(&long, "cluster.local"), "a".repeat(62));
    }
}
