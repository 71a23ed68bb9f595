//! Which kernel parameters a pod may set: those of its own namespaces, and no others.

/// A parameter that cannot be set for the pod.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("sysctl {name:?}: {problem}")]
pub struct SysctlError {
    /// Its name.
    pub name: String,
    /// What is wrong with it.
    pub problem: &'static str,
}

/// The namespaces a pod shares with the node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SharedWithNode {
    /// Its network.
    pub network: bool,
    /// Its shared memory and message queues.
    pub ipc: bool,
}

/// Refuses a parameter that would change the node, and a name that would lead out of `/proc/sys`.
#[allow(clippy::match_same_arms, reason = "one line per namespace, in the order they are refused")]
pub fn check(name: &str, shared: SharedWithNode) -> Result<(), SysctlError> {
    let refuse = |problem| Err(SysctlError { name: name.to_owned(), problem });
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-./:*".contains(&byte);
    // Both ways of writing one; with slashes a dot belongs to the name of an interface.
    let parts: Vec<&str> =
        if name.contains('/') { name.split('/').collect() } else { name.split('.').collect() };
    if !name.bytes().all(plain) || parts.iter().any(|part| matches!(*part, "" | "." | "..")) {
        return refuse("is no name of a kernel parameter");
    }
    let memory = |parameter: &str| parameter.starts_with("shm") || parameter.starts_with("msg");
    match parts.as_slice() {
        ["net", _, ..] if shared.network => refuse("the pod uses the node's network"),
        ["net", _, ..] => Ok(()),
        ["kernel", "domainname"] if !shared.network => Ok(()),
        ["fs", "mqueue", _, ..] | ["kernel", "sem"] if shared.ipc => {
            refuse("the pod uses the node's IPC namespace")
        }
        ["kernel", parameter] if memory(parameter) && shared.ipc => {
            refuse("the pod uses the node's IPC namespace")
        }
        ["fs", "mqueue", _, ..] => Ok(()),
        ["kernel", parameter] if *parameter == "sem" || memory(parameter) => Ok(()),
        _ => refuse("is not of a namespace, so it would change the whole node"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_parameters_of_the_pods_own_namespaces() {
        let own = SharedWithNode::default();
        let network = SharedWithNode { network: true, ipc: false };
        let ipc = SharedWithNode { network: false, ipc: true };
        let cases = [
            ("net.ipv4.ip_forward", own, true),
            ("net/ipv4/conf/eth0.1/arp_filter", own, true),
            ("net.ipv4.ip_forward", network, false),
            ("kernel.shm_rmid_forced", own, true),
            ("kernel.shmmax", ipc, false),
            ("kernel.msgmax", own, true),
            ("kernel.sem", ipc, false),
            ("fs.mqueue.msg_max", own, true),
            ("fs.mqueue.msg_max", ipc, false),
            ("kernel.domainname", own, true),
            ("kernel.panic", own, false),
            ("vm.overcommit_memory", own, false),
            ("net/../kernel/panic", own, false),
            ("net..ipv4", own, false),
            ("", own, false),
            ("net.ipv4.\0x", own, false),
        ];
        for (name, shared, allowed) in cases {
            let outcome = check(name, shared);
            assert_eq!(outcome.is_ok(), allowed, "{name} with {shared:?}: {outcome:?}");
        }
    }
}
