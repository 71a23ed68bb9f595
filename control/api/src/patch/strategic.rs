//! Strategic merge: merge patches that know which lists are keyed.
//!
//! Directives: `$patch: replace | delete | merge`, `$retainKeys`, `$deleteFromPrimitiveList/<field>`,
//! `$setElementOrder/<field>`. Semantics as in "Update API Objects in Place Using kubectl patch" of the Kubernetes
//! documentation and the API conventions of strategic merge patch.

use serde_json::{Map, Value};

use crate::{
    schema::shape::{Field, Shape, Ty},
    status::{ApiError, Reason},
};

const PATCH: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const DELETE_PREFIX: &str = "$deleteFromPrimitiveList/";
const ORDER_PREFIX: &str = "$setElementOrder/";

/// Merges `patch` into `original`, a struct of that shape or (without one) a plain map.
pub(super) fn merge_struct(
    shape: Option<&Shape>,
    mut original: Map<String, Value>,
    patch: &Map<String, Value>,
) -> Result<Map<String, Value>, ApiError> {
    match patch.get(PATCH).map(directive).transpose()? {
        Some(Directive::Replace) => return Ok(without_directives(patch)),
        Some(Directive::Delete) => return Ok(Map::new()),
        Some(Directive::Merge) | None => {}
    }
    retain(&mut original, patch)?;
    for (name, wanted) in patch {
        if name.starts_with('$') {
            continue;
        }
        let field = shape.and_then(|s| s.field(name));
        let order = patch.get(&format!("{ORDER_PREFIX}{name}")).and_then(Value::as_array);
        let current = original.remove(name);
        if let Some(merged) = merge_field(field, child_shape(field), current, wanted, order)? {
            original.insert(name.clone(), merged);
        }
    }
    for (name, wanted) in patch {
        if let Some(target) = name.strip_prefix(DELETE_PREFIX) {
            remove_scalars(&mut original, target, wanted)?;
        } else if let Some(target) = name.strip_prefix(ORDER_PREFIX)
            && !patch.contains_key(target)
        {
            reorder_field(shape, &mut original, target, wanted);
        }
    }
    Ok(original)
}

enum Directive {
    Replace,
    Delete,
    Merge,
}

fn directive(value: &Value) -> Result<Directive, ApiError> {
    match value.as_str() {
        Some("replace") => Ok(Directive::Replace),
        Some("delete") => Ok(Directive::Delete),
        Some("merge") => Ok(Directive::Merge),
        _ => Err(ApiError::bad_request(format!("Unknown patch type: {value}"))),
    }
}

/// The shape of a struct field, of the values of a map field, or of a list's elements.
fn child_shape(field: Option<&Field>) -> Option<&'static Shape> {
    match field?.ty {
        Ty::Object(index) | Ty::List(&Ty::Object(index)) | Ty::Map(&Ty::Object(index)) => {
            Some(Shape::at(index))
        }
        _ => None,
    }
}

fn merge_field(
    field: Option<&Field>,
    shape: Option<&'static Shape>,
    current: Option<Value>,
    wanted: &Value,
    order: Option<&Vec<Value>>,
) -> Result<Option<Value>, ApiError> {
    match (current, wanted) {
        (_, Value::Null) => Ok(None),
        (Some(Value::Object(current)), Value::Object(wanted)) => {
            let merged = match field.map(|f| f.ty) {
                // The values of a map of structs merge by themselves.
                Some(Ty::Map(Ty::Object(_))) => merge_map(shape, current, wanted)?,
                _ => merge_struct(shape, current, wanted)?,
            };
            Ok(Some(Value::Object(merged)))
        }
        (current, Value::Array(wanted)) => {
            let Some(field) = field.filter(|f| f.rule.merge) else {
                return Ok(Some(stripped(&Value::Array(wanted.clone()))));
            };
            let current = match current {
                Some(Value::Array(items)) => items,
                _ => Vec::new(),
            };
            merge_list(shape, field.rule.merge_key, current, wanted, order).map(|l| Some(Value::Array(l)))
        }
        (_, Value::Object(wanted)) => {
            merge_struct(shape, Map::new(), wanted).map(|merged| Some(Value::Object(merged)))
        }
        (_, wanted) => Ok(Some(wanted.clone())),
    }
}

fn merge_map(
    shape: Option<&'static Shape>,
    mut original: Map<String, Value>,
    patch: &Map<String, Value>,
) -> Result<Map<String, Value>, ApiError> {
    for (name, wanted) in patch.iter().filter(|(name, _)| !name.starts_with('$')) {
        let current = original.remove(name);
        if let Some(merged) = merge_field(None, shape, current, wanted, None)? {
            original.insert(name.clone(), merged);
        }
    }
    Ok(original)
}

/// `$retainKeys`: drops what the patch's author did not list.
fn retain(original: &mut Map<String, Value>, patch: &Map<String, Value>) -> Result<(), ApiError> {
    let Some(keep) = patch.get(RETAIN_KEYS) else { return Ok(()) };
    let Some(keep) = keep.as_array() else {
        return Err(ApiError::bad_request("invalid patch format of $retainKeys"));
    };
    let listed = |name: &str| keep.iter().any(|k| k == name);
    let foreign =
        patch.iter().any(|(name, value)| !name.starts_with('$') && !value.is_null() && !listed(name));
    if foreign {
        return Err(ApiError::new(
            Reason::Invalid,
            "the keys of the patch are not all listed in its $retainKeys",
        ));
    }
    original.retain(|name, _| listed(name));
    Ok(())
}

