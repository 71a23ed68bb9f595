//! Traffic between namespaces: what a user notices of addresses, routes and port mappings.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cni_plugins_host::netns;

/// Longest wait for a packet that must come.
const PATIENCE: Duration = Duration::from_secs(10);
/// Wait for a packet that must not come; a refusal by the kernel comes at once.
const DOUBT: Duration = Duration::from_millis(400);

/// A TCP server in a namespace that answers a connection with the client's address.
pub(crate) struct Server {
    listener: Option<TcpListener>,
    thread: Option<std::thread::JoinHandle<()>>,
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
}

impl Server {
    /// Listens on a port of every address of the family.
    pub(crate) fn start(namespace: &Path, any: IpAddr, port: u16) -> Result<Self> {
        let listener = netns::run_in(namespace, || TcpListener::bind(SocketAddr::new(any, port)))?
            .with_context(|| format!("listening on port {port}"))?;
        listener.set_nonblocking(true)?;
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let (inner, flag) = (listener.try_clone()?, std::sync::Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            while !flag.load(std::sync::atomic::Ordering::Relaxed) {
                match inner.accept() {
                    Ok((mut stream, client)) => {
                        // A client that is gone does not matter.
                        stream.write_all(client.ip().to_string().as_bytes()).ok();
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(2)),
                }
            }
        });
        Ok(Self { listener: Some(listener), thread: Some(thread), stop })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        drop(self.listener.take());
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// Connects to a [`Server`]; the address that it saw.
pub(crate) fn seen_by(from: &Path, target: SocketAddr) -> Result<IpAddr> {
    let text = netns::run_in(from, || -> std::io::Result<String> {
        let end = Instant::now() + PATIENCE;
        loop {
            match TcpStream::connect_timeout(&target, PATIENCE) {
                Ok(mut stream) => {
                    stream.set_read_timeout(Some(PATIENCE))?;
                    let mut text = String::new();
                    stream.read_to_string(&mut text)?;
                    return Ok(text);
                }
                // A bridge port, or an address, may need a moment.
                Err(error) if Instant::now() > end => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    })?
    .with_context(|| format!("connecting to {target}"))?;
    text.parse().with_context(|| format!("the server answered {text:?}"))
}

/// Fails when a connection can be made.
pub(crate) fn unreachable(from: &Path, target: SocketAddr) -> Result<()> {
    let connected = netns::run_in(from, || TcpStream::connect_timeout(&target, DOUBT).is_ok())?;
    ensure!(!connected, "{target} can be connected to");
    Ok(())
}

/// Sends a datagram and waits for an echo from `server`; whether it came.
pub(crate) fn udp_echo(
    client: &UdpSocket,
    target: SocketAddr,
    server: &UdpSocket,
    wait: Duration,
) -> Result<bool> {
    let end = Instant::now() + wait;
    server.set_nonblocking(true)?;
    client.set_nonblocking(true)?;
    let mut buffer = [0_u8; 64];
    while Instant::now() < end {
        // A port that nobody serves answers with an error at the next send.
        client.send_to(b"ping", target).ok();
        let pause = Instant::now() + Duration::from_millis(20);
        while Instant::now() < pause {
            if let Ok((length, peer)) = server.recv_from(&mut buffer) {
                server.send_to(&buffer[..length], peer)?;
            }
            if client.recv_from(&mut buffer).is_ok() {
                return Ok(true);
            }
            std::thread::yield_now();
        }
    }
    Ok(false)
}

/// A UDP socket of a namespace.
pub(crate) fn udp(namespace: &Path, any: IpAddr, port: u16) -> Result<UdpSocket> {
    netns::run_in(namespace, || UdpSocket::bind(SocketAddr::new(any, port)))?.context("a UDP socket")
}

/// Any address of IPv4.
pub(crate) const ANY4: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
/// Any address of IPv6.
pub(crate) const ANY6: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
