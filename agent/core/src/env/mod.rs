//! A container's environment, command and arguments. Pure.
//!
//! Order as upstream: `envFrom`, then `env` overriding it, `$(VAR)` expanded against what came before and the service
//! variables, and the service variables last, never overriding.

mod expand;
pub mod fields;
mod services;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ConfigMap, Container, EnvVar, EnvVarSource, Pod, Secret, Service};

pub use expand::expand;
pub use services::service_variables;

use crate::resources::ResourceList;

/// Why an environment cannot be built: the message of `CreateContainerConfigError`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvError {
    /// The object is missing and not optional.
    #[error("{kind} {name:?} not found")]
    NotFound {
        /// `configmap` or `secret`.
        kind: &'static str,
        /// Object.
        name: String,
    },
    /// The key is missing and not optional.
    #[error("couldn't find key {key} in {kind} {namespace}/{name}")]
    NoKey {
        /// `ConfigMap` or `Secret`.
        kind: &'static str,
        /// Pod's namespace.
        namespace: String,
        /// Object.
        name: String,
        /// Key.
        key: String,
    },
    /// A field path or resource that cannot be resolved.
    #[error(transparent)]
    Field(#[from] fields::FieldError),
}

/// Names that a container's environment refers to; read them before [`build`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct References {
    /// ConfigMaps.
    pub config_maps: BTreeSet<String>,
    /// Secrets.
    pub secrets: BTreeSet<String>,
}

/// What an environment is made from.
#[derive(Debug, Clone, Copy)]
pub struct EnvInput<'a> {
    /// The pod.
    pub pod: &'a Pod,
    /// The container.
    pub container: &'a Container,
    /// Services of the cluster; those that do not matter are skipped here.
    pub services: &'a [Arc<Service>],
    /// ConfigMaps of [`references`]; absent: does not exist.
    pub config_maps: &'a BTreeMap<String, Arc<ConfigMap>>,
    /// Secrets likewise.
    pub secrets: &'a BTreeMap<String, Arc<Secret>>,
    /// Addresses of the pod, once it has a sandbox.
    pub addresses: &'a fields::Addresses,
    /// Node's allocatable, for resourceFieldRef.
    pub allocatable: &'a ResourceList,
}

/// A container's process as CRI wants it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProcessEnv {
    /// Variables in order.
    pub variables: Vec<(String, String)>,
    /// Entry point; empty: the image's.
    pub command: Vec<String>,
    /// Arguments; empty: the image's.
    pub args: Vec<String>,
}

/// Objects that the container's variables come from.
pub fn references(container: &Container) -> References {
    let mut references = References::default();
    for source in container.env_from.iter().flatten() {
        references.config_maps.extend(source.config_map_ref.as_ref().map(|source| source.name.clone()));
        references.secrets.extend(source.secret_ref.as_ref().map(|source| source.name.clone()));
    }
    for from in container.env.iter().flatten().filter_map(|variable| variable.value_from.as_ref()) {
        references.config_maps.extend(from.config_map_key_ref.as_ref().map(|key| key.name.clone()));
        references.secrets.extend(from.secret_key_ref.as_ref().map(|key| key.name.clone()));
    }
    references
}

/// Builds variables, command and arguments.
pub fn build(input: EnvInput<'_>) -> Result<ProcessEnv, EnvError> {
    let service_variables = service_variables(input.pod, input.services);
    let mut variables = Variables::default();
    env_from(input, &mut variables)?;
    for variable in input.container.env.iter().flatten() {
        if let Some(value) = value(input, variable, &variables, &service_variables)? {
            variables.set(&variable.name, value);
        }
    }
    for (name, value) in &service_variables {
        if variables.get(name).is_none() {
            variables.set(name, value.clone());
        }
    }
    let expanded = |texts: &Option<Vec<String>>| -> Vec<String> {
        texts.iter().flatten().map(|text| expand(text, |name| variables.get(name))).collect()
    };
    Ok(ProcessEnv {
        command: expanded(&input.container.command),
        args: expanded(&input.container.args),
        variables: variables.list,
    })
}

/// Variables in the order of their first mention.
#[derive(Debug, Default)]
struct Variables {
    list: Vec<(String, String)>,
    index: BTreeMap<String, usize>,
}

