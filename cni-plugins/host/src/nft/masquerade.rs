//! Masquerade of what pods send to the outside: one map element per pod address, whose verdict is the chain with the
//! exclusions of the pod's network.
//!
//! A chain's name tells its content, so it never changes: pods of an edited network use another one, and a chain goes with
//! the last pod that used it.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
};

use cni_plugins_types::IpNet;
use nix::errno::Errno;

use super::{
    NftError, Owner, TABLE,
    attributes::{find, read},
    comment,
    expression::{Family, JUMP, Rule, put_verdict},
    fnv1a, is_absent, layout, network_prefix,
    wire::{Message, Socket, flag, kind},
};

/// Never masqueraded, whatever is configured: multicast and link-local.
const ALWAYS_EXCEPT: [&str; 4] = ["224.0.0.0/4", "169.254.0.0/16", "ff00::/8", "fe80::/10"];

/// Masquerades what `addresses` send, but not to their own subnets, to `except`, to multicast and link-local addresses.
/// May be repeated; an element that an earlier owner left is taken over.
pub fn add(owner: &Owner<'_>, addresses: &[IpNet], except: &[IpNet]) -> Result<(), NftError> {
    if addresses.is_empty() {
        return Ok(());
    }
    let run = || -> io::Result<()> {
        let mut socket = open()?;
        let by_subnet = chains(addresses, except);
        let comment = owner.comment();
        let elements = |flags: u16| -> Vec<Message> {
            let chain = |address: &IpNet| by_subnet.get(&subnet_of(address)).map(|chain| chain.name.as_str());
            addresses.iter().map(|address| element(flags, address.addr(), chain(address), &comment)).collect()
        };
        let chains = by_subnet.values();
        let fresh = elements(flag::CREATE | flag::EXCL);
        let mut outcome = socket.commit(&fresh);
        if outcome.as_ref().is_err_and(is_absent) {
            // The first pod with these exclusions: the table is there in most cases.
            let mut all: Vec<Message> = chains.clone().flat_map(Chain::messages).collect();
            all.extend(fresh.iter().cloned());
            outcome = socket.commit(&all);
        }
        if outcome.as_ref().is_err_and(is_absent) {
            let mut all = layout::messages();
            all.extend(chains.clone().flat_map(Chain::messages));
            all.extend(fresh.iter().cloned());
            outcome = socket.commit(&all);
        }
        match outcome {
            Err(error) if error.raw_os_error() == Some(Errno::EEXIST as i32) => {
                let held = list(&mut socket)?;
                let mut all = layout::messages();
                all.extend(chains.flat_map(Chain::messages));
                let wanted: BTreeSet<IpAddr> = addresses.iter().map(IpNet::addr).collect();
                let ours = |one: &&Element| wanted.contains(&one.address);
                all.extend(held.iter().filter(ours).map(Element::delete));
                all.extend(fresh);
                socket.commit(&all)
            }
            other => other,
        }
    };
    run().map_err(|source| NftError::new(format!("masquerade {}", shown(addresses)), source))
}

/// Ends the masquerade of an attachment's addresses; tells whether there was any.
pub fn remove(owner: &Owner<'_>) -> Result<bool, NftError> {
    let comment = owner.comment();
    remove_those(|element| element.comment == comment)
        .map(|count| count > 0)
        .map_err(|source| NftError::new("end the masquerade", source))
}

/// Whether all of `addresses` are masqueraded with these exclusions. An address alone (`/32`, `/128`) may have been added
/// with the prefix of any subnet: pods with a link of their own do not know theirs.
pub fn check(owner: &Owner<'_>, addresses: &[IpNet], except: &[IpNet]) -> Result<bool, NftError> {
    let comment = owner.comment();
    let held = open()
        .and_then(|mut socket| list(&mut socket))
        .map_err(|source| NftError::new("list masqueraded addresses", source))?;
    let held: BTreeMap<IpAddr, &str> = held
        .iter()
        .filter(|one| one.comment == comment)
        .map(|one| (one.address, one.chain.as_str()))
        .collect();
    Ok(addresses.iter().all(|address| {
        held.get(&address.addr())
            .is_some_and(|held| possible_chains(address, except).any(|chain| *held == chain))
    }))
}

