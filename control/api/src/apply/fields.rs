//! Sets of fields, as `FieldsV1` writes them.
//!
//! A set is a tree whose edges are path elements: `f:<field>`, `k:<keys of a list element>`, `v:<value of a set>`.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::{
    kinds::ResourceInfo,
    schema::shape::{Field, Rule, Shape, Ty},
};

/// Metadata that nobody owns.
const UNOWNED_METADATA: &[&str] = &[
    "name",
    "namespace",
    "generateName",
    "uid",
    "selfLink",
    "resourceVersion",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "generation",
    "managedFields",
];

/// A set of fields: whether this place is in it, and what below is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct FieldSet {
    owned: bool,
    children: BTreeMap<String, FieldSet>,
}

impl FieldSet {
    /// All fields of an object that can be owned.
    pub(super) fn of(shape: &'static Shape, object: &Value) -> Self {
        let mut set = Self::default();
        set.add_struct(shape, object);
        set.owned = false;
        for key in ["f:apiVersion", "f:kind"] {
            set.children.remove(key);
        }
        if let Some(metadata) = set.children.get_mut("f:metadata") {
            metadata.owned = false;
            metadata.children.retain(|key, _| !UNOWNED_METADATA.iter().any(|name| key[2..] == **name));
            if metadata.is_empty() {
                set.children.remove("f:metadata");
            }
        }
        set
    }

    /// Without what a write to this place does not reach: status, or everything but status.
    pub(super) fn restricted(mut self, info: &ResourceInfo, subresource: &str) -> Self {
        if subresource == "status" {
            self.children.retain(|key, _| key == "f:status");
        } else if info.has_status() {
            self.children.remove("f:status");
        }
        self
    }

    /// Reads `fieldsV1`.
    pub(super) fn from_json(json: &Value) -> Self {
        let mut set = Self::default();
        let Some(map) = json.as_object() else { return set };
        for (key, below) in map {
            if key == "." {
                set.owned = true;
                continue;
            }
            let mut child = Self::from_json(below);
            child.owned |= child.children.is_empty();
            set.children.insert(key.clone(), child);
        }
        set
    }

    /// Writes `fieldsV1`.
    pub(super) fn to_json(&self) -> Value {
        let mut map = Map::new();
        if self.owned && !self.children.is_empty() {
            map.insert(".".to_owned(), Value::Object(Map::new()));
        }
        map.extend(self.children.iter().map(|(key, child)| (key.clone(), child.to_json())));
        Value::Object(map)
    }

    /// Whether nothing is in it.
    pub(super) fn is_empty(&self) -> bool {
        !self.owned && self.children.values().all(Self::is_empty)
    }

    /// What is below a path element.
    pub(super) fn child(&self, element: &str) -> Option<&Self> {
        self.children.get(element)
    }

    /// Every element with what is below it.
    pub(super) fn children(&self) -> impl Iterator<Item = (&str, &Self)> {
        self.children.iter().map(|(key, child)| (key.as_str(), child))
    }

    /// Whether this place itself is in the set.
    pub(super) fn is_owned(&self) -> bool {
        self.owned
    }

    /// In either.
    pub(super) fn union(&self, other: &Self) -> Self {
        let mut out = self.clone();
        out.owned |= other.owned;
        for (key, theirs) in &other.children {
            let merged = out.children.get(key).map_or_else(|| theirs.clone(), |ours| ours.union(theirs));
            out.children.insert(key.clone(), merged);
        }
        out
    }

    /// In this one and not in the other.
    pub(super) fn without(&self, other: &Self) -> Self {
        let mut out = Self { owned: self.owned && !other.owned, children: BTreeMap::new() };
        for (key, ours) in &self.children {
            let rest = other.children.get(key).map_or_else(|| ours.clone(), |theirs| ours.without(theirs));
            if !rest.is_empty() {
                out.children.insert(key.clone(), rest);
            }
        }
        out
    }

    /// In this one, with nothing of the other at the place or below it: what can be removed without taking anything
    /// from the other.
    pub(super) fn clear_of(&self, other: &Self) -> Self {
        let mut out = Self { owned: self.owned && other.is_empty(), children: BTreeMap::new() };
        for (key, ours) in &self.children {
            let rest = other.children.get(key).map_or_else(|| ours.clone(), |theirs| ours.clear_of(theirs));
            if !rest.is_empty() {
                out.children.insert(key.clone(), rest);
            }
        }
        out
    }

    /// The members whose path the predicate keeps.
    pub(super) fn filtered(&self, keep: impl Fn(&[String]) -> bool) -> Self {
        let mut out = Self::default();
        self.for_each(&mut Vec::new(), &mut |path| {
            if keep(path) {
                out.insert(path);
            }
        });
        out
    }

    /// Visits the paths of all members.
    pub(super) fn for_each(&self, path: &mut Vec<String>, visit: &mut impl FnMut(&[String])) {
        if self.owned {
            visit(path);
        }
        for (key, child) in &self.children {
            path.push(key.clone());
            child.for_each(path, visit);
            path.pop();
        }
    }

    /// Whether the place at `path` is a member.
    pub(super) fn contains(&self, path: &[String]) -> bool {
        match path {
            [] => self.owned,
            [first, rest @ ..] => self.children.get(first).is_some_and(|child| child.contains(rest)),
        }
    }

