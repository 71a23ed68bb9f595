//! The nodes of `up --nodes N`: a network namespace and a cgroup for each, joined by a bridge.
//!
//! ```text
//! host namespace: control plane, images ── 10.250.0.1 on the fabric bridge ──┬── eth0 of node-1 (10.250.0.11)
//!                                                                            └── eth0 of node-2 (10.250.0.12) …
//! ```
//! A node's namespace is kept by a file below its run directory. Its components are started inside it and inside its
//! cgroup, so that the service load balancer, which is attached there, serves them and the pods that they start.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::cmd::Cmd;
use crate::paths::Layout;

/// Range of the nodes' own addresses.
pub(crate) const CIDR: &str = "10.250.0.0/24";
/// The host on the fabric: the control plane and the image registry listen there.
pub(crate) const HOST: Ipv4Addr = Ipv4Addr::new(10, 250, 0, 1);
/// The host's IPv6 address on the fabric, with `--dual-stack`.
pub(crate) const HOST_V6: &str = "fd00:250::1";
/// Nodes at most: as many as two cores run.
pub(crate) const MOST: u8 = 5;

/// Name of the node with this number, counted from 1.
pub(crate) fn name(number: u8) -> String {
    format!("node-{number}")
}

/// Its address on the fabric.
pub(crate) fn address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 250, 0, 10 + number)
}

/// Its IPv6 address there: the same number, as it is written.
pub(crate) fn address_v6(number: u8) -> String {
    format!("fd00:250::{}", 10 + number)
}

/// The number in a node's name.
pub(crate) fn number(name: &str) -> Option<u8> {
    name.strip_prefix("node-")?.parse().ok()
}

/// The bridge that joins the nodes.
pub(crate) fn bridge(layout: &Layout) -> String {
    format!("kl-{}fab0", layout.instance)
}

/// The host's end of a node's link.
fn link(layout: &Layout, number: u8) -> String {
    format!("kl-{}n{number}", layout.instance)
}

/// The file that keeps a node's network namespace.
pub(crate) fn netns(node: &Layout) -> PathBuf {
    node.run.join("netns.node")
}

/// Makes bridge, namespaces and links anew.
pub(crate) fn create(layout: &Layout, nodes: u8, dual_stack: bool) -> Result<()> {
    remove(layout)?;
    let bridge = bridge(layout);
    ip(&["link", "add", &bridge, "type", "bridge"])?;
    ip(&["address", "add", &format!("{HOST}/24"), "dev", &bridge])?;
    if dual_stack {
        ip(&["address", "add", &format!("{HOST_V6}/64"), "dev", &bridge, "nodad"])?;
    }
    ip(&["link", "set", &bridge, "up"])?;
    for number in 1..=nodes {
        join(layout, number, dual_stack)
            .with_context(|| format!("making the network namespace of {}", name(number)))?;
    }
    Ok(())
}

fn join(layout: &Layout, number: u8, dual_stack: bool) -> Result<()> {
    let netns = netns(&layout.node(&name(number)));
    if let Some(dir) = netns.parent() {
        fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    }
    fs::write(&netns, "").with_context(|| format!("creating {}", netns.display()))?;
    let (file, bridge, link) = (netns.display().to_string(), bridge(layout), link(layout, number));
    Cmd::new("unshare").args([&format!("--net={file}"), "true"]).output()?;
    ip(&["link", "add", &link, "type", "veth", "peer", "name", "eth0", "netns", &file])?;
    ip(&["link", "set", &link, "master", &bridge, "up"])?;
    let inside = |args: &[&str]| {
        Cmd::new("nsenter").args([&format!("--net={file}"), "ip"]).args(args).output().map(drop)
    };
    inside(&["link", "set", "lo", "up"])?;
    inside(&["address", "add", &format!("{}/24", address(number)), "dev", "eth0"])?;
    if dual_stack {
        inside(&["address", "add", &format!("{}/64", address_v6(number)), "dev", "eth0", "nodad"])?;
    }
    inside(&["link", "set", "eth0", "up"])?;
    if dual_stack {
        inside(&["-6", "route", "add", "default", "via", HOST_V6])?;
    }
    inside(&["route", "add", "default", "via", &HOST.to_string()])
}

/// Removes what [`create`] made; the namespaces go when nothing holds them any more.
pub(crate) fn remove(layout: &Layout) -> Result<()> {
    for node in layout.nodes() {
        crate::host::unmount_below(&netns(&node))?;
    }
    let links = (1..=MOST).map(|number| link(layout, number)).chain([bridge(layout)]);
    for link in links.filter(|link| PathBuf::from("/sys/class/net").join(link).exists()) {
        match ip(&["link", "del", &link]) {
            // With its namespace the kernel removes a node's link too, maybe just now.
            Err(_) if !PathBuf::from("/sys/class/net").join(&link).exists() => {}
            outcome => outcome?,
        }
    }
    Ok(())
}

fn ip(args: &[&str]) -> Result<()> {
    Cmd::new("ip").args(args).output().map(drop)
}

/// The cgroup2 directory of a node below the directory that `up` was given.
pub(crate) fn cgroup2(root: &str, node: &Layout) -> PathBuf {
    PathBuf::from(root).join(node.cgroup().trim_start_matches('/'))
}

/// Where a node's components are: not in the node's directory itself, which has directories with controllers below it.
pub(crate) fn daemons(node: &Layout) -> Result<PathBuf> {
    let file = node.data.join("cgroup2");
    let root = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    Ok(PathBuf::from(root.trim()).join("daemons"))
}

/// A command line that runs `program` inside a node: the process is in the node's cgroup before its first step, and in
/// its namespace before the program starts.
pub(crate) fn inside(node: &Layout, program: &std::path::Path) -> Result<Command> {
    let daemons = daemons(node)?;
    fs::create_dir_all(&daemons).with_context(|| format!("creating {}", daemons.display()))?;
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", "echo $$ > \"$0\" && exec \"$@\""])
        .arg(daemons.join("cgroup.procs"))
        .arg("nsenter")
        .arg(format!("--net={}", netns(node).display()))
        .arg(program);
    Ok(command)
}

/// `cargo xtask node NAME -- COMMAND`: runs a command as the node itself would.
pub(crate) fn run(layout: &Layout, node: &str, command: &[String]) -> Result<ExitCode> {
    let nodes = layout.nodes();
    let Some(place) = nodes.iter().find(|place| place.name() == node) else {
        let known: Vec<String> = nodes.iter().map(Layout::name).collect();
        if known.is_empty() {
            bail!("no nodes with namespaces of their own run: start them with `cargo xtask up --nodes N`");
        }
        bail!("there is no node {node:?}, only {}", known.join(", "));
    };
    let Some((program, arguments)) = command.split_first() else {
        bail!("no command given: cargo xtask node {node} -- COMMAND");
    };
    let status = inside(place, std::path::Path::new(program))?.args(arguments).status();
    let status = status.with_context(|| format!("running {program} in {node}"))?;
    // As shells tell it: its own, or that of the signal that ended it.
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_numbers() {
        assert_eq!(number(&name(3)), Some(3));
        assert_eq!(number("host"), None);
        assert_eq!(address(2).to_string(), "10.250.0.12");
    }
}
