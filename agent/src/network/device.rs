//! The tunnel device: made when it is missing or of another kind, adjusted where it differs, removed where the mode
//! has none.
//!
//! A device that is right is taken over as it is, so that an agent's restart interrupts nothing.

use std::net::IpAddr;

use agent_core::overlay::{Mac, Range};
use anyhow::{Context, Result, bail};
use netlink_packet_route::address::{AddressAttribute, AddressFlags};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use rtnetlink::{LinkUnspec, LinkVxlan};

use super::kernel::Kernel;

/// Linux' EEXIST.
const EXISTS: i32 = -17;

/// What the VXLAN device must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Vxlan {
    pub(super) name: String,
    pub(super) vni: u32,
    pub(super) port: u16,
    pub(super) local: IpAddr,
    pub(super) underlay: u32,
    pub(super) mac: Mac,
    pub(super) mtu: u32,
    /// Its own addresses, with which packets of the node itself reach other nodes' pods.
    pub(super) addresses: Vec<IpAddr>,
}

/// Makes it so and returns its index.
pub(super) async fn ensure(kernel: &Kernel, wanted: &Vxlan) -> Result<u32> {
    let index = match find(kernel, &wanted.name).await? {
        Some(link) if fits(&link, wanted) => {
            adjust(kernel, &link, wanted).await?;
            link.header.index
        }
        Some(link) => {
            expect_vxlan(&link, &wanted.name)?;
            tracing::info!(device = %wanted.name, "the tunnel device has other settings: made anew");
            kernel
                .handle
                .link()
                .del(link.header.index)
                .execute()
                .await
                .context("remove the old tunnel device")?;
            create(kernel, wanted).await?
        }
        None => create(kernel, wanted).await?,
    };
    addresses(kernel, index, &wanted.addresses).await?;
    Ok(index)
}

/// Removes a VXLAN device that an earlier mode left; another kind of device of that name is not ours.
pub(super) async fn remove(kernel: &Kernel, name: &str) -> Result<()> {
    let Some(link) = find(kernel, name).await? else { return Ok(()) };
    if kind(&link) != Some(&InfoKind::Vxlan) {
        return Ok(());
    }
    tracing::info!(device = %name, "the tunnel device is not needed in this mode: removed");
    kernel.handle.link().del(link.header.index).execute().await.context("remove the tunnel device")
}

async fn find(kernel: &Kernel, name: &str) -> Result<Option<LinkMessage>> {
    let is_it = |attribute: &LinkAttribute| matches!(attribute, LinkAttribute::IfName(it) if it == name);
    Ok(kernel.links().await?.into_iter().find(|link| link.attributes.iter().any(is_it)))
}

/// The name of a VXLAN device with this identifier.
fn same_vni(links: &[LinkMessage], vni: u32) -> Option<String> {
    let has_vni = |info: &LinkInfo| match info {
        LinkInfo::Data(InfoData::Vxlan(data)) => data.contains(&InfoVxlan::Id(vni)),
        _ => false,
    };
    let is_it = |attribute: &LinkAttribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.iter().any(has_vni),
        _ => false,
    };
    let link = links.iter().find(|link| link.attributes.iter().any(is_it))?;
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    })
}

async fn create(kernel: &Kernel, wanted: &Vxlan) -> Result<u32> {
    let mut builder = LinkVxlan::new(&wanted.name, wanted.vni)
        .port(wanted.port)
        .learning(false)
        .dev(wanted.underlay)
        .address(wanted.mac.0.to_vec())
        .mtu(wanted.mtu)
        .up();
    builder = match wanted.local {
        IpAddr::V4(v4) => builder.local(v4),
        // Over IPv6 a UDP checksum is due; zero is allowed for tunnels, and hardware expects it no more than we do.
        IpAddr::V6(v6) => builder.local6(v6),
    };
    match kernel.handle.link().add(builder.build()).execute().await {
        Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == EXISTS => {
            let (vni, port) = (wanted.vni, wanted.port);
            let other = same_vni(&kernel.links().await?, vni).unwrap_or_else(|| "unknown".to_owned());
            bail!(
                "another VXLAN device of this host ({other}) uses VNI {vni} and port {port}: set keelson.network.vni or port, or \
                 remove it"
            )
        }
        made => made.with_context(|| format!("make the tunnel device {}", wanted.name))?,
    }
    let link = find(kernel, &wanted.name).await?.context("the tunnel device vanished")?;
    tracing::info!(device = %wanted.name, vni = wanted.vni, port = wanted.port, mtu = wanted.mtu, "tunnel device made");
    Ok(link.header.index)
}

