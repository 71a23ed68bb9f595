//! Calls to containerd for images: deadlines, the lease that keeps a pull's parts from garbage collection, and errors
//! that say which step failed on what. It knows the calls, not what an image is.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use containerd_client::services::v1 as services;
use containerd_client::services::v1::leases_client::LeasesClient;
use tonic::{Code, Request, Response, Status};

use super::known::Changes;
use crate::containerd::Client;
use crate::telemetry;

/// How long containerd may take for one metadata call (a database write may wait for the disk).
pub const CALL_DEADLINE: Duration = Duration::from_secs(30);

/// How long a lease outlives a pull whose process died.
const LEASE_LIFE: jiff::SignedDuration = jiff::SignedDuration::from_hours(24);

/// Names the process that a lease belongs to.
const OWNER: &str = "io.keelson.owner";

/// A call to containerd that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step} {subject}: {}", status.message())]
pub struct CallError {
    /// What was to be done.
    pub step: &'static str,
    /// To what.
    pub subject: String,
    /// containerd's answer.
    pub status: Box<Status>,
}

impl CallError {
    /// The code containerd answered with.
    pub fn code(&self) -> Code {
        self.status.code()
    }
}

/// A way to containerd, with or without a lease. Cloning is cheap.
#[derive(Clone)]
pub struct Session {
    client: Client,
    lease: Option<String>,
    changes: Arc<Changes>,
}

impl Session {
    /// A session whose objects live only as long as something refers to them.
    pub fn new(client: Client) -> Self {
        Self { client, lease: None, changes: Arc::default() }
    }

    /// Takes out a lease; what the returned session creates or uses stays until [`Session::release`] (or a day).
    pub async fn leased(&self) -> Result<Self, CallError> {
        let id = format!("keelson-image-{}", random_name());
        let expire = jiff::Timestamp::now().saturating_add(LEASE_LIFE).unwrap_or(jiff::Timestamp::MAX);
        let labels = HashMap::from([
            ("containerd.io/gc.expire".to_owned(), expire.to_string()),
            (OWNER.to_owned(), owner(std::process::id())),
        ]);
        let message = services::CreateRequest { id: id.clone(), labels };
        let request = self.request(message, CALL_DEADLINE);
        let mut leases = LeasesClient::new(self.client.channel());
        call("create lease", &id, leases.create(request)).await?;
        Ok(Self { client: self.client.clone(), lease: Some(id), changes: Arc::clone(&self.changes) })
    }

    /// Changes of images, which whoever makes one tells.
    pub fn changes(&self) -> &Changes {
        &self.changes
    }

    /// Gives the lease back; a failure only means that it expires by itself. `sync` waits until what only the lease kept
    /// is gone.
    pub async fn release(self, sync: bool) {
        if let Some(id) = self.lease.clone() {
            self.delete_lease(&id, sync).await;
        }
    }

    /// Deletes the leases of processes that died, so that what they had begun is collected now and not in a day.
    pub async fn sweep(&self) -> Result<(), CallError> {
        let message = services::ListRequest { filters: vec![format!("labels.\"{OWNER}\"")] };
        let mut leases = LeasesClient::new(self.client.channel());
        let listed = call("list", "leases", leases.list(self.request(message, CALL_DEADLINE))).await?;
        let dead = listed
            .leases
            .iter()
            .filter(|lease| lease.labels.get(OWNER).is_some_and(|owner| !is_alive(owner)));
        for lease in dead {
            tracing::info!(lease = lease.id, "removing what an interrupted pull left");
            self.delete_lease(&lease.id, true).await;
        }
        Ok(())
    }

    async fn delete_lease(&self, id: &str, sync: bool) {
        let deadline = if sync { CALL_DEADLINE * 4 } else { CALL_DEADLINE };
        let request = self.request(services::DeleteRequest { id: id.to_owned(), sync }, deadline);
        let mut leases = LeasesClient::new(self.client.channel());
        let deleted = call("delete lease", id, leases.delete(request)).await;
        if let Err(error) = allow(deleted, Code::NotFound) {
            tracing::warn!(error = &error as &dyn std::error::Error, "a lease stays until it expires");
        }
    }

