//! Detachments from the pod network that failed when nobody was left to ask for them again.
//!
//! A sandbox that was never ready is taken back whole, so its client can neither stop it nor remove it. When the plugins fail
//! to detach it, what they gave it (an address above all) would be lost. So the sandbox goes, and what is owed is written
//! down first and tried again: after a pause that grows, when the network's configuration changes, and after a restart.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cri_shim_core::record::{DetachmentRecord, SandboxRecord};
use tokio::sync::Notify;

use crate::error::{RuntimeError, chain};
use crate::host::blocking;
use crate::runtime::Runtime;

/// First and longest pause between two tries.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));
/// Most detachments that are remembered. Each is one sandbox that could not be made; a client tries again some times a minute.
const MOST: usize = 4096;

/// The detachments that are still to be done.
#[derive(Debug, Default)]
pub struct Owed {
    all: Mutex<BTreeMap<String, SandboxRecord>>,
    news: Notify,
}

impl Owed {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, SandboxRecord>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.lock().len()
    }

    /// Adds one; says whether there was room.
    fn add(&self, record: SandboxRecord) -> bool {
        let mut all = self.lock();
        if all.len() >= MOST && !all.contains_key(&record.id) {
            return false;
        }
        all.insert(record.id.clone(), record);
        drop(all);
        self.news.notify_one();
        true
    }
}

impl Runtime {
    /// Remembers, on disk as well, that a sandbox is still to be detached.
    pub(super) async fn owe_detachment(&self, record: &SandboxRecord) -> Result<(), RuntimeError> {
        let debt = DetachmentRecord { sandbox: record.clone() };
        let journal = self.journal.clone();
        blocking(move || journal.write(&debt)).await?;
        if !self.owed.add(record.clone()) {
            tracing::error!(
                sandbox = record.id,
                "too many sandboxes to detach; this one is tried after a restart"
            );
        }
        Ok(())
    }

    /// Takes up what an earlier server still had to do.
    pub(crate) async fn recover_detachments(&self) -> Result<(), RuntimeError> {
        let journal = self.journal.clone();
        for debt in blocking(move || journal.load::<DetachmentRecord>()).await? {
            self.owed.add(debt.sandbox);
        }
        Ok(())
    }

    /// Does what is owed, for ever.
    pub(crate) async fn pay_detachments(self: Arc<Self>) {
        let mut network = self.network.changes();
        let mut pause = PAUSES.0;
        loop {
            if self.owed.count() == 0 {
                self.owed.news.notified().await;
                pause = PAUSES.0;
            }
            // Cancel-safe: both only say that it is time to look again. A closed channel is no reason to hurry.
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                Ok(()) = network.changed() => {}
            }
            let all: Vec<SandboxRecord> = self.owed.lock().values().cloned().collect();
            let mut paid = false;
            let mut left = None;
            for record in &all {
                match self.pay_detachment(record).await {
                    Ok(()) => paid = true,
                    Err(error) => left = left.or(Some((&record.id, error))),
                }
            }
            if let Some((sandbox, error)) = left {
                let owed = self.owed.count();
                tracing::warn!(sandbox, owed, error = %chain(&error), "sandboxes are still not detached");
            }
            pause = if paid { PAUSES.0 } else { (pause * 2).min(PAUSES.1) };
        }
    }

    /// Tries one.
    async fn pay_detachment(&self, record: &SandboxRecord) -> Result<(), RuntimeError> {
        self.network.detach(record).await?;
        let (journal, id) = (self.journal.clone(), record.id.clone());
        blocking(move || journal.remove::<DetachmentRecord>(&id)).await?;
        self.owed.lock().remove(&record.id);
        tracing::info!(sandbox = record.id, "detached at last");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_are_remembered_as_there_is_room_for_and_each_once() {
        let owed = Owed::default();
        let record = |number: usize| SandboxRecord { id: number.to_string(), ..SandboxRecord::default() };
        for number in 0..MOST {
            assert!(owed.add(record(number)));
        }
        assert!(!owed.add(record(MOST)), "there is no room");
        assert!(owed.add(record(0)), "this one is known");
        assert_eq!(owed.count(), MOST);
    }
}
