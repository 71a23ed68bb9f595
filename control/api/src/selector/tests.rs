//! Selector tables and a parse/print property.

#![allow(clippy::needless_pass_by_value, reason = "test tables pass literals")]

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::kinds;

#[track_caller]
fn check(selector: &str, labels: Value, expected: bool) {
    let object = json!({ "metadata": { "labels": labels } });
    assert_eq!(LabelSelector::parse(selector).unwrap().matches(&object), expected, "{selector}");
}

#[test]
fn label_selectors_select_as_upstream() {
    check("", json!({}), true);
    check("a=b", json!({"a": "b"}), true);
    check("a==b, c!=d", json!({"a": "b"}), true);
    check("a in (x, b),a", json!({"a": "b"}), true);
    check("a notin (x,b)", json!({"a": "b"}), false);
    check("a notin (x,b)", json!({}), true);
    check("!a", json!({"a": ""}), false);
    check("n>4,n<6", json!({"n": "5"}), true);
    check("app.kubernetes.io/name=web", json!({"app.kubernetes.io/name": "web"}), true);
}

#[test]
fn bad_label_selectors_are_named() {
    for bad in ["a in b", "a=b,,c", "a=$", "-x", "a is b", ","] {
        assert_eq!(LabelSelector::parse(bad).unwrap_err().code(), 400, "{bad}");
    }
}

#[test]
fn object_selectors_read_expressions() {
    let selector = json!({
        "matchLabels": {"a": "b"},
        "matchExpressions": [{"key": "t", "operator": "In", "values": ["x", "y"]}, {"key": "u", "operator": "DoesNotExist"}],
    });
    let parsed = LabelSelector::from_json(&selector).unwrap();
    assert!(parsed.matches(&json!({"metadata": {"labels": {"a": "b", "t": "y"}}})));
    assert!(!parsed.matches(&json!({"metadata": {"labels": {"a": "b", "t": "y", "u": ""}}})));
    assert_eq!(parsed.to_string(), "a=b,t in (x,y),!u");
    assert!(!LabelSelector::from_json(&Value::Null).unwrap().matches(&json!({})));
    assert!(LabelSelector::from_json(&json!({})).unwrap().matches(&json!({})));
}

#[test]
fn field_selectors_know_their_resource() {
    let pods = kinds::find("", "v1", "pods").unwrap();
    let pod = json!({"metadata": {"name": "a", "namespace": "d"}, "spec": {"nodeName": "n"}, "status": {"phase": "Running"}});
    let selector =
        FieldSelector::parse(pods, "spec.nodeName=n,status.phase!=Failed,spec.hostNetwork=false").unwrap();
    assert!(selector.matches(&pod));
    assert_eq!(selector.exact("spec.nodeName"), Some("n"));
    assert!(!FieldSelector::parse(pods, "metadata.name!=a").unwrap().matches(&pod));
    let error = FieldSelector::parse(pods, "spec.foo=bar").unwrap_err();
    assert_eq!(error.code(), 400);
    assert!(error.message.ends_with("field label not supported: spec.foo"), "{error}");
}

proptest! {
    #[test]
    fn never_panics(text in "\\PC{0,40}") {
        drop(LabelSelector::parse(&text));
        drop(FieldSelector::parse(kinds::find("", "v1", "pods").unwrap(), &text));
    }

    #[test]
    fn printing_and_parsing_agree(key in "[a-z]{1,5}", a in "[a-z]{1,3}", b in "[a-z]{1,3}", shape in 0..6) {
        let text = match shape {
            0 => format!("{key}={a}"),
            1 => format!("{key}!={a}"),
            2 => format!("{key} in ({a},{b})"),
            3 => format!("{key} notin ({a},{b})"),
            4 => format!("!{key}"),
            _ => key,
        };
        let parsed = LabelSelector::parse(&text).unwrap();
        prop_assert_eq!(LabelSelector::parse(&parsed.to_string()).unwrap(), parsed);
    }
}