    /// Adds a place.
    pub(super) fn insert(&mut self, path: &[String]) {
        match path {
            [] => self.owned = true,
            [first, rest @ ..] => self.children.entry(first.clone()).or_default().insert(rest),
        }
    }

    /// Takes a place out.
    pub(super) fn remove(&mut self, path: &[String]) {
        match path {
            [] => self.owned = false,
            [first, rest @ ..] => {
                if let Some(child) = self.children.get_mut(first) {
                    child.remove(rest);
                    if child.is_empty() {
                        self.children.remove(first);
                    }
                }
            }
        }
    }

    fn add_struct(&mut self, shape: &Shape, value: &Value) {
        match value.as_object() {
            Some(map) if !map.is_empty() && !shape.atomic => {
                for (name, child) in map {
                    self.add_below(&format!("f:{name}"), shape.field(name), child);
                }
            }
            _ => self.owned = true,
        }
    }

    fn add_below(&mut self, element: &str, field: Option<&Field>, value: &Value) {
        let set = self.children.entry(element.to_owned()).or_default();
        match field {
            Some(field) => set.add_value(field.ty, &field.rule, value),
            None => set.owned = true,
        }
    }

    fn add_value(&mut self, ty: Ty, rule: &Rule, value: &Value) {
        match (ty, value) {
            (Ty::Object(index), Value::Object(_)) if !rule.atomic => self.add_struct(Shape::at(index), value),
            (Ty::Map(of), Value::Object(map)) if !rule.atomic && !map.is_empty() => {
                for (name, child) in map {
                    self.children.entry(format!("f:{name}")).or_default().add_value(*of, &PLAIN, child);
                }
            }
            (Ty::List(of), Value::Array(items)) if !rule.list_keys.is_empty() && !items.is_empty() => {
                for item in items {
                    let set = self.children.entry(key_element(rule, item)).or_default();
                    if let Ty::Object(index) = *of {
                        set.add_struct(Shape::at(index), item);
                    }
                    set.owned = true;
                }
            }
            (Ty::List(_), Value::Array(items)) if rule.set && !items.is_empty() => {
                for item in items {
                    self.children.entry(format!("v:{item}")).or_default().owned = true;
                }
            }
            _ => self.owned = true,
        }
    }
}

/// The rule of what has none: values of maps.
const PLAIN: Rule =
    Rule { merge: false, retain_keys: false, merge_key: "", list_keys: &[], set: false, atomic: false };

/// The path element of a list's element: its keys as JSON, with the default of `protocol` filled in.
pub(super) fn key_element(rule: &Rule, item: &Value) -> String {
    let keys: BTreeMap<&str, Value> = rule
        .list_keys
        .iter()
        .map(|key| match (item.get(*key), *key) {
            (Some(value), _) => (*key, value.clone()),
            (None, "protocol") => (*key, "TCP".into()),
            (None, _) => (*key, Value::Null),
        })
        .collect();
    let shown: Vec<String> = keys.iter().map(|(key, value)| format!("\"{key}\":{value}")).collect();
    format!("k:{{{}}}", shown.join(","))
}

/// Whether a list's element has the keys of a path element.
pub(super) fn has_keys(element: &str, item: &Value) -> bool {
    let Some(Ok(Value::Object(keys))) = element.strip_prefix("k:").map(serde_json::from_str) else {
        return false;
    };
    keys.iter().all(|(key, wanted)| match item.get(key) {
        Some(found) => found == wanted,
        None => wanted.is_null() || (key == "protocol" && wanted == "TCP"),
    })
}

/// Whether a set's member is the one of a path element.
pub(super) fn is_value(element: &str, item: &Value) -> bool {
    let wanted: Option<Value> = element.strip_prefix("v:").and_then(|json| serde_json::from_str(json).ok());
    wanted.is_some_and(|wanted| wanted == *item)
}

/// The value at a path.
pub(super) fn get<'a>(value: &'a Value, path: &[String]) -> Option<&'a Value> {
    let mut at = value;
    for element in path {
        at = match (element.split_once(':')?, at) {
            (("f", name), Value::Object(map)) => map.get(name)?,
            (("k", _), Value::Array(items)) => items.iter().find(|item| has_keys(element, item))?,
            (("v", _), Value::Array(items)) => items.iter().find(|item| is_value(element, item))?,
            _ => return None,
        };
    }
    // Of an element that has fields of its own only its being there counts.
    let is_element = path.last().is_some_and(|last| last.starts_with("k:"));
    Some(if is_element { &Value::Bool(true) } else { at })
}

/// A path as conflicts show it: `.spec.containers[name="nginx"].image`.
pub(super) fn shown(path: &[String]) -> String {
    let mut text = String::new();
    for element in path {
        match element.split_once(':') {
            None => text.extend([".", element]),
            Some(("f", name)) => text.extend([".", name]),
            Some(("v", value)) => text.extend(["[=", value, "]"]),
            Some((_, keys)) => {
                let keys: BTreeMap<String, Value> = serde_json::from_str(keys).unwrap_or_default();
                let pairs: Vec<String> = keys.iter().map(|(key, value)| format!("{key}={value}")).collect();
                text.extend(["[", &pairs.join(","), "]"]);
            }
        }
    }
    text
}
