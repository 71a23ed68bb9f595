//! Names that make a sandbox and a container unique, so that a repeated request finds what the first one made.

use cri_shim_api::v1::{ContainerMetadata, PodSandboxMetadata};

/// A request that misses what its name is made of.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} must not be empty")]
pub struct NameError {
    /// The missing field.
    pub field: &'static str,
}

/// `<pod>_<namespace>_<uid>_<attempt>`.
pub fn sandbox(metadata: Option<&PodSandboxMetadata>) -> Result<String, NameError> {
    let metadata = metadata.ok_or(NameError { field: "sandbox metadata" })?;
    if metadata.name.is_empty() {
        return Err(NameError { field: "sandbox metadata.name" });
    }
    Ok(format!("{}_{}_{}_{}", metadata.name, metadata.namespace, metadata.uid, metadata.attempt))
}

/// `<container>_<pod>_<namespace>_<uid>_<attempt>`.
pub fn container(
    metadata: Option<&ContainerMetadata>,
    sandbox: Option<&PodSandboxMetadata>,
) -> Result<String, NameError> {
    let metadata = metadata.ok_or(NameError { field: "container metadata" })?;
    let sandbox = sandbox.ok_or(NameError { field: "sandbox metadata" })?;
    if metadata.name.is_empty() {
        return Err(NameError { field: "container metadata.name" });
    }
    let pod = format!("{}_{}_{}", sandbox.name, sandbox.namespace, sandbox.uid);
    Ok(format!("{}_{pod}_{}", metadata.name, metadata.attempt))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> PodSandboxMetadata {
        PodSandboxMetadata { name: "web".into(), uid: "u1".into(), namespace: "default".into(), attempt: 2 }
    }

    #[test]
    fn names_hold_every_part_and_the_attempt() {
        assert_eq!(sandbox(Some(&pod())).unwrap(), "web_default_u1_2");
        let nginx = ContainerMetadata { name: "nginx".into(), attempt: 3 };
        assert_eq!(container(Some(&nginx), Some(&pod())).unwrap(), "nginx_web_default_u1_3");
    }

    #[test]
    fn a_missing_part_is_named() {
        assert_eq!(sandbox(None).unwrap_err().to_string(), "sandbox metadata must not be empty");
        let unnamed = ContainerMetadata::default();
        assert_eq!(container(Some(&unnamed), Some(&pod())).unwrap_err().field, "container metadata.name");
    }
}
