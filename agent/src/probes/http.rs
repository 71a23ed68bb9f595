//! A minimal HTTP GET for probes and hooks: one connection per request, redirects to the same host followed, no certificate
//! checked.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, header};
use http_body_util::Empty;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::HTTPHeader;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::check::{Checked, dial_error};

/// One request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Get<'a> {
    pub(super) address: SocketAddr,
    pub(super) tls: bool,
    pub(super) host: Option<&'a str>,
    pub(super) path: &'a str,
    pub(super) headers: &'a [HTTPHeader],
    pub(super) user_agent: &'a str,
    pub(super) timeout: Duration,
}

/// Requests of one check at most, as upstream.
const MAX_REQUESTS: usize = 10;

/// A status, and where a redirect leads.
struct Answer {
    status: u16,
    location: Option<String>,
}

/// Success is any status from 200 to 399; a redirect that is not followed is told.
pub(super) async fn get(get: Get<'_>) -> Checked {
    let scheme = if get.tls { "https" } else { "http" };
    let path = if get.path.starts_with('/') { get.path.to_owned() } else { format!("/{}", get.path) };
    let url = format!("{scheme}://{}{path}", get.address);
    match tokio::time::timeout(get.timeout, follow(get, path)).await {
        Ok(Ok(status)) if (200..300).contains(&status) => Checked::Success(String::new()),
        Ok(Ok(status)) if (300..400).contains(&status) => {
            Checked::Warning(format!("Probe terminated redirects, the answer was {status}"))
        }
        Ok(Ok(status)) => Checked::Failure(format!("HTTP probe failed with statuscode: {status}")),
        Ok(Err(problem)) => Checked::Failure(format!("Get \"{url}\": {problem}")),
        Err(_elapsed) => Checked::Failure(format!(
            "Get \"{url}\": context deadline exceeded (Client.Timeout exceeded while awaiting headers)"
        )),
    }
}

/// Asks, and asks again where redirects on the same host lead; the last status.
async fn follow(get: Get<'_>, mut path: String) -> Result<u16, String> {
    let (mut to, name) = (get, get.host.map_or_else(|| get.address.ip().to_string(), str::to_owned));
    for _ in 0..MAX_REQUESTS {
        let answer = exchange(to, &path).await?;
        let next = answer.location.and_then(|location| redirect(to, &name, &path, &location));
        match next.filter(|_| matches!(answer.status, 301 | 302 | 303 | 307 | 308)) {
            Some((address, tls, next)) => {
                (to.address, to.tls) = (address, tls);
                path = next;
            }
            None => return Ok(answer.status),
        }
    }
    Err(format!("stopped after {MAX_REQUESTS} redirects"))
}

/// Where a redirect leads, when that is the same host: address, TLS, path.
fn redirect(from: Get<'_>, name: &str, path: &str, location: &str) -> Option<(SocketAddr, bool, String)> {
    if location.starts_with("//") {
        // A host without a scheme: not worth knowing whether it is the same.
        return None;
    }
    if location.starts_with('/') {
        return Some((from.address, from.tls, location.to_owned()));
    }
    let uri: http::Uri = location.parse().ok()?;
    let Some(scheme) = uri.scheme_str() else {
        // Relative to the directory of what was asked.
        let directory = path.split('?').next()?.rsplit_once('/')?.0;
        return (!location.contains("://"))
            .then(|| (from.address, from.tls, format!("{directory}/{location}")));
    };
    let tls = scheme == "https";
    let host = uri.host()?.trim_start_matches('[').trim_end_matches(']');
    let same = host == name || host == from.address.ip().to_string();
    let address = SocketAddr::new(from.address.ip(), uri.port_u16().unwrap_or(if tls { 443 } else { 80 }));
    let next = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    same.then(|| (address, tls, next.to_owned()))
}

async fn exchange(get: Get<'_>, path: &str) -> Result<Answer, String> {
    let stream = TcpStream::connect(get.address).await.map_err(|error| dial_error(get.address, &error))?;
    let request = request(get, path)?;
    if get.tls {
        let connector = TlsConnector::from(Arc::clone(tls_config()?));
        let name = ServerName::IpAddress(get.address.ip().into());
        let stream = connector.connect(name, stream).await.map_err(|error| error.to_string())?;
        send(stream, request).await
    } else {
        send(stream, request).await
    }
}

fn request(get: Get<'_>, path: &str) -> Result<Request<Empty<Bytes>>, String> {
    let authority =
        get.host.map_or_else(|| get.address.to_string(), |host| format!("{host}:{}", get.address.port()));
    let mut request = Request::get(path).body(Empty::new()).map_err(|error| error.to_string())?;
    let headers = request.headers_mut();
    let value = |text: &str| HeaderValue::from_str(text).map_err(|error| error.to_string());
    headers.insert(header::HOST, value(&authority)?);
    headers.insert(header::USER_AGENT, value(get.user_agent)?);
    headers.insert(header::ACCEPT, HeaderValue::from_static("*/*"));
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    for wanted in get.headers {
        let name: HeaderName =
            wanted.name.parse().map_err(|_invalid| format!("bad header {}", wanted.name))?;
        headers.insert(name, value(&wanted.value)?);
    }
    Ok(request)
}

