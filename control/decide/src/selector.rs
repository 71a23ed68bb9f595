//! Label selectors, node selectors and their requirements against labels.
//!
//! Input: selectors as API objects and label maps. Output: match or no match. An unreadable requirement
//! never matches, so that a malformed selector selects nothing rather than everything.

use k8s_openapi::{
    api::core::v1::{Node, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm},
    apimachinery::pkg::apis::meta::v1::LabelSelector,
};

use crate::object::{self, StringMap};

/// True when the selector has no requirement at all (upstream refuses to select with such a selector).
pub fn is_empty(selector: &LabelSelector) -> bool {
    selector.match_labels.as_ref().is_none_or(StringMap::is_empty)
        && selector.match_expressions.as_ref().is_none_or(Vec::is_empty)
}

/// True when every requirement of the selector holds for the labels.
pub fn matches(selector: &LabelSelector, labels: Option<&StringMap>) -> bool {
    let empty = StringMap::new();
    let labels = labels.unwrap_or(&empty);
    selector.match_labels.as_ref().is_none_or(|wanted| contains(labels, wanted))
        && selector.match_expressions.iter().flatten().all(|requirement| {
            holds(
                &requirement.operator,
                labels.get(&requirement.key).map(String::as_str),
                requirement.values.as_deref().unwrap_or_default(),
            )
        })
}

/// True when `labels` has every pair of `wanted`.
pub fn contains(labels: &StringMap, wanted: &StringMap) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// One requirement against the value a label has (`None`: the label is absent).
fn holds(operator: &str, value: Option<&str>, values: &[String]) -> bool {
    let listed = || value.is_some_and(|value| values.iter().any(|candidate| candidate == value));
    match operator {
        "In" => listed(),
        "NotIn" => !listed(),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => compare(value, values).is_some_and(|(actual, bound)| actual > bound),
        "Lt" => compare(value, values).is_some_and(|(actual, bound)| actual < bound),
        _ => false,
    }
}

fn compare(value: Option<&str>, values: &[String]) -> Option<(i64, i64)> {
    Some((value?.parse().ok()?, values.first()?.parse().ok()?))
}

/// True when any term of the node selector matches the node. A selector without terms matches no node.
pub fn node_matches(selector: &NodeSelector, node: &Node) -> bool {
    selector.node_selector_terms.iter().any(|term| node_term_matches(term, node))
}

/// True when all requirements of the term hold; an empty term matches no node.
pub fn node_term_matches(term: &NodeSelectorTerm, node: &Node) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    if expressions.is_empty() && fields.is_empty() {
        return false;
    }
    let labels = node.metadata.labels.as_ref();
    expressions.iter().all(|requirement| {
        let value = labels.and_then(|labels| labels.get(&requirement.key)).map(String::as_str);
        node_requirement_holds(requirement, value)
    }) && fields.iter().all(|requirement| {
        // `metadata.name` is the only field upstream knows here.
        requirement.key == "metadata.name"
            && node_requirement_holds(requirement, Some(object::name(&node.metadata)))
    })
}

fn node_requirement_holds(requirement: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    holds(&requirement.operator, value, requirement.values.as_deref().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelectorRequirement;

    use super::*;

    #[test]
    fn expressions_match_as_documented() {
        let labels = StringMap::from([("tier".into(), "web".into())]);
        for (operator, key, values, expected) in [
            ("In", "tier", vec!["web", "db"], true),
            ("In", "tier", vec!["db"], false),
            ("NotIn", "tier", vec!["db"], true),
            ("NotIn", "absent", vec!["db"], true),
            ("Exists", "tier", vec![], true),
            ("DoesNotExist", "tier", vec![], false),
            ("Bogus", "tier", vec![], false),
        ] {
            let selector = LabelSelector {
                match_expressions: Some(vec![LabelSelectorRequirement {
                    key: key.into(),
                    operator: operator.into(),
                    values: Some(values.into_iter().map(String::from).collect()),
                }]),
                match_labels: None,
            };
            assert_eq!(matches(&selector, Some(&labels)), expected, "{key} {operator}");
        }
    }
}
