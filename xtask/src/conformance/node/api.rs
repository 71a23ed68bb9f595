//! Requests to the API server of the cluster under test, as plain JSON: what a case sends is what it says.

use std::fmt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use kube::client::Body;
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::Value;

use super::super::stream::Session;
use super::super::stream::websocket::Socket;

/// A request that the API server, or a kubelet behind it, refused.
#[derive(Debug, Clone)]
pub(crate) struct Refused {
    /// HTTP status.
    pub(crate) code: u16,
    /// `NotFound`, `Invalid`, ….
    pub(crate) reason: String,
    /// For people.
    pub(crate) message: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {}: {}", self.code, self.reason, self.message)
    }
}

impl std::error::Error for Refused {}

/// The error of a request that must not succeed.
pub(crate) fn refusal<V: fmt::Debug>(what: &str, result: Result<V>) -> Result<Refused> {
    match result {
        Ok(answer) => bail!("{what} was accepted: {answer:?}"),
        Err(error) => error.downcast::<Refused>().with_context(|| what.to_owned()),
    }
}

/// A client of the cluster. Clones share connections.
#[derive(Clone)]
pub(crate) struct Api {
    client: kube::Client,
}

impl Api {
    /// By a kubeconfig's current context.
    pub(crate) async fn open(kubeconfig: &Path, context: Option<&str>) -> Result<Self> {
        let file = Kubeconfig::read_from(kubeconfig)
            .with_context(|| format!("reading kubeconfig {}", kubeconfig.display()))?;
        let choice =
            KubeConfigOptions { context: context.map(str::to_owned), ..KubeConfigOptions::default() };
        let config = kube::Config::from_custom_kubeconfig(file, &choice)
            .await
            .with_context(|| format!("kubeconfig {}", kubeconfig.display()))?;
        let client = kube::Client::try_from(config).context("a client for the cluster")?;
        Ok(Self { client })
    }

    /// The client itself, for watches.
    pub(crate) fn client(&self) -> &kube::Client {
        &self.client
    }

    /// A request whose answer begins; errors are taken apart.
    async fn send(&self, method: Method, path: &str, body: Option<(&str, &Value)>) -> Result<Response<Body>> {
        let what = format!("{method} {path}");
        let mut request = Request::builder().method(method).uri(path);
        let content = match body {
            Some((content_type, value)) => {
                request = request.header("content-type", content_type);
                serde_json::to_vec(value)?
            }
            None => Vec::new(),
        };
        let request = request.body(Body::from(content)).with_context(|| what.clone())?;
        let response = self.client.send(request).await.with_context(|| what.clone())?;
        let status = response.status();
        if status.is_success() || status == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        let text = String::from_utf8_lossy(&collect(response).await?).into_owned();
        let object: Value = serde_json::from_str(&text).unwrap_or_default();
        let message = object["message"].as_str().map_or(text, str::to_owned);
        let reason = object["reason"].as_str().unwrap_or_default().to_owned();
        Err(anyhow::Error::new(Refused { code: status.as_u16(), reason, message }))
    }

    async fn json(&self, method: Method, path: &str, body: Option<(&str, &Value)>) -> Result<Value> {
        let bytes = collect(self.send(method, path, body).await?).await?;
        serde_json::from_slice(&bytes).with_context(|| format!("{path} answered no JSON"))
    }

    /// GET.
    pub(crate) async fn get(&self, path: &str) -> Result<Value> {
        self.json(Method::GET, path, None).await
    }

    /// GET of something that is no JSON.
    pub(crate) async fn text(&self, path: &str) -> Result<String> {
        let bytes = collect(self.send(Method::GET, path, None).await?).await?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// POST.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> Result<Value> {
        self.json(Method::POST, path, Some(("application/json", body))).await
    }

    /// A merge patch.
    pub(crate) async fn merge(&self, path: &str, body: &Value) -> Result<Value> {
        self.json(Method::PATCH, path, Some(("application/merge-patch+json", body))).await
    }

