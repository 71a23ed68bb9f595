//! Lets packets with a mark pass stateful firewalls: for packets that were rewritten on both ways before connection
//! tracking saw them, and that would be packets of no connection to it.
//!
//! A table of its own, `inet keelson_untracked`, takes them out of connection tracking. Where `iptables` has a chain
//! `FORWARD` in nftables, they are accepted at its end: after everything that somebody wrote there, and before the chain's
//! policy. What `iptables-legacy` holds is out of reach here.

use std::io;

use super::{
    NftError,
    attributes::{Attributes, find, read},
    expression::{Meta, Rule},
    is_absent,
    wire::{INET, Message, Socket, flag, kind},
};

/// Name of the table.
pub const TABLE: &str = "keelson_untracked";
const CHAIN: &str = "prerouting";
/// Where `iptables` and `ip6tables` have what they forward by.
const THEIR_TABLE: &str = "filter";
const THEIR_CHAIN: &str = "FORWARD";
/// `NFPROTO_IPV4` and `NFPROTO_IPV6`.
const THEIR_FAMILIES: [u8; 2] = [2, 10];
/// What `meta` loads for the mark.
const MARK: u32 = Meta::Mark as u32;
/// `NF_ACCEPT`.
const ACCEPT: i32 = 1;

/// Makes packets that have this bit in their mark pass; changes nothing where they do.
pub fn pass(bit: u32) -> Result<(), NftError> {
    let mut socket = Socket::open()?;
    let made = is_made(&mut socket, bit).and_then(|made| if made { Ok(()) } else { make(&mut socket, bit) });
    made.map_err(|source| NftError::new(format!("make the table inet {TABLE}"), source))?;
    for family in THEIR_FAMILIES {
        let accepted = accept(&mut socket, family, bit);
        let family = if family == THEIR_FAMILIES[0] { "ip" } else { "ip6" };
        let step = || format!("accept at the end of {family} {THEIR_TABLE} {THEIR_CHAIN}");
        accepted.map_err(|source| NftError::new(step(), source))?;
    }
    Ok(())
}

/// Takes back what [`pass`] did; tells whether there was anything.
pub fn unpass(bit: u32) -> Result<bool, NftError> {
    let mut socket = Socket::open()?;
    let mut message = Message::nft(kind::DEL_TABLE, 0);
    message.body.text(1, TABLE);
    let mut any = match socket.commit(&[message]) {
        Ok(()) => true,
        Err(error) if is_absent(&error) => false,
        Err(source) => return Err(NftError::new(format!("delete the table inet {TABLE}"), source)),
    };
    for family in THEIR_FAMILIES {
        let removed = our_rules(&mut socket, family, bit).and_then(|handles| {
            let handles = handles.unwrap_or_default();
            let messages: Vec<Message> = handles.iter().map(|handle| delete(family, handle)).collect();
            if messages.is_empty() { Ok(false) } else { socket.commit(&messages).map(|()| true) }
        });
        any |= removed.map_err(|source| NftError::new("delete the rule of another table", source))?;
    }
    Ok(any)
}

/// Whether the table is there as [`make`] leaves it.
fn is_made(socket: &mut Socket, bit: u32) -> io::Result<bool> {
    let rules = rules(socket, INET, TABLE, CHAIN)?.unwrap_or_default();
    let wanted = Rule::default().marked(bit).untracked();
    Ok(rules.len() == 1 && rules.iter().any(|rule| names(rule) == names_of(&wanted.expressions().0)))
}

fn make(socket: &mut Socket, bit: u32) -> io::Result<()> {
    let mut table = Message::nft(kind::NEW_TABLE, flag::CREATE);
    table.body.text(1, TABLE);
    let mut chain = Message::nft(kind::NEW_CHAIN, flag::CREATE);
    chain.body.text(1, TABLE).text(3, CHAIN);
    // Where packets arrive, before connection tracking (-200).
    chain.body.nest(4, |hook| {
        hook.be32(1, 0).be32(2, i32::cast_unsigned(-300));
    });
    chain.body.text(7, "filter");
    let mut flush = Message::nft(kind::DEL_RULE, 0);
    flush.body.text(1, TABLE).text(2, CHAIN);
    let rule = Rule::default().marked(bit).untracked();
    socket.commit(&[table, chain, flush, new_rule(INET, TABLE, CHAIN, rule.expressions())])
}

/// Accepts at the end of another table's chain, where that is there.
fn accept(socket: &mut Socket, family: u8, bit: u32) -> io::Result<()> {
    if our_rules(socket, family, bit)?.is_none_or(|ours| !ours.is_empty()) {
        return Ok(());
    }
    // As `iptables` itself would write it, so that it goes on understanding its table.
    let rule = Rule::default().marked_by_iptables(bit).verdict_alone(ACCEPT);
    socket.commit(&[new_rule(family, THEIR_TABLE, THEIR_CHAIN, rule.expressions())])
}

