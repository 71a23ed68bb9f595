//! Merging a declared object into the live one, and taking out what is no longer declared.

use serde_json::{Map, Value};

use super::fields::{FieldSet, has_keys, is_value, key_element};
use crate::{
    patch::strategic::reorder,
    schema::shape::{Field, Rule, Shape, Ty},
};

/// `live` with the fields in `wanted` set as `declared` has them.
pub(super) fn structs(shape: &Shape, live: &Value, declared: &Value, wanted: &FieldSet) -> Value {
    let (Some(live), Some(declared)) = (live.as_object(), declared.as_object()) else {
        return declared.clone();
    };
    let mut out = live.clone();
    for (name, value) in declared {
        let Some(below) = wanted.child(&format!("f:{name}")) else { continue };
        let merged = field(shape.field(name), live.get(name), value, below);
        out.insert(name.clone(), merged);
    }
    Value::Object(out)
}

fn field(field: Option<&Field>, live: Option<&Value>, declared: &Value, wanted: &FieldSet) -> Value {
    let (Some(field), Some(live)) = (field, live) else { return declared.clone() };
    values(field.ty, &field.rule, live, declared, wanted)
}

fn values(ty: Ty, rule: &Rule, live: &Value, declared: &Value, wanted: &FieldSet) -> Value {
    match (ty, live, declared) {
        (Ty::Object(index), Value::Object(_), Value::Object(_)) if !rule.atomic => {
            let shape = Shape::at(index);
            if shape.atomic { declared.clone() } else { structs(shape, live, declared, wanted) }
        }
        (Ty::Map(_), Value::Object(live), Value::Object(declared)) if !rule.atomic => {
            let mut out = live.clone();
            out.extend(declared.clone());
            Value::Object(out)
        }
        (Ty::List(of), Value::Array(live), Value::Array(declared)) if !rule.list_keys.is_empty() => {
            keyed(*of, rule, live, declared, wanted)
        }
        (Ty::List(_), Value::Array(live), Value::Array(declared)) if rule.set => {
            let mut out = live.clone();
            out.extend(declared.iter().filter(|item| !live.contains(item)).cloned());
            Value::Array(reorder(out, Clone::clone, declared, live))
        }
        _ => declared.clone(),
    }
}

fn keyed(of: Ty, rule: &Rule, live: &[Value], declared: &[Value], wanted: &FieldSet) -> Value {
    let mut out = live.to_vec();
    for item in declared {
        let element = key_element(rule, item);
        match (out.iter_mut().find(|found| has_keys(&element, found)), of, wanted.child(&element)) {
            (Some(slot), Ty::Object(index), Some(below)) => {
                *slot = structs(Shape::at(index), slot, item, below);
            }
            (Some(slot), ..) => *slot = item.clone(),
            (None, ..) => out.push(item.clone()),
        }
    }
    let id_of = |item: &Value| Value::String(key_element(rule, item));
    let order: Vec<Value> = declared.iter().map(id_of).collect();
    let before: Vec<Value> = live.iter().map(id_of).collect();
    Value::Array(reorder(out, id_of, &order, &before))
}

/// Takes the places in `gone` out of a value; a place that has something left below stays.
pub(super) fn remove(value: &mut Value, gone: &FieldSet) {
    match value {
        Value::Object(map) => {
            for (element, below) in gone.children() {
                let Some(name) = element.strip_prefix("f:") else { continue };
                remove_field(map, name, below);
            }
        }
        Value::Array(items) => {
            for (element, below) in gone.children() {
                if element.starts_with("v:") {
                    items.retain(|item| !is_value(element, item));
                } else if below.is_owned() {
                    // Nobody else holds the element; with it goes what it still has.
                    items.retain(|item| !has_keys(element, item));
                } else if let Some(item) = items.iter_mut().find(|item| has_keys(element, item)) {
                    remove(item, below);
                }
            }
        }
        _ => {}
    }
}

fn remove_field(map: &mut Map<String, Value>, name: &str, below: &FieldSet) {
    let Some(child) = map.get_mut(name) else { return };
    let had_any = !is_bare(child);
    remove(child, below);
    let emptied = had_any && is_bare(child);
    let leaf = below.is_owned() && below.children().next().is_none();
    if leaf || emptied {
        map.remove(name);
    }
}

/// An empty map or list.
fn is_bare(value: &Value) -> bool {
    value.as_object().is_some_and(Map::is_empty) || value.as_array().is_some_and(Vec::is_empty)
}
