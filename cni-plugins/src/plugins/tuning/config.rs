//! The configuration of `keelson-tuning`; the keys are those of the reference plugin tuning.

use std::{collections::BTreeMap, io};

use cni_plugins_host::{file, netlink::parse_mac};
use serde::Deserialize;
use serde_json::Value;

use crate::{call::Call, failure::Failure};

/// Patterns of kernel parameters that configurations may set, one a line, `#` begins a comment.
const ALLOW_FILE: &str = "/etc/keelson/cni/sysctl.allow";
/// Largest such file.
const MAX_ALLOW_FILE: u64 = 1 << 20;
/// What is allowed where that file is missing.
const ALLOW_DEFAULT: &str = "net.*";
/// Stands for the interface's name in parameters.
const IFNAME: &str = "IFNAME";

/// The object on standard input.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct TuningConfig {
    /// Kernel parameters of the pod's namespace.
    #[serde(default)]
    sysctl: BTreeMap<String, String>,
    #[serde(default)]
    mac: Option<String>,
    #[serde(default)]
    mtu: u32,
    /// Receive every packet.
    #[serde(default)]
    pub(super) promisc: Option<bool>,
    /// Receive every multicast packet.
    #[serde(default)]
    pub(super) allmulti: Option<bool>,
    /// Length of the transmit queue.
    #[serde(default)]
    pub(super) tx_q_len: Option<u32>,
    /// File of allowed parameters instead of [`ALLOW_FILE`].
    #[serde(default)]
    sysctl_allow_file: Option<String>,
    #[serde(default)]
    runtime_config: RuntimeConfig,
}

#[derive(Debug, Default, Deserialize)]
struct RuntimeConfig {
    #[serde(default)]
    mac: Option<String>,
}

impl TuningConfig {
    /// Reads a call's object.
    pub(super) fn of(call: &Call) -> Result<Self, Failure> {
        call.parse()
    }

    /// The MTU to set.
    pub(super) fn mtu(&self) -> Option<u32> {
        (self.mtu != 0).then_some(self.mtu)
    }

    /// The hardware address to set: by the `mac` capability, `args.cni.mac`, `CNI_ARGS` or the key.
    pub(super) fn mac(&self, call: &Call) -> Result<Option<[u8; 6]>, Failure> {
        let asked = [
            ("runtimeConfig.mac", self.runtime_config.mac.as_deref()),
            ("args.cni.mac", call.cni_arg("mac").and_then(Value::as_str)),
            ("CNI_ARGS MAC", call.arg("MAC")),
            ("mac", self.mac.as_deref()),
        ];
        let found = asked.into_iter().find_map(|(field, text)| Some((field, text?)));
        let Some((field, text)) = found.filter(|(_, text)| !text.is_empty()) else { return Ok(None) };
        match parse_mac(text).filter(|mac| mac[0] & 1 == 0 && *mac != [0; 6]) {
            Some(mac) => Ok(Some(mac)),
            None => Err(Failure::config(format!("{field}: {text:?} is not the address of an interface"))),
        }
    }

    /// The parameters with slashes, all of them allowed.
    pub(super) fn sysctls(&self, call: &Call) -> Result<BTreeMap<String, String>, Failure> {
        if self.sysctl.is_empty() {
            return Ok(BTreeMap::new());
        }
        let file = self.sysctl_allow_file.as_deref().unwrap_or(ALLOW_FILE);
        let allowed = match file::read_regular(file.as_ref(), MAX_ALLOW_FILE) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => ALLOW_DEFAULT.to_owned(),
            read => {
                let bytes = read.map_err(|error| Failure::io(&format!("read {file}"), &error))?;
                String::from_utf8_lossy(&bytes).into_owned()
            }
        };
        let mut sysctls = BTreeMap::new();
        for (key, value) in &self.sysctl {
            let refused = |why: &str| Failure::config(format!("sysctl: {key}: {why}"));
            let path = sysctl_path(key, &call.ifname);
            let is_path = path.split('/').all(|part| !part.is_empty() && part != "." && part != "..");
            if !is_path || !path.starts_with("net/") {
                return Err(refused("is not a parameter of a network namespace (net.…)"));
            }
            if !is_allowed(&allowed, &sysctl_path(key, IFNAME)) {
                return Err(refused(&format!("is not allowed by {file}")));
            }
            sysctls.insert(path, value.clone());
        }
        Ok(sysctls)
    }
}

/// The path below `/proc/sys`. A name with slashes is one already; else its dots are slashes, except those
/// of the interface's name.
fn sysctl_path(key: &str, ifname: &str) -> String {
    let path = if key.contains('/') { key.to_owned() } else { key.replace('.', "/") };
    path.split('/').map(|part| if part == IFNAME { ifname } else { part }).collect::<Vec<_>>().join("/")
}

/// Whether a line of `patterns` matches; dots and slashes are the same there.
fn is_allowed(patterns: &str, path: &str) -> bool {
    let lines = patterns.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    lines.filter(|line| !line.is_empty()).any(|line| matches(&line.replace('.', "/"), path))
}

/// Whether `text` is `pattern`, in which each `*` stands for any text.
fn matches(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = text.strip_prefix(parts.next().unwrap_or_default()) else { return false };
    let parts: Vec<&str> = parts.collect();
    let Some((last, middle)) = parts.split_last() else { return rest.is_empty() };
    for part in middle {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_paths() {
        assert_eq!(sysctl_path("net.ipv4.conf.IFNAME.rp_filter", "eth0"), "net/ipv4/conf/eth0/rp_filter");
        assert_eq!(sysctl_path("net/ipv4/conf/IFNAME/rp_filter", "e.7"), "net/ipv4/conf/e.7/rp_filter");
        assert_eq!(sysctl_path("net.core.somaxconn", "eth0"), "net/core/somaxconn");
    }

    #[test]
    fn only_what_the_list_names_is_allowed() {
        let list = "# ours\nnet.core.somaxconn\nnet.ipv4.conf.*.rp_filter  # reverse path\nnet.ipv6.*\n";
        for allowed in
            ["net/core/somaxconn", "net/ipv4/conf/IFNAME/rp_filter", "net/ipv6/conf/all/disable_ipv6"]
        {
            assert!(is_allowed(list, allowed), "{allowed}");
        }
        for refused in
            ["net/core/somaxconn2", "net/ipv4/conf/IFNAME/arp_ignore", "net/ipv4/ip_forward", "xnet/ipv6/a"]
        {
            assert!(!is_allowed(list, refused), "{refused}");
        }
        assert!(is_allowed(ALLOW_DEFAULT, "net/ipv4/ip_forward"));
        assert!(!is_allowed("", "net/ipv4/ip_forward"));
    }
}
