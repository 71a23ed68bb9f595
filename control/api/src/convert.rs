//! Versions of one resource that share a stored form: `events.k8s.io/v1` Events are kept as core `v1` Events.
//!
//! Input: an object in the version of a URL, or a stored one. Output: the other form. Field names change, nothing is
//! lost on the way there and back.

use serde_json::Value;

use crate::kinds::ResourceInfo;

/// `(name in events.k8s.io, name in core)`.
const RENAMED: &[(&str, &str)] = &[
    ("regarding", "involvedObject"),
    ("note", "message"),
    ("reportingController", "reportingComponent"),
    ("deprecatedSource", "source"),
    ("deprecatedFirstTimestamp", "firstTimestamp"),
    ("deprecatedLastTimestamp", "lastTimestamp"),
    ("deprecatedCount", "count"),
];

/// Whether objects of this row are stored as they are.
pub fn is_identity(info: &ResourceInfo) -> bool {
    info.group != "events.k8s.io"
}

/// The stored form of an object of this row.
pub fn to_stored(info: &ResourceInfo, object: Value) -> Value {
    if is_identity(info) {
        return object;
    }
    rename(object, "v1", RENAMED.iter().map(|(new, old)| (*new, *old)))
}

/// The form this row shows of a stored object.
pub fn from_stored(info: &ResourceInfo, object: Value) -> Value {
    if is_identity(info) {
        return object;
    }
    rename(object, "events.k8s.io/v1", RENAMED.iter().map(|(new, old)| (*old, *new)))
}

fn rename<'a>(
    mut object: Value,
    api_version: &str,
    names: impl Iterator<Item = (&'a str, &'a str)>,
) -> Value {
    if let Some(map) = object.as_object_mut() {
        map.insert("apiVersion".to_owned(), api_version.into());
        for (from, to) in names {
            if let Some(value) = map.remove(from) {
                map.insert(to.to_owned(), value);
            }
        }
    }
    object
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::kinds;

    #[test]
    fn events_survive_the_round_trip() {
        let info = kinds::find("events.k8s.io", "v1", "events").unwrap();
        let event = json!({
            "apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": {"name": "e"},
            "regarding": {"kind": "Pod"}, "note": "hello", "reportingController": "c", "action": "Bind",
        });
        let stored = to_stored(info, event.clone());
        assert_eq!(stored["involvedObject"]["kind"], "Pod");
        assert_eq!(stored["apiVersion"], "v1");
        assert_eq!(from_stored(info, stored), event);
    }
}
