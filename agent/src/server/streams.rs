//! exec, attach and port-forward: asks the CRI for a streaming URL and relays the client's upgrade to it.

use std::time::Duration;

use cri_shim_api::v1::{AttachRequest, ExecRequest, ExecSyncRequest, PortForwardRequest};
use cri_shim_streaming::relay::{RelayError, is_upgrade, relay_upgrade};
use http::{Request, StatusCode, Uri};
use hyper::body::Incoming;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tracing::warn;

use super::reply::{self, Reply};
use super::routes::{Api, Query, Target};

/// Deadline of the CRI call that prepares a stream.
const PREPARE_DEADLINE: Duration = Duration::from_secs(30);
/// Deadline of connecting to the runtime's streaming server.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// Deadline of a command run by `/run`.
const RUN_SECONDS: i64 = 120;

/// Which standard streams a client wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "the four switches of the CRI's requests")]
struct Wanted {
    stdin: bool,
    stdout: bool,
    stderr: bool,
    tty: bool,
}

impl Wanted {
    /// Kubelet's spelling (`input=1`) and the API server's (`stdin=true`); a terminal has no separate stderr.
    fn of(query: &Query) -> Result<Self, &'static str> {
        let tty = query.is_on(&["tty"]);
        let wanted = Self {
            stdin: query.is_on(&["stdin", "input"]),
            stdout: query.is_on(&["stdout", "output"]),
            stderr: query.is_on(&["stderr", "error"]) && !tty,
            tty,
        };
        if wanted.stdin || wanted.stdout || wanted.stderr {
            return Ok(wanted);
        }
        Err("you must specify at least 1 of stdin, stdout, stderr")
    }
}

/// Runs a command in a container, interactively.
pub(super) async fn exec(api: &Api, target: Target<'_>, request: Request<Incoming>) -> Reply {
    let query = Query::of(&request);
    let wanted = match Wanted::of(&query) {
        Ok(wanted) => wanted,
        Err(message) => return reply::text(StatusCode::BAD_REQUEST, message),
    };
    let container = match api.state.container(target.namespace, target.pod, target.uid, target.container) {
        Ok(container) => container,
        Err(error) => return reply::lookup_error(&error),
    };
    let call = ExecRequest {
        container_id: container.id,
        cmd: query.all("command"),
        tty: wanted.tty,
        stdin: wanted.stdin,
        stdout: wanted.stdout,
        stderr: wanted.stderr,
        ..ExecRequest::default()
    };
    let mut runtime = api.runtime.clone();
    let answer = prepared(runtime.exec(call)).await.map(|answer| answer.url);
    relay(request, answer).await
}

/// Attaches to a container's main process.
pub(super) async fn attach(api: &Api, target: Target<'_>, request: Request<Incoming>) -> Reply {
    let wanted = match Wanted::of(&Query::of(&request)) {
        Ok(wanted) => wanted,
        Err(message) => return reply::text(StatusCode::BAD_REQUEST, message),
    };
    let container = match api.state.container(target.namespace, target.pod, target.uid, target.container) {
        Ok(container) => container,
        Err(error) => return reply::lookup_error(&error),
    };
    let call = AttachRequest {
        container_id: container.id,
        tty: wanted.tty,
        stdin: wanted.stdin,
        stdout: wanted.stdout,
        stderr: wanted.stderr,
        ..AttachRequest::default()
    };
    let mut runtime = api.runtime.clone();
    let answer = prepared(runtime.attach(call)).await.map(|answer| answer.url);
    relay(request, answer).await
}

/// Forwards ports of a pod.
pub(super) async fn port_forward(api: &Api, target: Target<'_>, request: Request<Incoming>) -> Reply {
    let sandbox = match api.state.sandbox(target.namespace, target.pod, target.uid) {
        Ok(sandbox) => sandbox,
        Err(error) => return reply::lookup_error(&error),
    };
    // WebSocket clients name the ports in the query, SPDY clients per stream.
    let ports = Query::of(&request).all("port");
    let port: Result<Vec<i32>, _> = ports
        .iter()
        .flat_map(|list| list.split(','))
        .map(|port| port.trim().parse::<u16>().map(i32::from))
        .collect();
    let Ok(port) = port else {
        return reply::text(StatusCode::BAD_REQUEST, format!("invalid port in {}", ports.join(",")));
    };
    let mut runtime = api.runtime.clone();
    let answer = prepared(runtime.port_forward(PortForwardRequest { pod_sandbox_id: sandbox, port })).await;
    relay(request, answer.map(|answer| answer.url)).await
}

