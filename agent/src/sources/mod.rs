//! What the agent reads from the API server: its pods, its node, services, and the objects that its pods use; and the
//! static pods of the node itself, which [`mirrors`] shows in the API.
//!
//! Each source of the API is one watch with reconnects; nothing is polled. Outputs are channels and stores; decisions are made
//! elsewhere.

pub mod manifest;
pub mod mirrors;
pub mod node;
pub mod objects;
pub mod offline;
pub mod pods;
pub mod services;
pub mod static_pods;
pub mod static_url;

use std::fmt::Debug;
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt as _, stream};
use kube::runtime::utils::Backoff;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;

const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Pause before everything is listed anew.
const ANEW: Duration = Duration::from_secs(1);

/// A watch that worked this long after a pause starts over with short ones.
const QUIET: Duration = Duration::from_secs(30);

/// Watches with reconnects. Where the API server is not as far as what it once told, its database was restored: then everything
/// is listed anew, for the watch alone would wait until the server has come as far again.
pub(crate) fn follow<K>(
    api: Api<K>,
    config: watcher::Config,
) -> impl Stream<Item = Result<watcher::Event<K>, watcher::Error>> + Send
where
    K: Resource + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let begin = move || watcher(api.clone(), config.clone()).backoff(Reconnect::default()).boxed();
    stream::unfold((begin(), begin), async |(mut stream, begin)| {
        let event = stream.next().await?;
        if event.as_ref().is_err_and(is_behind) {
            tokio::time::sleep(ANEW).await;
            stream = begin();
        }
        Some((event, (stream, begin)))
    })
}

/// Whether the API server has not come to the version that the watch asks for.
fn is_behind(error: &watcher::Error) -> bool {
    let says_so = |message: &str| message.contains("Too large resource version");
    match error {
        watcher::Error::WatchStartFailed(kube::Error::Api(status)) | watcher::Error::WatchError(status) => {
            says_so(&status.message)
        }
        _ => false,
    }
}

/// Pauses between reconnects of a watch: short, because one node is no herd, and so that a restarted API server is
/// noticed soon.
#[derive(Debug)]
struct Reconnect {
    next: Duration,
    last: Option<Instant>,
}

impl Default for Reconnect {
    fn default() -> Self {
        Self { next: FIRST_PAUSE, last: None }
    }
}

impl Iterator for Reconnect {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        if self.last.is_some_and(|last| last.elapsed() > QUIET + self.next) {
            self.next = FIRST_PAUSE;
        }
        self.last = Some(Instant::now());
        let pause = self.next;
        self.next = pause.saturating_mul(2).min(LONGEST_PAUSE);
        Some(pause)
    }
}

impl Backoff for Reconnect {
    /// The watcher calls this for each event, the first of which precedes every attempt to list: no sign of success.
    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use http::{Request, Response};
    use k8s_openapi::api::core::v1::Pod;
    use kube::Client;
    use kube::client::Body;
    use serde_json::{Value, json};

    use super::*;

    fn answer(code: u16, value: &Value) -> Response<Body> {
        let body = Body::from(value.to_string().into_bytes());
        Response::builder().status(code).header("content-type", "application/json").body(body).unwrap()
    }

    /// A server whose database is set back after the first list.
    async fn serve(request: Request<Body>, lists: Arc<AtomicU32>) -> Response<Body> {
        if request.uri().query().unwrap_or_default().contains("watch=true") {
            if lists.load(Ordering::Relaxed) > 1 {
                return std::future::pending().await;
            }
            let message = "Too large resource version: 100, current: 5";
            let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Timeout",
                "message": message, "code": 504});
            return answer(504, &status);
        }
        let version = if lists.fetch_add(1, Ordering::Relaxed) == 0 { "100" } else { "5" };
        let pod = json!({"metadata": {"name": "p", "namespace": "n", "resourceVersion": version}});
        let list = json!({"kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": version}, "items": [pod]});
        answer(200, &list)
    }

    #[tokio::test]
    async fn a_database_that_was_restored_is_listed_anew() {
        let lists = Arc::new(AtomicU32::new(0));
        let service = tower::service_fn(move |request: Request<Body>| {
            let lists = Arc::clone(&lists);
            async move { Ok::<_, Infallible>(serve(request, lists).await) }
        });
        let pods: Api<Pod> = Api::all(Client::new(service, "default"));
        let mut events = std::pin::pin!(follow(pods, watcher::Config::default()));
        let mut told = Vec::new();
        while told.len() < 7 {
            told.push(match events.next().await.expect("it goes on") {
                Ok(watcher::Event::Init) => "begin".to_owned(),
                Ok(watcher::Event::InitApply(pod)) => pod.metadata.resource_version.unwrap_or_default(),
                Ok(watcher::Event::InitDone) => "done".to_owned(),
                Ok(other) => panic!("{other:?}"),
                Err(error) => error.to_string().chars().take(5).collect(),
            });
        }
        assert_eq!(told, ["begin", "100", "done", "faile", "begin", "5", "done"]);
    }
}
