//! From OpenAPI v2's form to v3's: one document per group and version.

use serde_json::{Map, Value, json};

use super::{
    VERSION,
    definitions::{Definitions, collect_refs},
    paths,
};
use crate::kinds::ResourceInfo;

/// The document of one group and version: its paths and the schemas they need.
pub(super) fn document(rows: &[&ResourceInfo], definitions: &Definitions) -> Value {
    let v2_paths = Value::Object(paths::of_group(rows));
    let mut roots = Vec::new();
    collect_refs(&v2_paths, &mut roots);
    let mut schemas = Map::new();
    for name in definitions.closure(roots.into_iter()) {
        if let Some(definition) = definitions.get(name) {
            schemas.insert(name.to_owned(), schema(definition));
        }
    }
    let v3_paths: Map<String, Value> = v2_paths
        .as_object()
        .into_iter()
        .flatten()
        .map(|(path, item)| (path.clone(), path_item(item)))
        .collect();
    json!({
        "openapi": "3.0.0",
        "info": { "title": "Kubernetes", "version": VERSION },
        "paths": v3_paths,
        "components": { "schemas": schemas },
    })
}

fn path_item(item: &Value) -> Value {
    let entries = item.as_object().into_iter().flatten();
    let converted = entries.map(|(key, value)| match key.as_str() {
        "parameters" => (key.clone(), parameters(value)),
        _ => (key.clone(), operation(value)),
    });
    Value::Object(converted.collect())
}

fn parameters(list: &Value) -> Value {
    let all = list.as_array().into_iter().flatten();
    all.filter(|p| p["in"] != "body").map(parameter).collect()
}

fn parameter(parameter: &Value) -> Value {
    let mut out = json!({
        "name": parameter["name"],
        "in": parameter["in"],
        "description": parameter["description"],
        "schema": { "type": parameter["type"], "uniqueItems": true },
    });
    if parameter["required"] == true {
        out["required"] = json!(true);
    }
    out
}

fn operation(operation: &Value) -> Value {
    let mut out = Map::new();
    for (key, value) in operation.as_object().into_iter().flatten() {
        match key.as_str() {
            "consumes" | "produces" | "schemes" => {}
            "parameters" => {
                out.insert(key.clone(), parameters(value));
                let body = value.as_array().into_iter().flatten().find(|p| p["in"] == "body");
                if let Some(body) = body {
                    let content = content(&operation["consumes"], &body["schema"]);
                    out.insert("requestBody".to_owned(), json!({ "content": content, "required": true }));
                }
            }
            "responses" => {
                let converted = value.as_object().into_iter().flatten().map(|(code, response)| {
                    let mut answer = json!({ "description": response["description"] });
                    if let Some(found) = response.get("schema") {
                        answer["content"] = content(&operation["produces"], found);
                    }
                    (code.clone(), answer)
                });
                out.insert(key.clone(), Value::Object(converted.collect()));
            }
            _ => {
                out.insert(key.clone(), value.clone());
            }
        }
    }
    Value::Object(out)
}

fn content(types: &Value, found: &Value) -> Value {
    let names = types.as_array().into_iter().flatten().filter_map(Value::as_str);
    Value::Object(names.map(|name| (name.to_owned(), json!({ "schema": schema(found) }))).collect())
}

/// Converts a schema: references move and, beside other keywords, go into `allOf`; what may be a number or a string
/// says so.
fn schema(v2: &Value) -> Value {
    match v2 {
        Value::Object(map) => {
            if let Some(target) = map.get("$ref").and_then(Value::as_str) {
                return reference(map, target);
            }
            let mut out: Map<String, Value> =
                map.iter().map(|(key, value)| (key.clone(), nested(key, value))).collect();
            let starts_as_quantity = map
                .get("description")
                .and_then(Value::as_str)
                .is_some_and(|d| d.starts_with("Quantity is a"));
            if map.get("format").is_some_and(|f| f == "int-or-string") {
                out.remove("type");
                out.insert("oneOf".to_owned(), json!([{ "type": "integer" }, { "type": "string" }]));
            } else if starts_as_quantity {
                out.remove("type");
                out.insert("oneOf".to_owned(), json!([{ "type": "string" }, { "type": "number" }]));
            }
            Value::Object(out)
        }
        other => other.clone(),
    }
}

/// Keywords that hold schemas.
fn nested(key: &str, value: &Value) -> Value {
    match key {
        "properties" => {
            let fields = value.as_object().into_iter().flatten();
            Value::Object(fields.map(|(name, found)| (name.clone(), schema(found))).collect())
        }
        "items" | "additionalProperties" => schema(value),
        _ => value.clone(),
    }
}

fn reference(map: &Map<String, Value>, target: &str) -> Value {
    let moved = target.replacen("#/definitions/", "#/components/schemas/", 1);
    let plain = json!({ "$ref": moved });
    if map.len() == 1 {
        return plain;
    }
    let mut out: Map<String, Value> = map
        .iter()
        .filter(|(key, _)| *key != "$ref")
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    out.insert("allOf".to_owned(), json!([plain]));
    Value::Object(out)
}