fn merge_list(
    shape: Option<&'static Shape>,
    key: &str,
    original: Vec<Value>,
    patch: &[Value],
    order: Option<&Vec<Value>>,
) -> Result<Vec<Value>, ApiError> {
    if key.is_empty() {
        return Ok(merge_scalars(original, patch, order));
    }
    let before: Vec<Value> = original.iter().map(|item| item[key].clone()).collect();
    let mut merged = original;
    let mut replace = false;
    let mut wanted: Vec<&Map<String, Value>> = Vec::new();
    for item in patch {
        let Some(item) = item.as_object() else {
            return Err(ApiError::bad_request("a list of objects cannot be merged with a list of scalars"));
        };
        match item.get(PATCH).map(directive).transpose()? {
            Some(Directive::Delete) => {
                let id = merge_key(item, key)?;
                merged.retain(|m| m.get(key) != Some(id));
            }
            Some(Directive::Replace) => replace = true,
            Some(Directive::Merge) | None => wanted.push(item),
        }
    }
    if replace {
        return Ok(wanted.into_iter().map(|item| Value::Object(without_directives(item))).collect());
    }
    for item in &wanted {
        let id = merge_key(item, key)?;
        match merged.iter_mut().find(|m| m.get(key) == Some(id)) {
            Some(slot) => {
                let current = slot.as_object().cloned().unwrap_or_default();
                *slot = Value::Object(merge_struct(shape, current, item)?);
            }
            None => merged.push(Value::Object(merge_struct(shape, Map::new(), item)?)),
        }
    }
    let ids = |items: &mut dyn Iterator<Item = Option<&Value>>| -> Vec<Value> {
        items.map(|id| id.cloned().unwrap_or_default()).collect()
    };
    let patch_order = match order {
        Some(order) => ids(&mut order.iter().map(|o| o.get(key))),
        None => ids(&mut wanted.iter().map(|w| w.get(key))),
    };
    Ok(reorder(merged, |item| item[key].clone(), &patch_order, &before))
}

fn merge_key<'a>(item: &'a Map<String, Value>, key: &str) -> Result<&'a Value, ApiError> {
    item.get(key).ok_or_else(|| {
        let shown = Value::Object(item.clone());
        ApiError::bad_request(format!("map: {shown} does not contain declared merge key: {key}"))
    })
}

fn merge_scalars(original: Vec<Value>, patch: &[Value], order: Option<&Vec<Value>>) -> Vec<Value> {
    let before = original.clone();
    let mut merged = original;
    for item in patch {
        if !merged.contains(item) {
            merged.push(item.clone());
        }
    }
    let patch_order = order.map_or(patch, Vec::as_slice);
    reorder(merged, Clone::clone, patch_order, &before)
}

/// Puts the items the patch knows into the patch's order, and weaves the others in where they stood before.
pub(crate) fn reorder(
    items: Vec<Value>,
    id_of: impl Fn(&Value) -> Value,
    patch_order: &[Value],
    before: &[Value],
) -> Vec<Value> {
    let place = |ids: &[Value], id: &Value| ids.iter().position(|o| o == id);
    let (mut known, others): (Vec<_>, Vec<_>) =
        items.into_iter().map(|i| (id_of(&i), i)).partition(|(id, _)| place(patch_order, id).is_some());
    known.sort_by_key(|(id, _)| place(patch_order, id));
    let mut out = Vec::with_capacity(known.len() + others.len());
    let mut known = known.into_iter().peekable();
    for (id, other) in others {
        // An item of the patch goes first unless both stood in the list before, the other way round.
        while let Some((known_id, _)) = known.peek() {
            let other_first = match (place(before, &id), place(before, known_id)) {
                (Some(other_at), Some(known_at)) => other_at < known_at,
                _ => false,
            };
            if other_first {
                break;
            }
            out.extend(known.next().map(|(_, item)| item));
        }
        out.push(other);
    }
    out.extend(known.map(|(_, item)| item));
    out
}

fn reorder_field(shape: Option<&Shape>, original: &mut Map<String, Value>, target: &str, order: &Value) {
    let (Some(order), Some(slot)) = (order.as_array(), original.get_mut(target)) else { return };
    let key = shape.and_then(|s| s.field(target)).map_or("", |f| f.rule.merge_key);
    let Value::Array(items) = slot.take() else { return };
    let id_of = |item: &Value| if key.is_empty() { item.clone() } else { item[key].clone() };
    let before: Vec<Value> = items.iter().map(id_of).collect();
    let patch_order: Vec<Value> = order.iter().map(id_of).collect();
    *slot = Value::Array(reorder(items, id_of, &patch_order, &before));
}

fn remove_scalars(original: &mut Map<String, Value>, target: &str, gone: &Value) -> Result<(), ApiError> {
    let Some(gone) = gone.as_array() else {
        return Err(ApiError::bad_request("invalid patch format of primitive list"));
    };
    if let Some(items) = original.get_mut(target).and_then(Value::as_array_mut) {
        items.retain(|item| !gone.contains(item));
    }
    Ok(())
}

fn without_directives(map: &Map<String, Value>) -> Map<String, Value> {
    map.iter()
        .filter(|(name, value)| !name.starts_with('$') && !value.is_null())
        .map(|(name, value)| (name.clone(), stripped(value)))
        .collect()
}

fn stripped(value: &Value) -> Value {
    match value {
        Value::Object(map) => Value::Object(without_directives(map)),
        Value::Array(items) => {
            let plain = items.iter().filter(|item| item.get(PATCH).is_none_or(|d| d == "merge"));
            plain.map(stripped).collect()
        }
        other => other.clone(),
    }
}
