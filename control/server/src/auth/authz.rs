//! The fixed policy: masters may do everything, nodes what a node's agent needs, other authenticated users only discovery and questions
//! about themselves. Pure.
//!
//! What depends on the object (a node may change only its own pods) is checked in admission, where the object is at hand.

use super::{AUTHENTICATED, BOOTSTRAPPERS, MASTERS, User};

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action<'a> {
    /// A verb on a resource.
    Resource {
        /// `get`, `list`, …
        verb: &'a str,
        /// API group.
        group: &'a str,
        /// `pods` or `pods/log`.
        resource: &'a str,
        /// Namespace, empty for none or all.
        namespace: &'a str,
        /// Object name, empty for none or all.
        name: &'a str,
    },
    /// A verb on a path that is no resource.
    Path {
        /// `get`, …
        verb: &'a str,
        /// The path.
        path: &'a str,
    },
}

/// Whether the user may do it.
pub(crate) fn allowed(user: &User, action: Action<'_>) -> bool {
    if user.is_in(MASTERS) {
        return true;
    }
    match action {
        Action::Path { verb, path } => {
            matches!(verb, "get" | "head") && user.is_in(AUTHENTICATED) && is_open_path(path)
        }
        Action::Resource { verb, group, resource, namespace, name } => {
            is_self_review(verb, group, resource)
                || (user.is_in(BOOTSTRAPPERS) && may_ask_for_certificates(verb, group, resource))
                || user.node().is_some_and(|node| node_may(node, verb, group, resource, namespace, name))
        }
    }
}

/// Upstream's text for a refusal.
pub(crate) fn refusal(user: &User, action: Action<'_>) -> String {
    match action {
        Action::Path { verb, path } => {
            format!("User \"{}\" cannot {verb} path \"{path}\"", user.name)
        }
        Action::Resource { verb, group, resource, namespace, .. } => {
            let scope = if namespace.is_empty() {
                "at the cluster scope".to_owned()
            } else {
                format!("in the namespace \"{namespace}\"")
            };
            format!(
                "User \"{}\" cannot {verb} resource \"{resource}\" in API group \"{group}\" {scope}",
                user.name
            )
        }
    }
}

fn is_open_path(path: &str) -> bool {
    let roots = ["/api", "/apis", "/openapi", "/version", "/healthz", "/livez", "/readyz"];
    roots
        .iter()
        .any(|root| path == *root || path.strip_prefix(root).is_some_and(|rest| rest.starts_with('/')))
        || matches!(path, "/.well-known/openid-configuration" | "/openid/v1/jwks")
}

fn is_self_review(verb: &str, group: &str, resource: &str) -> bool {
    verb == "create"
        && matches!(
            (group, resource),
            ("authentication.k8s.io", "selfsubjectreviews")
                | ("authorization.k8s.io", "selfsubjectaccessreviews" | "selfsubjectrulesreviews")
        )
}

/// What a node needs that has no certificate yet: to ask for one, and to see what became of it.
fn may_ask_for_certificates(verb: &str, group: &str, resource: &str) -> bool {
    (group, resource) == ("certificates.k8s.io", "certificatesigningrequests")
        && matches!(verb, "create" | "get" | "list" | "watch")
}

fn node_may(node: &str, verb: &str, group: &str, resource: &str, namespace: &str, name: &str) -> bool {
    let read = matches!(verb, "get" | "list" | "watch");
    let edit = matches!(verb, "update" | "patch");
    match (group, resource) {
        ("", "nodes") => read || verb == "create" || (edit && name == node),
        ("", "nodes/status") => edit && name == node,
        ("", "pods") => read || matches!(verb, "create" | "delete"),
        ("", "pods/status" | "persistentvolumeclaims/status") => edit || verb == "get",
        (
            "",
            "services"
            | "endpoints"
            | "configmaps"
            | "secrets"
            | "namespaces"
            | "serviceaccounts"
            | "persistentvolumes"
            | "persistentvolumeclaims",
        )
        | ("discovery.k8s.io", "endpointslices")
        | ("storage.k8s.io", "csidrivers" | "volumeattachments")
        | ("node.k8s.io", "runtimeclasses")
        | ("resource.k8s.io", "resourceclaims") => read,
        ("storage.k8s.io", "csinodes") => {
            verb == "create" || (name == node && (edit || matches!(verb, "get" | "delete")))
        }
        ("resource.k8s.io", "resourceslices") => {
            read || edit || matches!(verb, "create" | "delete" | "deletecollection")
        }
        ("certificates.k8s.io", _) => may_ask_for_certificates(verb, group, resource),
        ("" | "events.k8s.io", "events") => verb == "create" || edit,
        ("", "serviceaccounts/token")
        | ("authentication.k8s.io", "tokenreviews")
        | ("authorization.k8s.io", "subjectaccessreviews" | "localsubjectaccessreviews") => verb == "create",
        ("coordination.k8s.io", "leases") => {
            namespace == "kube-node-lease"
                && (verb == "create" || (name == node && (edit || matches!(verb, "get" | "delete"))))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(name: &str, group: &str) -> User {
        let groups = vec![group.to_owned(), AUTHENTICATED.to_owned()];
        User { name: name.to_owned(), uid: String::new(), groups, extra: Vec::new() }
    }

    fn on<'a>(verb: &'a str, group: &'a str, resource: &'a str, name: &'a str) -> Action<'a> {
        Action::Resource { verb, group, resource, namespace: "default", name }
    }

    #[test]
    fn the_policy_in_cases() {
        let admin = user("kubernetes-admin", MASTERS);
        let node = user("system:node:a", "system:nodes");
        let newcomer = user("system:bootstrap:abcdef", BOOTSTRAPPERS);
        let account = user("system:serviceaccount:default:default", "system:serviceaccounts");
        let cases = [
            (&admin, on("delete", "", "nodes", "a"), true),
            (&node, on("patch", "", "nodes/status", "a"), true),
            (&node, on("patch", "", "nodes/status", "b"), false),
            (&node, on("delete", "apps", "deployments", "x"), false),
            (&node, on("create", "", "serviceaccounts/token", "default"), true),
            (&node, on("create", "certificates.k8s.io", "certificatesigningrequests", ""), true),
            (&node, on("update", "certificates.k8s.io", "certificatesigningrequests/approval", "x"), false),
            (&node, on("update", "storage.k8s.io", "csinodes", "b"), false),
            (&newcomer, on("create", "certificates.k8s.io", "certificatesigningrequests", ""), true),
            (&newcomer, on("list", "", "nodes", ""), false),
            (&account, on("list", "", "pods", ""), false),
            (&account, on("create", "authorization.k8s.io", "selfsubjectaccessreviews", ""), true),
            (&account, Action::Path { verb: "get", path: "/apis/apps/v1" }, true),
            (&account, Action::Path { verb: "get", path: "/metrics" }, false),
            (&account, Action::Path { verb: "get", path: "/apisx" }, false),
        ];
        for (user, action, want) in cases {
            assert_eq!(allowed(user, action), want, "{} {action:?}", user.name);
        }
        assert_eq!(
            refusal(&account, on("list", "", "pods", "")),
            "User \"system:serviceaccount:default:default\" cannot list resource \"pods\" in API group \"\" in \
             the namespace \"default\""
        );
    }
}
