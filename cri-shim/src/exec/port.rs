//! Connections to ports inside a sandbox's network namespace.
//!
//! The socket is made on a thread that enters the namespace and then ends, so no thread of the runtime ever changes its
//! own; a connected socket stays in its namespace and works from everywhere.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use cri_shim_streaming::runtime::PortStream;
use nix::sched::{CloneFlags, setns};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Semaphore, mpsc, oneshot};

/// How long one connection attempt may take.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// How long the client's direction may go on after the server closed its own.
const LINGER: Duration = Duration::from_secs(5);

/// Connection attempts, each a thread, at once.
static ATTEMPTS: Semaphore = Semaphore::const_new(32);

/// Why a port could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// The namespace could not be entered.
    #[error("failed to enter network namespace {}", path.display())]
    Enter {
        /// The namespace.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Nothing answers.
    #[error("failed to connect to localhost:{port} inside the pod: IPv4: {v4}, IPv6: {v6}")]
    Connect {
        /// The port.
        port: u16,
        /// Why not over IPv4.
        v4: io::Error,
        /// Why not over IPv6.
        v6: io::Error,
    },
    /// No thread.
    #[error("cannot start a thread to connect from")]
    Thread(#[source] io::Error),
    /// The connection broke.
    #[error("the connection broke")]
    Broken(#[source] io::Error),
}

/// Connects to localhost's `port` in the namespace (`None`: our own), IPv4 first.
pub async fn connect(netns: Option<&Path>, port: u16) -> Result<tokio::net::TcpStream, PortError> {
    let _counted = ATTEMPTS.acquire().await;
    let (answer, answered) = oneshot::channel();
    let netns = netns.map(Path::to_owned);
    let work = move || {
        // A caller that went away needs no answer.
        drop(answer.send(connect_here(netns.as_deref(), port)));
    };
    std::thread::Builder::new().name("port-forward".to_owned()).spawn(work).map_err(PortError::Thread)?;
    let lost = |_lost| PortError::Thread(io::Error::other("the thread ended without an answer"));
    let stream = answered.await.map_err(lost)??;
    stream.set_nonblocking(true).map_err(PortError::Broken)?;
    tokio::net::TcpStream::from_std(stream).map_err(PortError::Broken)
}

fn connect_here(netns: Option<&Path>, port: u16) -> Result<TcpStream, PortError> {
    if let Some(path) = netns {
        let failed = |source| PortError::Enter { path: path.to_owned(), source };
        let file = std::fs::File::open(path).map_err(failed)?;
        setns(file, CloneFlags::CLONE_NEWNET).map_err(|errno| failed(errno.into()))?;
    }
    let dial =
        |address: IpAddr| TcpStream::connect_timeout(&SocketAddr::new(address, port), CONNECT_DEADLINE);
    dial(Ipv4Addr::LOCALHOST.into())
        .or_else(|v4| dial(Ipv6Addr::LOCALHOST.into()).map_err(|v6| PortError::Connect { port, v4, v6 }))
}

/// Copies both ways until both ended, the client is gone, or the server closed and the client has nothing more to say.
pub async fn copy(connection: tokio::net::TcpStream, stream: PortStream) -> Result<(), PortError> {
    let PortStream { mut input, output, gone } = stream;
    let (mut read, mut write) = connection.into_split();
    let to_server = async {
        while let Some(bytes) = input.recv().await {
            write.write_all(&bytes).await?;
        }
        write.shutdown().await
    };
    let to_client = read_all(&mut read, output);
    tokio::pin!(to_server, to_client);
    let both = async {
        // Cancel-safe: both are polled in place.
        tokio::select! {
            result = &mut to_client => {
                result?;
                tokio::time::timeout(LINGER, to_server).await.unwrap_or(Ok(()))
            }
            result = &mut to_server => {
                result?;
                to_client.await
            }
        }
    };
    // Cancel-safe: when the client is gone there is nobody to copy for.
    let result = tokio::select! {
        result = both => result,
        () = gone.cancelled() => Ok(()),
    };
    result.map_err(PortError::Broken)
}

async fn read_all(read: &mut tokio::net::tcp::OwnedReadHalf, output: mpsc::Sender<Bytes>) -> io::Result<()> {
    loop {
        let mut buffer = BytesMut::with_capacity(16 * 1024);
        if read.read_buf(&mut buffer).await? == 0 || output.send(buffer.freeze()).await.is_err() {
            return Ok(());
        }
    }
}
