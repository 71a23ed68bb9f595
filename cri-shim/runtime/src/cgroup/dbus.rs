//! As much of D-Bus as is needed to ask systemd for a unit: one connection, one call at a time, no signals.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// How long systemd may take to answer.
const LIMIT: Duration = Duration::from_secs(25);
/// Longest answer that is read.
const LONGEST: usize = 1 << 20;

/// A connection.
pub(crate) struct Bus {
    stream: UnixStream,
    serial: u32,
}

/// A value of a property.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    Bool(bool),
    U64(u64),
    Text(String),
    Bytes(Vec<u8>),
    /// A list of process ids.
    Ids(Vec<u32>),
    /// A list of pairs of texts.
    Pairs(Vec<(String, String)>),
}

/// A failed call.
#[derive(Debug)]
pub(crate) enum Failed {
    Io(io::Error),
    /// systemd's answer: the error's name and text.
    Refused(String, String),
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Failed> for io::Error {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Io(error) => error,
            Failed::Refused(name, text) => io::Error::other(format!("{text} ({name})")),
        }
    }
}

impl Bus {
    /// Connects to systemd: over the system bus, or where there is none over systemd's own socket.
    pub(crate) fn systemd() -> io::Result<Self> {
        match Self::connect(Path::new("/run/dbus/system_bus_socket")) {
            Ok(mut bus) => {
                bus.hello()?;
                Ok(bus)
            }
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
            {
                Self::connect(Path::new("/run/systemd/private"))
            }
            Err(error) => Err(error),
        }
    }

    fn connect(socket: &Path) -> io::Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        // Who we are: the user's number, as hexadecimal digits of its decimal digits.
        let user = rustix::process::geteuid().as_raw().to_string();
        let digits: String = user.bytes().flat_map(|byte| [byte >> 4, byte & 15]).map(hex).collect();
        stream.write_all(format!("\0AUTH EXTERNAL {digits}\r\n").as_bytes())?;
        let answer = line(&mut stream)?;
        if !answer.starts_with("OK ") {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, answer));
        }
        stream.write_all(b"BEGIN\r\n")?;
        Ok(Self { stream, serial: 0 })
    }

    /// What a bus wants to hear first; systemd's own socket does not.
    fn hello(&mut self) -> Result<(), Failed> {
        let call =
            Call { destination: "org.freedesktop.DBus", path: "/org/freedesktop/DBus", member: "Hello" };
        self.call(&call, "", &Body::default())
    }

    /// Calls a method of systemd's manager.
    pub(crate) fn manager(&mut self, member: &str, signature: &str, body: &Body) -> Result<(), Failed> {
        let call =
            Call { destination: "org.freedesktop.systemd1", path: "/org/freedesktop/systemd1", member };
        self.call(&call, signature, body)
    }

    fn call(&mut self, call: &Call<'_>, signature: &str, body: &Body) -> Result<(), Failed> {
        self.serial += 1;
        let message = call.message(self.serial, signature, &body.bytes);
        self.stream.write_all(&message)?;
        loop {
            let answer = Answer::read(&mut self.stream)?;
            // Anything else (signals, NameAcquired) is of no interest.
            if answer.reply_to == Some(self.serial) {
                return match answer.error {
                    None => Ok(()),
                    Some(name) => Err(Failed::Refused(name, answer.text)),
                };
            }
        }
    }
}

fn hex(digit: u8) -> char {
    char::from_digit(u32::from(digit), 16).unwrap_or('0')
}

fn line(stream: &mut UnixStream) -> io::Result<String> {
    let mut text = Vec::new();
    let mut byte = [0];
    while !text.ends_with(b"\r\n") && text.len() < 512 {
        stream.read_exact(&mut byte)?;
        text.extend(byte);
    }
    Ok(String::from_utf8_lossy(&text).trim_end().to_owned())
}

struct Call<'a> {
    destination: &'a str,
    path: &'a str,
    member: &'a str,
}

