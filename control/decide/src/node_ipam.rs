//! Pod address ranges for nodes: one subnet per family and node, never given twice.
//!
//! Input: the cluster's ranges and the ranges that nodes hold. Output: free subnets for one node. The
//! caller keeps what it has just written among the holdings until its cache shows it.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Node;
use thiserror::Error;

use crate::{cidr::Cidr, object};

/// A cluster range and the size of the subnets cut from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    /// The range of all pods of this family.
    pub range: Cidr,
    /// Prefix length of one node's part.
    pub node_prefix: u8,
}

/// The cluster range has no free subnet left.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("the pod range {range} has no free /{node_prefix} left")]
pub struct Exhausted {
    range: Cidr,
    node_prefix: u8,
}

/// What each node holds, by node name.
pub type Holdings = BTreeMap<String, Vec<Cidr>>;

/// The ranges a node holds; those that cannot be read are left out.
pub fn held_by(node: &Node) -> Vec<Cidr> {
    let Some(spec) = node.spec.as_ref() else { return Vec::new() };
    let listed = spec.pod_cidrs.iter().flatten().chain(spec.pod_cidr.as_ref());
    let mut ranges: Vec<Cidr> = listed.filter_map(|text| text.parse().ok()).collect();
    ranges.sort();
    ranges.dedup();
    ranges
}

/// The ranges to write into the node's spec; `None` when it has its ranges already. `holdings` must cover
/// all nodes, and what was allocated but is not in the cache yet.
pub fn allocate(node: &Node, pools: &[Pool], holdings: &Holdings) -> Result<Option<Vec<Cidr>>, Exhausted> {
    let spec = node.spec.as_ref();
    let has_range = spec.is_some_and(|spec| {
        spec.pod_cidr.as_ref().is_some_and(|range| !range.is_empty())
            || spec.pod_cidrs.as_ref().is_some_and(|ranges| !ranges.is_empty())
    });
    if has_range || pools.is_empty() || object::is_being_deleted(&node.metadata) {
        return Ok(None);
    }
    // A write of ours that the cache does not show yet is simply written again.
    if let Some(pending) = holdings.get(object::name(&node.metadata)).filter(|held| !held.is_empty()) {
        return Ok(Some(pending.clone()));
    }
    pools.iter().map(|pool| first_free(pool, holdings)).collect::<Result<_, _>>().map(Some)
}

fn first_free(pool: &Pool, holdings: &Holdings) -> Result<Cidr, Exhausted> {
    let held: Vec<&Cidr> = holdings.values().flatten().filter(|held| held.overlaps(&pool.range)).collect();
    pool.range
        .subnets(pool.node_prefix)
        .find(|candidate| !held.iter().any(|held| held.overlaps(candidate)))
        .ok_or(Exhausted { range: pool.range, node_prefix: pool.node_prefix })
}

#[cfg(test)]
mod tests {
    use k8s_openapi::{api::core::v1::NodeSpec, apimachinery::pkg::apis::meta::v1::ObjectMeta};

    use super::*;

    fn node(name: &str, range: Option<&str>) -> Node {
        Node {
            metadata: ObjectMeta { name: Some(name.into()), ..ObjectMeta::default() },
            spec: Some(NodeSpec { pod_cidr: range.map(str::to_owned), ..NodeSpec::default() }),
            status: None,
        }
    }

    fn pool(range: &str, node_prefix: u8) -> Pool {
        Pool { range: range.parse().expect("valid"), node_prefix }
    }

    #[test]
    fn nodes_get_distinct_ranges_until_none_is_left() {
        let pools = [pool("10.244.0.0/23", 24)];
        let mut holdings = Holdings::new();
        let taken = node("old", Some("10.244.0.0/24"));
        assert_eq!(allocate(&taken, &pools, &holdings), Ok(None), "already has one");
        holdings.insert("old".into(), held_by(&taken));
        let second = allocate(&node("new", None), &pools, &holdings).expect("one left").expect("needed");
        assert_eq!(second[0].to_string(), "10.244.1.0/24");
        holdings.insert("new".into(), second.clone());
        assert_eq!(allocate(&node("new", None), &pools, &holdings), Ok(Some(second)), "stable on retry");
        assert!(allocate(&node("third", None), &pools, &holdings).is_err());
        holdings.remove("old");
        let reused = allocate(&node("third", None), &pools, &holdings).expect("freed").expect("needed");
        assert_eq!(reused[0].to_string(), "10.244.0.0/24");
    }

    #[test]
    fn dual_stack_gives_one_range_per_family() {
        let pools = [pool("10.244.0.0/16", 24), pool("fd00::/48", 64)];
        let ranges = allocate(&node("a", None), &pools, &Holdings::new()).expect("free").expect("needed");
        let ranges: Vec<_> = ranges.iter().map(Cidr::to_string).collect();
        assert_eq!(ranges, ["10.244.0.0/24", "fd00::/64"]);
    }
}
