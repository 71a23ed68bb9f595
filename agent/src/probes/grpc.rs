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
            Checked::Failure(format!("service unhealthy (responded with status {})", answer.get_ref().status))
        }
        Err(status) if status.code() == tonic::Code::Unimplemented => Checked::Failure(
            "error: this server does not implement the grpc health protocol (grpc.health.v1.Health)"
                .to_owned(),
        ),
        Err(status) => Checked::Failure(format!("error: health rpc failed: {}", status.message())),
    }
}
