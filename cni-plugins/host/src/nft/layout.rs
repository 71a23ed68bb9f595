//! The table: its sets, maps, chains and rules. Made, or brought to this form, in the transaction of the first change that
//! finds something missing.
//!
//! | object | what |
//! |---|---|
//! | `ports` | protocol and port of every mapped host port; what is not in it costs one lookup |
//! | `map4`, `map6` | host port on any address → pod address and port |
//! | `map4_ip`, `map6_ip` | host port on one address → the same |
//! | `pod_links` | links behind which mapped pods are: what comes from there to a host port is masqueraded |
//! | `masq4`, `masq6` | pod address → chain that holds its network's exclusions |
//!
//! A connection of the node to `::1` needs more than one to `127.0.0.1`: the kernel takes in no packet for `::1` that comes
//! over a link, and has no switch for it. So before connection tracking sees its packets, their source becomes
//! [`STAND_IN`], an address of this host that is never on any link; then they are rewritten as all others are. An answer is
//! for the stand-in until it has been routed to this host, and for `::1` again (chain `loopback_in`) before a socket is
//! looked for. Only what connection tracking has given the source `::1` gets there.

use std::net::Ipv6Addr;

use super::{
    TABLE,
    expression::{Family, Meta, Rule},
    wire::{Message, flag, kind},
};

/// Sets and maps.
pub(super) const PORTS: &str = "ports";
pub(super) const POD_LINKS: &str = "pod_links";

/// The map of host ports of a family; with or without host address in the key.
pub(super) fn port_map(family: Family, with_address: bool) -> &'static str {
    match (family, with_address) {
        (Family::V4, false) => "map4",
        (Family::V4, true) => "map4_ip",
        (Family::V6, false) => "map6",
        (Family::V6, true) => "map6_ip",
    }
}

/// The map of masqueraded addresses.
pub(super) fn masquerade_map(family: Family) -> &'static str {
    match family {
        Family::V4 => "masq4",
        Family::V6 => "masq6",
    }
}

/// Stands for `::1` while a packet is between the node and a pod. A unique local address (`fd`, `kelson`).
pub(super) const STAND_IN: Ipv6Addr = Ipv6Addr::new(0xfd6b, 0x656c, 0x736f, 0x6e00, 0, 0, 0, 1);
/// The bit that asks for masquerade behind a host port; the reference plugin uses the same.
const MARK: u32 = 0x2000;
/// Chains.
const HOST_PORTS: &str = "host_ports";
/// The data types of `nft`, by which it shows sets to people.
mod shown {
    pub(super) const ADDRESS4: u32 = 7;
    pub(super) const ADDRESS6: u32 = 8;
    pub(super) const PROTOCOL: u32 = 12;
    pub(super) const PORT: u32 = 13;
    pub(super) const LINK: u32 = 41;
    /// `NFT_DATA_VERDICT`.
    pub(super) const VERDICT: u32 = 0xffff_ff00;

    /// A concatenation.
    pub(super) fn of(types: &[u32]) -> u32 {
        types.iter().fold(0, |all, one| all << 6 | one)
    }
}

/// The messages that bring the table to its form; they may be sent again at any time and change nothing then.
pub(super) fn messages() -> Vec<Message> {
    let mut all = vec![new_table()];
    all.extend(sets());
    all.extend(chains());
    all.extend(rules());
    all
}

fn new_table() -> Message {
    let mut message = Message::nft(kind::NEW_TABLE, flag::CREATE);
    message.body.text(1, TABLE);
    message
}

/// Deletes the table with all that is in it.
pub(super) fn delete_table() -> Message {
    let mut message = Message::nft(kind::DEL_TABLE, 0);
    message.body.text(1, TABLE);
    message
}

fn sets() -> Vec<Message> {
    use shown::{ADDRESS4, ADDRESS6, LINK, PORT, PROTOCOL, VERDICT};
    let key = shown::of(&[PROTOCOL, PORT]);
    let (to4, to6) = ((shown::of(&[ADDRESS4, PORT]), 8), (shown::of(&[ADDRESS6, PORT]), 20));
    [
        (PORTS, key, 8, None),
        (POD_LINKS, LINK, 16, None),
        ("map4", key, 8, Some(to4)),
        ("map6", key, 8, Some(to6)),
        ("map4_ip", shown::of(&[PROTOCOL, ADDRESS4, PORT]), 12, Some(to4)),
        ("map6_ip", shown::of(&[PROTOCOL, ADDRESS6, PORT]), 24, Some(to6)),
        ("masq4", ADDRESS4, 4, Some((VERDICT, 0))),
        ("masq6", ADDRESS6, 16, Some((VERDICT, 0))),
    ]
    .into_iter()
    .enumerate()
    .map(|(index, (name, key_type, key_length, data))| {
        let mut message = Message::nft(kind::NEW_SET, flag::CREATE);
        // `NFT_SET_MAP`.
        let flags = if data.is_some() { 8 } else { 0 };
        message.body.text(1, TABLE).text(2, name).be32(3, flags).be32(4, key_type).be32(5, key_length);
        if let Some((data_type, length)) = data {
            message.body.be32(6, data_type);
            if length > 0 {
                message.body.be32(7, length);
            }
        }
        message.body.be32(10, u32::try_from(index + 1).unwrap_or_default());
        message
    })
    .collect()
}

