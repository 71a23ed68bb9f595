//! Query parameters of reads and writes. Pure.

use control_api::{
    kinds::ResourceInfo,
    meta::{self, DeleteOptions},
    selector::{FieldSelector, LabelSelector},
    status::{ApiError, FieldError},
};
use control_store::Revision;
use http::{HeaderMap, header};
use serde_json::Value;

use crate::{cache::Object, http::query::Query};

/// Which state a read wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Freshness {
    /// The newest.
    Latest,
    /// Any.
    Any,
    /// Not older than a revision.
    AtLeast(Revision),
    /// Exactly a revision.
    Exact(Revision),
}

/// What a list or watch selects.
#[derive(Clone, Debug, Default)]
pub(crate) struct Selection {
    /// Only this namespace.
    pub namespace: Option<String>,
    labels: LabelSelector,
    fields: FieldSelector,
    name: Option<String>,
}

impl Selection {
    /// From the parameters of a request.
    pub(crate) fn parse(
        info: &ResourceInfo,
        namespace: Option<&str>,
        name: Option<&str>,
        query: &Query,
    ) -> Result<Self, ApiError> {
        let labels = LabelSelector::parse(query.get("labelSelector"))?;
        let fields = FieldSelector::parse(info, query.get("fieldSelector"))?;
        let name = name.or(fields.exact("metadata.name")).map(str::to_owned);
        let namespace = namespace.or(fields.exact("metadata.namespace")).map(str::to_owned);
        Ok(Self { namespace, labels, fields, name })
    }

    /// Whether every object of the namespace is selected.
    pub(crate) fn is_all(&self) -> bool {
        self.labels.is_empty() && self.fields.is_empty() && self.name.is_none()
    }

    /// Whether an object is selected, its namespace included.
    pub(crate) fn matches(&self, object: &Object) -> bool {
        if self.namespace.as_deref().is_some_and(|namespace| namespace != object.namespace())
            || self.name.as_deref().is_some_and(|name| name != object.name())
        {
            return false;
        }
        (self.labels.is_empty() && self.fields.is_empty()) || object.satisfies(&self.labels, &self.fields)
    }
}

/// Where a list begins and how long it may be.
#[derive(Clone, Debug)]
pub(crate) struct ListOptions {
    /// What is selected.
    pub selection: Selection,
    /// At most so many objects; 0 means all.
    pub limit: usize,
    /// Continue token.
    pub token: String,
    /// Which state is wanted.
    pub freshness: Freshness,
}

impl ListOptions {
    /// From the parameters of a request.
    pub(crate) fn parse(
        info: &ResourceInfo,
        namespace: Option<&str>,
        query: &Query,
    ) -> Result<Self, ApiError> {
        let limit = number(query, "limit")?.unwrap_or(0);
        let freshness = freshness(info, query)?;
        let token = query.get("continue").to_owned();
        if !token.is_empty() && !query.get("resourceVersionMatch").is_empty() {
            let why = "resourceVersionMatch is forbidden when continue is provided";
            return Err(invalid(info, FieldError::forbidden("resourceVersionMatch", why)));
        }
        let selection = Selection::parse(info, namespace, None, query)?;
        Ok(Self { selection, limit: usize::try_from(limit).unwrap_or(usize::MAX), token, freshness })
    }
}

