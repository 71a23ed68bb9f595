//! Checks before anything starts: each finding says what is wrong, why it matters and what to do; all in one list.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::cmd::Cmd;
use crate::config::{Mode, Node, Overlay, POD_CIDR, PORTS, SERVICE_CIDR};
use crate::fabric;
use crate::paths::Layout;

/// Smallest free space below target/ with which a cluster starts: images, snapshots and the store need it.
const MIN_FREE_BYTES: u64 = 1 << 30;

/// Fails at once for anybody but root, before long builds.
pub(crate) fn require_root() -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    bail!(
        "`cargo xtask up` needs root: it mounts file systems, makes network namespaces and loads BPF programs. Run it with sudo or as root"
    )
}

/// Checks the host and describes the one node that is the host itself.
pub(crate) fn check(layout: &Layout, cgroup_root: Option<&Path>) -> Result<Node> {
    let (address, cgroup2) =
        check_host(layout, cgroup_root, &[(SERVICE_CIDR, "service"), (POD_CIDR, "pod")], None)?;
    let name = nix::unistd::gethostname()?.to_string_lossy().to_lowercase();
    Ok(Node { name, address, cgroup2: cgroup2.display().to_string(), overlay: None })
}

/// Checks the host and describes several nodes with network namespaces of their own.
pub(crate) fn check_nodes(
    layout: &Layout,
    cgroup_root: Option<&Path>,
    count: u8,
    overlay: Overlay,
) -> Result<Vec<(Layout, Node)>> {
    let (_, cgroup2) = check_host(layout, cgroup_root, &[(fabric::CIDR, "node")], Some(overlay.mode))?;
    let root = cgroup2.display().to_string();
    let nodes = (1..=count).map(|number| {
        let name = fabric::name(number);
        let place = layout.node(&name);
        let cgroup2 = fabric::cgroup2(&root, &place).display().to_string();
        let address = fabric::address(number).to_string();
        (place, Node { name, address, cgroup2, overlay: Some(overlay) })
    });
    Ok(nodes.collect())
}

/// The host's address and its cgroup2 directory.
fn check_host(
    layout: &Layout,
    cgroup_root: Option<&Path>,
    ranges: &[(&str, &str)],
    overlay: Option<Mode>,
) -> Result<(String, PathBuf)> {
    let mut findings = Vec::new();
    kernel(&mut findings);
    findings.extend(overlay.and_then(overlay_link));
    ports(&mut findings);
    routes(&mut findings, &[layout.bridge(), fabric::bridge(layout)], ranges);
    disk(layout, &mut findings);
    let cgroup2 = match cgroup2(layout, cgroup_root) {
        Ok(dir) => dir,
        Err(error) => {
            findings.push(format!("{error:#}"));
            PathBuf::new()
        }
    };
    let address = node_address();
    if let Err(error) = &address {
        findings.push(format!("{error:#}"));
    }
    if !findings.is_empty() {
        // A private cgroup2 mount of a moment ago is taken back.
        crate::host::unmount_below(&layout.run.join("cgroup2"))?;
        bail!("this host is not ready for `up`; nothing was started:\n  - {}", findings.join("\n  - "));
    }
    Ok((address?, cgroup2))
}

fn kernel(findings: &mut Vec<String>) {
    if !Path::new("/sys/kernel/btf/vmlinux").is_file() {
        findings.push(
            "the kernel has no BTF (/sys/kernel/btf/vmlinux is missing): the service load balancer's BPF programs \
             need it; boot a kernel built with CONFIG_DEBUG_INFO_BTF=y (Debian's are)"
                .to_owned(),
        );
    }
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !filesystems.lines().any(|line| line.ends_with("\toverlay"))
        && Cmd::new("modprobe").args(["overlay"]).output().is_err()
    {
        findings.push(
            "the kernel has no overlayfs (CONFIG_OVERLAY_FS): containers need it for their root".to_owned(),
        );
    }
}

/// What the kernel lacks for the network between nodes: such a link is made in a namespace that ends with the command.
fn overlay_link(mode: Mode) -> Option<String> {
    let (link, option) = match mode {
        Mode::Wireguard => (&["wireguard"][..], "CONFIG_WIREGUARD"),
        Mode::Vxlan => (&["vxlan", "id", "1", "dstport", "8472"][..], "CONFIG_VXLAN"),
        Mode::HostGw => return None,
    };
    let made =
        Cmd::new("unshare").args(["-n", "ip", "link", "add", "name", "probe", "type"]).args(link).output();
    made.err().map(|_| {
        let kind = link[0];
        format!(
            "the kernel can make no {kind} link, which --overlay {kind} needs: load its module (`modprobe {kind}`), boot a \
             kernel built with {option}, or choose another mode"
        )
    })
}

fn ports(findings: &mut Vec<String>) {
    for (port, what) in PORTS {
        if let Err(error) = TcpListener::bind((Ipv4Addr::UNSPECIFIED, *port)) {
            let holder = holder_of(*port).unwrap_or_else(|| "an unknown process".to_owned());
            findings.push(format!(
                "TCP port {port}, which {what} needs, cannot be bound ({error}): it is held by {holder}; stop that first"
            ));
        }
    }
}

