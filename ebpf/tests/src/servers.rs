//! Small servers that say who they are, and the client calls that ask them.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{anyhow, ensure};

use crate::bench::namespaces::Namespace;

/// How long anything here waits before a test fails.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// A server on a thread of its own; it ends with this value.
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    udp: bool,
}

impl Server {
    /// Answers every TCP connection with its own address and closes.
    pub fn tcp(address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        Ok(Self::spawn(listener.local_addr()?, false, move |stop| {
            let name = address.to_string();
            while let Ok((mut stream, _)) = listener.accept() {
                if stop.load(Ordering::Acquire) {
                    return;
                }
                // A client that hangs up first is its own business.
                drop(stream.write_all(name.as_bytes()));
            }
        }))
    }

    /// Sends back what it gets, on any number of connections.
    pub fn echo(address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        Ok(Self::spawn(listener.local_addr()?, false, move |stop| {
            while let Ok((mut stream, _)) = listener.accept() {
                if stop.load(Ordering::Acquire) {
                    return;
                }
                // Each ends with its client.
                std::thread::spawn(move || {
                    drop(stream.set_nodelay(true));
                    let mut byte = [0];
                    while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
                });
            }
        }))
    }

    /// Answers every datagram with its own address.
    pub fn udp(address: SocketAddr) -> io::Result<Self> {
        let socket = UdpSocket::bind(address)?;
        Ok(Self::spawn(socket.local_addr()?, true, move |stop| {
            let name = address.to_string();
            let mut buffer = [0; 1500];
            while let Ok((_, from)) = socket.recv_from(&mut buffer) {
                if stop.load(Ordering::Acquire) {
                    return;
                }
                drop(socket.send_to(name.as_bytes(), from));
            }
        }))
    }

    fn spawn(address: SocketAddr, udp: bool, serve: impl FnOnce(&AtomicBool) + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        let thread = std::thread::spawn(move || serve(&flag));
        Self { address, stop, thread: Some(thread), udp }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Wake it; if it is gone already there is nobody to wake.
        if self.udp {
            let any = if self.address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            drop(UdpSocket::bind(any).and_then(|socket| socket.send_to(b"stop", self.address)));
        } else {
            drop(TcpStream::connect_timeout(&self.address, DEADLINE));
        }
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// Waits for a condition; what has not come after a while is an error that says so.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let until = Instant::now() + DEADLINE * 6;
    while !condition()? {
        anyhow::ensure!(Instant::now() < until, "not seen in time: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Dials, and returns who answered and whom the socket believes to talk to.
pub fn ask_tcp(address: SocketAddr) -> io::Result<(String, SocketAddr)> {
    let mut stream = TcpStream::connect_timeout(&address, DEADLINE)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    let peer = stream.peer_addr()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok((answer, peer))
}

/// Sends one datagram from an unconnected socket and returns the answer and where it came from.
pub fn ask_udp(socket: &UdpSocket, address: SocketAddr) -> io::Result<(String, SocketAddr)> {
    socket.set_read_timeout(Some(DEADLINE))?;
    socket.send_to(b"who", address)?;
    let mut buffer = [0; 1500];
    let (len, from) = socket.recv_from(&mut buffer)?;
    Ok((String::from_utf8_lossy(&buffer[..len]).into_owned(), from))
}

/// Sends some megabytes to a server that `server` makes for it, from `client`; fails where others than these arrive.
pub fn send_much(server: &Namespace, address: SocketAddr, client: &Namespace) -> anyhow::Result<()> {
    const BYTES: usize = 8 << 20;
    let listener = server.run(move || TcpListener::bind(address))??;
    let reader = std::thread::spawn(move || -> anyhow::Result<usize> {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(DEADLINE))?;
        let mut all = Vec::new();
        stream.read_to_end(&mut all)?;
        ensure!(all.iter().all(|byte| *byte == 7), "other bytes than were sent");
        Ok(all.len())
    });
    client.run(move || -> anyhow::Result<()> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_write_timeout(Some(DEADLINE))?;
        stream.write_all(&vec![7; BYTES])?;
        Ok(stream.shutdown(Shutdown::Write)?)
    })??;
    let received = reader.join().map_err(|_panic| anyhow!("the reader ends"))??;
    ensure!(received == BYTES, "{received} of {BYTES} bytes arrived");
    Ok(())
}