/// What an attachment is to have.
#[derive(Debug, Clone)]
pub struct Wanted<'a> {
    /// The attachment.
    pub owner: Owner<'a>,
    /// Its addresses.
    pub addresses: Vec<IpNet>,
    /// Destinations that see them.
    pub except: Vec<IpNet>,
}

/// Brings back what somebody else took away, as `nft flush ruleset` does. An address that has an element stays as it is: it
/// may have been given to another.
pub fn restore(all: &[Wanted<'_>]) -> Result<(), NftError> {
    let held: BTreeSet<IpAddr> = open()
        .and_then(|mut socket| list(&mut socket))
        .map_err(|source| NftError::new("list masqueraded addresses", source))?
        .into_iter()
        .map(|element| element.address)
        .collect();
    all.iter().try_for_each(|one| {
        let is_lost = |address: &&IpNet| !held.contains(&address.addr());
        let lost: Vec<IpNet> = one.addresses.iter().filter(is_lost).copied().collect();
        add(&one.owner, &lost, &one.except)
    })
}

/// Ends the masquerade of a network's attachments other than the valid ones (container id, interface), and takes away every
/// chain that nothing leads to; tells of how many addresses.
pub fn gc(network: &str, valid: &[(String, String)]) -> Result<usize, NftError> {
    let prefix = network_prefix(network);
    let kept: BTreeSet<String> = valid
        .iter()
        .map(|(container_id, ifname)| Owner { network, container_id, ifname }.comment())
        .collect();
    remove_those(|element| element.comment.starts_with(&prefix) && !kept.contains(&element.comment))
        .and_then(|count| remove_unused_chains().map(|()| count))
        .map_err(|source| NftError::new("end stale masquerades", source))
}

/// One element of a map.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Element {
    address: IpAddr,
    chain: String,
    comment: String,
}

impl Element {
    fn delete(&self) -> Message {
        element(0, self.address, None, "")
    }
}

/// The exclusions of a network.
struct Chain {
    name: String,
    family: Family,
    except: Vec<IpNet>,
}

impl Chain {
    fn of(address: &IpNet, except: &[IpNet]) -> Self {
        let family = family_of(address.addr());
        let always = ALWAYS_EXCEPT.iter().filter_map(|text| text.parse::<IpNet>().ok());
        let own = IpNet::new(address.network(), address.prefix_len());
        let all: BTreeSet<IpNet> = always
            .chain(own)
            .chain(except.iter().filter_map(|net| IpNet::new(net.network(), net.prefix_len())))
            .filter(|net| family_of(net.addr()) == family)
            .collect();
        let except: Vec<IpNet> = all.into_iter().collect();
        let name = format!("{}_{:016x}", layout::masquerade_map(family), fnv1a(shown(&except).as_bytes()));
        Self { name, family, except }
    }

    /// Makes it; where it is there, nothing changes.
    fn messages(&self) -> Vec<Message> {
        let mut all = vec![layout::new_chain(&self.name), layout::flush_chain(&self.name)];
        let begin = || Rule::default().family(self.family).destination(0, self.family);
        for net in &self.except {
            let network = octets(net.addr());
            all.push(begin().in_subnet(&network, net.prefix_len()).back().append_to(&self.name));
        }
        all.push(Rule::default().masquerade().append_to(&self.name));
        all
    }
}

/// The chains of some addresses. Those of one subnet share theirs, which is computed and made once: the kernel goes through a
/// chain's rules each time that it is emptied.
fn chains(addresses: &[IpNet], except: &[IpNet]) -> BTreeMap<(IpAddr, u8), Chain> {
    let mut chains = BTreeMap::new();
    for address in addresses {
        chains.entry(subnet_of(address)).or_insert_with(|| Chain::of(address, except));
    }
    chains
}

