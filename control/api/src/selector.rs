//! Label and field selectors: parse and match.
//!
//! Input: the query parameters `labelSelector` and `fieldSelector`, or a `metav1.LabelSelector`. Output: a predicate
//! over objects. Unknown fields and bad syntax are errors; nothing matches by accident.

use std::{collections::BTreeSet, fmt};

use serde_json::{Map, Value};

use crate::{
    kinds::{ResourceInfo, SelectableField},
    status::ApiError,
    validate::names,
    value,
};

/// A conjunction of label requirements; the empty one matches everything.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LabelSelector {
    requirements: Vec<Requirement>,
    /// A `null` selector in an object selects nothing.
    matches_nothing: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Requirement {
    key: String,
    test: Test,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Test {
    Equals(String),
    NotEquals(String),
    In(BTreeSet<String>),
    NotIn(BTreeSet<String>),
    Exists,
    NotExists,
    GreaterThan(i64),
    LessThan(i64),
}

impl LabelSelector {
    /// Parses the string form, `a=b,c!=d,e in (f,g),h,!i,j>1`.
    pub fn parse(text: &str) -> Result<Self, ApiError> {
        let fail = |why: String| ApiError::bad_request(format!("unable to parse requirement: {why}"));
        let mut requirements = Vec::new();
        for part in split_top_level(text) {
            let part = part.trim();
            if part.is_empty() {
                if text.trim().is_empty() {
                    break;
                }
                return Err(fail("found ',', expected: identifier after ','".to_owned()));
            }
            requirements.push(Requirement::parse(part).map_err(fail)?);
        }
        Ok(Self { requirements, matches_nothing: false })
    }

    /// Reads a `metav1.LabelSelector` (`matchLabels`, `matchExpressions`); `null` selects nothing.
    pub fn from_json(selector: &Value) -> Result<Self, ApiError> {
        let Some(selector) = selector.as_object() else {
            return Ok(Self { requirements: Vec::new(), matches_nothing: true });
        };
        let empty = Map::new();
        let labels = selector.get("matchLabels").and_then(Value::as_object).unwrap_or(&empty);
        let mut requirements: Vec<Requirement> = labels
            .iter()
            .map(|(key, wanted)| {
                let wanted = wanted.as_str().unwrap_or_default().to_owned();
                Requirement { key: key.clone(), test: Test::Equals(wanted) }
            })
            .collect();
        let expressions = selector.get("matchExpressions").and_then(Value::as_array);
        for expression in expressions.into_iter().flatten() {
            requirements.push(Requirement::from_expression(expression)?);
        }
        Ok(Self { requirements, matches_nothing: false })
    }

    /// A selector of equal labels, as Services have; an absent or empty map selects nothing.
    pub fn from_map(labels: Option<&Map<String, Value>>) -> Self {
        let Some(labels) = labels.filter(|l| !l.is_empty()) else {
            return Self { requirements: Vec::new(), matches_nothing: true };
        };
        let requirements = labels
            .iter()
            .map(|(key, wanted)| {
                let wanted = wanted.as_str().unwrap_or_default().to_owned();
                Requirement { key: key.clone(), test: Test::Equals(wanted) }
            })
            .collect();
        Self { requirements, matches_nothing: false }
    }

    /// Whether an object's labels satisfy every requirement.
    pub fn matches(&self, object: &Value) -> bool {
        self.matches_labels(value::map(object, "/metadata/labels"))
    }

    /// The same for a bare label map.
    pub fn matches_labels(&self, labels: Option<&Map<String, Value>>) -> bool {
        !self.matches_nothing
            && self.requirements.iter().all(|r| {
                let found = labels.and_then(|l| l.get(&r.key)).and_then(Value::as_str);
                r.test.holds(found)
            })
    }

    /// Whether it selects everything.
    pub fn is_empty(&self) -> bool {
        self.requirements.is_empty() && !self.matches_nothing
    }
}

impl fmt::Display for LabelSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.matches_nothing {
            return write!(f, "<none>");
        }
        for (i, requirement) in self.requirements.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            write!(f, "{comma}{requirement}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Requirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = &self.key;
        let join = |set: &BTreeSet<String>| set.iter().map(String::as_str).collect::<Vec<_>>().join(",");
        match &self.test {
            Test::Equals(wanted) => write!(f, "{key}={wanted}"),
            Test::NotEquals(wanted) => write!(f, "{key}!={wanted}"),
            Test::In(set) => write!(f, "{key} in ({})", join(set)),
            Test::NotIn(set) => write!(f, "{key} notin ({})", join(set)),
            Test::Exists => write!(f, "{key}"),
            Test::NotExists => write!(f, "!{key}"),
            Test::GreaterThan(bound) => write!(f, "{key}>{bound}"),
            Test::LessThan(bound) => write!(f, "{key}<{bound}"),
        }
    }
}

