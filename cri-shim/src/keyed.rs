//! Locks by name, for work that must not be done twice at the same time. A name costs memory only while it is locked.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::OwnedMutexGuard;

/// A set of locks that come into being when they are asked for.
#[derive(Default)]
pub struct KeyedLocks(Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>);

impl KeyedLocks {
    /// Waits for `key` and holds it until the guard is dropped.
    pub async fn lock(&self, key: &str) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| lock.strong_count() > 0);
            let known = locks.get(key).and_then(Weak::upgrade);
            known.unwrap_or_else(|| {
                let lock = Arc::default();
                locks.insert(key.to_owned(), Arc::downgrade(&lock));
                lock
            })
        };
        lock.lock_owned().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_at_a_time_by_name_and_nothing_kept() {
        let locks = KeyedLocks::default();
        let held = locks.lock("a").await;
        drop(locks.lock("b").await);
        let waiting = tokio::time::timeout(std::time::Duration::from_millis(20), locks.lock("a")).await;
        assert!(waiting.is_err(), "the second holder waits");
        drop(held);
        drop(locks.lock("a").await);
        drop(locks.lock("c").await);
        assert_eq!(locks.0.lock().expect("unpoisoned").len(), 1, "only the latest name is left");
    }
}