/// Runs a command to its end and returns what it wrote.
pub(super) async fn run(api: &Api, target: Target<'_>, query: &Query) -> Reply {
    let container = match api.state.container(target.namespace, target.pod, target.uid, target.container) {
        Ok(container) => container,
        Err(error) => return reply::lookup_error(&error),
    };
    let mut cmd = query.all("command");
    if let Some(line) = query.first(&["cmd"]).filter(|_| cmd.is_empty()) {
        cmd = line.split(' ').map(str::to_owned).collect();
    }
    let call = ExecSyncRequest { container_id: container.id, cmd, timeout: RUN_SECONDS };
    match api.runtime.clone().exec_sync(call).await {
        Err(error) => reply::runtime_error(&error),
        Ok(answer) => {
            let mut answer = answer.into_inner();
            answer.stdout.append(&mut answer.stderr);
            let output = String::from_utf8_lossy(&answer.stdout).into_owned();
            if answer.exit_code == 0 {
                reply::text(StatusCode::OK, output)
            } else {
                let message = format!("command exited with code {}: {output}", answer.exit_code);
                reply::text(StatusCode::INTERNAL_SERVER_ERROR, message)
            }
        }
    }
}

/// A CRI answer within the deadline, or the reply that tells why not.
async fn prepared<T>(
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, Reply> {
    match timeout(PREPARE_DEADLINE, call).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(error)) => Err(reply::runtime_error(&error)),
        Err(_elapsed) => Err(reply::text(
            StatusCode::GATEWAY_TIMEOUT,
            "the container runtime did not prepare the stream in time",
        )),
    }
}

/// Passes the client's upgrade on to the runtime's streaming server.
async fn relay(request: Request<Incoming>, url: Result<String, Reply>) -> Reply {
    let url = match url {
        Ok(url) => url,
        Err(reply) => return reply,
    };
    if !is_upgrade(request.headers()) {
        return reply::text(StatusCode::BAD_REQUEST, "Upgrade request required");
    }
    match forward(request, &url).await {
        Ok(response) => response,
        Err(error) => {
            warn!(%url, error = &error as &dyn std::error::Error, "stream not relayed");
            reply::text(StatusCode::BAD_GATEWAY, error.to_string())
        }
    }
}

/// Why a stream could not be relayed.
#[derive(Debug, thiserror::Error)]
enum ForwardError {
    #[error("the container runtime gave the unusable streaming URL {0:?}")]
    Url(String),
    #[error("cannot connect to the streaming server {address}")]
    Connect {
        address: String,
        #[source]
        source: std::io::Error,
    },
    #[error("the streaming connection failed")]
    Relay(#[from] RelayError),
}

async fn forward(request: Request<Incoming>, url: &str) -> Result<Reply, ForwardError> {
    let unusable = || ForwardError::Url(url.to_owned());
    let uri: Uri = url.parse().map_err(|_invalid: http::uri::InvalidUri| unusable())?;
    let host = uri.host().ok_or_else(unusable)?;
    let port = uri.port_u16().unwrap_or(80);
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let address = format!("{host}:{port}");
    let refused = |source| ForwardError::Connect { address: address.clone(), source };
    let bare_host = host.trim_start_matches('[').trim_end_matches(']');
    let stream = timeout(CONNECT_DEADLINE, TcpStream::connect((bare_host, port)))
        .await
        .map_err(|elapsed| refused(elapsed.into()))?
        .map_err(refused)?;
    stream.set_nodelay(true).map_err(refused)?;
    Ok(relay_upgrade(request, stream, path, &address).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(text: &str) -> Result<Wanted, &'static str> {
        Wanted::of(&Query::of(&Request::builder().uri(format!("/x?{text}")).body(()).unwrap()))
    }

    #[test]
    fn a_terminal_has_no_stderr_and_something_must_be_wanted() {
        assert_eq!(
            wanted("input=1&output=1&error=1&tty=1"),
            Ok(Wanted { stdin: true, stdout: true, stderr: false, tty: true })
        );
        assert!(wanted("stderr=true").unwrap().stderr);
        assert!(wanted("tty=1&stderr=1").is_err());
        assert!(wanted("command=ls").is_err());
    }
}