impl Variables {
    fn set(&mut self, name: &str, value: String) {
        if let Some(entry) = self.index.get(name).and_then(|position| self.list.get_mut(*position)) {
            entry.1 = value;
            return;
        }
        self.index.insert(name.to_owned(), self.list.len());
        self.list.push((name.to_owned(), value));
    }

    fn get(&self, name: &str) -> Option<String> {
        self.index.get(name).and_then(|position| self.list.get(*position)).map(|(_, value)| value.clone())
    }
}

fn env_from(input: EnvInput<'_>, variables: &mut Variables) -> Result<(), EnvError> {
    for source in input.container.env_from.iter().flatten() {
        let prefix = source.prefix.as_deref().unwrap_or_default();
        if let Some(wanted) = &source.config_map_ref {
            match input.config_maps.get(&wanted.name) {
                Some(found) => {
                    for (key, value) in found.data.iter().flatten() {
                        variables.set(&format!("{prefix}{key}"), value.clone());
                    }
                }
                None if wanted.optional.unwrap_or(false) => {}
                None => return Err(EnvError::NotFound { kind: "configmap", name: wanted.name.clone() }),
            }
        }
        if let Some(wanted) = &source.secret_ref {
            match input.secrets.get(&wanted.name) {
                Some(found) => {
                    for (key, value) in found.data.iter().flatten() {
                        variables
                            .set(&format!("{prefix}{key}"), String::from_utf8_lossy(&value.0).into_owned());
                    }
                }
                None if wanted.optional.unwrap_or(false) => {}
                None => return Err(EnvError::NotFound { kind: "secret", name: wanted.name.clone() }),
            }
        }
    }
    Ok(())
}

/// The variable's value; `None` for an optional source that is missing.
fn value(
    input: EnvInput<'_>,
    variable: &EnvVar,
    before: &Variables,
    services: &BTreeMap<String, String>,
) -> Result<Option<String>, EnvError> {
    match (&variable.value, &variable.value_from) {
        (Some(text), _) if !text.is_empty() => {
            Ok(Some(expand(text, |name| before.get(name).or_else(|| services.get(name).cloned()))))
        }
        (_, Some(from)) => value_from(input, from),
        _ => Ok(Some(String::new())),
    }
}

fn value_from(input: EnvInput<'_>, from: &EnvVarSource) -> Result<Option<String>, EnvError> {
    let namespace = || input.pod.metadata.namespace.clone().unwrap_or_default();
    if let Some(field) = &from.field_ref {
        return Ok(Some(fields::field_value(input.pod, &field.field_path, Some(input.addresses))?));
    }
    if let Some(resource) = &from.resource_field_ref {
        return Ok(Some(fields::resource_value(
            input.pod,
            Some(&input.container.name),
            resource,
            input.allocatable,
        )?));
    }
    if let Some(wanted) = &from.config_map_key_ref {
        let optional = wanted.optional.unwrap_or(false);
        let Some(found) = input.config_maps.get(&wanted.name) else {
            return missing(optional, EnvError::NotFound { kind: "configmap", name: wanted.name.clone() });
        };
        return match found.data.as_ref().and_then(|data| data.get(&wanted.key)) {
            Some(value) => Ok(Some(value.clone())),
            None => missing(optional, no_key("ConfigMap", namespace(), &wanted.name, &wanted.key)),
        };
    }
    if let Some(wanted) = &from.secret_key_ref {
        let optional = wanted.optional.unwrap_or(false);
        let Some(found) = input.secrets.get(&wanted.name) else {
            return missing(optional, EnvError::NotFound { kind: "secret", name: wanted.name.clone() });
        };
        return match found.data.as_ref().and_then(|data| data.get(&wanted.key)) {
            Some(value) => Ok(Some(String::from_utf8_lossy(&value.0).into_owned())),
            None => missing(optional, no_key("Secret", namespace(), &wanted.name, &wanted.key)),
        };
    }
    Ok(Some(String::new()))
}

fn missing(optional: bool, error: EnvError) -> Result<Option<String>, EnvError> {
    if optional { Ok(None) } else { Err(error) }
}

fn no_key(kind: &'static str, namespace: String, name: &str, key: &str) -> EnvError {
    EnvError::NoKey { kind, namespace, name: name.to_owned(), key: key.to_owned() }
}

#[cfg(test)]
mod tests;
