//! What this machine is: read once at the start, as none of it changes while the agent runs.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use k8s_openapi::api::core::v1::{NodeSwapStatus, NodeSystemInfo};
use nix::sys::utsname::uname;
use nix::unistd::{SysconfVar, sysconf};

use super::KUBELET_VERSION;
use crate::host::kernel_memory::swap_capacity;

/// Facts about the machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Machine {
    /// For `status.nodeInfo`, without the runtime's version.
    pub(super) info: MachineInfo,
    /// CPUs online.
    pub(super) cpus: u64,
    /// Configured pages by resource name (`hugepages-2Mi`), in bytes.
    pub(super) huge_pages: BTreeMap<String, u64>,
}

/// Identities and versions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct MachineInfo {
    pub(super) machine_id: String,
    pub(super) system_uuid: String,
    pub(super) boot_id: String,
    pub(super) kernel: String,
    pub(super) os_image: String,
    pub(super) architecture: String,
    /// Swap in bytes.
    pub(super) swap: u64,
}

impl Machine {
    /// Reads the files and asks the kernel.
    pub(super) fn read() -> io::Result<Self> {
        let name = uname()?;
        let machine_id = text("/etc/machine-id");
        let system_uuid = Some(text("/sys/class/dmi/id/product_uuid")).filter(|uuid| !uuid.is_empty());
        let cpus = sysconf(SysconfVar::_NPROCESSORS_ONLN)?.and_then(|cpus| u64::try_from(cpus).ok());
        Ok(Self {
            info: MachineInfo {
                system_uuid: system_uuid.unwrap_or_else(|| machine_id.clone()),
                machine_id,
                boot_id: text("/proc/sys/kernel/random/boot_id"),
                kernel: name.release().to_string_lossy().into_owned(),
                os_image: pretty_name(&text("/etc/os-release")),
                architecture: architecture(&name.machine().to_string_lossy()),
                swap: swap_capacity(&text("/proc/meminfo")),
            },
            cpus: cpus.unwrap_or(1).max(1),
            huge_pages: huge_pages(Path::new("/sys/kernel/mm/hugepages")),
        })
    }
}

impl MachineInfo {
    /// As the API wants it.
    pub(super) fn node_info(&self, runtime_version: &str) -> NodeSystemInfo {
        NodeSystemInfo {
            architecture: self.architecture.clone(),
            boot_id: self.boot_id.clone(),
            container_runtime_version: runtime_version.to_owned(),
            kernel_version: self.kernel.clone(),
            kubelet_version: KUBELET_VERSION.to_owned(),
            machine_id: self.machine_id.clone(),
            operating_system: "linux".to_owned(),
            os_image: self.os_image.clone(),
            system_uuid: self.system_uuid.clone(),
            swap: i64::try_from(self.swap)
                .ok()
                .filter(|bytes| *bytes > 0)
                .map(|bytes| NodeSwapStatus { capacity: Some(bytes) }),
            ..NodeSystemInfo::default()
        }
    }
}

/// Content of a small file; empty when there is none (containers and VMs lack some).
fn text(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// `PRETTY_NAME` of os-release(5).
fn pretty_name(os_release: &str) -> String {
    let value = os_release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    value.map_or("Linux".to_owned(), |value| value.trim_matches(['"', '\'']).to_owned())
}

/// Go's name of an architecture, which Kubernetes uses.
pub(super) fn architecture(machine: &str) -> String {
    match machine {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "i686" | "i386" => "386",
        "armv7l" | "armv6l" => "arm",
        other => other,
    }
    .to_owned()
}

/// Bytes of huge pages by resource name: directories `hugepages-<size>kB` hold the number of pages of that size.
pub(crate) fn huge_pages(dir: &Path) -> BTreeMap<String, u64> {
    let mut pages = BTreeMap::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(kib) = name.strip_prefix("hugepages-").and_then(|rest| rest.strip_suffix("kB")) else {
            continue;
        };
        let Ok(kib) = kib.parse::<u64>() else { continue };
        let count = std::fs::read_to_string(entry.path().join("nr_hugepages"));
        let count: u64 = count.unwrap_or_default().trim().parse().unwrap_or_default();
        pages.insert(format!("hugepages-{}", page_size(kib)), count * kib * 1024);
    }
    pages
}

fn page_size(kib: u64) -> String {
    if kib.is_multiple_of(1 << 20) {
        format!("{}Gi", kib >> 20)
    } else if kib.is_multiple_of(1 << 10) {
        format!("{}Mi", kib >> 10)
    } else {
        format!("{kib}Ki")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_kubernetes_names() {
        assert_eq!(architecture("x86_64"), "amd64");
        assert_eq!(
            pretty_name("NAME=x\nPRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\n"),
            "Debian GNU/Linux 12 (bookworm)"
        );
        assert_eq!(
            (page_size(2048), page_size(1 << 20), page_size(64)),
            ("2Mi".into(), "1Gi".into(), "64Ki".into())
        );
    }

    #[test]
    fn swap_is_told_where_there_is_some() {
        let swapping = MachineInfo { swap: 1 << 30, ..MachineInfo::default() };
        assert_eq!(swapping.node_info("").swap, Some(NodeSwapStatus { capacity: Some(1 << 30) }));
        assert_eq!(MachineInfo::default().node_info("").swap, None);
    }

    #[test]
    fn this_machine_is_known() {
        let machine = Machine::read().unwrap();
        assert!(machine.cpus >= 1 && !machine.info.kernel.is_empty() && !machine.info.boot_id.is_empty());
    }
}
