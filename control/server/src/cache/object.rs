//! One cached object: the encoded copy that all readers share, and the few facts by which lists and watches select.

use bytes::Bytes;
use control_api::{
    kinds::ResourceInfo,
    selector::{FieldSelector, LabelSelector},
};
use control_store::Revision;
use serde_json::{Map, Value, json};

/// An object at one revision. Never changes; shared by reference.
#[derive(Debug)]
pub(crate) struct Object {
    /// `namespace/name`, or `name` for cluster-scoped kinds.
    pub key: Box<str>,
    /// `metadata.resourceVersion`.
    pub revision: Revision,
    /// The encoded object in its stored API version.
    pub body: Bytes,
    labels: Box<[(Box<str>, Box<str>)]>,
    /// Name, JSON pointer and value of each field that may be selected by.
    fields: Box<[(&'static str, &'static str, Box<str>)]>,
}

impl Object {
    /// Make an object from its encoded form; fails where that is not JSON.
    pub(crate) fn new(
        info: &ResourceInfo,
        key: &str,
        revision: Revision,
        body: Bytes,
    ) -> Result<Self, serde_json::Error> {
        let value: Value = serde_json::from_slice(&body)?;
        let labels = value.pointer("/metadata/labels").and_then(Value::as_object);
        let labels = labels.into_iter().flatten().filter_map(|(key, value)| {
            Some((key.clone().into_boxed_str(), value.as_str()?.to_owned().into_boxed_str()))
        });
        let fields = info.selectable.iter().filter_map(|field| {
            let pointer = field.pointers.iter().find(|pointer| value.pointer(pointer).is_some());
            let pointer = pointer.or(field.pointers.first())?;
            Some((field.name, *pointer, field.value(&value).into_boxed_str()))
        });
        Ok(Self { key: key.into(), revision, body, labels: labels.collect(), fields: fields.collect() })
    }

    /// `metadata.name`.
    pub(crate) fn name(&self) -> &str {
        self.key.rsplit_once('/').map_or(&self.key, |(_, name)| name)
    }

    /// `metadata.namespace`, empty for cluster-scoped kinds.
    pub(crate) fn namespace(&self) -> &str {
        self.key.rsplit_once('/').map_or("", |(namespace, _)| namespace)
    }

    /// Whether both selectors accept the object.
    pub(crate) fn satisfies(&self, labels: &LabelSelector, fields: &FieldSelector) -> bool {
        // Most of what a node's watch sees is another node's: refused without making anything.
        let elsewhere = self
            .fields
            .iter()
            .any(|(name, _, value)| fields.exact(name).is_some_and(|wanted| wanted != value.as_ref()));
        if elsewhere {
            return false;
        }
        let facts = self.facts();
        labels.matches(&facts) && fields.matches(&facts)
    }

    /// The selectable part of the object, in the shape of the object.
    fn facts(&self) -> Value {
        let labels: Map<String, Value> =
            self.labels.iter().map(|(key, value)| (key.to_string(), json!(value))).collect();
        let mut facts = json!({
            "metadata": { "name": self.name(), "namespace": self.namespace(), "labels": labels },
        });
        for (_, pointer, value) in self.fields.iter().filter(|(_, _, value)| !value.is_empty()) {
            insert(&mut facts, pointer, value);
        }
        facts
    }

    /// Decode the object.
    pub(crate) fn value(&self) -> Result<Value, serde_json::Error> {
        serde_json::from_slice(&self.body)
    }

    /// About how many bytes of memory the object takes.
    pub(crate) fn cost(&self) -> usize {
        let labels: usize = self.labels.iter().map(|(key, value)| key.len() + value.len() + 32).sum();
        self.body.len() + self.key.len() + labels + self.fields.len() * 40 + 120
    }
}

/// Put `value` at a JSON pointer, making the objects above it. Array indices become keys, which pointers find all the same.
fn insert(facts: &mut Value, pointer: &str, value: &str) {
    let mut slot = facts;
    for segment in pointer.split('/').skip(1) {
        if !slot.is_object() {
            *slot = json!({});
        }
        slot = &mut slot[segment];
    }
    *slot = json!(value);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_see_what_they_would_see_in_the_whole_object() {
        let info = control_api::kinds::find("", "v1", "pods").unwrap();
        let pod = json!({
            "metadata": {"name": "web", "namespace": "d", "labels": {"app": "web"}},
            "spec": {"nodeName": "a"},
            "status": {"podIPs": [{"ip": "10.0.0.1"}], "phase": "Running"},
        });
        let object = Object::new(info, "d/web", Revision(1), Bytes::from(pod.to_string())).unwrap();
        let check = |labels: &str, fields: &str| {
            let labels = LabelSelector::parse(labels).unwrap();
            let fields = FieldSelector::parse(info, fields).unwrap();
            let want = labels.matches(&pod) && fields.matches(&pod);
            assert_eq!(object.satisfies(&labels, &fields), want);
            want
        };
        assert!(check("app=web", "spec.nodeName=a,status.phase!=Failed"));
        assert!(check("", "metadata.name=web,metadata.namespace=d"));
        assert!(check("!tier", "spec.hostNetwork=false"));
        assert!(check("", "status.podIPs=10.0.0.1"));
        assert!(!check("app", "spec.nodeName=b"));
        assert!(!check("app!=web", ""));
    }
}
