//! The resources this API server knows, as one table.
//!
//! Input: a group, version and plural name (from a URL) or an apiVersion and kind (from an object). Output: the
//! static row that says how the resource is named, stored, selected, printed and which verbs it has. Adding a kind is
//! adding a row to `table.rs` (and regenerating `src/gen`, see [`crate::schema`]). Nothing here looks at objects.

mod table;

pub use table::RESOURCES;

/// Name syntax an object's `metadata.name` must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameRule {
    /// RFC 1123 subdomain, at most 253 characters; the usual one.
    Subdomain,
    /// RFC 1123 label, at most 63 characters (namespaces).
    Label1123,
    /// RFC 1035 label, at most 63 characters (services).
    Label1035,
    /// Anything that is a path segment.
    PathSegment,
}

/// How objects of a resource live.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// Stored below `/registry/<prefix>/`.
    Stored {
        /// Upstream's prefix, for example `services/specs`.
        prefix: &'static str,
    },
    /// A request that is answered and forgotten (reviews, bindings).
    CreateOnly,
}

/// A field that a field selector may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SelectableField {
    /// The name in the selector, for example `spec.nodeName`.
    pub name: &'static str,
    /// JSON pointers into the stored form; the first that exists wins (`source` of events has two).
    pub pointers: &'static [&'static str],
    /// What an absent value counts as.
    pub default: &'static str,
}

/// A subresource such as `status` or `exec`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subresource {
    /// Path segment after the object's name.
    pub name: &'static str,
    /// Kind of the body.
    pub kind: &'static str,
    /// Group of the body's kind; the parent's when it is `None`.
    pub group_version: Option<(&'static str, &'static str)>,
    /// Verbs, sorted.
    pub verbs: &'static [&'static str],
}

/// One row: everything the server must know about a resource.
#[derive(Debug, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "independent facts of a table row, not states")]
pub struct ResourceInfo {
    /// API group, empty for core.
    pub group: &'static str,
    /// Version within the group.
    pub version: &'static str,
    /// Plural name, the URL segment.
    pub plural: &'static str,
    /// Singular name.
    pub singular: &'static str,
    /// Kind.
    pub kind: &'static str,
    /// Kind of a list of it.
    pub list_kind: &'static str,
    /// Name of the OpenAPI definition.
    pub definition: &'static str,
    /// Whether objects live in a namespace.
    pub namespaced: bool,
    /// Names kubectl expands.
    pub short_names: &'static [&'static str],
    /// Categories (`all`).
    pub categories: &'static [&'static str],
    /// Verbs of the resource itself, sorted.
    pub verbs: &'static [&'static str],
    /// Subresources.
    pub subresources: &'static [Subresource],
    /// Where objects are kept.
    pub storage: Storage,
    /// Name syntax.
    pub name_rule: NameRule,
    /// Deletion waits for the node (pods): the object stays with a deletionTimestamp until deleted with grace 0.
    pub graceful_delete: bool,
    /// Whether `metadata.generation` is kept.
    pub generation: bool,
    /// PUT to a name that does not exist creates the object.
    pub create_on_update: bool,
    /// PUT without a resourceVersion overwrites.
    pub unconditional_update: bool,
    /// Fields a field selector may name, beside `metadata.name` and `metadata.namespace`.
    pub selectable: &'static [SelectableField],
}

impl ResourceInfo {
    /// `v1` or `apps/v1`.
    pub fn api_version(&self) -> String {
        api_version(self.group, self.version)
    }

    /// `pods` or `deployments.apps`, as error messages name it.
    pub fn qualified_plural(&self) -> String {
        qualify(self.plural, self.group)
    }

    /// `Pod` or `Deployment.apps`, as "is invalid" messages name it.
    pub fn qualified_kind(&self) -> String {
        qualify(self.kind, self.group)
    }

    /// The subresource of that name.
    pub fn subresource(&self, name: &str) -> Option<&'static Subresource> {
        self.subresources.iter().find(|s| s.name == name)
    }

    /// Whether `status` is written through its own subresource.
    pub fn has_status(&self) -> bool {
        self.subresource("status").is_some()
    }

    /// Whether the resource itself allows the verb.
    pub fn allows(&self, verb: &str) -> bool {
        self.verbs.contains(&verb)
    }

    /// Whether objects are stored at all.
    pub fn is_stored(&self) -> bool {
        matches!(self.storage, Storage::Stored { .. })
    }

    /// Prefix of all objects, or of one namespace's: `/registry/pods/default/`. Always ends with `/`.
    /// Empty for resources that are not stored.
    pub fn list_prefix(&self, namespace: Option<&str>) -> String {
        let Storage::Stored { prefix } = self.storage else { return String::new() };
        match namespace.filter(|_| self.namespaced) {
            Some(namespace) => format!("/registry/{prefix}/{namespace}/"),
            None => format!("/registry/{prefix}/"),
        }
    }

    /// Key of one object; `namespace` is ignored for cluster-scoped kinds.
    pub fn object_key(&self, namespace: Option<&str>, name: &str) -> String {
        format!("{}{name}", self.list_prefix(namespace))
    }
}

/// `v1` for the core group, else `group/version`.
pub fn api_version(group: &str, version: &str) -> String {
    if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") }
}

fn qualify(name: &str, group: &str) -> String {
    if group.is_empty() { name.to_owned() } else { format!("{name}.{group}") }
}

/// The row for a URL's group, version and plural.
pub fn find(group: &str, version: &str, plural: &str) -> Option<&'static ResourceInfo> {
    RESOURCES.iter().find(|r| r.plural == plural && r.group == group && r.version == version)
}

/// The row for an object's `apiVersion` and `kind`.
pub fn by_kind(api_version: &str, kind: &str) -> Option<&'static ResourceInfo> {
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    RESOURCES.iter().find(|r| r.kind == kind && r.group == group && r.version == version)
}

/// Groups and their versions in discovery order: core first, then as the table lists them.
pub fn group_versions() -> Vec<(&'static str, &'static str)> {
    let mut seen = Vec::new();
    for row in RESOURCES {
        if !seen.contains(&(row.group, row.version)) {
            seen.push((row.group, row.version));
        }
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_found_both_ways_and_unique() {
        for row in RESOURCES {
            assert_eq!(find(row.group, row.version, row.plural), Some(row));
            assert_eq!(by_kind(&row.api_version(), row.kind), Some(row));
            assert!(row.verbs.is_sorted(), "{}", row.plural);
            assert!(row.subresources.iter().all(|s| s.verbs.is_sorted()), "{}", row.plural);
        }
    }

    #[test]
    fn keys_follow_the_registry_layout() {
        let services = find("", "v1", "services").unwrap();
        assert_eq!(services.object_key(Some("default"), "web"), "/registry/services/specs/default/web");
        let nodes = find("", "v1", "nodes").unwrap();
        assert_eq!(nodes.object_key(None, "a"), "/registry/minions/a");
        assert_eq!(find("apps", "v1", "deployments").unwrap().qualified_plural(), "deployments.apps");
    }
}
