//! Links, addresses, routes, queueing disciplines and WireGuard over netlink, in this network namespace or another.
//!
//! Input: names, indices and addresses. Output: [`Link`]s and done changes; each failure names the
//! step and carries the kernel's errno and words. Changes are [`Step`]s, and several go to the kernel in
//! one system call ([`Netlink::run`]). The socket of [`Netlink::open_in`] is made inside the other
//! namespace and used from here, so no thread has to stay there.
//!
//! Everything blocks: the callers are processes that live for milliseconds. Knows nothing of bridges'
//! purpose or of pods; that is with the plugins.

mod address;
pub mod codec;
mod link;
mod neighbour;
mod option;
mod port;
mod qdisc;
mod route;
pub mod socket;
pub mod wireguard;

use std::{cell::RefCell, io, path::Path};

use nix::{errno::Errno, sys::socket::SockProtocol};

use self::{
    codec::Message,
    socket::{Socket, errno_of},
};
pub use self::{
    link::{BridgeSpec, Link, LinkChange, LinkRef, VethPair},
    port::{PortOptions, PortState, VlanRange},
    qdisc::{Qdisc, TokenBucket},
    route::RouteEntry,
};
use crate::netns::NetnsError;

/// A connection to one namespace's netlink.
#[derive(Debug)]
pub struct Netlink {
    socket: RefCell<Socket>,
}

/// One change or question, told in words for the error it may give.
#[derive(Debug)]
pub struct Step {
    what: String,
    message: Message,
    tolerated: Option<Errno>,
}

/// A failed netlink step.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The kernel refused.
    #[error("cannot {step}")]
    Request {
        /// What was tried, with its object.
        step: String,
        /// The kernel's errno and words.
        #[source]
        source: io::Error,
    },
    /// The other namespace could not be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
}

impl NetlinkError {
    /// Whether the kernel answered with `errno`.
    pub fn is(&self, errno: Errno) -> bool {
        self.errno() == Some(errno)
    }

    /// The kernel's errno.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            NetlinkError::Request { source, .. } => errno_of(source),
            NetlinkError::Netns(error) => errno_of(&error.source),
        }
    }
}

impl Step {
    /// A step of one message; `what` completes "cannot …".
    pub fn new(what: impl Into<String>, message: Message) -> Self {
        Self { what: what.into(), message, tolerated: None }
    }

    /// The same step, for which `errno` means that there is nothing to do.
    #[must_use]
    pub fn tolerating(mut self, errno: Errno) -> Self {
        self.tolerated = Some(errno);
        self
    }
}

impl Netlink {
    /// Connects to the calling thread's namespace.
    pub fn open() -> Result<Self, NetlinkError> {
        Socket::open(SockProtocol::NetlinkRoute).map(Self::on).map_err(open_error)
    }

    /// Connects to the namespace at `path`.
    pub fn open_in(path: &Path) -> Result<Self, NetlinkError> {
        Socket::open_in(path, SockProtocol::NetlinkRoute)?.map(Self::on).map_err(open_error)
    }

    fn on(socket: Socket) -> Self {
        Self { socket: RefCell::new(socket) }
    }

    /// Sends all steps in one system call; returns each one's answer, or the first failure that is not
    /// tolerated. Later steps are carried out also when an earlier one failed.
    pub fn run(&self, steps: Vec<Step>) -> Result<Vec<Vec<Vec<u8>>>, NetlinkError> {
        let (messages, words): (Vec<_>, Vec<_>) =
            steps.into_iter().map(|step| (step.message, (step.what, step.tolerated))).unzip();
        if messages.is_empty() {
            return Ok(Vec::new());
        }
        let answers = self
            .socket
            .borrow_mut()
            .exchange(&messages)
            .map_err(|source| request_io(words[0].0.clone(), source))?;
        let outcome = answers.into_iter().zip(words).map(|(answer, (what, tolerated))| {
            if answer.error.is_some() && answer.errno() == tolerated {
                return Ok(Vec::new());
            }
            answer.result().map_err(|source| request_io(what, source))
        });
        outcome.collect()
    }

    /// Carries out one step; tells whether there was something to do.
    pub fn run_one(&self, step: Step) -> Result<bool, NetlinkError> {
        let tolerated = step.tolerated;
        match self.ask(Step { tolerated: None, ..step }) {
            Ok(_) => Ok(true),
            Err(error) if tolerated.is_some() && error.errno() == tolerated => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn ask(&self, step: Step) -> Result<Vec<Vec<u8>>, NetlinkError> {
        Ok(self.run(vec![step])?.pop().unwrap_or_default())
    }

    fn dump(&self, what: &str, message: &Message, each: impl FnMut(&[u8])) -> Result<(), NetlinkError> {
        let dumped = self.socket.borrow_mut().dump(message, each);
        dumped.map_err(|source| request_io(what.to_owned(), source))
    }
}

/// A hardware address as text, `0a:58:0a:f4:00:02`.
pub fn format_mac(mac: &[u8]) -> String {
    mac.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

/// A hardware address from text.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let byte = |part: &str| (part.len() == 2).then(|| u8::from_str_radix(part, 16).ok()).flatten();
    let bytes: Vec<u8> = text.split(':').map(byte).collect::<Option<_>>()?;
    bytes.try_into().ok()
}

fn open_error(source: io::Error) -> NetlinkError {
    request_io("open a netlink socket".to_owned(), source)
}

fn request_io(step: String, source: io::Error) -> NetlinkError {
    NetlinkError::Request { step, source }
}

/// `AF_INET` or `AF_INET6` as the byte of a family header.
fn family(addr: std::net::IpAddr) -> u8 {
    if addr.is_ipv4() { 2 } else { 10 }
}

fn octets(addr: std::net::IpAddr) -> Vec<u8> {
    match addr {
        std::net::IpAddr::V4(v4) => v4.octets().to_vec(),
        std::net::IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn address_from(bytes: &[u8]) -> Option<std::net::IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(std::net::IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(std::net::IpAddr::from),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_addresses_round_trip() {
        let mac = [0x0a, 0x58, 10, 244, 0, 2];
        assert_eq!(format_mac(&mac), "0a:58:0a:f4:00:02");
        assert_eq!(parse_mac("0a:58:0a:f4:00:02"), Some(mac));
        for text in ["", "0a:58", "0a:58:0a:f4:00:zz", "0a:58:0a:f4:00:02:03", "+a:58:0a:f4:00:2"] {
            assert_eq!(parse_mac(text), None, "{text}");
        }
    }
}
