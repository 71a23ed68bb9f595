//! The HTTP/1.1 upgrade by hand, so that every header a server sees or sends is in the open.

use std::fmt::Write as _;

use anyhow::{Context, Result, bail};
use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The answer's head, and the connection with what came after the head.
pub(crate) struct Answer {
    /// Status code.
    pub(crate) status: u16,
    /// Head as text, in lower case.
    pub(crate) head: String,
    /// The connection.
    pub(crate) stream: TcpStream,
    /// Bytes read beyond the head.
    pub(crate) rest: BytesMut,
}

/// Host with port, and path with query of an http URL.
pub(crate) fn parts(url: &str) -> Result<(String, String)> {
    let rest = url.strip_prefix("http://").with_context(|| format!("{url:?} is no http URL"))?;
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    if host.is_empty() || host.starts_with(':') {
        bail!("{url:?} has no host");
    }
    Ok((host.to_owned(), format!("/{path}")))
}

/// Sends a request with these header lines and reads the answer's head.
pub(crate) async fn request(
    method: &str,
    url: &str,
    query: &str,
    headers: &[(&str, &str)],
) -> Result<Answer> {
    let (host, path) = parts(url)?;
    let mut stream = TcpStream::connect(&host).await.with_context(|| format!("connecting to {host}"))?;
    stream.set_nodelay(true)?;
    let mut text = format!("{method} {path}{query} HTTP/1.1\r\nHost: {host}\r\n");
    for (name, value) in headers {
        // Writing to a String cannot fail.
        write!(text, "{name}: {value}\r\n").ok();
    }
    text.push_str("\r\n");
    stream.write_all(text.as_bytes()).await?;
    let mut rest = BytesMut::new();
    let end = loop {
        if let Some(end) = rest.windows(4).position(|window| window == b"\r\n\r\n") {
            break end + 4;
        }
        if stream.read_buf(&mut rest).await? == 0 {
            bail!("the server closed the connection before its answer was complete: {rest:?}");
        }
    };
    let head = String::from_utf8_lossy(&rest.split_to(end)).to_lowercase();
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).context("an HTTP status line")?;
    Ok(Answer { status, head, stream, rest })
}

impl Answer {
    /// The connection if it was upgraded; else an error with the answer.
    pub(crate) fn upgraded(self) -> Result<(TcpStream, BytesMut)> {
        if self.status != 101 {
            bail!("the server did not upgrade: {} {:?}", self.head.trim(), self.rest);
        }
        Ok((self.stream, self.rest))
    }
}
