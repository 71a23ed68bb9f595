//! Clients of exec, attach and port-forward: SPDY/3.1 as kubectl of old and the kubelet speak it, and WebSocket v4, v5.
//!
//! One session type over both: what goes in, what comes out, and the status at the end.

pub(crate) mod http;
pub(crate) mod port;
mod spdy;
pub(crate) mod websocket;

use anyhow::Result;
use bytes::Bytes;

pub(crate) use spdy::SpdyStreams;

/// How a session is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// SPDY/3.1 with v4.channel.k8s.io.
    Spdy,
    /// SPDY/3.1 with v3.channel.k8s.io, whose status is words.
    Spdy3,
    /// SPDY/3.1 with v2.channel.k8s.io, which has no sizes of terminals either.
    Spdy2,
    /// SPDY/3.1 with channel.k8s.io, the first one.
    Spdy1,
    /// WebSocket with v4.channel.k8s.io.
    WebSocket4,
    /// WebSocket with v4.base64.channel.k8s.io, for clients that take text only.
    WebSocketBase64,
    /// WebSocket with v5.channel.k8s.io.
    WebSocket5,
}

/// Which streams a client wants.
#[derive(Debug, Clone, Copy, Default)]
#[allow(clippy::struct_excessive_bools, reason = "the fields of the requests")]
pub(crate) struct Wants {
    /// Standard input.
    pub(crate) stdin: bool,
    /// Standard output.
    pub(crate) stdout: bool,
    /// Standard error.
    pub(crate) stderr: bool,
    /// A terminal.
    pub(crate) tty: bool,
}

/// Something that arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Piece {
    /// Of standard output.
    Stdout(Bytes),
    /// Of standard error.
    Stderr(Bytes),
    /// Of the error stream: the status.
    Status(Bytes),
}

/// What a finished session gave.
#[derive(Debug, Default)]
pub(crate) struct Finished {
    /// All of standard output.
    pub(crate) stdout: Vec<u8>,
    /// All of standard error.
    pub(crate) stderr: Vec<u8>,
    /// The status, JSON `null` when none came.
    pub(crate) status: serde_json::Value,
}

impl Finished {
    /// Standard output as text.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// The exit code that the status tells.
    pub(crate) fn exit_code(&self) -> Option<i32> {
        if self.status["status"] == "Success" {
            return Some(0);
        }
        let causes = self.status["details"]["causes"].as_array()?;
        let cause = causes.iter().find(|cause| cause["reason"] == "ExitCode")?;
        cause["message"].as_str()?.parse().ok()
    }
}

/// An exec or attach being served.
pub(crate) enum Session {
    /// Over SPDY.
    Spdy(Box<spdy::ExecSession>),
    /// Over WebSocket.
    WebSocket(Box<websocket::ExecSession>),
}

impl Session {
    /// Connects to a streaming URL.
    pub(crate) async fn open(url: &str, protocol: Protocol, wants: Wants) -> Result<Self> {
        Ok(match protocol {
            Protocol::Spdy => Self::spdy(url, wants, &["v4.channel.k8s.io", "v3.channel.k8s.io"]).await?,
            Protocol::Spdy3 => Self::spdy(url, wants, &["v3.channel.k8s.io"]).await?,
            Protocol::Spdy2 => Self::spdy(url, wants, &["v2.channel.k8s.io"]).await?,
            Protocol::Spdy1 => Self::spdy(url, wants, &["channel.k8s.io"]).await?,
            Protocol::WebSocket4 => Self::websocket(url, "v4.channel.k8s.io").await?,
            Protocol::WebSocketBase64 => Self::websocket(url, "v4.base64.channel.k8s.io").await?,
            Protocol::WebSocket5 => Self::websocket(url, "v5.channel.k8s.io").await?,
        })
    }

    async fn spdy(url: &str, wants: Wants, protocols: &[&str]) -> Result<Self> {
        Ok(Self::Spdy(Box::new(spdy::ExecSession::open(url, wants, protocols).await?)))
    }

    async fn websocket(url: &str, protocol: &str) -> Result<Self> {
        Ok(Self::WebSocket(Box::new(websocket::ExecSession::open(url, protocol).await?)))
    }

    /// Over a connection that was upgraded to `v5.channel.k8s.io`.
    pub(crate) fn over(socket: websocket::Socket) -> Self {
        Self::WebSocket(Box::new(websocket::ExecSession::over(socket)))
    }

    /// Sends to standard input.
    pub(crate) async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Spdy(session) => session.send(bytes).await,
            Self::WebSocket(session) => session.send(bytes).await,
        }
    }

    /// Ends standard input.
    pub(crate) async fn close_stdin(&mut self) -> Result<()> {
        match self {
            Self::Spdy(session) => session.close_stdin().await,
            Self::WebSocket(session) => session.close_stdin().await,
        }
    }

    /// Tells the terminal's size.
    pub(crate) async fn resize(&mut self, width: u16, height: u16) -> Result<()> {
        let text = serde_json::json!({"Width": width, "Height": height}).to_string();
        match self {
            Self::Spdy(session) => session.resize(text.as_bytes()).await,
            Self::WebSocket(session) => session.resize(text.as_bytes()).await,
        }
    }

    /// What arrives next; `None` at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Piece>> {
        match self {
            Self::Spdy(session) => session.next().await,
            Self::WebSocket(session) => session.next().await,
        }
    }

    /// Reads until standard output holds `text`; gives all read so far.
    pub(crate) async fn read_until(&mut self, text: &str) -> Result<String> {
        let mut all = String::new();
        while !all.contains(text) {
            match self.next().await? {
                Some(Piece::Stdout(bytes)) => all.push_str(&String::from_utf8_lossy(&bytes)),
                Some(_) => {}
                None => anyhow::bail!("the session ended before {text:?} came; read: {all:?}"),
            }
        }
        Ok(all)
    }

    /// Reads to the end.
    pub(crate) async fn finish(mut self) -> Result<Finished> {
        let mut finished = Finished::default();
        let mut status = Vec::new();
        while let Some(piece) = self.next().await? {
            match piece {
                Piece::Stdout(bytes) => finished.stdout.extend_from_slice(&bytes),
                Piece::Stderr(bytes) => finished.stderr.extend_from_slice(&bytes),
                Piece::Status(bytes) => status.extend_from_slice(&bytes),
            }
        }
        if !status.is_empty() {
            // The older protocols tell it in words.
            let words = || String::from_utf8_lossy(&status).into_owned().into();
            finished.status = serde_json::from_slice(&status).unwrap_or_else(|_| words());
        }
        Ok(finished)
    }
}
