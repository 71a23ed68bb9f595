//! The walk over an object: unknown fields with their paths, and the first wrong type in Go's words.

use serde_json::{Number, Value};

use super::{
    MAX_LISTED, SchemaReport,
    shape::{Shape, Ty},
};
use crate::quantity::Quantity;

/// Checks `object` against `shape`.
pub(super) fn run(shape: &'static Shape, object: &Value) -> SchemaReport {
    let mut walk = Walk { report: SchemaReport::default(), path: Vec::new(), owner: shape.short_name() };
    walk.structure(shape, object);
    walk.report
}

/// One step of a path; errors about types leave the indices out, as Go does.
#[derive(Clone, Copy)]
enum Step<'a> {
    Field(&'a str),
    Index(usize),
}

struct Walk<'a> {
    report: SchemaReport,
    path: Vec<Step<'a>>,
    /// Go's name of the innermost struct.
    owner: &'static str,
}

impl<'a> Walk<'a> {
    fn structure(&mut self, shape: &'static Shape, value: &'a Value) {
        let Some(map) = value.as_object() else {
            if !value.is_null() {
                self.wrong(value, &format!("v1.{}", shape.short_name()));
            }
            return;
        };
        let outer = std::mem::replace(&mut self.owner, shape.short_name());
        for (name, child) in map {
            self.path.push(Step::Field(name));
            match shape.field(name) {
                Some(field) => self.value(field.ty, child),
                None => self.unknown(),
            }
            self.path.pop();
        }
        self.owner = outer;
    }

    fn value(&mut self, ty: Ty, value: &'a Value) {
        if value.is_null() {
            return;
        }
        match (ty, value) {
            (Ty::Object(index), _) => self.structure(Shape::at(index), value),
            (Ty::List(of), Value::Array(items)) => {
                for (index, item) in items.iter().enumerate() {
                    self.path.push(Step::Index(index));
                    self.value(*of, item);
                    self.path.pop();
                }
            }
            (Ty::Map(of), Value::Object(map)) => {
                for (name, item) in map {
                    self.path.push(Step::Field(name));
                    self.value(*of, item);
                    self.path.pop();
                }
            }
            (Ty::Any, _)
            | (Ty::Text | Ty::IntOrString, Value::String(_))
            | (Ty::Bool, Value::Bool(_))
            | (Ty::Double, Value::Number(_)) => {}
            (Ty::Int32 | Ty::Int64, Value::Number(number)) => self.integer(ty, number),
            (Ty::IntOrString, Value::Number(number)) => self.integer(Ty::Int32, number),
            (Ty::IntOrString, other) => {
                self.fail(format!("json: cannot unmarshal {} into Go value of type int32", kind_of(other)));
            }
            (Ty::Quantity, other) => self.quantity(other),
            (Ty::Time | Ty::MicroTime, Value::String(text)) => self.time(text),
            (Ty::Time | Ty::MicroTime, other) => {
                self.fail(format!("json: cannot unmarshal {} into Go value of type string", kind_of(other)));
            }
            (Ty::Bytes, Value::String(text)) => self.bytes(text),
            (_, other) => self.wrong(other, &ty.go_name()),
        }
    }

    fn integer(&mut self, ty: Ty, number: &Number) {
        let fits = match number.as_i64() {
            Some(n) => ty == Ty::Int64 || i32::try_from(n).is_ok(),
            // Go's decoder takes `1.0` and `1e3` for no integer either.
            None => false,
        };
        if !fits {
            self.wrong_text(&format!("number {number}"), &ty.go_name());
        }
    }

    fn quantity(&mut self, value: &Value) {
        let parsed = match value {
            Value::String(text) => Quantity::parse(text.trim()),
            Value::Number(number) => Quantity::parse(&number.to_string()),
            other => Quantity::parse(&other.to_string()),
        };
        if let Err(why) = parsed {
            self.fail(why.to_string());
        }
    }

    fn time(&mut self, text: &str) {
        if text.parse::<jiff::Timestamp>().is_err() {
            self.fail(format!(
                "parsing time \"{text}\" as \"2006-01-02T15:04:05Z07:00\": cannot parse \"{text}\" as \"2006\""
            ));
        }
    }

