//! One check: http, tcp, exec or grpc, with upstream's texts. Used by probes and by lifecycle hooks.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, HTTPGetAction, LifecycleHandler, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use tokio::net::TcpStream;
use tonic::Code;

use super::{grpc, http};
use crate::runtime::cri::Cri;

/// Output of a check kept for messages.
const MAX_OUTPUT: usize = 10 * 1024;

/// What to check.
#[derive(Debug, Clone)]
pub struct CheckTarget {
    /// The container, for its ports' names.
    pub container: Container,
    /// CRI id.
    pub container_id: String,
    /// Pod's address.
    pub address: Option<IpAddr>,
}

/// Result of a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Checked {
    /// Good.
    Success(String),
    /// Good, but somebody should know this.
    Warning(String),
    /// Bad, with the text for the event.
    Failure(String),
    /// Could not be made: says nothing about the container.
    Unknown(String),
}

/// Checks as the probe says.
pub async fn check_probe(cri: &Cri, probe: &Probe, target: &CheckTarget, timeout: Duration) -> Checked {
    if let Some(exec) = &probe.exec {
        return exec_check(cri, target, exec.command.clone().unwrap_or_default(), timeout).await;
    }
    if let Some(action) = &probe.http_get {
        return http_check(action, target, timeout, "kube-probe/1.36").await;
    }
    if let Some(action) = &probe.tcp_socket {
        return match address(target, action.host.as_deref(), &action.port) {
            Ok(address) => tcp_check(address, timeout).await,
            Err(problem) => Checked::Unknown(problem),
        };
    }
    if let Some(action) = &probe.grpc {
        return match address(target, None, &IntOrString::Int(action.port)) {
            Ok(address) => grpc::check(address, action.service.as_deref().unwrap_or_default(), timeout).await,
            Err(problem) => Checked::Unknown(problem),
        };
    }
    Checked::Unknown("missing probe handler".to_owned())
}

/// Runs a lifecycle hook.
pub async fn run_hook(
    cri: &Cri,
    hook: &LifecycleHandler,
    target: &CheckTarget,
    timeout: Duration,
) -> Checked {
    if let Some(exec) = &hook.exec {
        return exec_check(cri, target, exec.command.clone().unwrap_or_default(), timeout).await;
    }
    if let Some(action) = &hook.http_get {
        return http_check(action, target, timeout, "kube-lifecycle/1.36").await;
    }
    if let Some(sleep) = &hook.sleep {
        let seconds = Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0));
        tokio::time::sleep(seconds.min(timeout)).await;
        return Checked::Success(String::new());
    }
    // tcpSocket hooks are accepted by the API and do nothing, as upstream.
    Checked::Success(String::new())
}

async fn exec_check(cri: &Cri, target: &CheckTarget, command: Vec<String>, timeout: Duration) -> Checked {
    let shown = command.join(" ");
    match cri.exec(&target.container_id, command, timeout).await {
        Ok(answer) => {
            let mut output = answer.stdout;
            output.extend(answer.stderr);
            output.truncate(MAX_OUTPUT);
            let output = String::from_utf8_lossy(&output).into_owned();
            if answer.exit_code == 0 { Checked::Success(output) } else { Checked::Failure(output) }
        }
        Err(error) if error.code == Code::DeadlineExceeded => {
            Checked::Failure(format!("command timed out: {shown:?} timed out after {}s", timeout.as_secs()))
        }
        Err(error) => Checked::Unknown(error.message),
    }
}

async fn http_check(action: &HTTPGetAction, target: &CheckTarget, timeout: Duration, agent: &str) -> Checked {
    let address = match address(target, action.host.as_deref(), &action.port) {
        Ok(address) => address,
        Err(problem) => return Checked::Unknown(problem),
    };
    http::get(http::Get {
        address,
        tls: action.scheme.as_deref() == Some("HTTPS"),
        host: action.host.as_deref(),
        path: action.path.as_deref().unwrap_or("/"),
        headers: action.http_headers.as_deref().unwrap_or_default(),
        user_agent: agent,
        timeout,
    })
    .await
}

async fn tcp_check(address: SocketAddr, timeout: Duration) -> Checked {
    match tokio::time::timeout(timeout, TcpStream::connect(address)).await {
        Ok(Ok(_stream)) => Checked::Success(String::new()),
        Ok(Err(error)) => Checked::Failure(dial_error(address, &error)),
        Err(_elapsed) => Checked::Failure(format!("dial tcp {address}: i/o timeout")),
    }
}

/// `dial tcp 10.244.0.5:80: connect: connection refused`.
pub(super) fn dial_error(address: SocketAddr, error: &std::io::Error) -> String {
    let cause = match error.kind() {
        std::io::ErrorKind::ConnectionRefused => "connect: connection refused".to_owned(),
        std::io::ErrorKind::HostUnreachable => "connect: no route to host".to_owned(),
        _ => format!("connect: {error}"),
    };
    format!("dial tcp {address}: {cause}")
}

/// Host (an address; names are resolved by nobody here) and port, given by number or by a port's name.
fn address(target: &CheckTarget, host: Option<&str>, port: &IntOrString) -> Result<SocketAddr, String> {
    let port = match port {
        IntOrString::Int(number) => Some(*number),
        IntOrString::String(name) => target
            .container
            .ports
            .iter()
            .flatten()
            .find(|port| port.name.as_deref() == Some(name))
            .map(|port| port.container_port)
            .or_else(|| name.parse().ok()),
    };
    let port = port.and_then(|port| u16::try_from(port).ok()).ok_or("couldn't find port")?;
    let host = match host.filter(|host| !host.is_empty()) {
        Some("localhost") => Some(IpAddr::from([127, 0, 0, 1])),
        Some(host) => Some(host.parse().map_err(|_invalid| format!("host {host:?} is not an address"))?),
        None => target.address,
    };
    Ok(SocketAddr::new(host.ok_or("the pod has no address")?, port))
}
