//! Paths and their handlers.

use std::sync::Arc;

use cri_shim_api::v1::image_service_client::ImageServiceClient;
use cri_shim_api::v1::runtime_service_client::RuntimeServiceClient;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;
use tonic::transport::Channel;

use super::auth::{self, Identity};
use super::reply::{self, Reply};
use super::sizes::Sizes;
use super::summary::Sampler;
use super::{ServerConfig, cadvisor, logs, metrics, node_logs, streams, summary};
use crate::contracts::PodLookup;
use crate::logging;

/// A verbosity has no more digits.
const LONGEST_NUMBER: usize = 32;
/// Paths that `enableDebuggingHandlers` switches.
const DEBUGGING: [&str; 9] =
    ["run", "exec", "attach", "portForward", "containerLogs", "configz", "runningpods", "logs", "debug"];

/// The API's state: where answers come from.
pub(super) struct Api {
    pub(super) config: ServerConfig,
    pub(super) state: Arc<dyn PodLookup>,
    pub(super) runtime: RuntimeServiceClient<Channel>,
    /// Where the runtime's images are asked for; `None` in tests.
    pub(super) images: Option<ImageServiceClient<Channel>>,
    pub(super) sampler: Sampler,
    /// CPU of the agent, the runtime and all pods.
    pub(super) own_rate: Sampler,
    pub(super) runtime_rate: Sampler,
    pub(super) pods_rate: Sampler,
    pub(super) sizes: Sizes,
}

/// A container named by a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Target<'a> {
    pub(super) namespace: &'a str,
    pub(super) pod: &'a str,
    pub(super) uid: Option<&'a str>,
    /// Empty: the pod's only one, or the pod itself.
    pub(super) container: &'a str,
}

/// Query parameters, decoded, in order.
pub(super) struct Query(Vec<(String, String)>);

impl Query {
    /// Of a request; an undecodable query counts as empty.
    pub(super) fn of<B>(request: &Request<B>) -> Self {
        let parsed = axum::extract::Query::<Vec<(String, String)>>::try_from_uri(request.uri());
        Self(parsed.map(|query| query.0).unwrap_or_default())
    }

    /// The first value of any of `names`, empty ones left out.
    pub(super) fn first(&self, names: &[&str]) -> Option<&str> {
        let found = self.0.iter().find(|(name, value)| names.contains(&name.as_str()) && !value.is_empty());
        found.map(|(_, value)| value.as_str())
    }

    /// All values of `name`.
    pub(super) fn all(&self, name: &str) -> Vec<String> {
        self.0.iter().filter(|(given, _)| given == name).map(|(_, value)| value.clone()).collect()
    }

    /// Whether one of `names` is on (`1`, `true`, or without value).
    pub(super) fn is_on(&self, names: &[&str]) -> bool {
        let found = self.0.iter().find(|(name, _)| names.contains(&name.as_str()));
        found.is_some_and(|(_, value)| {
            matches!(value.as_str(), "" | "1" | "t" | "T" | "true" | "TRUE" | "True")
        })
    }
}

impl Api {
    /// An API over these sources.
    pub(super) fn new(
        config: ServerConfig,
        state: Arc<dyn PodLookup>,
        runtime: RuntimeServiceClient<Channel>,
    ) -> Self {
        let images = config.images.clone();
        Self {
            config,
            state,
            runtime,
            images,
            sampler: Sampler::default(),
            own_rate: Sampler::default(),
            runtime_rate: Sampler::default(),
            pods_rate: Sampler::default(),
            sizes: Sizes::default(),
        }
    }

    /// Answers one request of a client who is `identity`, if anybody.
    pub(super) async fn handle(&self, request: Request<Incoming>, identity: Option<&Identity>) -> Reply {
        let Some(identity) = identity else { return reply::text(StatusCode::UNAUTHORIZED, "Unauthorized") };
        if !identity.is_allowed() {
            return forbidden(identity, &request);
        }
        self.answer(request, self.config.debugging).await
    }

    /// Answers one request of anybody, on the read-only port.
    pub(super) async fn handle_read_only(&self, request: Request<Incoming>) -> Reply {
        self.answer(request, false).await
    }

