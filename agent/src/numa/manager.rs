//! What the managers of processors and of memory have in common: what a container is to have for itself is promised when its
//! pod is admitted, written down before it starts, and free again when the pod is over.

use std::path::Path;
use std::sync::Arc;

use agent_core::numa::{Assignments, Hints, Nodes};
use k8s_openapi::api::core::v1::{Container, Pod};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::Notify;
use tracing::warn;

use super::book::Book;

/// The rules by which containers get some of a resource for themselves, with what there is of it.
pub(super) trait Resource: Send + Sync + 'static {
    /// What one container has.
    type Share: Clone + Default + PartialEq + Serialize + DeserializeOwned + Send + Sync + 'static;

    /// The file that says who has what, below the root directory.
    const FILE: &'static str;

    /// Whether what earlier agents gave away is still there to be given.
    fn check(&self, given: &Assignments<Self::Share>) -> anyhow::Result<()>;

    /// The nodes that could give a container what it needs, or, without one, all that its pod needs.
    fn hints(&self, given: &Assignments<Self::Share>, pod: &Pod, container: Option<&Container>)
    -> Vec<Hints>;

    /// Gives the pod's containers what they need, or says why they cannot have it.
    fn assign(&self, given: &mut Assignments<Self::Share>, pod: &Pod) -> Result<(), String>;

    /// The same for one container, from near some nodes.
    fn assign_near(
        &self,
        given: &mut Assignments<Self::Share>,
        pod: &Pod,
        container: &Container,
        near: Option<Nodes>,
    ) -> Result<(), String>;

    /// What a container is held to, as the kernel lists it; empty: to nothing.
    fn set_of(&self, given: &Assignments<Self::Share>, pod_uid: &str, container: &str) -> String;
}

/// The manager of one resource. Clones share it; without its policy it gives nothing.
pub(super) struct Manager<R: Resource>(pub(super) Option<Arc<Inner<R>>>);

pub(super) struct Inner<R: Resource> {
    pub(super) rules: R,
    pub(super) book: Book<Assignments<R::Share>>,
    /// Something else is written down.
    pub(super) changed: Notify,
}

impl<R: Resource> Clone for Manager<R> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<R: Resource> Manager<R> {
    /// With what earlier agents gave to pods that still have a directory. Blocks.
    pub(super) fn open(rules: R, root_dir: &Path) -> anyhow::Result<Self> {
        let book = Book::open(root_dir.join(R::FILE), |known: &mut Assignments<R::Share>| {
            // What a pod with a directory had is still its own.
            known.0.retain(|uid, _| root_dir.join("pods").join(uid).exists());
            rules.check(known)
        })?;
        Ok(Self(Some(Arc::new(Inner { rules, book, changed: Notify::new() }))))
    }

    /// The nodes that could give a container what it needs, or, without one, all of the pod's together.
    pub(super) fn hints(&self, pod: &Pod, container: Option<&Container>) -> Vec<Hints> {
        let Some(inner) = &self.0 else { return Vec::new() };
        inner.rules.hints(&inner.book.promised(), pod, container)
    }

    /// Whether one of the pod's containers has, or was promised, some for itself.
    pub(super) fn has(&self, pod_uid: &str) -> bool {
        self.0.as_ref().is_some_and(|inner| inner.book.promised().has(pod_uid))
    }

    /// Promises what the pod's containers need for themselves, or says why it cannot have it.
    pub(super) fn promise(&self, pod: &Pod) -> Result<(), String> {
        let Some(inner) = &self.0 else { return Ok(()) };
        inner.book.promise(|next| inner.rules.assign(next, pod))
    }

    /// The same for one container, from near some nodes.
    pub(super) fn promise_near(
        &self,
        pod: &Pod,
        container: &Container,
        near: Option<Nodes>,
    ) -> Result<(), String> {
        let Some(inner) = &self.0 else { return Ok(()) };
        inner.book.promise(|next| inner.rules.assign_near(next, pod, container, near))
    }

    /// What a container about to start is held to, after that was written down; empty: to nothing.
    pub(super) async fn allocate(&self, pod: &Pod, container: &Container) -> Result<String, String> {
        let Some(inner) = &self.0 else { return Ok(String::new()) };
        self.promise(pod).map_err(|error| format!("Allocate failed due to {error}"))?;
        inner.write().await?;
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        Ok(inner.rules.set_of(&inner.book.promised(), uid, &container.name))
    }

    /// The pod is over, or was not admitted: what it had is free.
    pub(super) fn take_back(&self, pod_uid: &str) {
        if let Some(inner) = &self.0 {
            inner.book.promised().release(pod_uid);
        }
    }

    /// Writes down what was taken back.
    pub(super) async fn settle(&self) {
        if let Some(inner) = &self.0
            && let Err(problem) = inner.write().await
        {
            warn!("{problem}");
        }
    }
}

impl<R: Resource> Inner<R> {
    /// Writes down what was promised, and tells whoever waits for that.
    async fn write(&self) -> Result<(), String> {
        if self.book.write().await? {
            self.changed.notify_one();
        }
        Ok(())
    }
}