    /// A strategic merge patch.
    pub(crate) async fn patch(&self, path: &str, body: &Value) -> Result<Value> {
        self.json(Method::PATCH, path, Some(("application/strategic-merge-patch+json", body))).await
    }

    /// DELETE with options.
    pub(crate) async fn delete(&self, path: &str, options: &Value) -> Result<Value> {
        self.json(Method::DELETE, path, Some(("application/json", options))).await
    }

    /// DELETE; what is gone already is fine.
    pub(crate) async fn remove(&self, path: &str) -> Result<()> {
        match self.delete(path, &serde_json::json!({})).await {
            Err(error) if error.downcast_ref::<Refused>().is_none_or(|refused| refused.code != 404) => {
                Err(error)
            }
            _ => Ok(()),
        }
    }

    /// GET of a text that goes on.
    pub(crate) async fn stream(&self, path: &str) -> Result<Stream> {
        Ok(Stream { body: self.send(Method::GET, path, None).await?.into_body(), read: String::new() })
    }

    /// A WebSocket of one of these protocols; the server chose it.
    pub(crate) async fn socket(&self, path: &str, protocol: &str) -> Result<Socket> {
        let request = Request::builder()
            .uri(path)
            .header("connection", "Upgrade")
            .header("upgrade", "websocket")
            .header("sec-websocket-version", "13")
            // Only a proxy would care for its randomness.
            .header("sec-websocket-key", "a2VlbHNvbi1jb25mb3JtYQ==")
            .header("sec-websocket-protocol", protocol)
            .body(Body::empty())?;
        let response = self.client.send(request).await.with_context(|| path.to_owned())?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            let code = response.status().as_u16();
            let text = String::from_utf8_lossy(&collect(response).await?).into_owned();
            let object: Value = serde_json::from_str(&text).unwrap_or_default();
            let message = object["message"].as_str().map_or(text, str::to_owned);
            let reason = object["reason"].as_str().unwrap_or_default().to_owned();
            return Err(anyhow::Error::new(Refused { code, reason, message }));
        }
        let chosen = response.headers().get("sec-websocket-protocol").and_then(|value| value.to_str().ok());
        ensure!(chosen == Some(protocol), "the server chose {chosen:?}, not {protocol}");
        let upgraded = hyper::upgrade::on(response).await.context("upgrading")?;
        Ok(Socket::over(Box::new(TokioIo::new(upgraded))))
    }

    /// An exec or attach session.
    pub(crate) async fn session(&self, path: &str) -> Result<Session> {
        Ok(Session::over(self.socket(path, "v5.channel.k8s.io").await?))
    }
}

async fn collect(response: Response<Body>) -> Result<Bytes> {
    Ok(response.into_body().collect().await.context("reading the answer")?.to_bytes())
}

/// An answer that comes piece by piece.
pub(crate) struct Stream {
    body: Body,
    read: String,
}

impl Stream {
    /// Reads until `text` was read; gives all so far.
    pub(crate) async fn until(&mut self, text: &str) -> Result<&str> {
        while !self.read.contains(text) {
            ensure!(self.more().await?, "ended before {text:?} came; read: {:?}", self.read);
        }
        Ok(&self.read)
    }

    /// Reads to the end; gives all.
    pub(crate) async fn rest(mut self) -> Result<String> {
        while self.more().await? {}
        Ok(self.read)
    }

    async fn more(&mut self) -> Result<bool> {
        let Some(frame) = self.body.frame().await else { return Ok(false) };
        let frame = frame.context("reading the answer")?;
        if let Some(data) = frame.data_ref() {
            self.read.push_str(&String::from_utf8_lossy(data));
        }
        Ok(true)
    }
}

/// A text as part of a query.
pub(crate) fn encode(text: &str) -> String {
    use std::fmt::Write as _;
    text.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            write!(out, "%{byte:02X}").ok();
        }
        out
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn queries_are_encoded() {
        assert_eq!(super::encode("echo a&b=ä"), "echo%20a%26b%3D%C3%A4");
    }
}
