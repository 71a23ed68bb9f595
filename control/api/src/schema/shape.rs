//! The compact form of a schema: static tables of fields and how they merge.
//!
//! Filled by generated code (`src/gen/shapes.rs`), read by field checking, patches and server-side apply. Costs no
//! heap: everything is in the binary's read-only data.

use super::shapes::SHAPES;

/// The type of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ty {
    /// A string.
    Text,
    /// A boolean.
    Bool,
    /// A 32-bit integer.
    Int32,
    /// A 64-bit integer.
    Int64,
    /// A float.
    #[allow(
        dead_code,
        reason = "no type that is served now has a float; the generator names it when one does"
    )]
    Double,
    /// Base64.
    Bytes,
    /// RFC 3339, seconds.
    Time,
    /// RFC 3339, microseconds.
    MicroTime,
    /// A `resource.Quantity`.
    Quantity,
    /// A port or percentage.
    IntOrString,
    /// Anything (raw extensions, managed fields).
    Any,
    /// A struct, by its index in the table.
    Object(u16),
    /// A list of.
    List(&'static Ty),
    /// A map from strings to.
    Map(&'static Ty),
}

/// How a field merges in strategic merge patches and server-side apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "independent facts of a table row, not states")]
pub(crate) struct Rule {
    /// Lists merge instead of being replaced (`patchStrategy: merge`).
    pub(crate) merge: bool,
    /// Keys the patch does not list may be dropped (`patchStrategy: retainKeys`).
    pub(crate) retain_keys: bool,
    /// Which field tells elements apart; empty for lists of scalars.
    pub(crate) merge_key: &'static str,
    /// The same for server-side apply, where several fields may be the key.
    pub(crate) list_keys: &'static [&'static str],
    /// A list with set semantics.
    pub(crate) set: bool,
    /// A map or struct that is replaced as a whole.
    pub(crate) atomic: bool,
}

/// One field of a struct.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Field {
    /// JSON name.
    pub(crate) name: &'static str,
    /// Type.
    pub(crate) ty: Ty,
    /// Merging.
    pub(crate) rule: Rule,
}

/// One struct.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// OpenAPI definition name.
    pub(crate) name: &'static str,
    /// Server-side apply replaces it as a whole.
    pub(crate) atomic: bool,
    /// Fields, sorted by name.
    pub(crate) fields: &'static [Field],
}

const REPLACED: Rule =
    Rule { merge: false, retain_keys: false, merge_key: "", list_keys: &[], set: false, atomic: false };

/// A field that is simply replaced.
pub(crate) const fn f(name: &'static str, ty: Ty) -> Field {
    Field { name, ty, rule: REPLACED }
}

/// A field with a rule.
pub(crate) const fn r(name: &'static str, ty: Ty, rule: Rule) -> Field {
    Field { name, ty, rule }
}

/// A map that server-side apply replaces as a whole.
pub(crate) const fn atomic(name: &'static str, ty: Ty) -> Field {
    Field { name, ty, rule: Rule { atomic: true, ..REPLACED } }
}

impl Shape {
    /// The struct of a definition.
    pub(crate) fn of_definition(definition: &str) -> Option<&'static Shape> {
        SHAPES.binary_search_by(|s| s.name.cmp(definition)).ok().map(|at| &SHAPES[at])
    }

    /// The struct at an index of the table.
    pub(crate) fn at(index: u16) -> &'static Shape {
        &SHAPES[usize::from(index)]
    }

    /// A field by its JSON name.
    pub(crate) fn field(&self, name: &str) -> Option<&'static Field> {
        self.fields.binary_search_by(|f| f.name.cmp(name)).ok().map(|at| &self.fields[at])
    }

    /// Go's name of the struct: `Container`.
    pub(crate) fn short_name(&self) -> &'static str {
        self.name.rsplit('.').next().unwrap_or(self.name)
    }
}

impl Ty {
    /// Go's name of the type, as decoding errors show it.
    pub(crate) fn go_name(self) -> String {
        match self {
            Self::Text => "string".to_owned(),
            Self::Bool => "bool".to_owned(),
            Self::Int32 => "int32".to_owned(),
            Self::Int64 => "int64".to_owned(),
            Self::Double => "float64".to_owned(),
            Self::Bytes => "[]uint8".to_owned(),
            Self::Time => "v1.Time".to_owned(),
            Self::MicroTime => "v1.MicroTime".to_owned(),
            Self::Quantity => "resource.Quantity".to_owned(),
            Self::IntOrString => "intstr.IntOrString".to_owned(),
            Self::Any => "runtime.RawExtension".to_owned(),
            Self::Object(index) => format!("v1.{}", Shape::at(index).short_name()),
            Self::List(of) => format!("[]{}", of.go_name()),
            Self::Map(of) => format!("map[string]{}", of.go_name()),
        }
    }
}
