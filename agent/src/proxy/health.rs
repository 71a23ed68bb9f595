//! What load balancers ask: kube-proxy's :10256 and each Service's `healthCheckNodePort`.
//!
//! `/healthz` is 200 while the proxy keeps up and the node takes traffic, `/livez` while it keeps up. A health-check
//! port is 200 while this node has ready endpoints of its Service. Answers are JSON of kube-proxy's shape. A port that
//! cannot be bound is told and left out; everything else goes on.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use axum::{
    Json, Router,
    extract::State,
    http::{HeaderMap, HeaderValue, StatusCode},
    routing::get,
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;

use super::facts::ObjectName;

/// What `/healthz` tells.
#[derive(Clone, Debug)]
pub(super) struct ProxyHealth {
    /// When the maps were last brought up to date; `None` before the first time.
    pub(super) last_updated: Option<jiff::Timestamp>,
    /// Whether the node shall get traffic from load balancers.
    pub(super) node_eligible: bool,
}

/// Serves `/healthz` and `/livez` until `cancel`.
pub(super) async fn serve_proxy(
    listener: TcpListener,
    health: watch::Receiver<ProxyHealth>,
    cancel: CancellationToken,
) {
    let router = Router::new()
        .route("/healthz", get(|State(health)| async move { proxy_answer(&health, true) }))
        .route("/livez", get(|State(health)| async move { proxy_answer(&health, false) }))
        .with_state(health);
    serve(listener, router, cancel).await;
}

fn proxy_answer(health: &watch::Receiver<ProxyHealth>, for_node: bool) -> (StatusCode, Json<Value>) {
    let health = health.borrow().clone();
    let good = health.last_updated.is_some() && (health.node_eligible || !for_node);
    let mut body = json!({
        "lastUpdated": health.last_updated.map(|time| time.to_string()),
        "currentTime": jiff::Timestamp::now().to_string(),
    });
    if for_node {
        body["nodeEligible"] = health.node_eligible.into();
    }
    (if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, Json(body))
}

/// The health-check ports of all Services.
pub(super) struct HealthChecks {
    address: IpAddr,
    ports: BTreeMap<u16, HealthCheck>,
}

struct HealthCheck {
    service: ObjectName,
    endpoints: watch::Sender<usize>,
    /// Dropped with the entry: the server ends.
    _running: tokio_util::sync::DropGuard,
}

impl HealthChecks {
    /// None yet; they will listen on this address.
    pub(super) fn new(address: IpAddr) -> Self {
        Self { address, ports: BTreeMap::new() }
    }

    /// Makes the Service answer on this port, on no other; says why where that cannot be.
    pub(super) async fn set(
        &mut self,
        service: &ObjectName,
        wanted: Option<u16>,
        endpoints: usize,
    ) -> Result<(), String> {
        self.ports.retain(|port, check| check.service != *service || Some(*port) == wanted);
        let Some(port) = wanted else {
            return Ok(());
        };
        if let Some(check) = self.ports.get(&port) {
            if check.service != *service {
                let other = &check.service;
                return Err(format!(
                    "spec.healthCheckNodePort {port} belongs to Service {}/{} already",
                    other.namespace, other.name
                ));
            }
            check.endpoints.send_replace(endpoints);
            return Ok(());
        }
        let address = SocketAddr::new(self.address, port);
        let listener = TcpListener::bind(address).await.map_err(|error| {
            format!("spec.healthCheckNodePort {port} cannot be served on {address}: {error}")
        })?;
        let (sender, count) = watch::channel(endpoints);
        let cancel = CancellationToken::new();
        let router = Router::new().fallback(get(check_answer)).with_state((service.clone(), count));
        tokio::spawn(serve(listener, router, cancel.clone()));
        let check =
            HealthCheck { service: service.clone(), endpoints: sender, _running: cancel.drop_guard() };
        self.ports.insert(port, check);
        Ok(())
    }

    /// The ports in use.
    #[cfg(test)]
    fn ports(&self) -> Vec<u16> {
        self.ports.keys().copied().collect()
    }
}

async fn check_answer(
    State((service, count)): State<(ObjectName, watch::Receiver<usize>)>,
) -> (StatusCode, HeaderMap, Json<Value>) {
    let endpoints = *count.borrow();
    let status = if endpoints > 0 { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let mut headers = HeaderMap::new();
    headers.insert("x-load-balancing-endpoint-weight", HeaderValue::from(endpoints));
    headers.insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    let body = json!({
        "service": {"namespace": service.namespace, "name": service.name},
        "localEndpoints": endpoints,
        "serviceProxyHealthy": true,
    });
    (status, headers, Json(body))
}

async fn serve(listener: TcpListener, router: Router, cancel: CancellationToken) {
    let served = axum::serve(listener, router).with_graceful_shutdown(cancel.cancelled_owned()).await;
    if let Err(error) = served {
        tracing::warn!(%error, "a health server ended");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> ObjectName {
        ObjectName { namespace: "ns".into(), name: text.into() }
    }

    #[tokio::test]
    async fn a_port_belongs_to_one_service_and_goes_with_it() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut checks = HealthChecks::new([127, 0, 0, 1].into());
        checks.set(&name("a"), Some(free), 1).await.unwrap();
        let refused = checks.set(&name("b"), Some(free), 1).await.unwrap_err();
        assert!(refused.contains("belongs to Service ns/a already"), "{refused}");
        checks.set(&name("a"), None, 0).await.unwrap();
        assert_eq!(checks.ports(), Vec::<u16>::new());
    }

    #[tokio::test]
    async fn a_port_that_is_taken_is_named() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let mut checks = HealthChecks::new([127, 0, 0, 1].into());
        let refused = checks.set(&name("a"), Some(port), 1).await.unwrap_err();
        assert!(refused.contains(&port.to_string()) && refused.contains("in use"), "{refused}");
    }

    #[tokio::test]
    async fn the_count_of_endpoints_decides() {
        let (sender, count) = watch::channel(2);
        let (status, headers, body) = check_answer(State((name("a"), count.clone()))).await;
        assert_eq!(
            (status, &headers["x-load-balancing-endpoint-weight"]),
            (StatusCode::OK, &HeaderValue::from(2))
        );
        assert_eq!(body.0["localEndpoints"], 2);
        sender.send_replace(0);
        assert_eq!(check_answer(State((name("a"), count))).await.0, StatusCode::SERVICE_UNAVAILABLE);
    }

    #[test]
    fn healthz_is_about_the_node_and_livez_is_not() {
        let health =
            |last_updated, node_eligible| watch::channel(ProxyHealth { last_updated, node_eligible }).1;
        let now = Some(jiff::Timestamp::now());
        assert_eq!(proxy_answer(&health(None, true), true).0, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(proxy_answer(&health(now, true), true).0, StatusCode::OK);
        assert_eq!(proxy_answer(&health(now, false), true).0, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(proxy_answer(&health(now, false), false).0, StatusCode::OK);
    }
}