impl Call<'_> {
    fn message(&self, serial: u32, signature: &str, body: &[u8]) -> Vec<u8> {
        let mut fields = Body::default();
        let interface =
            if self.member == "Hello" { "org.freedesktop.DBus" } else { "org.freedesktop.systemd1.Manager" };
        for (code, kind, text) in
            [(1, "o", self.path), (2, "s", interface), (3, "s", self.member), (6, "s", self.destination)]
        {
            fields.align(8);
            fields.bytes.push(code);
            fields.signature(kind);
            fields.text(text);
        }
        if !signature.is_empty() {
            fields.align(8);
            fields.bytes.push(8);
            fields.signature("g");
            fields.signature(signature);
        }
        // Little-endian, a method call, no flags, version 1.
        let mut message = Body { bytes: vec![b'l', 1, 0, 1] };
        message.number(length(body));
        message.number(serial);
        message.number(length(&fields.bytes));
        message.bytes.extend(fields.bytes);
        message.align(8);
        message.bytes.extend(body);
        message.bytes
    }
}

fn length(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX)
}

/// Arguments as they go over the wire.
#[derive(Debug, Default)]
pub(crate) struct Body {
    bytes: Vec<u8>,
}

impl Body {
    fn align(&mut self, to: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
    }

    fn number(&mut self, value: u32) {
        self.align(4);
        self.bytes.extend(value.to_le_bytes());
    }

    /// A string.
    pub(crate) fn text(&mut self, text: &str) {
        self.number(length(text.as_bytes()));
        self.bytes.extend(text.bytes().chain([0]));
    }

    fn signature(&mut self, text: &str) {
        self.bytes.push(u8::try_from(text.len()).unwrap_or(u8::MAX));
        self.bytes.extend(text.bytes().chain([0]));
    }

    /// A truth value.
    pub(crate) fn truth(&mut self, value: bool) {
        self.number(u32::from(value));
    }

    /// An array of elements that begin at multiples of eight.
    fn array(&mut self, write: impl FnOnce(&mut Self)) {
        self.number(0);
        let place = self.bytes.len() - 4;
        self.align(8);
        let begin = self.bytes.len();
        write(self);
        let length = u32::try_from(self.bytes.len() - begin).unwrap_or(u32::MAX);
        if let Some(place) = self.bytes.get_mut(place..place + 4) {
            place.copy_from_slice(&length.to_le_bytes());
        }
    }

    /// `a(sv)`.
    pub(crate) fn properties(&mut self, list: &[(&str, Value)]) {
        self.array(|body| {
            for (name, value) in list {
                body.align(8);
                body.text(name);
                body.value(value);
            }
        });
    }

    /// An empty array of structures.
    pub(crate) fn nothing(&mut self) {
        self.array(|_| {});
    }

    fn value(&mut self, value: &Value) {
        match value {
            Value::Bool(value) => {
                self.signature("b");
                self.truth(*value);
            }
            Value::U64(value) => {
                self.signature("t");
                self.align(8);
                self.bytes.extend(value.to_le_bytes());
            }
            Value::Text(text) => {
                self.signature("s");
                self.text(text);
            }
            Value::Bytes(bytes) => {
                self.signature("ay");
                self.number(length(bytes));
                self.bytes.extend(bytes);
            }
            Value::Pairs(pairs) => {
                self.signature("a(ss)");
                self.array(|body| {
                    for (first, second) in pairs {
                        body.align(8);
                        body.text(first);
                        body.text(second);
                    }
                });
            }
            Value::Ids(ids) => {
                self.signature("au");
                self.number(u32::try_from(ids.len() * 4).unwrap_or(u32::MAX));
                for id in ids {
                    self.number(*id);
                }
            }
        }
    }
}

/// What is read of a message.
#[derive(Debug, Default, PartialEq, Eq)]
struct Answer {
    reply_to: Option<u32>,
    error: Option<String>,
    /// The first argument, when it is a string.
    text: String,
}

