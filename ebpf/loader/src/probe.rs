//! Finds out what the kernel and the machine offer, by trying, before anything is changed.

use std::path::Path;

use aya::{maps::MapType, programs::ProgramType, sys};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use crate::pins;

/// One thing that the data plane uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Feature {
    /// What it is.
    pub name: &'static str,
    /// Whether it is there.
    pub present: bool,
    /// Whether the data plane runs without it.
    pub optional: bool,
    /// What is missing and what to do, or what was found.
    pub detail: String,
}

/// Looks at everything. Changes nothing.
#[must_use]
pub fn probe(pin_dir: &Path, cgroup_dir: &Path) -> Vec<Feature> {
    vec![programs(), socket_storage(), cgroup2(cgroup_dir), bpffs(pin_dir), kernel_btf()]
}

/// The required features that are missing, one readable line each.
#[must_use]
pub fn missing(features: &[Feature]) -> Vec<String> {
    let absent = features.iter().filter(|feature| !feature.present && !feature.optional);
    absent.map(|feature| format!("{}: {}", feature.name, feature.detail)).collect()
}

fn programs() -> Feature {
    let (present, detail) = match sys::is_program_supported(ProgramType::CgroupSockAddr) {
        Ok(true) => (true, "cgroup/sock_addr programs load".to_owned()),
        Ok(false) => (false, "the kernel lacks CONFIG_CGROUP_BPF (cgroup/sock_addr programs)".to_owned()),
        Err(error) => {
            (false, format!("cannot load a BPF program, CAP_BPF and CAP_NET_ADMIN are needed: {error}"))
        }
    };
    Feature { name: "cgroup socket programs", present, optional: false, detail }
}

fn socket_storage() -> Feature {
    let (present, detail) = match sys::is_map_supported(MapType::SkStorage) {
        Ok(true) => (true, "socket storage maps can be made".to_owned()),
        Ok(false) => {
            (false, "the kernel lacks BPF_MAP_TYPE_SK_STORAGE (Linux 5.2, CONFIG_BPF_SYSCALL)".to_owned())
        }
        Err(error) => (false, format!("cannot make a BPF map: {error}")),
    };
    Feature { name: "socket storage", present, optional: false, detail }
}

fn cgroup2(dir: &Path) -> Feature {
    let (present, detail) = match statfs(dir) {
        Ok(fs) if fs.filesystem_type() == CGROUP2_SUPER_MAGIC => {
            (true, format!("cgroup2 at {}", dir.display()))
        }
        Ok(_) => (
            false,
            format!(
                "{} is not on a cgroup2 file system; mount one (`mount -t cgroup2 none DIR`) and name it as cgroupRoot",
                dir.display()
            ),
        ),
        Err(errno) => (false, format!("{} cannot be read: {}", dir.display(), errno.desc())),
    };
    Feature { name: "cgroup v2", present, optional: false, detail }
}

fn bpffs(pin_dir: &Path) -> Feature {
    let point = pins::mount_point(pin_dir);
    let mounted = pins::on_bpffs(pin_dir);
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let offered = known.lines().any(|line| line.split_whitespace().last() == Some("bpf"));
    let detail = match (mounted, offered) {
        (true, _) => format!("BPF file system below {}", point.display()),
        (false, true) => format!("not mounted; will be mounted at {}", point.display()),
        (false, false) => "the kernel offers no BPF file system (CONFIG_BPF_SYSCALL)".to_owned(),
    };
    Feature { name: "BPF file system", present: mounted || offered, optional: false, detail }
}

/// The programs carry their own types and touch no kernel structure, so the kernel's types are a convenience.
fn kernel_btf() -> Feature {
    let present = Path::new("/sys/kernel/btf/vmlinux").is_file();
    let detail = if present {
        "kernel types at /sys/kernel/btf/vmlinux".to_owned()
    } else {
        "the kernel was built without CONFIG_DEBUG_INFO_BTF; the service programs work without it".to_owned()
    };
    Feature { name: "kernel BTF", present, optional: true, detail }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_cgroup2_is_named_with_what_to_do() {
        let feature = cgroup2(Path::new("/proc"));
        assert!(!feature.present);
        let lines = missing(&[feature]);
        assert!(lines[0].starts_with("cgroup v2: /proc is not on a cgroup2 file system"), "{lines:?}");
    }

    #[test]
    fn an_optional_feature_is_never_in_the_way() {
        let feature = Feature { name: "x", present: false, optional: true, detail: String::new() };
        assert!(missing(&[feature]).is_empty());
    }
}
