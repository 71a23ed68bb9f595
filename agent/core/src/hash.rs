//! The container hash: tells whether a running container still is what the pod asks for. Pure.

use k8s_openapi::api::core::v1::Container;

/// Hash over the fields whose change restarts a container in place: name and image. All other fields of a pod's
/// containers are immutable or (resources) applied without a restart.
pub fn container_hash(container: &Container) -> String {
    let image = container.image.as_deref().unwrap_or_default();
    let text = serde_json::json!({ "image": image, "name": container.name }).to_string();
    format!("{:x}", fnv1a(text.as_bytes()))
}

/// FNV-1a, 32 bits: short, stable across versions and machines; not for security.
pub fn fnv1a(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_changes_the_hash_and_environment_does_not() {
        let mut container =
            Container { name: "a".to_owned(), image: Some("nginx:1".to_owned()), ..Container::default() };
        let before = container_hash(&container);
        container.env = Some(Vec::new());
        assert_eq!(container_hash(&container), before);
        container.image = Some("nginx:2".to_owned());
        assert_ne!(container_hash(&container), before);
    }

    #[test]
    fn fnv_matches_the_published_vector() {
        assert_eq!(fnv1a(b"a"), 0xe40c_292c);
    }
}
