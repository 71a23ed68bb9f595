//! Forwarding entries of bridges.

use nix::errno::Errno;

use super::{Step, codec::Message, format_mac};

const RTM_NEWNEIGH: u16 = 28;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const AF_BRIDGE: u8 = 7;
const NDA_LLADDR: u16 = 2;
const NDA_VLAN: u16 = 5;
/// `NUD_NOARP`: an entry that does not age and is not the host's own.
const STATIC: u16 = 0x40;
/// `NTF_MASTER`: the entry belongs to the bridge above the port.
const MASTER: u8 = 4;

impl Step {
    /// A forwarding entry that does not age: `mac` is behind port `index`.
    pub fn add_static_forwarding(index: u32, mac: [u8; 6], vlan: Option<u16>) -> Self {
        let mut header = [0; 12];
        header[0] = AF_BRIDGE;
        header[4..8].copy_from_slice(&index.to_ne_bytes());
        header[8..10].copy_from_slice(&STATIC.to_ne_bytes());
        header[10] = MASTER;
        let message = Message::new(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE)
            .header(&header)
            .attr(NDA_LLADDR, &mac)
            .when(vlan, |message, vlan| message.u16(NDA_VLAN, vlan));
        Step::new(format!("bind {} to bridge port {index}", format_mac(&mac)), message)
            .tolerating(Errno::EEXIST)
    }
}
