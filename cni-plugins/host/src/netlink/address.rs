//! Addresses of links.

use cni_plugins_types::IpNet;
use nix::errno::Errno;

use super::{
    Netlink, NetlinkError, Step, address_from,
    codec::{Message, find, u32_at},
    family, octets,
};

const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_FLAGS: u16 = 8;
const IFA_F_NODAD: u32 = 2;
const IFA_F_OPTIMISTIC: u32 = 4;
const IFA_F_NOPREFIXROUTE: u32 = 0x200;

impl Step {
    /// Gives a link an address; one that is there already is tolerated. IPv6 addresses are usable at once:
    /// without duplicate address detection, or, with `detect_duplicates`, while it goes on.
    pub fn add_address(index: u32, address: IpNet, detect_duplicates: bool) -> Self {
        let v6_flags = if detect_duplicates { IFA_F_OPTIMISTIC } else { IFA_F_NODAD };
        let flags = if address.addr().is_ipv6() { v6_flags } else { 0 };
        // Without a broadcast address old programs that ask for one get 0.0.0.0; a /31 or /32 has none.
        let broadcast = (address.addr().is_ipv4() && address.prefix_len() < 31).then(|| address.last());
        let message = message(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, index, address)
            .when(broadcast, |message, last| message.attr(IFA_BROADCAST, &octets(last)))
            .u32(IFA_FLAGS, flags);
        Step::new(format!("add address {address} to link {index}"), message).tolerating(Errno::EEXIST)
    }

    /// As [`Step::add_address`], without a route to the address's subnet.
    pub fn add_address_only(index: u32, address: IpNet) -> Self {
        let nodad = if address.addr().is_ipv6() { IFA_F_NODAD } else { 0 };
        let message = message(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, index, address)
            .u32(IFA_FLAGS, nodad | IFA_F_NOPREFIXROUTE);
        Step::new(format!("add address {address} to link {index}"), message).tolerating(Errno::EEXIST)
    }

    /// Takes an address from a link; absence is tolerated.
    pub fn delete_address(index: u32, address: IpNet) -> Self {
        Step::new(
            format!("remove address {address} from link {index}"),
            message(RTM_DELADDR, 0, index, address),
        )
        .tolerating(Errno::EADDRNOTAVAIL)
    }
}

impl Netlink {
    /// The addresses of a link.
    pub fn addresses(&self, index: u32) -> Result<Vec<IpNet>, NetlinkError> {
        let request = Message::new(RTM_GETADDR, 0).header(&[0; 8]);
        let mut found = Vec::new();
        self.dump("list addresses", &request, |body| {
            if u32_at(body, 4) == Some(index) {
                found.extend(read(body));
            }
        })?;
        Ok(found)
    }
}

fn message(kind: u16, flags: u16, index: u32, address: IpNet) -> Message {
    let mut header = [family(address.addr()), address.prefix_len(), 0, 0, 0, 0, 0, 0];
    header[4..].copy_from_slice(&index.to_ne_bytes());
    let bytes = octets(address.addr());
    Message::new(kind, flags).header(&header).attr(IFA_LOCAL, &bytes).attr(IFA_ADDRESS, &bytes)
}

fn read(body: &[u8]) -> Option<IpNet> {
    let prefix_len = *body.get(1)?;
    let attributes = body.get(8..)?;
    // IFA_LOCAL is the interface's own address where the link is point-to-point; IPv6 has ADDRESS only.
    let bytes = find(attributes, IFA_LOCAL).or_else(|| find(attributes, IFA_ADDRESS))?;
    IpNet::new(address_from(bytes)?, prefix_len)
}
