//! Who may use an image that is on the node already: what it was pulled with, and what the policy makes of that. Pure.
//!
//! Input: the policy, what is written down of the image, and the credentials of the pod that wants it. Output: whether the
//! registry has to be asked first, and what is written down afterwards. A secret counts for the repository that it was used for;
//! a record without credentials says that the agent pulled the image, and lets nobody in. Upstream's rules: KEP-2535,
//! `pkg/kubelet/images/pullmanager`.

mod policy;
pub mod written;

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub use policy::{Allowlist, Policy, repository};

/// So many secrets are written down for one repository without a pull: namespaces that come and go must not fill the disk.
const MOST_LEARNED: usize = 100;

/// A secret that an image was pulled with.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PullSecret {
    /// Its uid.
    pub uid: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// SHA-256 of the credentials in it that were used, in hex.
    pub credential_hash: String,
}

/// A service account whose token an image was pulled with.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PullServiceAccount {
    /// Its uid.
    pub uid: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// With what an image of a repository was pulled.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PullCredentials {
    /// These secrets.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub kubernetes_secrets: Vec<PullSecret>,
    /// Tokens of these service accounts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub kubernetes_service_accounts: Vec<PullServiceAccount>,
    /// Nothing that a pod has to bring.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub node_pods_accessible: bool,
}

impl PullCredentials {
    /// Of a pull without credentials.
    pub fn none_needed() -> Self {
        Self { node_pods_accessible: true, ..Self::default() }
    }

    /// Of a pull with a secret.
    pub fn of_secret(secret: PullSecret) -> Self {
        Self { kubernetes_secrets: vec![secret], ..Self::default() }
    }

    fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Takes others in; whether that changes anything. Of a secret that is known by its names the newest hash counts.
    fn add(&mut self, others: PullCredentials) -> bool {
        if self.node_pods_accessible || others.is_empty() {
            return false;
        }
        let before = self.clone();
        if others.node_pods_accessible {
            *self = Self::none_needed();
            return true;
        }
        let key = |secret: PullSecret| {
            let hash = secret.credential_hash;
            ((secret.namespace, secret.name, secret.uid), hash)
        };
        let all = std::mem::take(&mut self.kubernetes_secrets).into_iter().chain(others.kubernetes_secrets);
        let secrets: BTreeMap<_, _> = all.map(key).collect();
        let secret =
            |((namespace, name, uid), credential_hash)| PullSecret { uid, namespace, name, credential_hash };
        self.kubernetes_secrets = secrets.into_iter().map(secret).collect();
        let accounts = std::mem::take(&mut self.kubernetes_service_accounts).into_iter();
        let accounts: BTreeSet<_> = accounts.chain(others.kubernetes_service_accounts).collect();
        self.kubernetes_service_accounts = accounts.into_iter().collect();
        *self != before
    }
}

/// What is written down of an image that the agent pulled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PulledRecord {
    /// When it was written last; whole seconds.
    pub last_updated: Timestamp,
    /// The runtime's id of the image.
    pub image_ref: String,
    /// By repository.
    pub credentials: BTreeMap<String, PullCredentials>,
}

impl PulledRecord {
    /// Of an image that was pulled nobody knows how.
    pub fn new(image_ref: &str, now: Timestamp) -> Self {
        Self { last_updated: seconds(now), image_ref: image_ref.to_owned(), credentials: BTreeMap::new() }
    }

    /// Takes in what the image was pulled with from a repository; whether that changes anything but the time.
    pub fn add(&mut self, repository: &str, credentials: PullCredentials, now: Timestamp) -> bool {
        let changed = match self.credentials.get_mut(repository) {
            Some(known) => known.add(credentials),
            None if credentials.is_empty() => false,
            None => self.credentials.insert(repository.to_owned(), credentials).is_none(),
        };
        if changed {
            self.last_updated = seconds(now);
        }
        changed
    }

    /// It was pulled once more.
    pub fn touch(&mut self, now: Timestamp) {
        self.last_updated = seconds(now);
    }
}

fn seconds(at: Timestamp) -> Timestamp {
    Timestamp::from_second(at.as_second()).unwrap_or(at)
}

/// What is known of an image that is on the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Known {
    /// Nothing: it was there before, or somebody else pulled it.
    Nothing,
    /// The agent pulls it, or was stopped while it did.
    Pulling,
    /// The agent pulled it.
    Record(PulledRecord),
}

/// Whether a pod may use an image that is on the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// The policy lets everybody.
    Allowed,
    /// It has what the image was pulled with.
    Found {
        /// A secret that is to be written down, too.
        learned: Option<PullSecret>,
    },
    /// The registry has to be asked.
    MustAuthenticate,
}

/// Whether a pod whose own secrets are these may use the image, which it calls by this repository's name.
pub fn access(policy: &Policy, repository: &str, known: &Known, own: &[PullSecret]) -> Access {
    if !policy.verifies(repository, *known != Known::Nothing) {
        return Access::Allowed;
    }
    let Known::Record(record) = known else { return Access::MustAuthenticate };
    let Some(used) = record.credentials.get(repository) else { return Access::MustAuthenticate };
    if used.node_pods_accessible {
        return Access::Found { learned: None };
    }
    let has_room = used.kubernetes_secrets.len() < MOST_LEARNED;
    for secret in own {
        for known in &used.kubernetes_secrets {
            let same_content =
                !known.credential_hash.is_empty() && secret.credential_hash == known.credential_hash;
            let same_object =
                (&secret.uid, &secret.namespace, &secret.name) == (&known.uid, &known.namespace, &known.name);
            // The same object with another content is a secret that was renewed.
            if same_content || (same_object && has_room) {
                let is_new = has_room && !used.kubernetes_secrets.contains(secret);
                return Access::Found { learned: is_new.then(|| secret.clone()) };
            }
        }
    }
    Access::MustAuthenticate
}

#[cfg(test)]
mod tests;
