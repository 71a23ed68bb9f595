//! Port-forward: one pair of SPDY streams per connection, plain or tunnelled through a WebSocket.

use anyhow::Result;
use bytes::BytesMut;

use super::SpdyStreams;
use super::spdy::Carrier;
use super::websocket::Socket;

/// A port-forward session.
pub(crate) struct Forwarder {
    streams: SpdyStreams,
    requests: u32,
}

/// One forwarded connection.
#[derive(Clone, Copy)]
pub(crate) struct Connection {
    data: u32,
    error: u32,
}

impl Forwarder {
    /// Over SPDY.
    pub(crate) async fn spdy(url: &str) -> Result<Self> {
        Ok(Self { streams: SpdyStreams::connect(url, &["portforward.k8s.io"]).await?, requests: 0 })
    }

    /// SPDY inside a WebSocket.
    pub(crate) async fn tunnel(url: &str) -> Result<Self> {
        let socket = Socket::connect(url, "", "SPDY/3.1+portforward.k8s.io").await?;
        Ok(Self::over(socket))
    }

    /// SPDY inside a WebSocket that somebody else has connected with the protocol `SPDY/3.1+portforward.k8s.io`.
    pub(crate) fn over(socket: Socket) -> Self {
        Self { streams: SpdyStreams::over(Carrier::Tunnel(socket), BytesMut::new()), requests: 0 }
    }

    /// Opens a connection to a port of the pod.
    pub(crate) async fn open(&mut self, port: u16) -> Result<Connection> {
        let (port, request) = (port.to_string(), self.requests.to_string());
        self.requests += 1;
        let error =
            self.streams.open(&[("streamtype", "error"), ("port", &port), ("requestid", &request)]).await?;
        self.streams.data(error, &[], true).await?;
        let data =
            self.streams.open(&[("streamtype", "data"), ("port", &port), ("requestid", &request)]).await?;
        Ok(Connection { data, error })
    }

    /// Sends to the pod; `last` ends our direction.
    pub(crate) async fn send(&mut self, connection: Connection, bytes: &[u8], last: bool) -> Result<()> {
        self.streams.data(connection.data, bytes, last).await
    }

    /// All the pod sends until it closes, and what the error stream tells; like `kubectl port-forward` it ends our
    /// direction then.
    pub(crate) async fn exchange(&mut self, connection: Connection) -> Result<(Vec<u8>, String)> {
        self.until_end(connection, true).await
    }

    /// The same, but our direction stays as it is.
    pub(crate) async fn read(&mut self, connection: Connection) -> Result<(Vec<u8>, String)> {
        self.until_end(connection, false).await
    }

    async fn until_end(&mut self, connection: Connection, close: bool) -> Result<(Vec<u8>, String)> {
        let (mut data, mut error, mut open) = (Vec::new(), Vec::new(), 2);
        while open > 0 {
            let Some((id, bytes, fin)) = self.streams.next().await? else { break };
            if id == connection.data {
                data.extend_from_slice(&bytes);
                if fin && close {
                    self.streams.data(id, &[], true).await?;
                }
            } else if id == connection.error {
                error.extend_from_slice(&bytes);
            } else {
                continue;
            }
            open -= usize::from(fin);
        }
        Ok((data, String::from_utf8_lossy(&error).into_owned()))
    }
}