impl Requirement {
    fn parse(part: &str) -> Result<Self, String> {
        if let Some(key) = part.strip_prefix('!') {
            return Self::new(key, Test::NotExists);
        }
        for (operator, make) in
            [("!=", Test::NotEquals as fn(String) -> Test), ("==", Test::Equals), ("=", Test::Equals)]
        {
            if let Some((key, wanted)) = part.split_once(operator) {
                let wanted = wanted.trim();
                if let Some(why) = names::label_value(wanted) {
                    return Err(format!("invalid label value: {wanted:?}: {why}"));
                }
                return Self::new(key, make(wanted.to_owned()));
            }
        }
        for (operator, make) in [('>', Test::GreaterThan as fn(i64) -> Test), ('<', Test::LessThan)] {
            if let Some((key, bound)) = part.split_once(operator) {
                let bound = bound.trim();
                let number = bound.parse().map_err(|_not_a_number| {
                    format!("for 'Gt', 'Lt' operators, the value must be an integer: {bound:?}")
                });
                return Self::new(key, make(number?));
            }
        }
        match part.split_once(char::is_whitespace) {
            None => Self::new(part, Test::Exists),
            Some((key, rest)) => Self::parse_set(key, rest.trim()),
        }
    }

    fn parse_set(key: &str, rest: &str) -> Result<Self, String> {
        let (make, list) = if let Some(list) = rest.strip_prefix("notin") {
            (Test::NotIn as fn(BTreeSet<String>) -> Test, list)
        } else if let Some(list) = rest.strip_prefix("in") {
            (Test::In as fn(BTreeSet<String>) -> Test, list)
        } else {
            return Err(format!("found '{rest}', expected: in, notin, =, ==, !=, gt, lt"));
        };
        let inner = list.trim().strip_prefix('(').and_then(|l| l.strip_suffix(')'));
        let inner = inner.ok_or_else(|| format!("found '{}', expected: '('", list.trim()))?;
        Self::new(key, make(inner.split(',').map(|v| v.trim().to_owned()).collect()))
    }

    fn new(key: &str, test: Test) -> Result<Self, String> {
        let key = key.trim();
        match names::qualified_name(key).first() {
            Some(why) => Err(format!("invalid label key {key:?}: {why}")),
            None => Ok(Self { key: key.to_owned(), test }),
        }
    }

    fn from_expression(expression: &Value) -> Result<Self, ApiError> {
        let key = value::text(expression, "/key").to_owned();
        let values: BTreeSet<String> = value::list(expression, "/values")
            .iter()
            .filter_map(Value::as_str)
            .map(ToOwned::to_owned)
            .collect();
        let test = match value::text(expression, "/operator") {
            "In" => Test::In(values),
            "NotIn" => Test::NotIn(values),
            "Exists" => Test::Exists,
            "DoesNotExist" => Test::NotExists,
            other => {
                return Err(ApiError::bad_request(format!(
                    "{other:?} is not a valid label selector operator"
                )));
            }
        };
        Ok(Self { key, test })
    }
}

