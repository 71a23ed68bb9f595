//! What a Service's annotations say about how clients outside are spread and served. Pure.
//!
//! | annotation | value |
//! |---|---|
//! | `service.keelson.io/algorithm` | `maglev`: consistent hashing, the same on every node; `random` (default) |
//! | `service.keelson.io/forwarding` | `dsr`: endpoints on other nodes answer their clients directly; `snat` (default) |
//! | `service.keelson.io/weights` | shares of endpoints by node name or address, others have 1: `node-a=3, 10.244.1.7=0` |

use std::{collections::BTreeMap, net::IpAddr};

const ALGORITHM: &str = "service.keelson.io/algorithm";
const FORWARDING: &str = "service.keelson.io/forwarding";
const WEIGHTS: &str = "service.keelson.io/weights";
/// More would only make tables slower to build.
const HEAVIEST: u16 = 1000;

/// The choices.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Choices {
    /// Consistent hashing.
    pub(super) consistent: bool,
    /// Endpoints answer clients directly.
    pub(super) direct: bool,
    /// Shares by address.
    pub(super) by_address: BTreeMap<IpAddr, u16>,
    /// Shares by a node's name, as [`name_hash`] has it.
    pub(super) by_node: BTreeMap<u32, u16>,
}

impl Choices {
    /// Reads them; what makes no sense is told.
    pub(super) fn read(annotations: Option<&BTreeMap<String, String>>, problems: &mut Vec<String>) -> Self {
        let mut choices = Self::default();
        let Some(annotations) = annotations else {
            return choices;
        };
        let mut wrong = |name: &str, text: &str, expected: &str| {
            problems.push(format!("metadata.annotations[{name}]: {text:?} is not {expected}"));
        };
        match annotations.get(ALGORITHM).map(String::as_str) {
            None | Some("random") => {}
            Some("maglev") => choices.consistent = true,
            Some(other) => wrong(ALGORITHM, other, "maglev or random"),
        }
        match annotations.get(FORWARDING).map(String::as_str) {
            None | Some("snat") => {}
            // Every node must choose the same endpoint.
            Some("dsr") => (choices.direct, choices.consistent) = (true, true),
            Some(other) => wrong(FORWARDING, other, "dsr or snat"),
        }
        let weights = annotations.get(WEIGHTS).map(String::as_str).unwrap_or_default();
        for part in weights.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let share = part.split_once('=').and_then(|(whose, share)| {
                let share = share.trim().parse::<u16>().ok().filter(|share| *share <= HEAVIEST)?;
                Some((whose.trim(), share)).filter(|(whose, _)| !whose.is_empty())
            });
            let Some((whose, share)) = share else {
                wrong(WEIGHTS, part, "like node-a=3 or 10.244.1.7=0, with a number up to 1000");
                continue;
            };
            match whose.parse() {
                Ok(address) => drop(choices.by_address.insert(address, share)),
                Err(_) => drop(choices.by_node.insert(name_hash(whose), share)),
            }
        }
        if !(choices.consistent || choices.by_address.is_empty() && choices.by_node.is_empty()) {
            problems.push(format!(
                "metadata.annotations[{WEIGHTS}]: weights need {ALGORITHM}: maglev, and are not followed"
            ));
        }
        choices
    }

    /// The share of an endpoint; nothing where it is 1.
    pub(super) fn weight(&self, address: IpAddr, node: u32) -> Option<u16> {
        let share = self.by_address.get(&address).or_else(|| self.by_node.get(&node));
        share.copied().filter(|share| *share != 1)
    }
}

/// A node's name in four bytes, since every endpoint has one: FNV-1a.
pub(super) fn name_hash(name: &str) -> u32 {
    name.bytes().fold(0x811c_9dc5, |state, byte| (state ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> (Choices, Vec<String>) {
        let annotations =
            pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let mut problems = Vec::new();
        (Choices::read(Some(&annotations), &mut problems), problems)
    }

    #[test]
    fn annotations_are_read() {
        let (choices, problems) = read(&[(FORWARDING, "dsr"), (WEIGHTS, "node-a=3, 10.244.1.7 = 0,")]);
        assert_eq!(problems, Vec::<String>::new());
        assert!(choices.direct && choices.consistent, "direct answers need the same choice everywhere");
        assert_eq!(choices.weight([10, 244, 1, 7].into(), name_hash("node-a")), Some(0), "an address wins");
        assert_eq!(choices.weight([10, 244, 1, 8].into(), name_hash("node-a")), Some(3));
        assert_eq!(choices.weight([10, 244, 1, 8].into(), name_hash("node-b")), None);
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let (choices, problems) =
            read(&[(ALGORITHM, "best"), (FORWARDING, "x"), (WEIGHTS, "a=1001,=3,b,c=2")]);
        assert_eq!((choices.consistent, choices.direct), (false, false));
        let all = problems.join("\n");
        for part in ["\"best\" is not maglev", "\"x\" is not dsr", "\"a=1001\"", "\"=3\"", "\"b\"", "need"] {
            assert!(all.contains(part), "{part} is not in:\n{all}");
        }
    }
}
