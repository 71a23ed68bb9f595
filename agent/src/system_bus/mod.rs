//! A connection to the system bus: calls, the signals asked for, and descriptors that come with replies.

pub(crate) mod message;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncWriteExt as _, Interest};
use tokio::net::UnixStream;

use self::message::{ERROR, FIXED, MAX_SIZE, Message, REPLY, SIGNAL, Target, Value};
use crate::host::descriptors::receive;

/// Where the system bus is.
pub(crate) const SOCKET: &str = "/run/dbus/system_bus_socket";
/// Deadline of a call, and of the greeting.
const DEADLINE: Duration = Duration::from_secs(10);
/// Signals that wait to be taken; further ones are lost, because only the newest counts.
const MAX_SIGNALS: usize = 64;

/// Why the bus cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BusError {
    /// Not there, or gone.
    #[error("the system bus is away")]
    Io(#[from] io::Error),
    /// It does not speak as it should.
    #[error("the system bus speaks nonsense: {0}")]
    Protocol(&'static str),
    /// Somebody said no.
    #[error("{member}: {error}: {text}")]
    Refused {
        /// The method.
        member: String,
        /// Name of the error.
        error: String,
        /// What it means.
        text: String,
    },
    /// Nobody answered.
    #[error("{member}: no answer in time")]
    Deadline {
        /// The method.
        member: String,
    },
}

/// A connection.
pub(crate) struct Bus {
    stream: UnixStream,
    serial: u32,
    buffer: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
    signals: VecDeque<Message>,
}

const BUS: Target<'static> = Target {
    destination: "org.freedesktop.DBus",
    path: "/org/freedesktop/DBus",
    interface: "org.freedesktop.DBus",
    member: "",
};

impl Bus {
    /// Connects and says hello.
    pub(crate) async fn connect(socket: &Path) -> Result<Self, BusError> {
        let stream = UnixStream::connect(socket).await?;
        let mut bus = Self {
            stream,
            serial: 0,
            buffer: Vec::new(),
            descriptors: VecDeque::new(),
            signals: VecDeque::new(),
        };
        let greeting = tokio::time::timeout(DEADLINE, bus.greet()).await;
        greeting.map_err(|_elapsed| BusError::Deadline { member: "greeting".to_owned() })??;
        bus.call(Target { member: "Hello", ..BUS }, &[]).await?;
        Ok(bus)
    }

    /// Asks for the signals that the rule matches.
    pub(crate) async fn subscribe(&mut self, rule: &str) -> Result<(), BusError> {
        self.call(Target { member: "AddMatch", ..BUS }, &[Value::Text(rule)]).await.map(|_| ())
    }

    /// One call; its reply, and the descriptor that came with it.
    pub(crate) async fn call(
        &mut self,
        target: Target<'_>,
        arguments: &[Value<'_>],
    ) -> Result<(Message, Option<OwnedFd>), BusError> {
        self.serial += 1;
        let serial = self.serial;
        let answered = async {
            self.stream.write_all(&message::call(serial, target, arguments)).await?;
            loop {
                let (message, descriptor) = self.next().await?;
                match message.kind {
                    REPLY if message.reply_to == serial => return Ok((message, descriptor)),
                    ERROR if message.reply_to == serial => {
                        let text = message.text().unwrap_or_default();
                        let member = target.member.to_owned();
                        return Err(BusError::Refused { member, error: message.error, text });
                    }
                    SIGNAL if self.signals.len() < MAX_SIGNALS => self.signals.push_back(message),
                    _ => {}
                }
            }
        };
        match tokio::time::timeout(DEADLINE, answered).await {
            Ok(answer) => answer,
            Err(_elapsed) => Err(BusError::Deadline { member: target.member.to_owned() }),
        }
    }

    /// The next signal. Cancel-safe: what was read of it is kept.
    pub(crate) async fn signal(&mut self) -> Result<Message, BusError> {
        loop {
            if let Some(signal) = self.signals.pop_front() {
                return Ok(signal);
            }
            let (message, _) = self.next().await?;
            if message.kind == SIGNAL {
                return Ok(message);
            }
        }
    }

    async fn greet(&mut self) -> Result<(), BusError> {
        // The user's id in digits, these in hexadecimal.
        let user = nix::unistd::Uid::effective().to_string();
        let hexadecimal = |text: String, byte| text + &format!("{byte:02x}");
        let user = user.bytes().fold(String::new(), hexadecimal);
        self.stream.write_all(format!("\0AUTH EXTERNAL {user}\r\n").as_bytes()).await?;
        self.expect_line("OK ").await?;
        self.stream.write_all(b"NEGOTIATE_UNIX_FD\r\n").await?;
        self.expect_line("AGREE_UNIX_FD").await?;
        self.stream.write_all(b"BEGIN\r\n").await?;
        Ok(())
    }

    async fn expect_line(&mut self, beginning: &str) -> Result<(), BusError> {
        let end = loop {
            if let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\r\n") {
                break end;
            }
            self.read().await?;
        };
        let line: Vec<u8> = self.buffer.drain(..end + 2).collect();
        if line.starts_with(beginning.as_bytes()) {
            Ok(())
        } else {
            Err(BusError::Protocol("it refuses the greeting"))
        }
    }

    async fn next(&mut self) -> Result<(Message, Option<OwnedFd>), BusError> {
        loop {
            if self.buffer.len() >= FIXED {
                let size = message::size(&self.buffer).map_err(BusError::Protocol)?;
                if self.buffer.len() >= size {
                    let bytes: Vec<u8> = self.buffer.drain(..size).collect();
                    let message = message::decode(&bytes).map_err(BusError::Protocol)?;
                    let mut descriptor = None;
                    for _ in 0..message.descriptors {
                        descriptor = self.descriptors.pop_front();
                    }
                    return Ok((message, descriptor));
                }
            }
            self.read().await?;
        }
    }

    /// Reads what there is, at least one byte. Cancel-safe: it only waits before it reads.
    async fn read(&mut self) -> Result<(), BusError> {
        if self.buffer.len() > MAX_SIZE {
            return Err(BusError::Protocol("too much at once"));
        }
        let mut chunk = [0; 4096];
        let (length, descriptors) = loop {
            self.stream.readable().await?;
            let stream = &self.stream;
            match stream.try_io(Interest::READABLE, || receive(stream.as_fd(), &mut chunk)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => break read?,
            }
        };
        if length == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        self.buffer.extend(chunk.get(..length).unwrap_or_default());
        self.descriptors.extend(descriptors);
        Ok(())
    }
}