    fn bytes(&mut self, text: &str) {
        use base64::{Engine as _, engine::general_purpose::STANDARD};
        // Go skips line breaks inside base64.
        let clean: std::borrow::Cow<'_, str> = if text.contains(['\n', '\r']) {
            text.chars().filter(|c| !matches!(c, '\n' | '\r')).collect::<String>().into()
        } else {
            text.into()
        };
        if let Err(why) = STANDARD.decode(clean.as_bytes()) {
            let at = match why {
                base64::DecodeError::InvalidByte(at, _)
                | base64::DecodeError::InvalidLastSymbol { offset: at, .. } => at,
                base64::DecodeError::InvalidLength(_) | base64::DecodeError::InvalidPadding => clean.len(),
            };
            self.fail(format!("illegal base64 data at input byte {at}"));
        }
    }

    fn wrong(&mut self, value: &Value, wanted: &str) {
        self.wrong_text(kind_of(value), wanted);
    }

    fn wrong_text(&mut self, found: &str, wanted: &str) {
        let fields: Vec<&str> = self
            .path
            .iter()
            .filter_map(|step| match step {
                Step::Field(name) => Some(*name),
                Step::Index(_) => None,
            })
            .collect();
        if fields.is_empty() {
            self.fail(format!("json: cannot unmarshal {found} into Go value of type {wanted}"));
        } else {
            let (owner, path) = (self.owner, fields.join("."));
            self.fail(format!(
                "json: cannot unmarshal {found} into Go struct field {owner}.{path} of type {wanted}"
            ));
        }
    }

    fn fail(&mut self, message: String) {
        self.report.type_error.get_or_insert(message);
    }

    fn unknown(&mut self) {
        if self.report.unknown.len() >= MAX_LISTED {
            return;
        }
        let mut text = String::new();
        for step in &self.path {
            match step {
                Step::Field(name) if text.is_empty() => text.push_str(name),
                Step::Field(name) => text.extend([".", *name]),
                Step::Index(index) => text.extend(["[", &index.to_string(), "]"]),
            }
        }
        self.report.unknown.push(format!("unknown field \"{text}\""));
    }
}

/// Go's name of a JSON value's kind.
fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::{kinds, schema::check};

    #[allow(clippy::needless_pass_by_value, reason = "test tables pass literals")]
    fn deployment(container: serde_json::Value, replicas: serde_json::Value) -> serde_json::Value {
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
            "spec": {"replicas": replicas, "template": {"spec": {"containers": [container]}}},
        })
    }

    #[test]
    fn unknown_fields_are_named_with_their_path() {
        let info = kinds::find("apps", "v1", "deployments").unwrap();
        let mut object = deployment(json!({"name": "a", "imagee": "x"}), json!(1));
        object["spec"]["foo"] = json!(1);
        let report = check(info, &object);
        assert_eq!(
            report.strict_error(info, &[]).unwrap().message,
            "Deployment in version \"v1\" cannot be handled as a Deployment: strict decoding error: unknown field \
             \"spec.foo\", unknown field \"spec.template.spec.containers[0].imagee\""
        );
        super::super::prune(info, &mut object);
        assert_eq!(check(info, &object), crate::schema::SchemaReport::default());
    }

    #[test]
    fn wrong_types_read_as_gos_decoder_says() {
        let info = kinds::find("apps", "v1", "deployments").unwrap();
        let cases = [
            (
                deployment(json!({}), json!("three")),
                "json: cannot unmarshal string into Go struct field DeploymentSpec.spec.replicas of type int32",
            ),
            (
                deployment(json!({"ports": {"containerPort": 80}}), json!(1)),
                "json: cannot unmarshal object into Go struct field \
                 Container.spec.template.spec.containers.ports of type []v1.ContainerPort",
            ),
            (
                deployment(json!({}), json!(1.5)),
                "json: cannot unmarshal number 1.5 into Go struct field DeploymentSpec.spec.replicas of type int32",
            ),
            (
                deployment(json!({"resources": {"limits": {"cpu": "lots"}}}), json!(1)),
                "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]+)?$'",
            ),
        ];
        for (object, expected) in cases {
            assert_eq!(check(info, &object).type_error.as_deref(), Some(expected));
        }
        let fine = deployment(json!({"resources": {"limits": {"cpu": 1, "memory": "1Gi"}}}), json!(null));
        assert_eq!(check(info, &fine).type_error, None);
        let mut stored = fine;
        super::super::prune(info, &mut stored);
        let container = &stored["spec"]["template"]["spec"]["containers"][0];
        assert_eq!(container["resources"]["limits"], json!({"cpu": "1", "memory": "1Gi"}));
        assert!(stored["spec"].get("replicas").is_none());
    }
}