impl Test {
    fn holds(&self, found: Option<&str>) -> bool {
        let number = || found.and_then(|f| f.parse::<i64>().ok());
        match self {
            Self::Equals(wanted) => found == Some(wanted),
            Self::NotEquals(wanted) => found != Some(wanted),
            Self::In(set) => found.is_some_and(|f| set.contains(f)),
            Self::NotIn(set) => found.is_none_or(|f| !set.contains(f)),
            Self::Exists => found.is_some(),
            Self::NotExists => found.is_none(),
            Self::GreaterThan(bound) => number().is_some_and(|n| n > *bound),
            Self::LessThan(bound) => number().is_some_and(|n| n < *bound),
        }
    }
}

/// Splits at commas that are not inside parentheses.
fn split_top_level(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut depth, mut start) = (0_u32, 0);
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

/// A conjunction of field tests (`=`, `==`, `!=`); evaluated on the stored form of an object.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FieldSelector {
    tests: Vec<FieldTest>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct FieldTest {
    field: SelectableField,
    wanted: String,
    equal: bool,
}

const NAME: SelectableField =
    SelectableField { name: "metadata.name", pointers: &["/metadata/name"], default: "" };
const NAMESPACE: SelectableField =
    SelectableField { name: "metadata.namespace", pointers: &["/metadata/namespace"], default: "" };

impl FieldSelector {
    /// Parses the query parameter for a resource; fields it cannot select by are a 400.
    pub fn parse(info: &ResourceInfo, text: &str) -> Result<Self, ApiError> {
        let mut tests = Vec::new();
        for part in split_unescaped(text).iter().filter(|p| !p.is_empty()) {
            let (name, wanted, equal) = if let Some((name, wanted)) = part.split_once("!=") {
                (name, wanted, false)
            } else if let Some((name, wanted)) = part.split_once("==") {
                (name, wanted, true)
            } else if let Some((name, wanted)) = part.split_once('=') {
                (name, wanted, true)
            } else {
                let why = format!("invalid selector: '{text}'; can't understand '{part}'");
                return Err(ApiError::bad_request(why));
            };
            let field = lookup(info, name).ok_or_else(|| {
                let version = info.api_version();
                ApiError::bad_request(format!(
                    "Unable to find \"{version}, Resource={}\" that match label selector \"\", field selector \
                     \"{text}\": field label not supported: {name}",
                    info.plural
                ))
            })?;
            tests.push(FieldTest { field, wanted: unescape(wanted), equal });
        }
        Ok(Self { tests })
    }

    /// Whether the stored object satisfies every test.
    pub fn matches(&self, object: &Value) -> bool {
        self.tests.iter().all(|t| (t.field.value(object) == t.wanted) == t.equal)
    }

    /// The value a field is required to equal, for turning a list into a get.
    pub fn exact(&self, name: &str) -> Option<&str> {
        self.tests.iter().find(|t| t.equal && t.field.name == name).map(|t| t.wanted.as_str())
    }

    /// Whether it selects everything.
    pub fn is_empty(&self) -> bool {
        self.tests.is_empty()
    }
}

impl SelectableField {
    /// The field's value as the selector compares it.
    pub fn value(&self, object: &Value) -> String {
        let found = self.pointers.iter().find_map(|p| object.pointer(p));
        match found {
            None | Some(Value::Null) => self.default.to_owned(),
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
        }
    }
}

fn lookup(info: &ResourceInfo, name: &str) -> Option<SelectableField> {
    match name {
        "metadata.name" => Some(NAME),
        "metadata.namespace" if info.namespaced => Some(NAMESPACE),
        _ => info.selectable.iter().find(|f| f.name == name).copied(),
    }
}

/// Splits at commas that no backslash precedes.
fn split_unescaped(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut start, mut escaped) = (0, false);
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            ',' => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut escaped = false;
    for c in text.chars() {
        if c == '\\' && !escaped {
            escaped = true;
        } else {
            escaped = false;
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests;
