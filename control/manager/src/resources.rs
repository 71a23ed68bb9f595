//! The kinds the API server serves, for controllers that work on all of them.
//!
//! Input: API discovery. Output: an unchanging snapshot, refreshed on demand.

use std::sync::{Arc, PoisonError, RwLock};

use control_decide::garbage::TypeName;
use kube::{
    Api, Client, Discovery,
    api::{ApiResource, DynamicObject},
    discovery::{Scope, verbs},
};

use crate::write::{WriteError, call};

/// One served kind.
#[derive(Clone, Debug)]
pub(crate) struct Served {
    pub(crate) resource: ApiResource,
    pub(crate) namespaced: bool,
    verbs: Vec<String>,
}

impl Served {
    /// True when all these verbs work on it.
    pub(crate) fn supports(&self, wanted: &[&str]) -> bool {
        wanted.iter().all(|verb| self.verbs.iter().any(|held| held == verb))
    }

    /// True when it can be collected and emptied: deleted, listed and watched.
    pub(crate) fn is_collectable(&self) -> bool {
        self.supports(&[verbs::DELETE, verbs::LIST, verbs::WATCH])
    }

    /// Its type as owner references spell it.
    pub(crate) fn type_name(&self) -> Arc<TypeName> {
        Arc::new(TypeName {
            api_version: self.resource.api_version.clone(),
            kind: self.resource.kind.clone(),
        })
    }

    /// `deployments.apps`
    pub(crate) fn display_name(&self) -> String {
        if self.resource.group.is_empty() {
            self.resource.plural.clone()
        } else {
            format!("{}.{}", self.resource.plural, self.resource.group)
        }
    }

    /// The API of its objects, in one namespace unless it is cluster-scoped.
    pub(crate) fn api(&self, client: &Client, namespace: &str) -> Api<DynamicObject> {
        if self.namespaced {
            Api::namespaced_with(client.clone(), namespace, &self.resource)
        } else {
            Api::all_with(client.clone(), &self.resource)
        }
    }

    /// The API of its objects everywhere.
    pub(crate) fn api_everywhere(&self, client: &Client) -> Api<DynamicObject> {
        Api::all_with(client.clone(), &self.resource)
    }
}

/// What is served, as of the last look.
pub(crate) struct Resources {
    client: Client,
    served: RwLock<Arc<Vec<Served>>>,
}

impl Resources {
    /// Knows nothing before the first [`Self::refresh`].
    pub(crate) fn new(client: Client) -> Arc<Self> {
        Arc::new(Resources { client, served: RwLock::default() })
    }

    /// The last snapshot.
    pub(crate) fn served(&self) -> Arc<Vec<Served>> {
        Arc::clone(&self.served.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Asks the API server and returns the new snapshot.
    pub(crate) async fn refresh(&self) -> Result<Arc<Vec<Served>>, WriteError> {
        let discovery =
            call(|| "discover the API".to_owned(), Discovery::new(self.client.clone()).run()).await?;
        let all = discovery.groups().flat_map(kube::discovery::ApiGroup::recommended_resources);
        let served: Vec<_> = all
            .map(|(resource, capabilities)| Served {
                resource,
                namespaced: capabilities.scope == Scope::Namespaced,
                verbs: capabilities.operations,
            })
            .collect();
        let served = Arc::new(served);
        *self.served.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&served);
        Ok(served)
    }

    /// The kind an owner reference names, in whichever version it is served.
    pub(crate) fn find(&self, type_name: &TypeName) -> Result<Served, WriteError> {
        let group = type_name.api_version.rsplit_once('/').map_or("", |(group, _)| group);
        let served = self.served();
        let found = served
            .iter()
            .find(|served| served.resource.group == group && served.resource.kind == type_name.kind);
        found.cloned().ok_or_else(|| WriteError::UnknownKind {
            api_version: type_name.api_version.clone(),
            kind: type_name.kind.clone(),
        })
    }
}