/// The state that `resourceVersion` and `resourceVersionMatch` ask for.
pub(crate) fn freshness(info: &ResourceInfo, query: &Query) -> Result<Freshness, ApiError> {
    let version = query.get("resourceVersion");
    let revision = match version {
        "" => None,
        text => Some(Revision(text.parse().map_err(|_not_a_number| {
            invalid(info, FieldError::invalid("resourceVersion", text, "strconv.ParseUint: invalid syntax"))
        })?)),
    };
    let forbidden = |why: &str| Err(invalid(info, FieldError::forbidden("resourceVersionMatch", why)));
    match (query.get("resourceVersionMatch"), revision) {
        ("", None) => Ok(Freshness::Latest),
        ("" | "NotOlderThan", Some(Revision(0))) => Ok(Freshness::Any),
        ("" | "NotOlderThan", Some(revision)) => Ok(Freshness::AtLeast(revision)),
        ("Exact", Some(Revision(0))) => {
            forbidden("resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"")
        }
        ("Exact", Some(revision)) => Ok(Freshness::Exact(revision)),
        ("NotOlderThan", None) if query.flag("sendInitialEvents") => Ok(Freshness::Latest),
        ("Exact" | "NotOlderThan", None) => {
            forbidden("resourceVersionMatch is forbidden unless resourceVersion is provided")
        }
        (other, _) => Err(invalid(
            info,
            FieldError::not_supported("resourceVersionMatch", other, &["Exact", "NotOlderThan", ""]),
        )),
    }
}

/// A parameter that must be a number, where it is there.
pub(crate) fn number(query: &Query, name: &str) -> Result<Option<u64>, ApiError> {
    match query.get(name) {
        "" => Ok(None),
        text => text.parse().map(Some).map_err(|_not_a_number| {
            ApiError::bad_request(format!("{name} must be a whole number, not \"{text}\""))
        }),
    }
}

/// How strictly fields are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FieldValidation {
    /// Unknown fields are dropped silently.
    Ignore,
    /// They are dropped with a warning.
    Warn,
    /// They are errors.
    Strict,
}

/// Parameters of a write.
#[derive(Clone, Debug)]
pub(crate) struct WriteOptions {
    /// Nothing is stored.
    pub dry_run: bool,
    /// Treatment of unknown fields.
    pub validation: FieldValidation,
    /// `fieldManager`, or what the client calls itself.
    pub field_manager: String,
    /// The client named a `fieldManager`.
    pub named_manager: bool,
    /// `force`, for server-side apply.
    pub force: bool,
}

impl WriteOptions {
    /// From the parameters of a request.
    pub(crate) fn parse(query: &Query, headers: &HeaderMap) -> Result<Self, ApiError> {
        let validation = match query.get("fieldValidation") {
            "" | "Warn" => FieldValidation::Warn,
            "Ignore" => FieldValidation::Ignore,
            "Strict" => FieldValidation::Strict,
            other => {
                return Err(ApiError::bad_request(format!(
                    "fieldValidation: Unsupported value: \"{other}\": supported values: \"Ignore\", \"Strict\", \"Warn\""
                )));
            }
        };
        Ok(Self {
            dry_run: dry_run(query)?,
            validation,
            field_manager: field_manager(query, headers),
            named_manager: !query.get("fieldManager").is_empty(),
            force: query.flag("force"),
        })
    }

    /// The server's own writes.
    pub(crate) fn internal() -> Self {
        Self {
            dry_run: false,
            validation: FieldValidation::Strict,
            field_manager: "keelson".to_owned(),
            named_manager: true,
            force: false,
        }
    }
}

/// The named manager, else the first word of the user agent, as upstream.
fn field_manager(query: &Query, headers: &HeaderMap) -> String {
    let named = query.get("fieldManager");
    let agent = headers.get(header::USER_AGENT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let own = agent.split('/').next().unwrap_or_default();
    let name = if named.is_empty() { own } else { named };
    name.chars().filter(|c| !c.is_control()).take(128).collect()
}

fn dry_run(query: &Query) -> Result<bool, ApiError> {
    match query.all("dryRun").find(|value| !matches!(*value, "" | "All")) {
        Some(other) => Err(ApiError::bad_request(format!(
            "dryRun: Unsupported value: \"{other}\": supported values: \"All\""
        ))),
        None => Ok(query.get("dryRun") == "All"),
    }
}

/// Options of a DELETE, from its body and, over it, its parameters.
pub(crate) fn delete_options(body: &Value, query: &Query) -> Result<DeleteOptions, ApiError> {
    let mut options = meta::delete_options(body)?;
    if let Some(seconds) = number(query, "gracePeriodSeconds")? {
        options.grace_period_seconds = Some(i64::try_from(seconds).unwrap_or(i64::MAX));
    }
    match query.get("propagationPolicy") {
        "" => {}
        policy => options.propagation = Some(meta::deletion::propagation(policy)?),
    }
    options.dry_run |= dry_run(query)?;
    Ok(options)
}

fn invalid(info: &ResourceInfo, error: FieldError) -> ApiError {
    ApiError::invalid(info, "", &[error])
}