fn new_rule(family: u8, table: &str, chain: &str, expressions: &Attributes) -> Message {
    let mut message = Message::nft_of(family, kind::NEW_RULE, flag::CREATE | flag::APPEND);
    message.body.text(1, table).text(2, chain).nest(4, |list| list.0.extend(&expressions.0));
    message
}

fn delete(family: u8, handle: &[u8]) -> Message {
    let mut message = Message::nft_of(family, kind::DEL_RULE, 0);
    message.body.text(1, THEIR_TABLE).text(2, THEIR_CHAIN).put(3, handle);
    message
}

/// Handles of our rules in the chain of `iptables`; nothing where there is no such chain.
fn our_rules(socket: &mut Socket, family: u8, bit: u32) -> io::Result<Option<Vec<Vec<u8>>>> {
    let Some(rules) = rules(socket, family, THEIR_TABLE, THEIR_CHAIN)? else {
        return Ok(None);
    };
    let ours = rules.iter().filter(|rule| is_ours(rule, bit));
    Ok(Some(ours.filter_map(|rule| Some(find(rule, 3)?.to_vec())).collect()))
}

/// The rules of a chain; nothing where that is not there.
fn rules(socket: &mut Socket, family: u8, table: &str, chain: &str) -> io::Result<Option<Vec<Vec<u8>>>> {
    let mut message = Message::nft_of(family, kind::GET_CHAIN, 0);
    message.body.text(1, table).text(3, chain);
    match socket.get(&message, 4) {
        Ok(_) => {}
        Err(error) if is_absent(&error) => return Ok(None),
        Err(error) => return Err(error),
    }
    let mut message = Message::nft_of(family, kind::GET_RULE, 0);
    message.body.text(1, table).text(2, chain);
    match socket.dump(&message) {
        Err(error) if is_absent(&error) => Ok(None),
        other => other.map(Some),
    }
}

/// The expressions of a rule that was listed.
fn names(rule: &[u8]) -> Vec<String> {
    names_of(find(rule, 4).unwrap_or_default())
}

fn names_of(expressions: &[u8]) -> Vec<String> {
    let names = read(expressions).filter_map(|(_, one)| find(one, 1));
    names.map(|name| String::from_utf8_lossy(name).trim_end_matches('\0').to_owned()).collect()
}

/// Whether a rule accepts what has our mark, in either of the forms that versions of `iptables` write.
fn is_ours(rule: &[u8], bit: u32) -> bool {
    let expressions = find(rule, 4).unwrap_or_default();
    let data = |name: &str| {
        let named = |one: &[u8]| find(one, 1).is_some_and(|found| found == [name.as_bytes(), &[0]].concat());
        read(expressions).find(|(_, one)| named(one)).and_then(|(_, one)| find(one, 2))
    };
    let accepts = data("immediate")
        .and_then(|data| find(find(find(data, 2)?, 2)?, 1))
        .is_some_and(|code| code == ACCEPT.to_be_bytes());
    let matched = data("match").and_then(|data| find(data, 3)?.get(..8));
    let compared = data("cmp").and_then(|data| find(find(data, 3)?, 1));
    let loaded = data("meta").and_then(|data| find(data, 2));
    let only = names_of(expressions).iter().all(|name| name != "payload" && name != "ct");
    let native = loaded == Some(&MARK.to_be_bytes()) && compared == Some(&bit.to_ne_bytes()) && only;
    accepts && (native || matched == Some(&Rule::mark_info(bit)[..8]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(rule: &Rule) -> Vec<u8> {
        let mut all = Attributes::default();
        all.nest(4, |list| list.0.extend(&rule.expressions().0));
        all.0
    }

    #[test]
    fn our_rule_is_known_in_both_forms_and_others_are_not_ours() {
        let ours = Rule::default().marked_by_iptables(0x1000).verdict_alone(ACCEPT);
        assert!(is_ours(&listed(&ours), 0x1000));
        assert!(!is_ours(&listed(&ours), 0x2000));
        let rewritten = Rule::default().meta(0, Meta::Mark).compare(0, true, &0x1000_u32.to_ne_bytes());
        assert!(is_ours(&listed(&rewritten.clone().verdict_alone(ACCEPT)), 0x1000));
        assert!(!is_ours(&listed(&rewritten.drop_packet()), 0x1000));
        assert!(!is_ours(&listed(&Rule::default().verdict_alone(ACCEPT)), 0x1000));
    }
}
