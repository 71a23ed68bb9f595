//! The shim's own service for `keelson-cri`, see [`crate::protocol`]: one short thread per request.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use prost::Message;

use crate::exec_sync;
use crate::protocol::{Call, Ended, Failed, HEADER, Kind, Request, header, parse_header};
use crate::shim::Shim;
use crate::threads;
use crate::ttrpc::{Code, Failure};

/// How long a client may take to ask, and for each piece of an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Serves one connection. As many at once as there may be files open; attached clients do not count.
pub fn accept(shim: &Arc<Shim>, client: UnixStream) {
    if shim.busy.fetch_add(1, Ordering::AcqRel) >= shim.files.most {
        shim.busy.fetch_sub(1, Ordering::AcqRel);
        // Not to be held up by a client that does not read.
        if client.set_nonblocking(true).is_ok() {
            let most = shim.files.most;
            let words = format!("the pod runs {most} commands already, as many as its shim can; try again");
            fail(&client, &Failure::new(Code::ResourceExhausted, words));
        }
        return;
    }
    let worker = Arc::clone(shim);
    let work = move || {
        if let Err(failure) = serve(&worker, &client) {
            fail(&client, &failure);
        }
        worker.work_done();
    };
    if threads::spawn("own", work).is_err() {
        shim.work_done();
    }
}

fn serve(shim: &Arc<Shim>, client: &UnixStream) -> Result<(), Failure> {
    let broken = |error: io::Error| Failure::new(Code::InvalidArgument, format!("request: {error}"));
    let request = read_request(client).map_err(broken)?;
    let container = shim.container(&request.container)?;
    match request.call {
        Some(Call::ExecSync(exec)) => exec_sync::run(shim, &container, &exec, client),
        Some(Call::ReopenLog(_)) => {
            let pump = container.lock().init.pump.clone();
            let missing =
                || Failure::new(Code::FailedPrecondition, "the shim writes no log for this container");
            pump.ok_or_else(missing)?
                .reopen()
                .map_err(|error| Failure::new(Code::Internal, format!("reopen the log: {error}")))?;
            end(client, 0);
            Ok(())
        }
        Some(Call::Attach(_)) => {
            let pump = container.lock().init.pump.clone();
            let missing =
                || Failure::new(Code::FailedPrecondition, "the shim reads no output of this container");
            let pump = pump.ok_or_else(missing)?;
            let follower = client.try_clone().map_err(broken)?;
            if !pump.follow(follower) {
                end(client, 0);
            }
            Ok(())
        }
        None => Err(Failure::new(Code::Unimplemented, "the shim does not know this call")),
    }
}

fn read_request(mut client: &UnixStream) -> io::Result<Request> {
    client.set_read_timeout(Some(PATIENCE))?;
    client.set_write_timeout(Some(PATIENCE))?;
    let mut head = [0; HEADER];
    client.read_exact(&mut head)?;
    let Some((Kind::Request, length)) = parse_header(head) else {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a request"));
    };
    let mut payload = vec![0; length];
    client.read_exact(&mut payload)?;
    Request::decode(payload.as_slice()).map_err(io::Error::other)
}

/// Sends a frame.
pub fn send(mut client: &UnixStream, kind: Kind, payload: &[u8]) -> io::Result<()> {
    client.write_all(&header(kind, payload.len()))?;
    client.write_all(payload)
}

/// Tells that all is done. A client that has left does not hear it.
pub fn end(client: &UnixStream, exit_code: u32) {
    send(client, Kind::Ended, &Ended { exit_code }.encode_to_vec()).ok();
}

/// Tells that it was not done.
pub fn fail(client: &UnixStream, failure: &Failure) {
    let failed = Failed { code: failure.code as i32, message: failure.message.clone() };
    send(client, Kind::Failed, &failed.encode_to_vec()).ok();
}
