//! The traffic of `bench overlay`: a server in one node and a client in the other, both this program run again.
//!
//! A connection's first octet says what it is: `S` is read and forgotten, `R` is answered octet by octet.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::fabric;
use crate::paths::Layout;

/// Octets per write of a stream.
const CHUNK: usize = 256 << 10;

/// What a client does.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    /// Sends as fast as it can over so many connections.
    Stream(u32),
    /// Sends one octet and waits for the answer, again and again.
    Request,
}

/// Arguments of the hidden command.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Peer {
    /// Listens on a free port, prints it, and serves until its input ends.
    Serve,
    /// Measures and prints the figure.
    Send {
        /// Server.
        to: SocketAddr,
        /// Connections; 0 stands for request and response.
        streams: u32,
        /// Duration.
        millis: u64,
    },
}

impl Peer {
    /// Runs the hidden command.
    pub(crate) fn run(&self) -> Result<()> {
        match self {
            Self::Serve => serve(),
            Self::Send { to, streams: 0, millis } => request(*to, Duration::from_millis(*millis)),
            Self::Send { to, streams, millis } => stream(*to, *streams, Duration::from_millis(*millis)),
        }
    }
}

/// The server in a node; ends with this value.
pub(super) struct Server {
    child: Child,
    port: u16,
}

impl Server {
    pub(super) fn start(node: &Layout) -> Result<Self> {
        let mut child = fabric::inside(node, &std::env::current_exe()?)?
            .args(["overlay-peer", "serve"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting the server")?;
        let mut line = String::new();
        let output = child.stdout.take().context("a server without output")?;
        BufReader::new(output).read_line(&mut line)?;
        let port = line.trim().parse().context("the server names no port")?;
        Ok(Self { child, port })
    }

    pub(super) fn measure(&self, from: &Layout, to: IpAddr, kind: Kind, millis: u64) -> Result<f64> {
        let streams = match kind {
            Kind::Stream(count) => count,
            Kind::Request => 0,
        };
        let output = fabric::inside(from, &std::env::current_exe()?)?
            .args(["overlay-peer", "send", &SocketAddr::new(to, self.port).to_string()])
            .args([streams.to_string(), millis.to_string()])
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let told = String::from_utf8_lossy(&output.stderr);
        text.trim().parse().with_context(|| format!("the client said {text:?} {told:?}"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Its input ends, and so does it.
        drop(self.child.stdin.take());
        self.child.wait().ok();
    }
}

fn serve() -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    println!("{}", listener.local_addr()?.port());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || answer(stream));
        }
    });
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    Ok(())
}

/// Until the client closes; what it cannot finish, the client tells.
fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    let mut kind = [0];
    stream.read_exact(&mut kind)?;
    stream.set_nodelay(true)?;
    let mut buffer = vec![0; CHUNK];
    let mut received: u64 = 0;
    loop {
        let count = stream.read(&mut buffer)?;
        received += count as u64;
        match (count, kind[0]) {
            // The client has ended its side: it is told how much arrived.
            (0, b'S') => return stream.write_all(&received.to_be_bytes()),
            (0, _) => return Ok(()),
            (_, b'S') => {}
            _ => stream.write_all(&buffer[..count])?,
        }
    }
}

fn stream(to: SocketAddr, streams: u32, duration: Duration) -> Result<()> {
    let stop = AtomicBool::new(false);
    let began = Instant::now();
    let total = std::thread::scope(|scope| -> Result<u64> {
        let senders: Vec<_> = (0..streams).map(|_| scope.spawn(|| send(to, &stop))).collect();
        std::thread::sleep(duration);
        stop.store(true, Ordering::Relaxed);
        let mut total = 0;
        for sender in senders {
            let Ok(sent) = sender.join() else { bail!("a sender panicked") };
            total += sent?;
        }
        Ok(total)
    })?;
    #[allow(clippy::cast_precision_loss, reason = "octets of some seconds")]
    let gigabits = total as f64 * 8.0 / 1e9;
    println!("{}", gigabits / began.elapsed().as_secs_f64());
    Ok(())
}

/// Sends until told to stop; what the server has received.
fn send(to: SocketAddr, stop: &AtomicBool) -> Result<u64> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
    stream.set_write_timeout(Some(Duration::from_secs(10)))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"S")?;
    let chunk = vec![7; CHUNK];
    while !stop.load(Ordering::Relaxed) {
        stream.write_all(&chunk)?;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut received = [0; 8];
    stream.read_exact(&mut received)?;
    Ok(u64::from_be_bytes(received))
}

fn request(to: SocketAddr, duration: Duration) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.set_nodelay(true)?;
    stream.write_all(b"R")?;
    let began = Instant::now();
    let mut count: u32 = 0;
    let mut octet = [1];
    while began.elapsed() < duration {
        stream.write_all(&octet)?;
        stream.read_exact(&mut octet)?;
        count += 1;
    }
    ensure!(count > 0, "no answer");
    println!("{}", f64::from(count) / began.elapsed().as_secs_f64());
    Ok(())
}