impl Answer {
    fn read(stream: &mut impl Read) -> io::Result<Self> {
        let odd = || io::Error::new(io::ErrorKind::InvalidData, "not a D-Bus message");
        let mut head = [0; 16];
        stream.read_exact(&mut head)?;
        let number = |at: usize| {
            let bytes = head.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
            bytes.map(u32::from_le_bytes).and_then(|value| usize::try_from(value).ok()).unwrap_or(usize::MAX)
        };
        let (body, fields) = (number(4), number(12));
        if head.first() != Some(&b'l') || body > LONGEST || fields > LONGEST {
            return Err(odd());
        }
        // The fields begin at a multiple of eight, and so does what follows them.
        let mut rest = vec![0; fields.next_multiple_of(8) + body];
        stream.read_exact(&mut rest)?;
        let mut answer = Self::default();
        let mut at = 0;
        while at < fields {
            at = answer.field(&rest, at.next_multiple_of(8)).ok_or_else(odd)?;
        }
        if answer.error.is_some() {
            answer.text = text(&rest, fields.next_multiple_of(8)).map(|(text, _)| text).unwrap_or_default();
        }
        Ok(answer)
    }

    /// Reads one header field; gives where it ends.
    fn field(&mut self, bytes: &[u8], at: usize) -> Option<usize> {
        let (code, kind) = (*bytes.get(at)?, *bytes.get(at + 2)?);
        let value = at + 4;
        match kind {
            b's' | b'o' => {
                let (text, end) = text(bytes, value)?;
                if code == 4 {
                    self.error = Some(text);
                }
                Some(end)
            }
            b'g' => Some(value + 2 + usize::from(*bytes.get(value)?)),
            b'u' => {
                if code == 5 {
                    self.reply_to = Some(u32_at(bytes, value)?);
                }
                Some(value + 4)
            }
            _ => None,
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn text(bytes: &[u8], at: usize) -> Option<(String, usize)> {
    let length = usize::try_from(u32_at(bytes, at)?).ok()?;
    let text = bytes.get(at + 4..(at + 4).checked_add(length)?)?;
    Some((String::from_utf8_lossy(text).into_owned(), at + 4 + length + 1))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_call_is_laid_out_as_the_specification_says() {
        let mut body = Body::default();
        body.text("a");
        body.properties(&[("B", Value::Bool(true)), ("T", Value::U64(7)), ("I", Value::Ids(vec![9]))]);
        // "a": length 1, 'a', 0; the array's length; padding to 8; then the structures.
        assert_eq!(&body.bytes[..12], [1, 0, 0, 0, b'a', 0, 0, 0, 60, 0, 0, 0]);
        assert_eq!(&body.bytes[16..32], [1, 0, 0, 0, b'B', 0, 1, b'b', 0, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(&body.bytes[32..48], [1, 0, 0, 0, b'T', 0, 1, b't', 0, 0, 0, 0, 0, 0, 0, 0]);
        let mut pairs = Body::default();
        pairs.value(&Value::Pairs(vec![("a".to_owned(), "b".to_owned())]));
        assert_eq!(&pairs.bytes[..7], b"\x05a(ss)\0");
        // The length counts from the first pair, which begins at a multiple of eight.
        assert_eq!(&pairs.bytes[8..16], [14, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(&pairs.bytes[16..], b"\x01\0\0\0a\0\0\0\x01\0\0\0b\0");
        let mut mask = Body::default();
        mask.value(&Value::Bytes(vec![3]));
        assert_eq!(mask.bytes, b"\x02ay\0\x01\0\0\0\x03");
        let call = Call { destination: "d", path: "/", member: "M" };
        let message = call.message(5, "s", &body.bytes);
        assert_eq!(&message[..4], [b'l', 1, 0, 1]);
        assert_eq!(u32_at(&message, 8), Some(5));
        assert_eq!((message.len() - body.bytes.len()) % 8, 0);
    }

    /// A bus that refuses everything.
    fn refuse(listener: &UnixListener) {
        let (mut stream, _) = listener.accept().unwrap();
        assert_eq!(line(&mut stream).unwrap().trim_start_matches('\0').split(' ').next(), Some("AUTH"));
        stream.write_all(b"OK 1234\r\n").unwrap();
        assert_eq!(line(&mut stream).unwrap(), "BEGIN");
        let mut head = [0; 16];
        stream.read_exact(&mut head).unwrap();
        let mut fields = Body::default();
        fields.bytes.push(4);
        fields.signature("s");
        fields.text("org.Refused");
        fields.align(8);
        fields.bytes.push(5);
        fields.signature("u");
        fields.number(u32_at(&head, 8).unwrap());
        let mut body = Body::default();
        body.text("not today");
        let mut message = Body { bytes: vec![b'l', 3, 0, 1] };
        message.number(length(&body.bytes));
        message.number(1);
        message.number(length(&fields.bytes));
        message.bytes.extend(fields.bytes);
        message.align(8);
        message.bytes.extend(body.bytes);
        stream.write_all(&message.bytes).unwrap();
    }

    #[test]
    fn a_refusal_comes_back_with_its_text() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("bus");
        let listener = UnixListener::bind(&socket).unwrap();
        let server = std::thread::spawn(move || refuse(&listener));
        let mut bus = Bus::connect(&socket).unwrap();
        let mut body = Body::default();
        body.text("x.scope");
        let failed = bus.manager("StopUnit", "s", &body).unwrap_err();
        assert_eq!(io::Error::from(failed).to_string(), "not today (org.Refused)");
        server.join().unwrap();
    }

    /// A bus of its own, ended with the test.
    struct Daemon(std::process::Child);

    impl Drop for Daemon {
        fn drop(&mut self) {
            drop(self.0.kill());
            drop(self.0.wait());
        }
    }

    /// A bus daemon checks every message it passes on, and hangs up on one that is not well formed.
    #[test]
    fn a_real_bus_takes_our_messages() {
        if !Path::new("/usr/bin/dbus-daemon").exists() {
            eprintln!("skipped: dbus-daemon is not installed");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("bus");
        let config = dir.path().join("bus.conf");
        let text = format!(
            "<busconfig><type>session</type><listen>unix:path={}</listen><auth>EXTERNAL</auth>\
             <policy context=\"default\"><allow send_destination=\"*\" eavesdrop=\"true\"/><allow eavesdrop=\"true\"/></policy></busconfig>",
            socket.display()
        );
        std::fs::write(&config, text).unwrap();
        let mut command = std::process::Command::new("/usr/bin/dbus-daemon");
        let command = command.arg("--nofork").arg(format!("--config-file={}", config.display()));
        let _daemon = Daemon(command.spawn().unwrap());
        let begun = std::time::Instant::now();
        let mut bus = loop {
            match Bus::connect(&socket) {
                Ok(bus) => break bus,
                Err(error) => assert!(begun.elapsed() < LIMIT, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        bus.hello().unwrap();
        let mut body = Body::default();
        body.text("x.scope");
        body.text("replace");
        body.properties(&[
            ("Delegate", Value::Bool(true)),
            ("MemoryMax", Value::U64(1 << 40)),
            ("Slice", Value::Text("a-b.slice".to_owned())),
            ("PIDs", Value::Ids(vec![1, 2, 3])),
        ]);
        body.nothing();
        let first = bus.manager("StartTransientUnit", "ssa(sv)a(sa(sv))", &body);
        let mut body = Body::default();
        body.text("x.scope");
        body.truth(true);
        body.properties(&[("TasksMax", Value::U64(u64::MAX))]);
        let second = bus.manager("SetUnitProperties", "sba(sv)", &body);
        for answer in [first, second] {
            let unknown = "org.freedesktop.DBus.Error.ServiceUnknown";
            assert!(matches!(&answer, Err(Failed::Refused(name, _)) if name == unknown), "{answer:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut with_head = vec![b'l', 2, 0, 1, 8, 0, 0, 0, 1, 0, 0, 0, 24, 0, 0, 0];
            with_head.extend(&bytes);
            drop(Answer::read(&mut with_head.as_slice()));
            drop(Answer::read(&mut bytes.as_slice()));
        }
    }
}
