//! gRPC health checks: <https://github.com/grpc/grpc/blob/master/doc/health-checking.md>.

use std::net::SocketAddr;
use std::time::Duration;

use http::uri::PathAndQuery;
use tonic::transport::Endpoint;

use super::check::Checked;

/// `grpc.health.v1.HealthCheckRequest`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct HealthCheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

/// `grpc.health.v1.HealthCheckResponse`.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
struct HealthCheckResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// `HealthCheckResponse.ServingStatus.SERVING`.
const SERVING: i32 = 1;

/// Asks for the health of `service` (empty: the server as a whole).
pub(super) async fn check(address: SocketAddr, service: &str, timeout: Duration) -> Checked {
    match tokio::time::timeout(timeout, ask(address, service)).await {
        Ok(checked) => checked,
        Err(_elapsed) => Checked::Failure(format!(
            "timeout: failed to connect service {:?} within {timeout:?}: context deadline exceeded",
            address.to_string()
        )),
    }
}

async fn ask(address: SocketAddr, service: &str) -> Checked {
    let endpoint = match Endpoint::from_shared(format!("http://{address}")) {
        Ok(endpoint) => endpoint,
        Err(error) => return Checked::Unknown(error.to_string()),
    };
    let channel = match endpoint.connect().await {
        Ok(channel) => channel,
        Err(error) => return Checked::Failure(format!("service {address} cannot be reached: {error}")),
    };
    let mut client = tonic::client::Grpc::new(channel);
    if let Err(error) = client.ready().await {
        return Checked::Failure(format!("service {address} cannot be reached: {error}"));
    }
    let request = tonic::Request::new(HealthCheckRequest { service: service.to_owned() });
    let path = PathAndQuery::from_static("/grpc.health.v1.Health/Check");
    let codec: tonic_prost::ProstCodec<HealthCheckRequest, HealthCheckResponse> =
        tonic_prost::ProstCodec::default();
    match client.unary(request, path, codec).await {
        Ok(answer) if answer.get_ref().status == SERVING => Checked::Success(String::new()),
        Ok(answer) => {
            let word = match answer.get_ref().status {
                0 => "UNKNOWN".to_owned(),
                2 => "NOT_SERVING".to_owned(),
                3 => "SERVICE_UNKNOWN".to_owned(),
                other => other.to_string(),
            };
            Checked::Failure(format!("service unhealthy (responded with {word:?})"))
        }
        Err(status) if status.code() == tonic::Code::Unimplemented => Checked::Failure(
            "error: this server does not implement the grpc health protocol (grpc.health.v1.Health)"
                .to_owned(),
        ),
        Err(status) => Checked::Failure(format!("error: health rpc failed: {}", status.message())),
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use bytes::Bytes;
    use http_body_util::{BodyExt as _, StreamBody};
    use hyper::body::Frame;
    use hyper_util::rt::{TokioExecutor, TokioIo};
    use tokio::net::TcpListener;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// A health service that answers each check with this serving status, or with a gRPC error.
    async fn server(answer: Result<u8, u8>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let service = hyper::service::service_fn(
                    move |request: http::Request<hyper::body::Incoming>| async move {
                        assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
                        let asked = request.into_body().collect().await.unwrap().to_bytes();
                        assert_eq!(&asked[5..], b"\n\x03web", "the service's name");
                        let mut trailers = http::HeaderMap::new();
                        let code = answer.err().unwrap_or(0);
                        trailers.insert("grpc-status", code.to_string().parse().unwrap());
                        let message = answer
                            .ok()
                            .map(|status| Frame::data(Bytes::from(vec![0, 0, 0, 0, 2, 8, status])));
                        let frames =
                            message.into_iter().chain([Frame::trailers(trailers)]).map(Ok::<_, Infallible>);
                        let body = StreamBody::new(futures::stream::iter(frames.collect::<Vec<_>>()));
                        let response = http::Response::builder().header("content-type", "application/grpc");
                        Ok::<_, Infallible>(response.body(body).unwrap())
                    },
                );
                let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                tokio::spawn(connection.serve_connection(TokioIo::new(stream), service));
            }
        });
        address
    }

    #[tokio::test]
    async fn only_serving_is_healthy() {
        assert_eq!(check(server(Ok(1)).await, "web", SECOND * 10).await, Checked::Success(String::new()));
        let not_serving = check(server(Ok(2)).await, "web", SECOND * 10).await;
        assert_eq!(
            not_serving,
            Checked::Failure("service unhealthy (responded with \"NOT_SERVING\")".to_owned())
        );
        let Checked::Failure(unimplemented) = check(server(Err(12)).await, "web", SECOND * 10).await else {
            panic!("a failure")
        };
        assert!(unimplemented.contains("does not implement the grpc health protocol"), "{unimplemented}");
    }

    #[tokio::test]
    async fn who_does_not_answer_fails() {
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        assert!(matches!(check(closed, "", SECOND * 10).await, Checked::Failure(_)));
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let Checked::Failure(problem) = check(silent.local_addr().unwrap(), "", SECOND).await else {
            panic!("a failure")
        };
        assert!(problem.contains("timeout"), "{problem}");
    }
}
