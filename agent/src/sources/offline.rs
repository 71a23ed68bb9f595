//! The API server of a node that has none: every request fails at once, with a sentence that says so.

use http::{Request, Response};
use kube::Client;
use kube::client::Body;

/// Why nothing is answered.
#[derive(Debug, thiserror::Error)]
#[error("the node stands alone: keelson.kubeconfig is not given, so there is no API server")]
struct NoServer;

/// A client whose requests fail.
pub fn client() -> Client {
    let service =
        tower::service_fn(|_request: Request<Body>| std::future::ready(Err::<Response<Body>, _>(NoServer)));
    Client::new(service, "default")
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Pod;
    use kube::Api;

    use super::*;
    use crate::chain::chain;

    #[tokio::test]
    async fn requests_fail_with_the_reason() {
        let error =
            Api::<Pod>::all(client()).list(&kube::api::ListParams::default()).await.expect_err("nobody");
        assert!(chain(&error).contains("stands alone"), "{}", chain(&error));
    }
}
