//! An API server with room for one pod: status patches are merged by the project's own strategic merge.

use std::sync::{Arc, Mutex, PoisonError};

use http::{Method, Request, Response};
use http_body_util::BodyExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::{Notify, mpsc};

use super::Journal;
use crate::sources::pods::PodEvent;

/// The API server; clones share the pod.
#[derive(Clone)]
pub(super) struct FakeApi {
    journal: Journal,
    pod: Arc<Mutex<Option<Value>>>,
    changed: Arc<Notify>,
    created: Arc<Mutex<u32>>,
    trouble: Arc<Mutex<Trouble>>,
    /// The only ResourceClaim.
    pub(super) claim: Arc<Mutex<Option<Value>>>,
}

/// What the server answers instead of what it should, one code after the other.
#[derive(Default)]
struct Trouble {
    codes: Vec<u16>,
    requests: usize,
    /// It does what it is asked all the same.
    done: bool,
}

impl FakeApi {
    pub(super) fn new(journal: Journal) -> Self {
        Self {
            journal,
            pod: Arc::default(),
            changed: Arc::default(),
            created: Arc::default(),
            trouble: Arc::default(),
            claim: Arc::default(),
        }
    }

    pub(super) fn client(&self) -> Client {
        let api = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let api = api.clone();
            async move { Ok::<_, std::convert::Infallible>(api.answer(request).await) }
        });
        Client::new(service, "default")
    }

    pub(super) fn pods(&self) -> Vec<Arc<Pod>> {
        self.typed().into_iter().collect()
    }

    pub(super) fn create(&self, mut pod: Value) -> Arc<Pod> {
        pod["metadata"]["resourceVersion"] = json!("1");
        pod["status"] = json!({"phase": "Pending"});
        *self.lock() = Some(pod);
        self.typed().expect("just made")
    }

    pub(super) fn delete(&self, grace: i64) -> Arc<Pod> {
        if let Some(pod) = self.lock().as_mut() {
            pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
            pod["metadata"]["deletionGracePeriodSeconds"] = json!(grace);
            bump(pod);
        }
        self.typed().expect("it was made")
    }

    pub(super) fn edit(&self, change: impl FnOnce(&mut Value)) -> Arc<Pod> {
        if let Some(pod) = self.lock().as_mut() {
            change(pod);
            bump(pod);
        }
        self.typed().expect("it was made")
    }

    pub(super) fn forget(&self) {
        *self.lock() = None;
    }

    /// From now on every request fails, with these codes in turn; `done`: after it was carried out. No code: all is well.
    pub(super) fn fail_with(&self, codes: &[u16], done: bool) {
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        *trouble = Trouble { codes: codes.to_vec(), requests: 0, done };
    }

    /// Requests that failed since.
    pub(super) fn failed(&self) -> usize {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).requests
    }

    /// The code to fail with now, and whether the request is carried out all the same.
    fn trouble(&self) -> Option<(u16, bool)> {
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        let code = *trouble.codes.get(trouble.requests % trouble.codes.len().max(1))?;
        trouble.requests += 1;
        Some((code, trouble.done))
    }

    /// The watch: the newest state after each change.
    pub(super) async fn feed(self, events: mpsc::Sender<PodEvent>) {
        loop {
            self.changed.notified().await;
            if let Some(pod) = self.typed()
                && events.send(PodEvent::Apply(pod)).await.is_err()
            {
                return;
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Value>> {
        self.pod.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn typed(&self) -> Option<Arc<Pod>> {
        let value = self.lock().clone()?;
        Some(Arc::new(serde_json::from_value(value).expect("a pod")))
    }

    async fn answer(&self, request: Request<Body>) -> Response<Body> {
        match self.trouble() {
            None => self.answer_well(request).await,
            Some((code, done)) => {
                if done {
                    self.answer_well(request).await;
                }
                let kind = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "no", "code": code});
                json_response(code, &kind)
            }
        }
    }

    async fn answer_well(&self, request: Request<Body>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let body = body.collect().await.expect("a body").to_bytes();
        let is_pod = parts.uri.path().contains("/pods/p");
        if parts.method == Method::POST && parts.uri.path().ends_with("/pods") {
            let mut pod: Value = serde_json::from_slice(&body).expect("a pod");
            let mut counter = self.created.lock().unwrap_or_else(PoisonError::into_inner);
            *counter += 1;
            pod["metadata"]["uid"] = json!(format!("made-{counter}"));
            self.journal.add(format!("api: create {}", pod["metadata"]["name"].as_str().unwrap_or_default()));
            let made = serde_json::to_value(&*self.create(pod)).expect("a pod");
            self.changed.notify_one();
            return json_response(201, &made);
        }
        let claim = self.claim.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(claim) = claim.filter(|_| parts.uri.path().contains("/resourceclaims/")) {
            return json_response(200, &claim);
        }
        if parts.method == Method::POST && parts.uri.path().ends_with("/events") {
            let event: Value = serde_json::from_slice(&body).expect("an event");
            let text = |field: &str| event[field].as_str().unwrap_or_default().to_owned();
            self.journal.add(format!("event: {} {}", text("reason"), text("message")));
            return json_response(201, &event);
        }
        if parts.method == Method::PATCH && is_pod {
            let patch: Value = serde_json::from_slice(&body).expect("a patch");
            return self.patch(&patch);
        }
        if parts.method == Method::DELETE && is_pod {
            self.journal.add("api: delete");
            let pod = self.lock().take();
            return json_response(200, &pod.unwrap_or_default());
        }
        json_response(
            404,
            &json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "no", "code": 404}),
        )
    }

    fn patch(&self, patch: &Value) -> Response<Body> {
        let info = control_api::kinds::find("", "v1", "pods").expect("pods are known");
        let mut pod = self.lock();
        let Some(current) = pod.as_ref() else {
            return json_response(
                404,
                &json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 404}),
            );
        };
        if patch["metadata"]["uid"] != current["metadata"]["uid"] {
            return json_response(
                409,
                &json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "another uid", "code": 409}),
            );
        }
        let mut merged = control_api::patch::strategic_merge(info, current, patch).expect("a good patch");
        bump(&mut merged);
        self.journal.add(format!("api: {}", summary(&merged["status"])));
        *pod = Some(merged.clone());
        drop(pod);
        self.changed.notify_one();
        json_response(200, &merged)
    }
}

fn bump(pod: &mut Value) {
    let version: u64 = pod["metadata"]["resourceVersion"].as_str().and_then(|v| v.parse().ok()).unwrap_or(0);
    pod["metadata"]["resourceVersion"] = json!((version + 1).to_string());
}

/// `Running Ready=True restarts=0 [reason]`.
fn summary(status: &Value) -> String {
    let ready = status["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|condition| condition["type"] == "Ready")
        .and_then(|condition| condition["status"].as_str())
        .unwrap_or("?");
    let container = &status["containerStatuses"][0];
    let reason = container["state"]["waiting"]["reason"].as_str().unwrap_or_default();
    let phase = status["phase"].as_str().unwrap_or_default();
    let own = status["reason"].as_str().unwrap_or_default();
    format!("{phase} Ready={ready} restarts={} {reason}{own}", container["restartCount"])
}

fn json_response(code: u16, value: &Value) -> Response<Body> {
    Response::builder()
        .status(code)
        .header("content-type", "application/json")
        .body(Body::from(value.to_string().into_bytes()))
        .expect("a response")
}
