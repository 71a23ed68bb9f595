//! Keeps the MTU of running pods at what the underlay carries, when that changes after they were made.
//!
//! Both ends of every veth on the pods' bridge, and the bridge. An end inside a pod is set by a thread that enters the
//! pod's network namespace; they are found in the directory where the runtime keeps them. The end here is never made
//! smaller than the one inside, because the kernel drops what does not fit: where the inside is out of reach, the pod is
//! left as it is, and hears of the smaller MTU by ICMP.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use nix::sched::{CloneFlags, setns};
use rtnetlink::LinkUnspec;

use super::kernel::Kernel;

/// Linux' ENODEV: the pod ended between the list and the change.
const NO_DEVICE: i32 = -19;

/// Sets what differs. `namespaces`: where the runtime keeps the pods' network namespaces.
pub(super) async fn keep_mtu(
    kernel: &Kernel,
    bridge: &str,
    namespaces: Option<&Path>,
    mtu: u32,
) -> Result<()> {
    let links = kernel.links().await?;
    let Some(bridge) = links.iter().find(|link| name(link) == Some(bridge)) else { return Ok(()) };
    let ports: Vec<&LinkMessage> =
        links.iter().filter(|link| controller(link) == Some(bridge.header.index)).collect();
    if ports.iter().chain([&bridge]).all(|link| mtu_of(link) == Some(mtu)) {
        return Ok(());
    }
    // Larger first outside, then inside; smaller the other way round.
    for port in ports.iter().filter(|port| mtu_of(port) < Some(mtu)) {
        set(kernel, port.header.index, mtu).await?;
    }
    let inside = match namespaces {
        Some(dir) => set_inside(dir.to_owned(), mtu).await?,
        None => BTreeMap::new(),
    };
    let mut left = 0;
    for port in &ports {
        let reached = inside.get(&port.header.index) == Some(&mtu);
        left += usize::from(!reached);
        if reached && mtu_of(port) > Some(mtu) {
            set(kernel, port.header.index, mtu).await?;
        }
    }
    if left == 0 {
        set(kernel, bridge.header.index, mtu).await?;
    }
    tracing::info!(mtu, pods = ports.len() - left, unreached = left, "MTU of running pods adjusted");
    Ok(())
}

/// Sets every pod's end, in a thread of its own, since a namespace is a thread's; which ends have which MTU now, by the
/// index of the other end.
async fn set_inside(dir: PathBuf, mtu: u32) -> Result<BTreeMap<u32, u32>> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    std::thread::Builder::new().name("pod-mtu".to_owned()).spawn(move || {
        let mut reached = BTreeMap::new();
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            match enter_and_set(&entry.path(), mtu) {
                Ok(found) => reached.extend(found),
                // A namespace that is just going, or no namespace.
                Err(error) => tracing::debug!(path = %entry.path().display(), error = format!("{error:#}"), "not entered"),
            }
        }
        // Nobody waits any more when the pass was given up.
        sender.send(reached).ok();
    })?;
    receiver.await.context("the thread for pods' namespaces ended early")
}

fn enter_and_set(namespace: &Path, mtu: u32) -> Result<BTreeMap<u32, u32>> {
    let file = File::open(namespace)?;
    setns(&file, CloneFlags::CLONE_NEWNET)?;
    tokio::runtime::Builder::new_current_thread().enable_io().build()?.block_on(async {
        let kernel = Kernel::open()?;
        let mut reached = BTreeMap::new();
        for link in kernel.links().await?.iter().filter(|link| is_veth(link)) {
            let Some(outside) = peer(link) else { continue };
            if mtu_of(link) != Some(mtu) {
                set(&kernel, link.header.index, mtu).await?;
            }
            reached.insert(outside, mtu);
        }
        Ok(reached)
    })
}

async fn set(kernel: &Kernel, index: u32, mtu: u32) -> Result<()> {
    let message = LinkUnspec::new_with_index(index).mtu(mtu).build();
    match kernel.handle.link().set(message).execute().await {
        Err(rtnetlink::Error::NetlinkError(answer)) if answer.raw_code() == NO_DEVICE => Ok(()),
        outcome => outcome.with_context(|| format!("set the MTU of interface {index}")),
    }
}

fn is_veth(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => {
            infos.iter().any(|info| matches!(info, LinkInfo::Kind(InfoKind::Veth)))
        }
        _ => false,
    })
}

fn name(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}

fn mtu_of(link: &LinkMessage) -> Option<u32> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    })
}

fn controller(link: &LinkMessage) -> Option<u32> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Controller(index) => Some(*index),
        _ => None,
    })
}

fn peer(link: &LinkMessage) -> Option<u32> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Link(index) => Some(*index),
        _ => None,
    })
}