/// What can be changed in place: hardware address, MTU, up.
async fn adjust(kernel: &Kernel, link: &LinkMessage, wanted: &Vxlan) -> Result<()> {
    let mac = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(mac) => Some(mac.as_slice()),
        _ => None,
    });
    let mtu = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    });
    let up = link.header.flags.contains(LinkFlags::Up);
    if mac == Some(&wanted.mac.0) && mtu == Some(wanted.mtu) && up {
        return Ok(());
    }
    let message = LinkUnspec::new_with_index(link.header.index)
        .address(wanted.mac.0.to_vec())
        .mtu(wanted.mtu)
        .up()
        .build();
    tracing::info!(device = %wanted.name, mtu = wanted.mtu, "tunnel device adjusted");
    kernel.handle.link().set(message).execute().await.context("adjust the tunnel device")
}

fn kind(link: &LinkMessage) -> Option<&InfoKind> {
    infos(link).find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    })
}

fn infos(link: &LinkMessage) -> impl Iterator<Item = &LinkInfo> {
    link.attributes.iter().flat_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.as_slice(),
        _ => &[],
    })
}

fn expect_vxlan(link: &LinkMessage, name: &str) -> Result<()> {
    if kind(link) == Some(&InfoKind::Vxlan) {
        return Ok(());
    }
    bail!(
        "an interface called {name} exists and is no VXLAN device: set keelson.network.device to another name"
    )
}

/// Whether all that only a new device can have is right.
fn fits(link: &LinkMessage, wanted: &Vxlan) -> bool {
    let data: Vec<&InfoVxlan> = infos(link)
        .flat_map(|info| match info {
            LinkInfo::Data(InfoData::Vxlan(data)) => data.as_slice(),
            _ => &[],
        })
        .collect();
    let local = match wanted.local {
        IpAddr::V4(v4) => InfoVxlan::Local(v4),
        IpAddr::V6(v6) => InfoVxlan::Local6(v6),
    };
    kind(link) == Some(&InfoKind::Vxlan)
        && [
            InfoVxlan::Id(wanted.vni),
            InfoVxlan::Port(wanted.port),
            InfoVxlan::Link(wanted.underlay),
            InfoVxlan::Learning(false),
            local,
        ]
        .iter()
        .all(|needed| data.contains(&needed))
}

/// Exactly these addresses, each alone in its range; link-local ones are the kernel's.
async fn addresses(kernel: &Kernel, index: u32, wanted: &[IpAddr]) -> Result<()> {
    let has = kernel.addresses().await?;
    let has: Vec<_> = has.into_iter().filter(|(link, ..)| *link == index).collect();
    for (_, address, _, message) in &has {
        let link_local = matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local());
        if !link_local && !wanted.contains(address) {
            let removed = kernel.handle.address().del(message.clone()).execute().await;
            removed.with_context(|| format!("remove {address} from the tunnel device"))?;
        }
    }
    for address in wanted.iter().filter(|wanted| !has.iter().any(|(_, has, ..)| has == *wanted)) {
        let alone = Range::of(*address, 128).prefix();
        let mut request = kernel.handle.address().add(index, *address, alone);
        // Nobody else can have it: no reason to wait for an answer from the others.
        request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        request.execute().await.with_context(|| format!("give {address} to the tunnel device"))?;
    }
    Ok(())
}
