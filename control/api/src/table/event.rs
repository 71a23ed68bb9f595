//! Events, in their stored (core) form.

use jiff::Timestamp;
use serde_json::Value;

use super::{Column, name, since, text_column, wide};
use crate::value::{int, text};

/// kubectl's columns.
pub(super) const COLUMNS: &[Column] = &[
    text_column("Last Seen", "When it happened last."),
    text_column("Type", "Normal or Warning."),
    text_column("Reason", "Why, in one word."),
    text_column("Object", "What it is about."),
    wide("Subobject", "The part of the object it is about."),
    wide("Source", "Who reported it."),
    text_column("Message", "What happened."),
    wide("First Seen", "When it happened first."),
    Column { kind: "integer", ..wide("Count", "How often.") },
    Column { format: "name", ..wide("Name", "Name of the event.") },
];

/// An event's cells.
pub(super) fn cells(event: &Value, now: Timestamp) -> Vec<Value> {
    let first = match text(event, "/firstTimestamp") {
        "" => text(event, "/eventTime"),
        first => first,
    };
    let series = event.get("series").filter(|s| s.is_object());
    let last = match (series.map(|s| text(s, "/lastObservedTime")), text(event, "/lastTimestamp")) {
        (Some(last), _) if !last.is_empty() => last,
        (_, "") => first,
        (_, last) => last,
    };
    let count = series.and_then(|s| int(s, "/count")).or_else(|| int(event, "/count")).unwrap_or(0).max(1);
    let kind = text(event, "/involvedObject/kind").to_lowercase();
    let object = match text(event, "/involvedObject/name") {
        "" => kind,
        about => format!("{kind}/{about}"),
    };
    vec![
        since(last, now).into(),
        text(event, "/type").into(),
        text(event, "/reason").into(),
        object.into(),
        text(event, "/involvedObject/fieldPath").into(),
        source(event).into(),
        text(event, "/message").trim().into(),
        since(first, now).into(),
        count.into(),
        name(event),
    ]
}

fn source(event: &Value) -> String {
    let first_of = |a: &str, b: &str| match text(event, a) {
        "" => text(event, b).to_owned(),
        found => found.to_owned(),
    };
    let component = first_of("/source/component", "/reportingComponent");
    let instance = first_of("/source/host", "/reportingInstance");
    if instance.is_empty() { component } else { format!("{component}, {instance}") }
}
