//! Network namespaces beside the arena's: clients outside, pods, other nodes. Each is a thread that does what it is asked,
//! joined to the caller's namespace by a veth.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::mpsc::{Sender, channel},
    time::Duration,
};

use anyhow::{Context, Result};
use nix::{
    sched::{CloneFlags, unshare},
    unistd::gettid,
};

use crate::arena::ip;

/// How long a place's thread may take for one job.
const DEADLINE: Duration = Duration::from_secs(60);
/// How long a client waits for a server that shall answer.
const ANSWER: Duration = Duration::from_secs(20);
/// How long a client waits for one that shall be silent.
pub const SILENCE: Duration = Duration::from_secs(2);

/// A thread in a network namespace of its own.
pub struct Place {
    jobs: Sender<Box<dyn FnOnce() + Send>>,
    /// The thread, by which `ip link … netns` finds the namespace.
    pub thread: i32,
}

impl Place {
    /// A namespace with nothing but loopback.
    pub fn empty() -> Result<Self> {
        let (jobs, work) = channel::<Box<dyn FnOnce() + Send>>();
        let (ready, started) = channel();
        std::thread::spawn(move || {
            let made = unshare(CloneFlags::CLONE_NEWNET).map(|()| gettid().as_raw());
            if ready.send(made).is_ok() {
                for job in work {
                    job();
                }
            }
        });
        let thread = started.recv()??;
        let place = Self { jobs, thread };
        place.run(|| ip(&["link", "set", "lo", "up"]))??;
        Ok(place)
    }

    /// Joined to the caller's namespace by a device of this name there, and by `eth0` here. Addresses have their
    /// prefix; the default routes lead to the caller's.
    pub fn joined(device: &str, node: &[&str], own: &[&str]) -> Result<Self> {
        let place = Self::empty()?;
        place.join(device, "eth0", node, own)?;
        let gateways: Vec<String> =
            node.iter().map(|address| address.split('/').next().unwrap_or_default().to_owned()).collect();
        place.run(move || {
            gateways.iter().try_for_each(|gateway| ip(&["route", "add", "default", "via", gateway]))
        })??;
        Ok(place)
    }

    /// One more device between the two, without routes.
    pub fn join(&self, device: &str, inside: &str, node: &[&str], own: &[&str]) -> Result<()> {
        let thread = self.thread.to_string();
        ip(&["link", "add", device, "type", "veth", "peer", "name", inside, "netns", &thread])?;
        for address in node {
            add(device, address)?;
        }
        ip(&["link", "set", device, "up"])?;
        let (inside, own) =
            (inside.to_owned(), own.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>());
        self.run(move || -> Result<()> {
            own.iter().try_for_each(|address| add(&inside, address))?;
            ip(&["link", "set", &inside, "up"])
        })?
    }

    /// Does something there and waits for it.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let (done, outcome) = channel();
        self.jobs
            .send(Box::new(move || drop(done.send(job()))))
            .ok()
            .context("the place's thread is gone")?;
        outcome.recv_timeout(DEADLINE).context("a place's thread does not answer")
    }

    /// Servers over TCP and UDP that tell each client who they are and whom they see: `NAME FROM LEN`.
    pub fn serve(&self, address: &str, name: &str) -> Result<()> {
        let (address, name) = (address.to_owned(), name.to_owned());
        self.run(move || -> Result<()> {
            let (listener, own) = (TcpListener::bind(&address)?, name.clone());
            std::thread::spawn(move || {
                while let Ok((mut stream, from)) = listener.accept() {
                    // A client that hangs up first is its own business.
                    drop(write!(stream, "{own} {from} 0"));
                }
            });
            let socket = UdpSocket::bind(&address)?;
            std::thread::spawn(move || {
                let mut buffer = [0; 9000];
                while let Ok((len, from)) = socket.recv_from(&mut buffer) {
                    drop(socket.send_to(format!("{name} {from} {len}").as_bytes(), from));
                }
            });
            Ok(())
        })?
    }

    /// What a server says over TCP; a silent one is given up early.
    pub fn ask_tcp(&self, address: SocketAddr, patience: Duration) -> Result<io::Result<String>> {
        self.run(move || {
            let mut stream = TcpStream::connect_timeout(&address, patience)?;
            stream.set_read_timeout(Some(ANSWER))?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        })
    }

    /// What a server says to a datagram of this many bytes.
    pub fn ask_udp(&self, address: SocketAddr, len: usize, patience: Duration) -> Result<io::Result<String>> {
        self.run(move || {
            let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = UdpSocket::bind(any)?;
            socket.set_read_timeout(Some(patience))?;
            socket.connect(address)?;
            socket.send(&vec![7; len])?;
            let mut buffer = [0; 200];
            let len = socket.recv(&mut buffer)?;
            Ok(String::from_utf8_lossy(&buffer[..len]).into_owned())
        })
    }
}

