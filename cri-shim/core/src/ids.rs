//! Ids of sandboxes and containers: 64 hexadecimal digits, made from 32 random bytes of the caller.

use std::fmt;

/// Id of a pod sandbox.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SandboxId(String);

/// Id of a container.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContainerId(String);

macro_rules! id {
    ($name:ident) => {
        impl $name {
            /// A new id from random bytes.
            pub fn from_random(bytes: [u8; 32]) -> Self {
                Self(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
            }

            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl From<&str> for $name {
            fn from(id: &str) -> Self {
                Self(id.to_owned())
            }
        }

        impl From<String> for $name {
            fn from(id: String) -> Self {
                Self(id)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id!(SandboxId);
id!(ContainerId);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_64_hex_digits() {
        let id = SandboxId::from_random([0xa5; 32]);
        assert_eq!(id.as_str().len(), 64);
        assert!(id.as_str().starts_with("a5a5"));
    }
}
