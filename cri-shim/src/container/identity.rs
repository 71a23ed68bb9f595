//! Who a container's first process is: the image's passwd and group files, read once per image.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use containerd_client::types::Mount;
use cri_shim_api::v1::ContainerConfig;
use cri_shim_core::users::{self, Identity};

use crate::error::RuntimeError;
use crate::host::{blocking, rootfs};

/// Most images that are remembered.
const MOST_IMAGES: usize = 128;
/// Files larger than this together are read each time.
const MOST_BYTES: usize = 64 << 10;

/// The files of an image that say who its users are.
#[derive(Debug, Default)]
pub struct Accounts {
    passwd: String,
    group: String,
}

impl Accounts {
    /// Reads them from the layers of a snapshot.
    pub async fn read(mounts: Vec<Mount>) -> Result<Self, RuntimeError> {
        blocking(move || {
            Ok(Self {
                passwd: rootfs::read(&mounts, "etc/passwd")?,
                group: rootfs::read(&mounts, "etc/group")?,
            })
        })
        .await
    }

    /// The first process's user, by the security context or else by the image's own choice.
    pub fn identity(&self, config: &ContainerConfig, image_user: &str) -> Result<Identity, RuntimeError> {
        let security = config.linux.as_ref().and_then(|linux| linux.security_context.clone());
        Ok(users::resolve(&security.unwrap_or_default(), image_user, &self.passwd, &self.group)?)
    }
}

/// The accounts of the images used last, by chain id: what a chain id names never changes.
#[derive(Debug, Default)]
pub struct AccountCache {
    known: Mutex<VecDeque<(String, Arc<Accounts>)>>,
}

impl AccountCache {
    /// The accounts of an image, when they are remembered.
    pub fn get(&self, chain_id: &str) -> Option<Arc<Accounts>> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.iter().find(|(known, _)| known == chain_id).map(|(_, accounts)| Arc::clone(accounts))
    }

    /// Remembers the accounts of an image.
    pub fn put(&self, chain_id: &str, accounts: &Arc<Accounts>) {
        if chain_id.is_empty() || accounts.passwd.len() + accounts.group.len() > MOST_BYTES {
            return;
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|(other, _)| other != chain_id);
        known.push_front((chain_id.to_owned(), Arc::clone(accounts)));
        known.truncate(MOST_IMAGES);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts(length: usize) -> Arc<Accounts> {
        Arc::new(Accounts { passwd: "x".repeat(length), group: String::new() })
    }

    #[test]
    fn the_cache_is_bounded_in_number_and_size() {
        let cache = AccountCache::default();
        for number in 0..=MOST_IMAGES {
            cache.put(&format!("sha256:{number}"), &accounts(1));
        }
        assert!(cache.get("sha256:0").is_none(), "the oldest one went");
        assert!(cache.get("sha256:1").is_some());
        cache.put("sha256:big", &accounts(MOST_BYTES + 1));
        assert!(cache.get("sha256:big").is_none());
        cache.put("", &accounts(1));
        assert!(cache.get("").is_none(), "an image without layers has no name for them");
    }
}
