//! Who asks, and whether they may.
//!
//! [`authn`] turns a client certificate or a bearer token into a [`User`]; [`tokens`] makes and checks service account tokens; [`bootstrap`]
//! knows those by which a node joins; [`authz`] is the fixed policy. Nothing here stores or changes objects.

pub(crate) mod authn;
pub(crate) mod authz;
pub(crate) mod bootstrap;
pub(crate) mod tokens;

/// Group of users that may do everything.
pub(crate) const MASTERS: &str = "system:masters";
/// Group of the nodes' agents.
pub(crate) const NODES: &str = "system:nodes";
/// Group of nodes that have nothing but a bootstrap token.
pub(crate) const BOOTSTRAPPERS: &str = "system:bootstrappers";
/// Group of everyone who proved an identity.
pub(crate) const AUTHENTICATED: &str = "system:authenticated";
/// Prefix of a node's user name.
pub(crate) const NODE_USER: &str = "system:node:";
/// Prefix of a service account's user name.
pub(crate) const SERVICE_ACCOUNT_USER: &str = "system:serviceaccount:";

/// An authenticated user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct User {
    /// The user name.
    pub name: String,
    /// The uid, for service accounts.
    pub uid: String,
    /// Group names.
    pub groups: Vec<String>,
    /// Further facts, such as the pod a token is bound to.
    pub extra: Vec<(String, String)>,
}

impl User {
    /// The server itself: bootstrap and housekeeping.
    pub(crate) fn system() -> Self {
        Self {
            name: "system:apiserver".to_owned(),
            uid: String::new(),
            groups: vec![MASTERS.to_owned(), AUTHENTICATED.to_owned()],
            extra: Vec::new(),
        }
    }

    /// Whether the user is in a group.
    pub(crate) fn is_in(&self, group: &str) -> bool {
        self.groups.iter().any(|name| name == group)
    }

    /// The node's name, when the user is a node's agent.
    pub(crate) fn node(&self) -> Option<&str> {
        self.name.strip_prefix(NODE_USER).filter(|_| self.is_in(NODES) && !self.is_in(MASTERS))
    }
}