/// Gives a device an address that can be used at once: also on `lo`, duplicate address detection ends an IPv6 one's
/// tentative state only later, from a work queue.
pub fn add(device: &str, address: &str) -> Result<()> {
    if address.contains(':') {
        ip(&["addr", "add", address, "dev", device, "nodad"])
    } else {
        ip(&["addr", "add", address, "dev", device])
    }
}

/// Lets the caller's namespace forward packets.
pub fn forward() -> Result<()> {
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
    std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")?;
    Ok(())
}

/// Sends frames by a device of the calling thread's namespace as fast as the kernel takes them.
#[allow(unsafe_code, reason = "packet sockets have an address of their own")]
pub fn send_frames(device: &str, frames: impl Iterator<Item = Vec<u8>>) -> Result<()> {
    let index = i32::try_from(nix::net::if_::if_nametoindex(device)?)?;
    // SAFETY: the system call takes integers and returns a new descriptor, which nobody else knows.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error()).context("open a packet socket");
        }
        OwnedFd::from_raw_fd(fd)
    };
    let to = libc::sockaddr_ll {
        sll_family: u16::try_from(libc::AF_PACKET)?,
        sll_protocol: 0x0800_u16.to_be(),
        sll_ifindex: index,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: [0; 8],
    };
    let size = libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>())?;
    for frame in frames {
        // SAFETY: the kernel reads frame and address, both of the sizes that are told.
        let sent = unsafe {
            libc::sendto(
                socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const to).cast(),
                size,
            )
        };
        let error = io::Error::last_os_error();
        // A full queue loses frames, as any network does.
        if sent < 0 && error.raw_os_error() != Some(libc::ENOBUFS) {
            return Err(error).context("send a frame");
        }
    }
    Ok(())
}

/// Makes a veth of the calling thread's namespace do its own checksums and take frames that drivers send on (a driver's
/// program does not know of work left to hardware).
#[allow(unsafe_code, reason = "ethtool's settings are an ioctl with a structure of its own")]
pub fn without_offload(device: &str) -> Result<()> {
    const ETHTOOL_STXCSUM: u32 = 0x17;
    const ETHTOOL_STSO: u32 = 0x1f;
    const ETHTOOL_SGRO: u32 = 0x2c;
    const SIOCETHTOOL: libc::c_ulong = 0x8946;
    #[repr(C)]
    struct Value {
        command: u32,
        data: u32,
    }
    #[repr(C)]
    struct Request {
        name: [u8; 16],
        value: *mut Value,
        padding: [u64; 2],
    }
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    for (command, data) in [(ETHTOOL_STSO, 0), (ETHTOOL_STXCSUM, 0), (ETHTOOL_SGRO, 1)] {
        let mut value = Value { command, data };
        let mut request = Request { name: [0; 16], value: &raw mut value, padding: [0; 2] };
        for (to, from) in request.name.iter_mut().zip(device.bytes()) {
            *to = from;
        }
        // SAFETY: the request is an `ifreq` with its name and the pointer to an `ethtool_value`, both alive during the
        // call.
        let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
        if result != 0 {
            return Err(io::Error::last_os_error())
                .with_context(|| format!("setting {command:#x} of {device}"));
        }
    }
    Ok(())
}