/// The chains, empty.
fn chains() -> Vec<Message> {
    // Hook numbers of linux/netfilter.h, priorities of linux/netfilter_ipv4.h: before connection tracking (-200),
    // destination NAT, source NAT, and behind that.
    let hooked = [
        ("guard", "filter", 0, -300),
        ("loopback_out", "route", 3, -250),
        ("loopback_in", "filter", 1, 150),
        ("prerouting", "nat", 0, -100),
        ("output", "nat", 3, -100),
        ("postrouting", "nat", 4, 100),
    ];
    let mut all: Vec<Message> = hooked
        .into_iter()
        .map(|(name, kind_of, hook, priority)| {
            let mut message = new_chain(name);
            message.body.nest(4, |inner| {
                inner.be32(1, hook).be32(2, i32::cast_unsigned(priority));
            });
            message.body.text(7, kind_of);
            message
        })
        .collect();
    all.push(new_chain(HOST_PORTS));
    let names = hooked.iter().map(|hooked| hooked.0).chain([HOST_PORTS]);
    all.extend(names.map(flush_chain));
    all
}

/// Makes a chain that no hook calls; one that is there stays.
pub(super) fn new_chain(name: &str) -> Message {
    let mut message = Message::nft(kind::NEW_CHAIN, flag::CREATE);
    message.body.text(1, TABLE).text(3, name);
    message
}

/// Deletes a chain and its rules; the kernel refuses it while a map leads there.
pub(super) fn delete_chain(name: &str) -> Message {
    let mut message = Message::nft(kind::DEL_CHAIN, 0);
    message.body.text(1, TABLE).text(3, name);
    message
}

/// Takes a chain's rules away.
pub(super) fn flush_chain(name: &str) -> Message {
    let mut message = Message::nft(kind::DEL_RULE, 0);
    message.body.text(1, TABLE).text(2, name);
    message
}

fn rules() -> Vec<Message> {
    let loopback = [b"lo".as_slice(), &[0; 14]].concat();
    let mapped = || Rule::default().meta(0, Meta::Protocol).destination_port(1).in_set(PORTS).for_this_host();
    let protocol_of = |family| Rule::default().family(family).meta(0, Meta::Protocol);
    let mut all = Vec::new();
    // Host ports reach 127.0.0.1 by `route_localnet` on the pods' link; what it opens besides is closed here.
    for from in [true, false] {
        let rule = Rule::default().family(Family::V4).meta(0, Meta::InputName).compare(0, false, &loopback);
        let rule = if from { rule.source(0, Family::V4) } else { rule.destination(0, Family::V4) };
        all.push(rule.in_subnet(&[127, 0, 0, 0], 8).drop_packet().append_to("guard"));
    }
    all.extend(loopback_v6(&loopback));
    all.push(mapped().jump(HOST_PORTS).append_to("prerouting"));
    all.push(mapped().jump(HOST_PORTS).append_to("output"));
    // The pod's answer must come back through here: from its own link it would go to the client directly, and 127.0.0.1
    // and ::1 have no way back at all.
    let marks = [
        Rule::default().meta(0, Meta::InputName).in_set(POD_LINKS),
        Rule::default().family(Family::V4).source(0, Family::V4).in_subnet(&[127, 0, 0, 0], 8),
        Rule::default().family(Family::V6).source(0, Family::V6).compare(0, true, &STAND_IN.octets()),
    ];
    all.extend(marks.map(|rule| rule.set_mark_bits(MARK).append_to(HOST_PORTS)));
    for family in [Family::V4, Family::V6] {
        let port = 1 + family.length() / 4;
        let exact = protocol_of(family).destination(1, family).destination_port(port);
        all.push(exact.rewrite_by(port_map(family, true), family).append_to(HOST_PORTS));
        let any = protocol_of(family).destination_port(1);
        all.push(any.rewrite_by(port_map(family, false), family).append_to(HOST_PORTS));
    }
    all.push(Rule::default().marked(MARK).destination_rewritten().masquerade().append_to("postrouting"));
    for family in [Family::V4, Family::V6] {
        let rule = Rule::default().family(family).source(0, family).verdict_of(masquerade_map(family));
        all.push(rule.append_to("postrouting"));
    }
    all
}

/// What connections to `::1` need besides, see the module.
fn loopback_v6(loopback: &[u8]) -> Vec<Message> {
    const V6: Family = Family::V6;
    let (own, stand_in) = (Ipv6Addr::LOCALHOST.octets(), STAND_IN.octets());
    let from_here = || {
        let here = Rule::default().family(V6).source(0, V6).compare(0, true, &own);
        here.destination(0, V6).compare(0, true, &own).meta(0, Meta::Protocol)
    };
    let by_address = from_here().destination(1, V6).destination_port(5).translate(port_map(V6, true));
    let by_port = from_here().destination_port(1).translate(port_map(V6, false));
    let to_stand_in = || Rule::default().family(V6).destination(0, V6).compare(0, true, &stand_in);
    let from_outside = to_stand_in().meta(0, Meta::InputName).compare(0, false, loopback);
    let answer = to_stand_in().source(0, V6).compare(0, true, &own);
    vec![
        from_outside.drop_packet().append_to("guard"),
        by_address.put(0, &stand_in).overwrite_source(0, V6).append_to("loopback_out"),
        by_port.put(0, &stand_in).overwrite_source(0, V6).append_to("loopback_out"),
        answer.put(0, &own).overwrite_destination(0, V6).append_to("loopback_in"),
    ]
}
