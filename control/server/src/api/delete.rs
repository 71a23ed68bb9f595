//! `delete` and `deletecollection`.

use std::sync::Arc;

use bytes::Bytes;
use control_api::{
    meta::{self, DeleteOptions, Deletion},
    status::ApiError,
};
use control_store::{StoreError, Txn};

use super::{
    Api,
    options::{Freshness, Selection},
    read::store_error,
    write::{ObjectRef, now, written},
};
use crate::{admission, auth::User, cache::Object, codec};

/// How often a deletion is computed again after a lost race.
const TRIES: usize = 10;

/// What came of a deletion.
#[derive(Debug)]
pub(crate) enum Deleted {
    /// The object is gone; this was its last state.
    Gone(Arc<Object>),
    /// It waits for its grace period or finalizers.
    Waits(Arc<Object>),
}

impl Api {
    /// Delete one object.
    pub(crate) async fn delete(
        &self,
        target: ObjectRef<'_>,
        user: &User,
        options: &DeleteOptions,
    ) -> Result<Deleted, ApiError> {
        let ObjectRef { info, namespace, name } = target;
        let stored = self.stored_info(info)?;
        for _attempt in 0..TRIES {
            let current = self.get_object(info, namespace, name, Freshness::Latest).await?;
            let old = current.value().map_err(ApiError::internal)?;
            admission::delete(user, stored, &old)?;
            let (txn, value) = {
                let key = Bytes::from(stored.object_key(namespace, name));
                match meta::delete(stored, &old, options, &now())? {
                    Deletion::Pending => return Ok(Deleted::Waits(current)),
                    Deletion::Remove => (Txn::delete(key, current.revision), None),
                    Deletion::Update(new) => {
                        let value = codec::encode(&new).map_err(ApiError::internal)?;
                        (Txn::update(key, current.revision, value.clone()), Some(value))
                    }
                }
            };
            if options.dry_run {
                return Ok(if value.is_some() { Deleted::Waits(current) } else { Deleted::Gone(current) });
            }
            match (self.store.txn(txn).await, value) {
                (Ok(revision), Some(value)) => {
                    return Ok(Deleted::Waits(written(stored, namespace, name, revision, &value)?));
                }
                (Ok(_), None) => {
                    admission::removed(self, stored, &old);
                    return Ok(Deleted::Gone(current));
                }
                (Err(StoreError::Conflict { .. }), _) => {}
                (Err(error), _) => return Err(store_error(&error)),
            }
        }
        Err(ApiError::stale(info, name))
    }

    /// Delete every selected object.
    pub(crate) async fn delete_collection(
        &self,
        target: ObjectRef<'_>,
        selection: &Selection,
        user: &User,
        options: &DeleteOptions,
    ) -> Result<Vec<Arc<Object>>, ApiError> {
        self.wait(Freshness::Latest).await?;
        let cache = self.cache.resource(target.info).ok_or_else(ApiError::unknown_path)?;
        let snapshot = cache.snapshot(selection.namespace.as_deref(), |object| selection.matches(object));
        for object in &snapshot.objects {
            let namespace = Some(object.namespace()).filter(|namespace| !namespace.is_empty());
            let one = ObjectRef { namespace, name: object.name(), ..target };
            match self.delete(one, user, options).await {
                Ok(_) => {}
                // Somebody else was faster.
                Err(error) if error.reason == control_api::status::Reason::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(snapshot.objects)
    }
}
