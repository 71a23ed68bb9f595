//! A client of the shim's own service, as simple as can be.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use keelson_shim::protocol::{Call, Ended, ExecSync, Failed, HEADER, Kind, Request, header, parse_header};
use prost::Message;

use super::PATIENCE;

/// What a command left, or why not.
pub type Outcome = Result<(String, String, u32), (i32, String)>;

/// Sends a request; gives the connection.
pub fn ask(socket: &Path, container: &str, call: Call) -> UnixStream {
    let mut stream = UnixStream::connect(socket).expect("the shim listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    let request = Request { container: container.to_owned(), call: Some(call) }.encode_to_vec();
    let mut send = |bytes: &[u8]| {
        if let Err(error) = stream.write_all(bytes) {
            // One that takes no more requests says so without reading any.
            assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
        }
    };
    send(&header(Kind::Request, request.len()));
    send(&request);
    stream
}

/// The next frame.
pub fn frame(stream: &mut UnixStream) -> (Kind, Vec<u8>) {
    let mut head = [0; HEADER];
    stream.read_exact(&mut head).expect("an answer");
    let (kind, length) = parse_header(head).expect("a frame");
    let mut payload = vec![0; length];
    stream.read_exact(&mut payload).expect("all of it");
    (kind, payload)
}

/// Runs a command to its end.
pub fn exec_sync(socket: &Path, container: &str, args: &[&str], timeout_ms: u64) -> Outcome {
    let args = args.iter().map(|arg| (*arg).to_owned()).collect();
    let mut stream = ask(socket, container, Call::ExecSync(ExecSync { args, timeout_ms }));
    let (mut out, mut err) = (Vec::new(), Vec::new());
    loop {
        match frame(&mut stream) {
            (Kind::Stdout, bytes) => out.extend(bytes),
            (Kind::Stderr, bytes) => err.extend(bytes),
            (Kind::Ended, bytes) => {
                let code = Ended::decode(bytes.as_slice()).expect("ended").exit_code;
                let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
                return Ok((text(out), text(err), code));
            }
            (Kind::Failed, bytes) => {
                let failed = Failed::decode(bytes.as_slice()).expect("failed");
                return Err((failed.code, failed.message));
            }
            (Kind::Request, _) => panic!("the shim asks"),
        }
    }
}