async fn send<S>(stream: S, request: Request<Empty<Bytes>>) -> Result<Answer, String>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    let mut answer = std::pin::pin!(sender.send_request(request));
    let mut connection = std::pin::pin!(connection);
    // The connection's future moves the bytes; the answer arrives while it runs. Both are polled until the answer.
    let response = tokio::select! {
        response = &mut answer => response,
        ended = &mut connection => match ended {
            Ok(()) => answer.await,
            Err(error) => Err(error),
        },
    };
    response
        .map(|response| {
            let location = response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
            Answer { status: response.status().as_u16(), location: location.map(str::to_owned) }
        })
        .map_err(|error| if error.is_incomplete_message() { "EOF".to_owned() } else { error.to_string() })
}

/// Probes do not verify certificates (documented behaviour of HTTPS probes).
fn tls_config() -> Result<&'static Arc<ClientConfig>, String> {
    static CONFIG: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    if let Some(config) = CONFIG.get() {
        return Ok(config);
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AcceptAny { provider }))
        .with_no_client_auth();
    Ok(CONFIG.get_or_init(|| Arc::new(config)))
}

#[derive(Debug)]
struct AcceptAny {
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for AcceptAny {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    async fn answer_once(answer: &'static str) -> (SocketAddr, tokio::task::JoinHandle<String>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("accept");
            let mut request = vec![0; 4096];
            let length = stream.read(&mut request).await.expect("request");
            stream.write_all(answer.as_bytes()).await.expect("answer");
            String::from_utf8_lossy(&request[..length]).into_owned()
        });
        (address, server)
    }

    fn request_to(address: SocketAddr) -> Get<'static> {
        Get {
            address,
            tls: false,
            host: None,
            path: "healthz?full=1",
            headers: &[],
            user_agent: "kube-probe/1.36",
            timeout: Duration::from_secs(5),
        }
    }

    #[tokio::test]
    async fn statuses_decide() {
        for (answer, expected) in [
            ("HTTP/1.1 204 No Content\r\n\r\n", Checked::Success(String::new())),
            (
                "HTTP/1.1 302 Found\r\nLocation: http://other.example/x\r\nContent-Length: 0\r\n\r\n",
                Checked::Warning("Probe terminated redirects, the answer was 302".to_owned()),
            ),
            (
                "HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n",
                Checked::Failure("HTTP probe failed with statuscode: 503".to_owned()),
            ),
        ] {
            let (address, server) = answer_once(answer).await;
            assert_eq!(get(request_to(address)).await, expected);
            let request = server.await.expect("server");
            assert!(request.starts_with("GET /healthz?full=1 HTTP/1.1\r\n"), "{request}");
        }
    }

    #[tokio::test]
    async fn a_redirect_on_the_same_host_is_followed() {
        let (second, end) = answer_once("HTTP/1.1 500 Broken\r\nContent-Length: 0\r\n\r\n").await;
        let location = format!("http://{second}/next?a=b");
        let first = format!("HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n");
        let (address, _) = answer_once(Box::leak(first.into_boxed_str())).await;
        let checked = get(request_to(address)).await;
        assert_eq!(checked, Checked::Failure("HTTP probe failed with statuscode: 500".to_owned()));
        let request = end.await.expect("server");
        assert!(request.starts_with("GET /next?a=b HTTP/1.1\r\n"), "{request}");
    }

    #[test]
    fn redirects_are_resolved() {
        let from = request_to("192.0.2.1:8080".parse().expect("an address"));
        let to = |location: &str| {
            redirect(from, "192.0.2.1", "/a/b?c", location)
                .map(|(at, tls, path)| format!("{at} {tls} {path}"))
        };
        assert_eq!(to("/x").as_deref(), Some("192.0.2.1:8080 false /x"));
        assert_eq!(to("x").as_deref(), Some("192.0.2.1:8080 false /a/x"));
        assert_eq!(to("https://192.0.2.1/").as_deref(), Some("192.0.2.1:443 true /"));
        assert_eq!(to("http://192.0.2.2/"), None);
        assert_eq!(to("//elsewhere/x"), None);
    }

    #[tokio::test]
    async fn a_refused_connection_is_told_as_upstream_tells_it() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        drop(listener);
        let Checked::Failure(text) = get(request_to(address)).await else { panic!("must fail") };
        assert!(text.ends_with("connect: connection refused"), "{text}");
    }
}
