//! What cannot work on a node without an API server. Pure.

use std::net::IpAddr;

use super::AgentConfig;

impl AgentConfig {
    /// What cannot work where there is no API server.
    pub(super) fn standalone_problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let without = "keelson.kubeconfig is not given: the node stands alone, and";
        if !self.keelson.kubelet {
            problems.push(format!("{without} keelson.kubelet: false leaves nothing to do"));
        }
        if self.bootstraps() {
            problems.push(format!(
                "{without} keelson.bootstrapKubeconfig does not say where to keep what it leads to: name the file in \
                 keelson.kubeconfig"
            ));
        }
        let proxy = self.keelson.proxy.as_ref().is_some_and(|section| section.enabled);
        let network = self.keelson.network.as_ref().is_some_and(|section| section.enabled);
        for (field, is_on) in [("keelson.proxy", proxy), ("keelson.network", network)] {
            if is_on {
                problems.push(format!("{without} {field} has nobody to tell it of services and nodes"));
            }
        }
        if !self.pod_cidr.is_empty() {
            for range in self.pod_cidr.split(',') {
                let parts = range.split_once('/');
                let is_good = parts.is_some_and(|(address, length)| {
                    address.parse::<IpAddr>().is_ok() && length.parse::<u8>().is_ok()
                });
                if !is_good {
                    problems.push(format!("podCIDR {range:?} is not an address range, as 10.88.0.0/24"));
                }
            }
        }
        problems
    }
}
