//! What happens to an object between decoding and validation: additions and refusals that need other objects.
//!
//! Inputs: the object, the user, and the caches. Outputs: the changed object and an [`Admitted`], which undoes allocations unless it is
//! committed. Never writes to the store.

pub(crate) mod allocator;
mod certificate;
mod classes;
pub(crate) mod namespace;
mod node;
mod pod;

use control_api::{
    admit,
    kinds::ResourceInfo,
    meta::{self, UpdateTarget},
    status::ApiError,
};
use serde_json::Value;

use self::allocator::Reservation;
use crate::{api::Api, auth::User};

/// Allocations of a write; given back when it is dropped without [`Admitted::commit`].
#[derive(Debug, Default)]
pub(crate) struct Admitted(Option<Reservation>);

impl Admitted {
    /// The write is stored.
    pub(crate) fn commit(&mut self) {
        if let Some(reservation) = self.0.take() {
            reservation.commit();
        }
    }
}

/// Admit a new object.
pub(crate) async fn create(
    api: &Api,
    user: &User,
    info: &'static ResourceInfo,
    object: &mut Value,
) -> Result<Admitted, ApiError> {
    node::create(user, info, object)?;
    match (info.group, info.kind) {
        ("", "Pod") => pod::create(api, object).await?,
        ("", "Node") => admit::node(object),
        ("", "Service") => return reserve(api, info, object, None),
        ("", "PersistentVolumeClaim") => {
            classes::default_storage_class(api, object)?;
            admit::protect(object, "kubernetes.io/pvc-protection");
        }
        ("", "PersistentVolume") => admit::protect(object, "kubernetes.io/pv-protection"),
        ("scheduling.k8s.io", "PriorityClass") => classes::one_default(api, info, object)?,
        ("certificates.k8s.io", "CertificateSigningRequest") => certificate::create(user, info, object)?,
        _ => {}
    }
    Ok(Admitted::default())
}

/// Admit the new form of an object.
pub(crate) fn update(
    api: &Api,
    user: &User,
    info: &'static ResourceInfo,
    new: &mut Value,
    old: &Value,
    part: UpdateTarget,
) -> Result<Admitted, ApiError> {
    node::update(user, info, old)?;
    if (info.group, info.kind) == ("", "Service") && part == UpdateTarget::Main {
        return reserve(api, info, new, Some(old));
    }
    match (info.group, info.kind) {
        ("scheduling.k8s.io", "PriorityClass") => classes::one_default(api, info, new)?,
        ("certificates.k8s.io", "CertificateSigningRequest") => certificate::date_conditions(new),
        _ => {}
    }
    Ok(Admitted::default())
}

/// Keep what the server allocated where a full update leaves it out.
pub(crate) fn carry_over(info: &ResourceInfo, new: &mut Value, old: &Value) {
    if (info.group, info.kind) == ("", "Service") {
        allocator::carry_over(new, old);
    }
}

/// Whether the user may delete this very object.
pub(crate) fn delete(user: &User, info: &ResourceInfo, old: &Value) -> Result<(), ApiError> {
    namespace::deletable(info, old)?;
    node::update(user, info, old)
}

/// An object is gone: give back what it held.
pub(crate) fn removed(api: &Api, info: &ResourceInfo, object: &Value) {
    if (info.group, info.kind) == ("", "Service") {
        api.allocator.release(object);
    }
}

fn reserve(
    api: &Api,
    info: &ResourceInfo,
    new: &mut Value,
    old: Option<&Value>,
) -> Result<Admitted, ApiError> {
    let reserved = api.allocator.reserve(new, old, api.random);
    let reservation = reserved.map_err(|errors| ApiError::invalid(info, meta::name(new), &errors))?;
    Ok(Admitted(Some(reservation)))
}
