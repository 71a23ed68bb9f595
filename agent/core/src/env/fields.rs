//! Downward API: values of pod fields and container resources, for variables and volumes. Pure.

use std::collections::BTreeMap;

use control_api::quantity::Quantity as Number;
use k8s_openapi::api::core::v1::{Container, Pod, ResourceFieldSelector};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::resources::ResourceList;

/// A field path or resource that cannot be resolved.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FieldError {
    /// No such field.
    #[error("unsupported fieldPath: {path}")]
    Path {
        /// As written.
        path: String,
    },
    /// No such container.
    #[error("container {name} not found")]
    Container {
        /// As written.
        name: String,
    },
    /// No such resource.
    #[error("unsupported container resource : {resource}")]
    Resource {
        /// As written.
        resource: String,
    },
}

/// Addresses that the pod object may not carry yet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Addresses {
    /// `status.podIPs`.
    pub pod: Vec<String>,
    /// `status.hostIPs`.
    pub host: Vec<String>,
}

/// The value of `fieldRef.fieldPath`. Volumes pass no addresses: `status.*` is for variables only.
pub fn field_value(pod: &Pod, path: &str, addresses: Option<&Addresses>) -> Result<String, FieldError> {
    let metadata = &pod.metadata;
    let spec = pod.spec.as_ref();
    let text = |value: Option<&String>| Ok(value.cloned().unwrap_or_default());
    if let Some((map, key)) = subscript(path) {
        let values = match map {
            "metadata.labels" => metadata.labels.as_ref(),
            "metadata.annotations" => metadata.annotations.as_ref(),
            _ => return Err(FieldError::Path { path: path.to_owned() }),
        };
        return text(values.and_then(|values| values.get(key)));
    }
    match (path, addresses) {
        ("metadata.name", _) => text(metadata.name.as_ref()),
        ("metadata.namespace", _) => text(metadata.namespace.as_ref()),
        ("metadata.uid", _) => text(metadata.uid.as_ref()),
        ("metadata.labels", _) => Ok(formatted(metadata.labels.as_ref())),
        ("metadata.annotations", _) => Ok(formatted(metadata.annotations.as_ref())),
        ("spec.nodeName", Some(_)) => text(spec.and_then(|spec| spec.node_name.as_ref())),
        ("spec.serviceAccountName", Some(_)) => {
            text(spec.and_then(|spec| spec.service_account_name.as_ref()))
        }
        ("status.podIP", Some(addresses)) => text(addresses.pod.first()),
        ("status.podIPs", Some(addresses)) => Ok(addresses.pod.join(",")),
        ("status.hostIP", Some(addresses)) => text(addresses.host.first()),
        ("status.hostIPs", Some(addresses)) => Ok(addresses.host.join(",")),
        _ => Err(FieldError::Path { path: path.to_owned() }),
    }
}

/// `metadata.labels['key']` → (`metadata.labels`, `key`).
fn subscript(path: &str) -> Option<(&str, &str)> {
    let (map, key) = path.split_once("['")?;
    Some((map, key.strip_suffix("']")?))
}

/// One `key="value"` per line, sorted, as downward API files show maps.
fn formatted(values: Option<&BTreeMap<String, String>>) -> String {
    let lines: Vec<String> =
        values.into_iter().flatten().map(|(key, value)| format!("{key}={value:?}")).collect();
    lines.join("\n")
}

/// The value of a `resourceFieldRef`: divided by its divisor and rounded up. A missing limit is the node's allocatable.
pub fn resource_value(
    pod: &Pod,
    default_container: Option<&str>,
    selector: &ResourceFieldSelector,
    allocatable: &ResourceList,
) -> Result<String, FieldError> {
    let name = selector.container_name.as_deref().filter(|name| !name.is_empty()).or(default_container);
    let container = find(pod, name.unwrap_or_default())?;
    let resource = selector.resource.as_str();
    let unsupported = || FieldError::Resource { resource: resource.to_owned() };
    let (side, kind) = resource.split_once('.').ok_or_else(unsupported)?;
    let lists = container.resources.as_ref();
    let quantity = match side {
        "limits" => lists
            .and_then(|lists| lists.limits.as_ref())
            .and_then(|limits| limits.get(kind))
            .or_else(|| allocatable.get(kind)),
        "requests" => lists.and_then(|lists| lists.requests.as_ref()).and_then(|requests| requests.get(kind)),
        _ => return Err(unsupported()),
    };
    let amount = quantity.and_then(parse).unwrap_or(Number::from_units(0));
    let divisor = selector.divisor.as_ref().and_then(parse).filter(|divisor| !divisor.is_zero());
    let divisor = divisor.unwrap_or(Number::from_units(1));
    let value = if kind == "cpu" {
        divide_up(amount.millis(), divisor.millis())
    } else {
        divide_up(amount.value(), divisor.value())
    };
    Ok(value.to_string())
}

fn parse(quantity: &Quantity) -> Option<Number> {
    Number::parse(&quantity.0).ok()
}

fn divide_up(amount: i64, divisor: i64) -> i64 {
    let divisor = divisor.max(1);
    amount.div_euclid(divisor) + i64::from(amount.rem_euclid(divisor) != 0)
}

fn find<'a>(pod: &'a Pod, name: &str) -> Result<&'a Container, FieldError> {
    let spec = pod.spec.as_ref();
    spec.iter()
        .flat_map(|spec| spec.containers.iter().chain(spec.init_containers.iter().flatten()))
        .find(|container| container.name == name)
        .ok_or_else(|| FieldError::Container { name: name.to_owned() })
}