    /// Puts an existing object (`content`, `snapshots/overlayfs`) under this session's lease.
    pub async fn hold(&self, kind: &str, id: &str) -> Result<(), CallError> {
        let Some(lease) = &self.lease else { return Ok(()) };
        let resource = services::Resource { id: id.to_owned(), r#type: kind.to_owned() };
        let message = services::AddResourceRequest { id: lease.clone(), resource: Some(resource) };
        let request = self.request(message, CALL_DEADLINE);
        let mut leases = LeasesClient::new(self.client.channel());
        call("hold", id, leases.add_resource(request)).await.map(drop)
    }

    /// The channel for a service's client.
    pub fn channel(&self) -> tonic::transport::Channel {
        self.client.channel()
    }

    /// A request with namespace, lease and deadline.
    pub fn request<T>(&self, message: T, deadline: Duration) -> Request<T> {
        self.with_lease(self.client.request(message, deadline))
    }

    /// A request of a stream, whose messages have deadlines of their own.
    pub fn streaming<T>(&self, stream: T) -> Request<T> {
        let mut request = Request::new(stream);
        let namespace =
            self.client.request((), CALL_DEADLINE).metadata().get("containerd-namespace").cloned();
        if let Some(namespace) = namespace {
            request.metadata_mut().insert("containerd-namespace", namespace);
        }
        self.with_lease(request)
    }

    fn with_lease<T>(&self, mut request: Request<T>) -> Request<T> {
        let lease = self.lease.as_ref().and_then(|lease| lease.parse().ok());
        if let Some(lease) = lease {
            request.metadata_mut().insert("containerd-lease", lease);
        }
        request
    }
}

/// Runs one call and says on failure what it was for.
pub async fn call<T>(
    step: &'static str,
    subject: &str,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, CallError> {
    let begun = Instant::now();
    let answer = call.await;
    // What is looked for and is not there is an answer.
    let failure = answer.as_ref().is_err_and(|status| status.code() != Code::NotFound);
    telemetry::containerd_call(step, begun.elapsed(), failure);
    answer.map(Response::into_inner).map_err(|status| failed(step, subject, status))
}

/// The error of a step.
pub fn failed(step: &'static str, subject: &str, status: Status) -> CallError {
    CallError { step, subject: subject.to_owned(), status: Box::new(status) }
}

/// `Ok` also for the answer `expected`, which then is `None`.
pub fn allow<T>(result: Result<T, CallError>, expected: Code) -> Result<Option<T>, CallError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.code() == expected => Ok(None),
        Err(error) => Err(error),
    }
}

/// A process by its id, the moment it started, and the boot that was in.
fn owner(pid: u32) -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in brackets may hold anything; the start is the twentieth field behind it.
    let started =
        stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(19)).unwrap_or("gone");
    format!("{pid}:{started}:{}", boot.trim())
}

fn is_alive(text: &str) -> bool {
    let pid = text.split(':').next().and_then(|pid| pid.parse().ok());
    pid.is_some_and(|pid| owner(pid) == text)
}

/// A name no other pull uses.
pub fn random_name() -> String {
    // Collisions are answered by containerd with an error; only without any kernel randomness is the name the time.
    let number = getrandom::u64().unwrap_or_else(|_none| crate::clock::now().unsigned_abs());
    format!("{number:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_is_alive_only_as_itself() {
        let own = owner(std::process::id());
        assert!(is_alive(&own) && !own.contains("gone"), "{own}");
        let (pid, rest) = own.split_once(':').expect("three parts");
        assert!(!is_alive(&format!("{pid}:1{rest}")), "another process with its id");
        assert!(!is_alive("1:1:other-boot") && !is_alive("") && !is_alive("x"));
    }
}
