//! From the v2 document's JSON to gnostic's protobuf.

use prost::Message as _;
use serde_json::{Map, Value};

use super::gnostic::{
    AdditionalPropertiesItem, Any, BodyParameter, Definitions, Document, Info, ItemsItem, NamedAny,
    NamedPathItem, NamedResponseValue, NamedSchema, NonBodyParameter, Operation, Parameter, ParametersItem,
    PathItem, PathParameter, Paths, QueryParameter, Response, ResponseValue, Responses, Schema, SchemaItem,
    TypeItem,
};
use crate::value::{flag, text};

/// Encodes a v2 document.
pub(super) fn encode(document: &Value) -> Vec<u8> {
    let paths = entries(&document["paths"])
        .map(|(name, item)| NamedPathItem { name: name.clone(), value: Some(path_item(item)) })
        .collect();
    Document {
        swagger: string(document, "swagger"),
        info: Some(Info {
            title: string(&document["info"], "title"),
            version: string(&document["info"], "version"),
        }),
        paths: Some(Paths { path: paths }),
        definitions: Some(named_schemas(&document["definitions"])),
    }
    .encode_to_vec()
}

fn path_item(item: &Value) -> PathItem {
    let method = |name: &str| item.get(name).map(operation);
    PathItem {
        get: method("get"),
        put: method("put"),
        post: method("post"),
        delete: method("delete"),
        patch: method("patch"),
        parameters: parameters(item),
    }
}

fn operation(operation: &Value) -> Operation {
    let responses = entries(&operation["responses"])
        .map(|(code, response)| NamedResponseValue {
            name: code.clone(),
            value: Some(ResponseValue {
                response: Some(Response {
                    description: string(response, "description"),
                    schema: response.get("schema").map(|s| SchemaItem { schema: Some(schema(s)) }),
                }),
            }),
        })
        .collect();
    Operation {
        tags: strings(operation, "tags"),
        description: string(operation, "description"),
        id: string(operation, "operationId"),
        produces: strings(operation, "produces"),
        consumes: strings(operation, "consumes"),
        parameters: parameters(operation),
        responses: Some(Responses { response_code: responses }),
        schemes: strings(operation, "schemes"),
        vendor_extension: extensions(operation),
    }
}

fn parameters(holder: &Value) -> Vec<ParametersItem> {
    let all = holder["parameters"].as_array().into_iter().flatten();
    all.map(|p| ParametersItem { parameter: Some(parameter(p)) }).collect()
}

fn parameter(found: &Value) -> Parameter {
    let location = string(found, "in");
    let non_body = match location.as_str() {
        "body" => {
            let body = BodyParameter {
                name: string(found, "name"),
                location,
                required: flag(found, "/required"),
                schema: found.get("schema").map(schema),
            };
            return Parameter { body_parameter: Some(body), non_body_parameter: None };
        }
        "path" => NonBodyParameter {
            path_parameter_sub_schema: Some(PathParameter {
                required: flag(found, "/required"),
                location,
                description: string(found, "description"),
                name: string(found, "name"),
                r#type: string(found, "type"),
                unique_items: flag(found, "/uniqueItems"),
            }),
            query_parameter_sub_schema: None,
        },
        _ => NonBodyParameter {
            path_parameter_sub_schema: None,
            query_parameter_sub_schema: Some(QueryParameter {
                location,
                description: string(found, "description"),
                name: string(found, "name"),
                r#type: string(found, "type"),
                unique_items: flag(found, "/uniqueItems"),
            }),
        },
    };
    Parameter { body_parameter: None, non_body_parameter: Some(non_body) }
}

fn schema(found: &Value) -> Schema {
    let type_name = text(found, "/type");
    Schema {
        reference: string(found, "$ref"),
        format: string(found, "format"),
        description: string(found, "description"),
        required: strings(found, "required"),
        additional_properties: found
            .get("additionalProperties")
            .map(|inner| Box::new(AdditionalPropertiesItem { schema: Some(Box::new(schema(inner))) })),
        r#type: (!type_name.is_empty()).then(|| TypeItem { value: vec![type_name.to_owned()] }),
        items: found.get("items").map(|inner| ItemsItem { schema: vec![schema(inner)] }),
        properties: found.get("properties").map(named_schemas),
        vendor_extension: extensions(found),
    }
}

fn named_schemas(found: &Value) -> Definitions {
    let all =
        entries(found).map(|(name, inner)| NamedSchema { name: name.clone(), value: Some(schema(inner)) });
    Definitions { additional_properties: all.collect() }
}

fn extensions(holder: &Value) -> Vec<NamedAny> {
    entries(holder)
        .filter(|(name, _)| name.starts_with("x-"))
        .map(|(name, value)| NamedAny { name: name.clone(), value: Some(Any { yaml: value.to_string() }) })
        .collect()
}

fn entries(found: &Value) -> impl Iterator<Item = (&String, &Value)> {
    found.as_object().into_iter().flat_map(Map::iter)
}

fn string(holder: &Value, key: &str) -> String {
    holder.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn strings(holder: &Value, key: &str) -> Vec<String> {
    let all = holder.get(key).and_then(Value::as_array).into_iter().flatten();
    all.filter_map(Value::as_str).map(str::to_owned).collect()
}
