//! Upstream's validation, one function per kind, with its wording.
//!
//! Input: defaulted objects (and the stored one for updates). Output: every field that is wrong, in field order.
//! What needs other objects (allocated ports and addresses, quotas) is the server's. Types are taken as checked by
//! [`crate::schema`]: a wrong type reads as an absent field.

mod cluster;
mod config;
mod container;
mod metadata;
pub mod names;
mod node;
mod path;
mod pod;
mod resize;
mod resources;
mod review;
mod service;
mod slice;
mod storage;
mod volume;
mod workload;

use std::collections::BTreeSet;

use path::Path;
use serde_json::Value;

use crate::{kinds::ResourceInfo, status::FieldError};

/// Everything wrong with a new object.
pub fn create(info: &ResourceInfo, object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    metadata::check(&mut errors, info, object);
    check_object(&mut errors, info, object);
    if (info.group, info.kind) == ("", "Pod") {
        pod::no_ephemeral_containers(&mut errors, object);
    }
    errors.0
}

/// Everything wrong with the new form of an object, including changes of what may not change.
pub fn update(info: &ResourceInfo, new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    metadata::check(&mut errors, info, new);
    check_object(&mut errors, info, new);
    match (info.group, info.kind) {
        ("", "Pod") => pod::update(&mut errors, new, old),
        ("", "Service") => service::update(&mut errors, new, old),
        ("", "ConfigMap") => config::update_config_map(&mut errors, new, old),
        ("", "Secret") => config::update_secret(&mut errors, new, old),
        ("", "Node") => node::update(&mut errors, new, old),
        ("apps", _) => workload::update(&mut errors, new, old),
        ("discovery.k8s.io", "EndpointSlice") => slice::update(&mut errors, new, old),
        _ => update_more(&mut errors, info, new, old),
    }
    errors.0
}

/// What may not change in kinds that others extend the cluster with.
fn update_more(errors: &mut Errors, info: &ResourceInfo, new: &Value, old: &Value) {
    match info.kind {
        "PersistentVolume" => storage::update_volume(errors, new, old),
        "PersistentVolumeClaim" => storage::update_claim(errors, new, old),
        "StorageClass" => storage::update_class(errors, new, old),
        "CSIDriver" => storage::update_driver(errors, new, old),
        "CSIStorageCapacity" => storage::update_capacity(errors, new, old),
        "VolumeAttachment" => storage::update_attachment(errors, new, old),
        "VolumeAttributesClass" => storage::update_attributes_class(errors, new, old),
        "RuntimeClass" => cluster::update_runtime_class(errors, new, old),
        "PriorityClass" => cluster::update_priority_class(errors, new, old),
        "ResourceClaim" | "ResourceClaimTemplate" => cluster::update_resource_claim(errors, new, old),
        "ResourceSlice" => cluster::update_resource_slice(errors, new, old),
        _ => {}
    }
}

/// Everything wrong with new ephemeral containers of a pod.
pub fn ephemeral_containers_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    pod::create(&mut errors, new);
    pod::ephemeral_containers(&mut errors, new, old);
    errors.0
}

/// Everything wrong with other resources for the containers of a pod that may run.
pub fn resize(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    pod::create(&mut errors, new);
    resize::check(&mut errors, new, old);
    errors.0
}

/// Everything wrong with a write of the `status` subresource.
pub fn status_update(info: &ResourceInfo, new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    metadata::check(&mut errors, info, new);
    match info.kind {
        "Deployment" | "ReplicaSet" => workload::status(&mut errors, new),
        "Pod" => pod::status(&mut errors, new),
        "CertificateSigningRequest" => cluster::certificate_request_status(&mut errors, new, old),
        _ => {}
    }
    errors.0
}

/// Everything wrong with a Binding, of `pods/binding` too.
pub fn binding(object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    review::binding(&mut errors, object);
    errors.0
}

