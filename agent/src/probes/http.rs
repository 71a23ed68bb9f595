//! A minimal HTTP GET for probes and hooks: one connection per check, no redirects followed, no certificate checked.

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

/// Success is any status from 200 to 399.
pub(super) async fn get(get: Get<'_>) -> Checked {
    let scheme = if get.tls { "https" } else { "http" };
    let path = if get.path.starts_with('/') { get.path.to_owned() } else { format!("/{}", get.path) };
    let url = format!("{scheme}://{}{path}", get.address);
    match tokio::time::timeout(get.timeout, exchange(get, &path)).await {
        Ok(Ok(status)) if (200..400).contains(&status) => Checked::Success(String::new()),
        Ok(Ok(status)) => Checked::Failure(format!("HTTP probe failed with statuscode: {status}")),
        Ok(Err(problem)) => Checked::Failure(format!("Get \"{url}\": {problem}")),
        Err(_elapsed) => Checked::Failure(format!(
            "Get \"{url}\": context deadline exceeded (Client.Timeout exceeded while awaiting headers)"
        )),
    }
}

async fn exchange(get: Get<'_>, path: &str) -> Result<u16, String> {
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

async fn send<S>(stream: S, request: Request<Empty<Bytes>>) -> Result<u16, String>
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
        .map(|response| response.status().as_u16())
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
                "HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n",
                Checked::Success(String::new()),
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
    async fn a_refused_connection_is_told_as_upstream_tells_it() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        drop(listener);
        let Checked::Failure(text) = get(request_to(address)).await else { panic!("must fail") };
        assert!(text.ends_with("connect: connection refused"), "{text}");
    }
}