fn subnet_of(address: &IpNet) -> (IpAddr, u8) {
    (address.network(), address.prefix_len())
}

/// The chains that an address may have been added with, the most likely first.
fn possible_chains(address: &IpNet, except: &[IpNet]) -> impl Iterator<Item = String> {
    let addr = address.addr();
    let least =
        if address.prefix_len() == if addr.is_ipv4() { 32 } else { 128 } { 0 } else { address.prefix_len() };
    (least..=address.prefix_len())
        .rev()
        .filter_map(move |length| IpNet::new(addr, length))
        .map(|net| Chain::of(&net, except).name)
}

fn open() -> io::Result<Socket> {
    Socket::open().map_err(|error| error.source)
}

/// Removes elements, and in the same transaction the chains that only they led to.
fn remove_those(is_meant: impl Fn(&Element) -> bool) -> io::Result<usize> {
    let mut socket = open()?;
    loop {
        let (meant, rest): (Vec<Element>, Vec<Element>) =
            list(&mut socket)?.into_iter().partition(|one| is_meant(one));
        if meant.is_empty() {
            return Ok(0);
        }
        let elements: Vec<Message> = meant.iter().map(Element::delete).collect();
        let used: BTreeSet<&str> = rest.iter().map(|one| one.chain.as_str()).collect();
        let chains: BTreeSet<&str> = meant.iter().map(|one| one.chain.as_str()).collect();
        let mut all = elements.clone();
        all.extend(chains.difference(&used).map(|chain| layout::delete_chain(chain)));
        let outcome = match socket.commit(&all) {
            // Another pod has come to use one of them in between.
            Err(error) if is_in_use(&error) => socket.commit(&elements),
            other => other,
        };
        match outcome {
            // Somebody else took one of them away in between.
            Err(error) if is_absent(&error) => {}
            other => return other.map(|()| meant.len()),
        }
    }
}

/// Removes the chains of exclusions that no element leads to: a killed call, or an earlier version, left them.
fn remove_unused_chains() -> io::Result<()> {
    let mut socket = open()?;
    let used: BTreeSet<String> = list(&mut socket)?.into_iter().map(|one| one.chain).collect();
    let objects = socket.dump(&Message::nft(kind::GET_CHAIN, 0))?;
    let unused: Vec<String> = objects
        .iter()
        .filter(|object| find(object, 1).map(comment::text).as_deref() == Some(TABLE))
        .filter_map(|object| find(object, 3).map(comment::text))
        .filter(|name| is_of_exclusions(name) && !used.contains(name))
        .collect();
    for name in unused {
        match socket.commit(&[layout::delete_chain(&name)]) {
            // Used again, or gone, in between.
            Err(error) if is_in_use(&error) || is_absent(&error) => {}
            other => other?,
        }
    }
    Ok(())
}

/// Whether a chain has a name such as [`Chain::of`] gives.
fn is_of_exclusions(name: &str) -> bool {
    [Family::V4, Family::V6].into_iter().any(|family| {
        let rest = name.strip_prefix(layout::masquerade_map(family)).and_then(|rest| rest.strip_prefix('_'));
        rest.is_some_and(|hash| hash.len() == 16 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()))
    })
}

fn is_in_use(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::EBUSY as i32)
}

/// All elements of both maps; none when the table is not there.
fn list(socket: &mut Socket) -> io::Result<Vec<Element>> {
    let mut all = Vec::new();
    for family in [Family::V4, Family::V6] {
        let mut message = Message::nft(kind::GET_ELEMENTS, 0);
        message.body.text(1, TABLE).text(2, layout::masquerade_map(family));
        let objects = match socket.dump(&message) {
            Err(error) if is_absent(&error) => return Ok(Vec::new()),
            other => other?,
        };
        for object in objects {
            let elements = find(&object, 3).unwrap_or_default();
            all.extend(read(elements).filter_map(|(_, one)| parse(one)));
        }
    }
    Ok(all)
}