fn check_object(errors: &mut Errors, info: &ResourceInfo, object: &Value) {
    match (info.group, info.kind) {
        ("", "Pod") => pod::create(errors, object),
        ("", "Service") => service::check(errors, object),
        ("", "ConfigMap") => config::config_map(errors, object),
        ("", "Secret") => config::secret(errors, object),
        ("", "Node") => node::check(errors, object),
        ("", "Endpoints") => slice::endpoints(errors, object),
        ("", "Event") => review::event(errors, object),
        ("", "Binding") => review::binding(errors, object),
        ("apps", "Deployment") => workload::deployment(errors, object),
        ("apps", "ReplicaSet") => workload::replica_set(errors, object),
        ("coordination.k8s.io", "Lease") => review::lease(errors, object),
        ("discovery.k8s.io", "EndpointSlice") => slice::endpoint_slice(errors, object),
        ("authentication.k8s.io", "TokenReview") => review::token_review(errors, object),
        ("authorization.k8s.io", _) => review::access_review(errors, object),
        _ => check_more(errors, info, object),
    }
}

/// Kinds that others extend the cluster with.
fn check_more(errors: &mut Errors, info: &ResourceInfo, object: &Value) {
    match info.kind {
        "PersistentVolume" => storage::volume(errors, object),
        "PersistentVolumeClaim" => storage::claim(errors, object),
        "StorageClass" => storage::class(errors, object),
        "CSIDriver" => storage::driver(errors, object),
        "CSINode" => storage::csi_node(errors, object),
        "CSIStorageCapacity" => storage::capacity(errors, object),
        "VolumeAttachment" => storage::attachment(errors, object),
        "VolumeAttributesClass" => storage::attributes_class(errors, object),
        "CertificateSigningRequest" => cluster::certificate_request(errors, object),
        "RuntimeClass" => cluster::runtime_class(errors, object),
        "PriorityClass" => cluster::priority_class(errors, object),
        "ResourceClaim" => cluster::resource_claim(errors, object),
        "ResourceClaimTemplate" => cluster::resource_claim_template(errors, object),
        "ResourceSlice" => cluster::resource_slice(errors, object),
        _ => {}
    }
}

/// The errors found so far, with shorthands for the usual ones.
#[derive(Debug, Default)]
struct Errors(Vec<FieldError>);

impl Errors {
    fn push(&mut self, error: FieldError) {
        self.0.push(error);
    }

    fn required(&mut self, at: &Path<'_>) {
        self.push(FieldError::required(at, ""));
    }

    fn invalid(&mut self, at: &Path<'_>, value: impl Into<Value>, why: impl Into<String>) {
        self.push(FieldError::invalid(at, value, why));
    }

    fn forbidden(&mut self, at: &Path<'_>, why: &str) {
        self.push(FieldError::forbidden(at, why));
    }

    /// The value of an enum field; absent ones are not judged.
    fn one_of(&mut self, at: &Path<'_>, found: &str, supported: &[&str]) {
        if !found.is_empty() && !supported.contains(&found) {
            self.push(FieldError::not_supported(at, found, supported));
        }
    }

    fn at_least_zero(&mut self, at: &Path<'_>, number: Option<i64>) {
        if let Some(number) = number.filter(|n| *n < 0) {
            self.invalid(at, number, "must be greater than or equal to 0");
        }
    }

    fn in_range(&mut self, at: &Path<'_>, number: i64, low: i64, high: i64) {
        if !(low..=high).contains(&number) {
            self.invalid(at, number, format!("must be between {low} and {high}, inclusive"));
        }
    }

    fn port(&mut self, at: &Path<'_>, number: i64) {
        self.in_range(at, number, 1, 65_535);
    }

    /// A name's syntax; `None` says it is fine.
    fn syntax(&mut self, at: &Path<'_>, found: &str, why: Option<String>) {
        if let Some(why) = why {
            self.invalid(at, found, why);
        }
    }

    /// The name of an item in a list: a label that no other item has.
    fn own_label<'a>(&mut self, at: &Path<'_>, name: &'a str, seen: &mut BTreeSet<&'a str>) {
        if name.is_empty() {
            return self.required(at);
        }
        self.syntax(at, name, names::label_1123(name));
        if !seen.insert(name) {
            self.push(FieldError::duplicate(at, name));
        }
    }

    fn immutable(&mut self, at: &Path<'_>, new: Option<&Value>, old: Option<&Value>) {
        if new != old {
            self.invalid(at, new.cloned().unwrap_or_default(), "field is immutable");
        }
    }
}

#[cfg(test)]
mod tests;
