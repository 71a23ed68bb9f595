//! Rules of routing: what chooses routes by more than their destination, which packets past the stack know nothing of.

use anyhow::{Context, Result};
use futures::TryStreamExt;
use netlink_packet_route::{
    route::RouteHeader,
    rule::{RuleAttribute, RuleMessage},
};
use rtnetlink::{Handle, IpVersion};

use super::network::code;

/// Linux' EAFNOSUPPORT and EOPNOTSUPP.
const NO_SUCH_FAMILY: i32 = -97;
const NOT_SUPPORTED: i32 = -95;

/// Whether there are rules besides the three that every machine has.
pub(super) async fn has_others(handle: &Handle) -> Result<bool> {
    for version in [IpVersion::V4, IpVersion::V6] {
        let listed: Result<Vec<RuleMessage>, _> = handle.rule().get(version).execute().try_collect().await;
        let rules = match listed {
            // A kernel without this family, or without rules.
            Err(error) if matches!(code(&error), Some(NO_SUCH_FAMILY | NOT_SUPPORTED)) => continue,
            listed => listed.context("list the rules of routing")?,
        };
        if !rules.iter().all(is_usual) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether a rule of routing is one of those that every machine has, by its place and where it leads.
fn is_usual(rule: &RuleMessage) -> bool {
    /// `RT_TABLE_LOCAL`, `RT_TABLE_MAIN` and `RT_TABLE_DEFAULT`, each with its priority.
    const USUAL: [(u32, u8); 3] = [(0, 255), (32766, RouteHeader::RT_TABLE_MAIN), (32767, 253)];
    let priority = rule.attributes.iter().find_map(|attribute| match attribute {
        RuleAttribute::Priority(priority) => Some(*priority),
        _ => None,
    });
    // Without the attribute it is 0.
    USUAL.contains(&(priority.unwrap_or_default(), rule.header.table))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_between_the_usual_ones_is_told() {
        let rule = |table: u8, priority: Option<u32>| {
            let mut rule = RuleMessage::default();
            rule.header.table = table;
            rule.attributes.extend(priority.map(RuleAttribute::Priority));
            rule
        };
        for usual in [rule(255, None), rule(254, Some(32766)), rule(253, Some(32767))] {
            assert!(is_usual(&usual), "{usual:?}");
        }
        for other in [rule(254, Some(100)), rule(100, Some(32766)), rule(254, None)] {
            assert!(!is_usual(&other), "{other:?}");
        }
    }
}
