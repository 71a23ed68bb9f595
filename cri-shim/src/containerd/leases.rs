//! Leases: what a pull or an unpack makes stays out of garbage collection until the lease is deleted.

use std::collections::HashMap;
use std::time::Duration;

use containerd_client::services::v1::{CreateRequest, DeleteRequest};

use super::error::gone;
use super::{Containerd, ContainerdError, METADATA_DEADLINE, call};

impl Containerd {
    /// Creates the lease `id`; containerd drops it by itself after `lifetime`, so that a killed process leaks none.
    /// A lease that exists already is taken over.
    pub async fn create_lease(&self, id: &str, lifetime: Duration) -> Result<(), ContainerdError> {
        let expires = jiff::Timestamp::now()
            .checked_add(jiff::SignedDuration::try_from(lifetime).unwrap_or(jiff::SignedDuration::MAX))
            .unwrap_or(jiff::Timestamp::MAX);
        let labels = HashMap::from([("containerd.io/gc.expire".to_owned(), format!("{expires:.0}"))]);
        let request = CreateRequest { id: id.to_owned(), labels };
        match call("Leases.Create", id, METADATA_DEADLINE, self.leases_client().create(request)).await {
            Err(error) if !error.is_already_exists() => Err(error),
            _ => Ok(()),
        }
    }

    /// Deletes the lease `id`; one that is gone is fine. `sync` waits for the garbage collection it causes.
    pub async fn delete_lease(&self, id: &str, sync: bool) -> Result<(), ContainerdError> {
        let request = DeleteRequest { id: id.to_owned(), sync };
        gone(call("Leases.Delete", id, METADATA_DEADLINE, self.leases_client().delete(request)).await)
    }
}
