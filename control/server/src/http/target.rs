//! What a request is about: its resource, namespace, name, subresource and verb, read from method, path and query. Pure.

use control_api::kinds::{self, ResourceInfo};
use http::Method;

use super::query::{self, Query};

/// A request for a resource, or for something else.
#[derive(Clone, Debug)]
pub(crate) enum Target {
    /// `/api/v1/…` or `/apis/G/V/…` down to a known resource.
    Resource(ResourceTarget),
    /// Anything else: discovery, OpenAPI, health, unknown paths.
    Other {
        /// The path.
        path: String,
        /// `get`, `post`, …
        verb: &'static str,
    },
}

/// A request for a resource.
#[derive(Clone, Debug)]
pub(crate) struct ResourceTarget {
    /// The resource.
    pub info: &'static ResourceInfo,
    /// The namespace of the path.
    pub namespace: Option<String>,
    /// The object's name.
    pub name: Option<String>,
    /// The subresource.
    pub subresource: Option<String>,
    /// What is asked: `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`, `deletecollection`.
    pub verb: &'static str,
}

impl ResourceTarget {
    /// `pods` or `pods/log`.
    pub(crate) fn resource(&self) -> String {
        match &self.subresource {
            Some(subresource) => format!("{}/{subresource}", self.info.plural),
            None => self.info.plural.to_owned(),
        }
    }

    /// The subresource, empty where none is asked for.
    pub(crate) fn sub(&self) -> &str {
        self.subresource.as_deref().unwrap_or_default()
    }

    /// Whether the answer may take as long as it likes.
    pub(crate) fn is_long_running(&self) -> bool {
        self.verb == "watch" || matches!(self.sub(), "log" | "exec" | "attach" | "portforward" | "proxy")
    }
}

impl Target {
    /// Read a request line.
    pub(crate) fn parse(method: &Method, path: &str, query: &Query) -> Self {
        let segments: Vec<String> =
            path.split('/').filter(|segment| !segment.is_empty()).map(|s| query::decode(s, false)).collect();
        let parts: Vec<&str> = segments.iter().map(String::as_str).collect();
        let found = match parts.as_slice() {
            ["api", version, rest @ ..] => locate("", version, rest),
            ["apis", group, version, rest @ ..] => locate(group, version, rest),
            _ => None,
        };
        match found {
            Some((info, namespace, name, subresource)) => {
                let verb = resource_verb(method, name.is_some(), subresource.is_some(), query);
                Self::Resource(ResourceTarget { info, namespace, name, subresource, verb })
            }
            None => Self::Other { path: path.to_owned(), verb: plain_verb(method) },
        }
    }
}

type Located = (&'static ResourceInfo, Option<String>, Option<String>, Option<String>);

fn locate(group: &str, version: &str, rest: &[&str]) -> Option<Located> {
    let owned = |text: &&str| Some((*text).to_owned());
    match rest {
        // The namespace itself and its own subresources, not objects inside it.
        ["namespaces", name, sub @ ("status" | "finalize")] if group.is_empty() => {
            Some((kinds::find("", version, "namespaces")?, None, owned(name), owned(sub)))
        }
        ["namespaces", namespace, plural, rest @ ..] => {
            let info = kinds::find(group, version, plural).filter(|info| info.namespaced)?;
            let (name, subresource) = tail(rest)?;
            Some((info, owned(namespace), name, subresource))
        }
        [plural, rest @ ..] => {
            let info = kinds::find(group, version, plural)?;
            let (name, subresource) = tail(rest)?;
            if info.namespaced && name.is_some() {
                return None;
            }
            Some((info, None, name, subresource))
        }
        [] => None,
    }
}

/// Name and subresource; `proxy` may be followed by any path.
fn tail(rest: &[&str]) -> Option<(Option<String>, Option<String>)> {
    match rest {
        [] => Some((None, None)),
        [name] => Some((Some((*name).to_owned()), None)),
        [name, subresource] => Some((Some((*name).to_owned()), Some((*subresource).to_owned()))),
        [name, "proxy", ..] => Some((Some((*name).to_owned()), Some("proxy".to_owned()))),
        _ => None,
    }
}

fn resource_verb(method: &Method, named: bool, subresource: bool, query: &Query) -> &'static str {
    match *method {
        Method::GET | Method::HEAD if query.flag("watch") && !subresource => "watch",
        Method::GET | Method::HEAD if named => "get",
        Method::GET | Method::HEAD => "list",
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE if named => "delete",
        Method::DELETE => "deletecollection",
        _ => "",
    }
}

fn plain_verb(method: &Method) -> &'static str {
    match *method {
        Method::GET => "get",
        Method::HEAD => "head",
        Method::POST => "post",
        Method::PUT => "put",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(request: &str, want: &str) {
        let (method, uri) = request.split_once(' ').unwrap();
        let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
        let got = match Target::parse(&method.parse().unwrap(), path, &Query::parse(Some(query))) {
            Target::Resource(target) => format!(
                "{} {} ns={} name={}",
                target.verb,
                target.resource(),
                target.namespace.as_deref().unwrap_or("-"),
                target.name.as_deref().unwrap_or("-")
            ),
            Target::Other { path, verb } => format!("{verb} {path}"),
        };
        assert_eq!(got, want);
    }

    #[test]
    fn paths_become_targets() {
        check("GET /api/v1/pods", "list pods ns=- name=-");
        check("GET /api/v1/pods?watch=true", "watch pods ns=- name=-");
        check("GET /api/v1/namespaces/default/pods/web", "get pods ns=default name=web");
        check("GET /api/v1/namespaces/default/pods/web/log?follow=true", "get pods/log ns=default name=web");
        check("POST /api/v1/namespaces/d/pods/web/exec?command=sh", "create pods/exec ns=d name=web");
        check("GET /api/v1/namespaces/default", "get namespaces ns=- name=default");
        check("PUT /api/v1/namespaces/default/finalize", "update namespaces/finalize ns=- name=default");
        check("DELETE /apis/apps/v1/namespaces/d/deployments", "deletecollection deployments ns=d name=-");
        check("PATCH /apis/apps/v1/namespaces/d/deployments/w/scale", "patch deployments/scale ns=d name=w");
        check("GET /apis/apps/v1", "get /apis/apps/v1");
        check("GET /apis/apps/v1/namespaces/d/nothing", "get /apis/apps/v1/namespaces/d/nothing");
        check("GET /api/v1/pods/web", "get /api/v1/pods/web");
    }
}