fn parse(element: &[u8]) -> Option<Element> {
    let key = find(find(element, 1)?, 1)?;
    let address = match key.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(key).ok()?),
        _ => IpAddr::from(<[u8; 16]>::try_from(key).ok()?),
    };
    let verdict = find(element, 2).and_then(|data| find(data, 2)).unwrap_or_default();
    let chain = find(verdict, 2).map(comment::text).unwrap_or_default();
    Some(Element { address, chain, comment: comment::read(element) })
}

fn element(flags: u16, address: IpAddr, chain: Option<&str>, comment: &str) -> Message {
    let adds = flags & flag::CREATE != 0;
    let mut message = Message::nft(if adds { kind::NEW_ELEMENTS } else { kind::DEL_ELEMENTS }, flags);
    message.body.text(1, TABLE).text(2, layout::masquerade_map(family_of(address)));
    message.body.nest(3, |list| {
        list.nest(1, |element| {
            super::expression::value(element, 1, &octets(address));
            if let Some(chain) = chain {
                element.nest(2, |data| put_verdict(data, JUMP, Some(chain)));
                comment::put(element, comment);
            }
        });
    });
    message
}

fn family_of(address: IpAddr) -> Family {
    if address.is_ipv4() { Family::V4 } else { Family::V6 }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn shown(all: &[IpNet]) -> String {
    all.iter().map(IpNet::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::{super::attributes::Attributes, *};

    #[test]
    fn a_chains_name_tells_its_exclusions() {
        let address = |text: &str| text.parse::<IpNet>().unwrap();
        let one = Chain::of(&address("10.1.2.3/24"), &[address("10.0.0.0/8"), address("fd00::/8")]);
        let same = Chain::of(&address("10.1.2.99/24"), &[address("fd00::/8"), address("10.0.0.0/8")]);
        let other = Chain::of(&address("10.1.2.3/24"), &[]);
        assert_eq!(one.name, same.name);
        assert_ne!(one.name, other.name);
        assert!(one.name.len() < 32);
        assert!(is_of_exclusions(&one.name) && is_of_exclusions(&other.name));
        assert!(
            !is_of_exclusions("masq4") && !is_of_exclusions("masq4_mine") && !is_of_exclusions("postrouting")
        );
        let shown = shown(&one.except);
        assert_eq!(shown, "10.0.0.0/8, 10.1.2.0/24, 169.254.0.0/16, 224.0.0.0/4");
    }

    #[test]
    fn many_addresses_of_a_subnet_have_one_chain() {
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        let of_one = (0..=255).map(|host| net(&format!("10.1.2.{host}/24")));
        let all: Vec<IpNet> = of_one.chain([net("10.1.2.3/25"), net("fd00::1/64")]).collect();
        let made = chains(&all, &[]);
        assert_eq!(made.len(), 3);
        for address in &all {
            assert_eq!(made[&subnet_of(address)].name, Chain::of(address, &[]).name);
        }
    }

    #[test]
    fn an_address_alone_is_found_whatever_its_subnet_was() {
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        let except = [net("10.0.0.0/8")];
        let made_with = Chain::of(&net("192.168.3.7/22"), &except).name;
        assert!(possible_chains(&net("192.168.3.7/32"), &except).any(|chain| chain == made_with));
        assert!(!possible_chains(&net("192.168.3.7/32"), &[]).any(|chain| chain == made_with));
        assert!(!possible_chains(&net("192.168.3.7/24"), &except).any(|chain| chain == made_with));
    }

    #[test]
    fn an_element_is_read_back() {
        let mut element = Attributes::default();
        super::super::expression::value(&mut element, 1, &[10, 1, 2, 3]);
        element.nest(2, |data| put_verdict(data, JUMP, Some("masq4_1")));
        comment::put(&mut element, "net/c1/eth0");
        let found = parse(&element.0).unwrap();
        assert_eq!(found.address.to_string(), "10.1.2.3");
        assert_eq!((found.chain.as_str(), found.comment.as_str()), ("masq4_1", "net/c1/eth0"));
    }
}