    async fn answer(&self, request: Request<Incoming>, debugging: bool) -> Reply {
        let path = request.uri().path().to_owned();
        let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
        let is_get = request.method() == Method::GET;
        if !debugging && segments.first().is_some_and(|first| DEBUGGING.contains(first)) {
            return reply::text(StatusCode::METHOD_NOT_ALLOWED, "Debug endpoints are disabled.");
        }
        match segments.as_slice() {
            ["healthz" | "livez" | "readyz", ..] if is_get => reply::text(StatusCode::OK, "ok"),
            ["pods"] if is_get => reply::json(&pod_list(&self.state.pods())),
            ["runningpods"] if is_get => reply::json(&pod_list(&running(self.state.pods()))),
            ["configz"] if is_get => reply::json(&self.config.configz),
            ["stats", "summary"] if is_get => summary::answer(self).await,
            ["metrics", "resource"] if is_get => metrics::resource(self).await,
            ["metrics", "cadvisor"] if is_get => cadvisor::answer(self).await,
            ["metrics", "probes"] if is_get => {
                reply::with_type(StatusCode::OK, metrics::CONTENT_TYPE, self.config.probes.render())
            }
            ["metrics"] if is_get => metrics::own(self),
            ["containerLogs", namespace, pod, container] if is_get => {
                logs::answer(self, Target { namespace, pod, uid: None, container }, &Query::of(&request))
                    .await
            }
            ["logs", ..] if is_get => {
                let rest = path.strip_prefix("/logs").unwrap_or_default();
                node_logs::answer(self, rest, &Query::of(&request)).await
            }
            ["debug", rest @ ..] => self.debug(rest, request).await,
            ["exec", rest @ ..] => match container_target(rest) {
                Some(target) => streams::exec(self, target, request).await,
                None => not_found(),
            },
            ["attach", rest @ ..] => match container_target(rest) {
                Some(target) => streams::attach(self, target, request).await,
                None => not_found(),
            },
            ["run", rest @ ..] if request.method() == Method::POST => match container_target(rest) {
                Some(target) => streams::run(self, target, &Query::of(&request)).await,
                None => not_found(),
            },
            ["portForward", namespace, pod] => {
                streams::port_forward(self, Target { namespace, pod, uid: None, container: "" }, request)
                    .await
            }
            ["portForward", namespace, pod, uid] => {
                streams::port_forward(self, Target { namespace, pod, uid: Some(uid), container: "" }, request)
                    .await
            }
            _ => not_found(),
        }
    }
}

impl Api {
    /// Below `/debug`: there is no profiler, and the log's verbosity can be changed.
    async fn debug(&self, rest: &[&str], request: Request<Incoming>) -> Reply {
        let disabled =
            |what: &str| reply::text(StatusCode::METHOD_NOT_ALLOWED, format!("{what} endpoint is disabled."));
        match rest {
            ["pprof", ..] if !self.config.settings.profiling => disabled("profiling"),
            ["flags", "v"] if !self.config.settings.debug_flags => disabled("flags"),
            ["flags", "v"] if request.method() == Method::PUT => set_verbosity(request).await,
            ["flags", "v"] => reply::text(StatusCode::NOT_ACCEPTABLE, "unsupported http method"),
            _ => not_found(),
        }
    }
}

/// Says more or less in the log, as the body wants.
async fn set_verbosity(request: Request<Incoming>) -> Reply {
    let body = Limited::new(request.into_body(), LONGEST_NUMBER).collect().await;
    let bytes = body.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes).trim().to_owned();
    let outcome = text.parse::<u32>().map_err(|error| error.to_string()).and_then(logging::set_verbosity);
    match outcome {
        Ok(()) => reply::text(StatusCode::OK, format!("successfully set klog.logging.verbosity to {text}")),
        Err(problem) => {
            let message = format!("failed set klog.logging.verbosity {text}: {problem}");
            reply::text(StatusCode::BAD_REQUEST, message)
        }
    }
}

/// `{namespace}/{pod}[/{uid}]/{container}`.
fn container_target<'a>(segments: &[&'a str]) -> Option<Target<'a>> {
    match segments {
        [namespace, pod, container] => Some(Target { namespace, pod, uid: None, container }),
        [namespace, pod, uid, container] => Some(Target { namespace, pod, uid: Some(uid), container }),
        _ => None,
    }
}

fn forbidden(identity: &Identity, request: &Request<Incoming>) -> Reply {
    let verb = match *request.method() {
        Method::GET | Method::HEAD => "get",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        _ => "create",
    };
    let subresource = auth::subresource(request.uri().path());
    let message = format!(
        "Forbidden (user={}, verb={verb}, resource=nodes, subresource(s)=[{subresource}])",
        identity.user
    );
    reply::text(StatusCode::FORBIDDEN, message)
}

fn not_found() -> Reply {
    reply::text(StatusCode::NOT_FOUND, "404 page not found\n")
}

fn pod_list(pods: &[Arc<Pod>]) -> serde_json::Value {
    let items: Vec<&Pod> = pods.iter().map(AsRef::as_ref).collect();
    json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items})
}

fn running(mut pods: Vec<Arc<Pod>>) -> Vec<Arc<Pod>> {
    pods.retain(|pod| pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Running"));
    pods
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(text: &str) -> Query {
        Query::of(&Request::builder().uri(format!("/x?{text}")).body(()).unwrap())
    }

    #[test]
    fn queries_are_decoded_and_both_spellings_taken() {
        let query = query("command=sh&command=-c&command=echo%20a%26b&input=1&stdout=true&tty=false&empty");
        assert_eq!(query.all("command"), ["sh", "-c", "echo a&b"]);
        assert!(
            query.is_on(&["stdin", "input"]) && query.is_on(&["stdout", "output"]) && query.is_on(&["empty"])
        );
        assert!(!query.is_on(&["tty"]) && !query.is_on(&["stderr", "error"]));
        assert_eq!(query.first(&["empty", "tty"]), Some("false"));
    }

    #[test]
    fn targets_may_have_a_uid() {
        let target = container_target(&["ns", "p", "u", "c"]).unwrap();
        assert_eq!((target.uid, target.container), (Some("u"), "c"));
        assert_eq!(container_target(&["ns", "p", "c"]).unwrap().uid, None);
        assert_eq!(container_target(&["ns", "p"]), None);
    }
}
