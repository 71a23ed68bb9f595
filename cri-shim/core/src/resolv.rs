//! The resolver file of a sandbox.

use cri_shim_api::v1::DnsConfig;

/// The text of `resolv.conf`: from the pod's DNS configuration, else the node's own.
pub fn render(dns: Option<&DnsConfig>, node: &str) -> String {
    let Some(dns) =
        dns.filter(|dns| !dns.servers.is_empty() || !dns.searches.is_empty() || !dns.options.is_empty())
    else {
        return node.to_owned();
    };
    let mut lines = Vec::new();
    if !dns.searches.is_empty() {
        lines.push(format!("search {}", dns.searches.join(" ")));
    }
    lines.extend(dns.servers.iter().map(|server| format!("nameserver {server}")));
    if !dns.options.is_empty() {
        lines.push(format!("options {}", dns.options.join(" ")));
    }
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pods_own_configuration_replaces_the_nodes() {
        let dns = DnsConfig {
            servers: vec!["10.96.0.10".into()],
            searches: vec!["default.svc.cluster.local".into(), "cluster.local".into()],
            options: vec!["ndots:5".into()],
        };
        assert_eq!(
            render(Some(&dns), "nameserver 1.1.1.1\n"),
            "search default.svc.cluster.local cluster.local\nnameserver 10.96.0.10\noptions ndots:5\n"
        );
        assert_eq!(render(Some(&DnsConfig::default()), "nameserver 1.1.1.1\n"), "nameserver 1.1.1.1\n");
    }
}
