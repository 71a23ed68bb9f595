//! Who has what: promised in memory at admission, and written down before it is used.

use std::path::{Path, PathBuf};
use std::sync::{MutexGuard, PoisonError};

use anyhow::Context as _;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::Mutex;

/// One file, and what is to be in it.
pub(super) struct Book<A> {
    path: PathBuf,
    promised: std::sync::Mutex<A>,
    written: Mutex<A>,
}

impl<A: Clone + Default + PartialEq + Serialize + DeserializeOwned> Book<A> {
    /// What earlier agents wrote, after `check` has looked at it. Blocks.
    pub(super) fn open(
        path: PathBuf,
        check: impl FnOnce(&mut A) -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        let known =
            read(&path).and_then(|mut known| check(&mut known).map(|()| known)).with_context(|| {
                format!("{} does not fit this machine: drain the node and remove it", path.display())
            })?;
        let promised = std::sync::Mutex::new(known.clone());
        Ok(Self { path, promised, written: Mutex::new(known) })
    }

    /// Who has, or was promised, what.
    pub(super) fn promised(&self) -> MutexGuard<'_, A> {
        self.promised.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Promises something, wholly or not at all.
    pub(super) fn promise<T, E>(&self, change: impl FnOnce(&mut A) -> Result<T, E>) -> Result<T, E> {
        let mut promised = self.promised();
        let mut next = promised.clone();
        let outcome = change(&mut next)?;
        *promised = next;
        Ok(outcome)
    }

    /// Writes down what was promised; whether that is something new.
    pub(super) async fn write(&self) -> Result<bool, String> {
        let mut written = self.written.lock().await;
        let next = self.promised().clone();
        if next == *written {
            return Ok(false);
        }
        self.save(&next).await?;
        *written = next;
        Ok(true)
    }

    /// What is written down.
    pub(super) async fn written(&self) -> A {
        self.written.lock().await.clone()
    }

    async fn save(&self, what: &A) -> Result<(), String> {
        let text = serde_json::to_string(what).map_err(|error| error.to_string())?;
        let path = self.path.clone();
        let saved = tokio::task::spawn_blocking(move || crate::files::write_private(&path, &text)).await;
        saved
            .map_err(std::io::Error::other)
            .and_then(|saved| saved)
            .map_err(|error| format!("cannot write {}: {error}", self.path.display()))
    }
}

fn read<A: Default + DeserializeOwned>(path: &Path) -> anyhow::Result<A> {
    let text = crate::files::read(path)?;
    text.map_or(Ok(A::default()), |text| Ok(serde_json::from_str(&text)?))
}
