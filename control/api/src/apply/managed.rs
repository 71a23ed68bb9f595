//! `metadata.managedFields`: who owns what.

use serde_json::{Value, json};

use super::{Author, fields::FieldSet};
use crate::{
    kinds::ResourceInfo,
    value::{ensure_map, list, text},
};

/// The most managers of ordinary updates that are kept apart, as upstream; older ones are forgotten.
const MAX_UPDATERS: usize = 10;

/// One manager's record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    manager: String,
    operation: String,
    api_version: String,
    subresource: String,
    time: String,
    pub(super) fields: FieldSet,
}

impl Entry {
    /// A record of this author.
    pub(super) fn new(info: &ResourceInfo, author: &Author<'_>, operation: &str, fields: FieldSet) -> Self {
        Self {
            manager: author.manager.to_owned(),
            operation: operation.to_owned(),
            api_version: info.api_version(),
            subresource: author.subresource.to_owned(),
            time: author.now.to_owned(),
            fields,
        }
    }

    /// `"kubectl" using apps/v1`, as conflicts name an owner.
    pub(super) fn describe(&self) -> String {
        let mut text = format!("\"{}\"", self.manager);
        if !self.subresource.is_empty() {
            text.extend([" with subresource \"", &self.subresource, "\""]);
        }
        text.extend([" using ", &self.api_version]);
        if self.operation == "Update" {
            text.extend([" at ", &self.time]);
        }
        text
    }

    fn is_of(&self, other: &Self) -> bool {
        self.manager == other.manager
            && self.operation == other.operation
            && self.subresource == other.subresource
            && (self.operation == "Apply" || self.api_version == other.api_version)
    }

    fn read(json: &Value) -> Self {
        let owned = |pointer: &str| text(json, pointer).to_owned();
        Self {
            manager: owned("/manager"),
            operation: owned("/operation"),
            api_version: owned("/apiVersion"),
            subresource: owned("/subresource"),
            time: owned("/time"),
            fields: FieldSet::from_json(&json["fieldsV1"]),
        }
    }

    fn to_json(&self) -> Value {
        let mut json = json!({
            "manager": self.manager,
            "operation": self.operation,
            "apiVersion": self.api_version,
            "time": self.time,
            "fieldsType": "FieldsV1",
            "fieldsV1": self.fields.to_json(),
        });
        if !self.subresource.is_empty() {
            json["subresource"] = json!(self.subresource);
        }
        json
    }
}

/// All records of an object.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Managed(Vec<Entry>);

impl Managed {
    /// The records an object carries.
    pub(super) fn read(object: &Value) -> Self {
        Self(list(object, "/metadata/managedFields").iter().map(Entry::read).collect())
    }

    /// Puts the records into an object.
    pub(super) fn write(&self, object: &mut Value) {
        let entries: Vec<Value> = self.0.iter().map(Entry::to_json).collect();
        if let Some(metadata) = ensure_map(object, "metadata") {
            metadata.insert("managedFields".to_owned(), entries.into());
        }
    }

    /// Whether nobody owns anything.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What the author of `entry` owned so far.
    pub(super) fn fields_of(&self, entry: &Entry) -> FieldSet {
        self.0.iter().find(|e| e.is_of(entry)).map(|e| e.fields.clone()).unwrap_or_default()
    }

    /// What all others own.
    pub(super) fn union_of_others(&self, entry: &Entry) -> FieldSet {
        self.0.iter().filter(|e| !e.is_of(entry)).fold(FieldSet::default(), |all, e| all.union(&e.fields))
    }

    /// Fields `entry` wants to change that others own: `(owner, path)`.
    pub(super) fn conflicts(
        &self,
        entry: &Entry,
        changes: impl Fn(&[String]) -> bool,
    ) -> Vec<(Entry, Vec<String>)> {
        let mut found = Vec::new();
        for owner in self.0.iter().filter(|e| !e.is_of(entry)) {
            entry.fields.for_each(&mut Vec::new(), &mut |path| {
                if owner.fields.contains(path) && changes(path) {
                    found.push((owner.clone(), path.to_vec()));
                }
            });
        }
        found
    }

    /// Takes a field away from an owner.
    pub(super) fn disown(&mut self, owner: &Entry, path: &[String]) {
        if let Some(entry) = self.0.iter_mut().find(|e| e.is_of(owner)) {
            entry.fields.remove(path);
        }
        self.drop_empty();
    }

    /// Takes fields away from everybody but the author of `entry`.
    pub(super) fn disown_others(&mut self, entry: &Entry, fields: &FieldSet) {
        for other in self.0.iter_mut().filter(|e| !e.is_of(entry)) {
            other.fields = other.fields.without(fields);
        }
        self.drop_empty();
    }

    /// Replaces or adds a record; an unchanged one keeps its time, an empty one goes.
    pub(super) fn put(&mut self, entry: Entry) {
        match self.0.iter_mut().find(|e| e.is_of(&entry)) {
            Some(slot) if slot.fields == entry.fields && slot.api_version == entry.api_version => {}
            Some(slot) => *slot = entry,
            None => self.0.push(entry),
        }
        self.drop_empty();
        let updaters = self.0.iter().filter(|e| e.operation == "Update").count();
        if updaters > MAX_UPDATERS
            && let Some(oldest) = self.0.iter().position(|e| e.operation == "Update")
        {
            self.0.remove(oldest);
        }
    }

    fn drop_empty(&mut self) {
        self.0.retain(|e| !e.fields.is_empty());
    }
}
