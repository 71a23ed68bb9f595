//! Forgets flows that connection tracking remembers.
//!
//! A UDP flow keeps the way that its first packet took, so that a client which goes on sending would never notice that a
//! host port has come, gone, or moved to another pod.

use std::collections::BTreeSet;

use super::{
    NftError,
    attributes::find,
    is_absent,
    wire::{Message, Socket},
};

/// `NFNL_SUBSYS_CTNETLINK`, with `IPCTNL_MSG_CT_GET` and `IPCTNL_MSG_CT_DELETE`.
const GET: u16 = 1 << 8 | 1;
const DELETE: u16 = 1 << 8 | 2;
/// Number of UDP.
const UDP: u8 = 17;
/// Address families that flows have.
const FAMILIES: [u8; 2] = [2, 10];

/// Forgets all UDP flows whose original destination port is one of `ports`; tells how many.
pub fn forget_udp(ports: &BTreeSet<u16>) -> Result<usize, NftError> {
    if ports.is_empty() {
        return Ok(0);
    }
    let run = || -> std::io::Result<usize> {
        let mut socket = Socket::open().map_err(|error| error.source)?;
        let mut count = 0;
        for family in FAMILIES {
            for flow in socket.dump(&Message::of(GET, 0, family))? {
                let Some(tuple) = find(&flow, 1).filter(|tuple| is_meant(tuple, ports)) else { continue };
                let mut delete = Message::of(DELETE, 0, family);
                // The original tuple, and the zone where there is one, tell the flow.
                delete.body.put(1 | 0x8000, tuple);
                if let Some(zone) = find(&flow, 18) {
                    delete.body.put(18, zone);
                }
                match socket.request(&delete) {
                    // It ended by itself in between.
                    Err(error) if is_absent(&error) => {}
                    other => other.map(|()| count += 1)?,
                }
            }
        }
        Ok(count)
    };
    run().map_err(|source| NftError::new("forget UDP flows", source))
}

fn is_meant(tuple: &[u8], ports: &BTreeSet<u16>) -> bool {
    let protocol = find(tuple, 2).unwrap_or_default();
    let port = find(protocol, 3).and_then(|bytes| bytes.try_into().ok()).map(u16::from_be_bytes);
    find(protocol, 1) == Some(&[UDP]) && port.is_some_and(|port| ports.contains(&port))
}

#[cfg(test)]
mod tests {
    use super::{super::attributes::Attributes, *};

    #[test]
    fn a_flow_is_told_by_protocol_and_destination_port() {
        let tuple = |protocol: u8, port: u16| {
            let mut tuple = Attributes::default();
            tuple.nest(2, |inner| {
                inner.put(1, &[protocol]).put(2, &4000_u16.to_be_bytes()).put(3, &port.to_be_bytes());
            });
            tuple.0
        };
        let ports = BTreeSet::from([53]);
        assert!(is_meant(&tuple(17, 53), &ports));
        assert!(!is_meant(&tuple(6, 53), &ports));
        assert!(!is_meant(&tuple(17, 54), &ports));
        assert!(!is_meant(&[], &ports));
    }
}