/// Name and pid of the process that listens on a TCP port, from /proc.
fn holder_of(port: u16) -> Option<String> {
    let inode = ["/proc/net/tcp", "/proc/net/tcp6"].iter().find_map(|table| listening_inode(table, port))?;
    let wanted = format!("socket:[{inode}]");
    for process in fs::read_dir("/proc").ok()?.flatten() {
        // `self` and `thread-self` stand for a process that is listed by its number too.
        if process.file_name().to_string_lossy().parse::<u32>().is_err() {
            continue;
        }
        let fds = process.path().join("fd");
        let holds = fs::read_dir(fds)
            .into_iter()
            .flatten()
            .flatten()
            .any(|fd| fs::read_link(fd.path()).is_ok_and(|target| target.to_string_lossy() == wanted));
        if holds {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("`{}` (pid {})", name.trim(), process.file_name().to_string_lossy()));
        }
    }
    None
}

fn listening_inode(table: &str, port: u16) -> Option<String> {
    const LISTEN: &str = "0A";
    let suffix = format!(":{port:04X}");
    fs::read_to_string(table).ok()?.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let matches = fields.get(1)?.ends_with(&suffix) && *fields.get(3)? == LISTEN;
        matches.then(|| fields.get(9).map(|inode| (*inode).to_owned()))?
    })
}

fn routes(findings: &mut Vec<String>, own_bridges: &[String], ranges: &[(&str, &str)]) {
    let Ok(table) = json_of(&["-4", "-j", "route", "show", "table", "main"]) else { return };
    for route in table.as_array().into_iter().flatten() {
        let Some(destination) = route["dst"].as_str().filter(|dst| *dst != "default") else { continue };
        let device = route["dev"].as_str().unwrap_or("no device");
        if own_bridges.iter().any(|own| own == device) {
            continue;
        }
        for (range, what) in ranges {
            if overlap(destination, range) {
                findings.push(format!(
                    "the route {destination} (dev {device}) overlaps the {what} range {range}: packets for one would go \
                     to the other; remove it with `ip route del {destination}`"
                ));
            }
        }
    }
}

/// Whether two IPv4 prefixes share an address; what does not parse shares none.
fn overlap(one: &str, other: &str) -> bool {
    let parse = |text: &str| -> Option<(u32, u32)> {
        let (address, bits) = text.split_once('/').unwrap_or((text, "32"));
        Some((address.parse::<Ipv4Addr>().ok()?.to_bits(), bits.parse().ok()?))
    };
    let (Some((a, a_bits)), Some((b, b_bits))) = (parse(one), parse(other)) else { return false };
    let common = a_bits.min(b_bits);
    common == 0 || (a ^ b) >> (32 - common) == 0
}

fn disk(layout: &Layout, findings: &mut Vec<String>) {
    let target = layout.repo.join("target");
    if let Ok(stat) = nix::sys::statvfs::statvfs(&target) {
        let free = stat.blocks_available() * stat.fragment_size();
        if free < MIN_FREE_BYTES {
            findings.push(format!(
                "{} has {} MiB free, at least {} MiB are needed for images and the store: make room",
                target.display(),
                free >> 20,
                MIN_FREE_BYTES >> 20
            ));
        }
    }
}

/// The cgroup2 directory to attach to: as told, where the host has mounted one, or a private mount.
fn cgroup2(layout: &Layout, told: Option<&Path>) -> Result<PathBuf> {
    if let Some(dir) = told {
        if !dir.join("cgroup.procs").is_file() {
            bail!("--cgroup-root {}: not a cgroup2 directory (it has no cgroup.procs)", dir.display());
        }
        return Ok(dir.to_owned());
    }
    let mounts = fs::read_to_string("/proc/self/mounts").context("reading /proc/self/mounts")?;
    let mounted = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let dir = fields.nth(1)?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(dir))
    });
    if let Some(dir) = mounted {
        return Ok(dir);
    }
    let private = layout.run.join("cgroup2");
    fs::create_dir_all(&private)?;
    Cmd::new("mount").args(["-t", "cgroup2", "none"]).args([&private]).output().context(
        "no cgroup2 is mounted and none can be (the socket load balancer attaches to it): boot a kernel with CONFIG_CGROUP_BPF",
    )?;
    Ok(private)
}

/// The address towards the default gateway, else the first global one.
fn node_address() -> Result<String> {
    if let Ok(route) = json_of(&["-4", "-j", "route", "get", "192.0.2.254"])
        && let Some(address) = route[0]["prefsrc"].as_str()
    {
        return Ok(address.to_owned());
    }
    let links = json_of(&["-4", "-j", "address", "show", "scope", "global"])?;
    let address =
        links.as_array().into_iter().flatten().find_map(|link| link["addr_info"][0]["local"].as_str());
    address.map(str::to_owned).context(
        "this host has no IPv4 address but loopback: pods and the API need one; give an interface an address",
    )
}

fn json_of(args: &[&str]) -> Result<Value> {
    let text = Cmd::new("ip").args(args).output()?;
    serde_json::from_str(&text).context("parsing the output of `ip -j`")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_overlap_when_one_holds_the_other() {
        assert!(overlap("10.96.5.0/24", SERVICE_CIDR));
        assert!(overlap("10.0.0.0/8", POD_CIDR));
        assert!(overlap("10.96.0.10", SERVICE_CIDR));
        assert!(!overlap("10.112.0.0/16", SERVICE_CIDR));
        assert!(!overlap("192.0.2.0/24", POD_CIDR));
        assert!(!overlap("garbage", POD_CIDR));
    }

    #[test]
    fn the_holder_of_a_port_is_named() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let holder = holder_of(port).unwrap();
        assert!(holder.contains(&format!("pid {}", std::process::id())), "{holder}");
    }
}
