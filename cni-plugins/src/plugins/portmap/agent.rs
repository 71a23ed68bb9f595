//! The offer to an agent that carries host ports in its eBPF data plane.
//!
//! An agent that has one listens on the socket `agent.sock` in the directory of the records. It is told `take FILE` and
//! answers `taken` once its maps have the ports of that record, or anything else to leave them to nftables. The
//! connection stays open until the record says `"carrier": "agent"`; where it ends and the record does not say so, the
//! agent takes the ports out again, so that a call that is killed leaves them in one place at most. `drop FILE` is answered
//! with `dropped` once they are gone, `check FILE` with `held` or `missing`. A socket that nobody listens on, or an answer
//! that does not come within the deadline, means that there is no agent. An agent that starts programs what the records
//! say; what its data plane does not take, it puts into nftables and marks `nftables`, under the lock.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

/// Longest wait for the agent's answer.
const DEADLINE: Duration = Duration::from_secs(1);

/// The agent's promise; it holds once the record says so, and ends with this value otherwise.
pub(super) struct Taken {
    /// Held for its drop.
    _stream: UnixStream,
}

/// Offers a record's ports to a live agent.
pub(super) fn offer(dir: &Path, file: &str) -> Option<Taken> {
    let (answer, stream) = ask(dir, &format!("take {file}\n"))?;
    (answer == "taken").then_some(Taken { _stream: stream })
}

/// Tells a live agent that the record goes; one that does not answer finds it gone when it looks.
pub(super) fn withdraw(dir: &Path, file: &str) -> bool {
    ask(dir, &format!("drop {file}\n")).is_some_and(|(answer, _)| answer == "dropped")
}

/// Whether a live agent says that it does not have the ports of a record that it should have.
pub(super) fn misses(dir: &Path, file: &str) -> bool {
    ask(dir, &format!("check {file}\n")).is_some_and(|(answer, _)| answer == "missing")
}

fn ask(dir: &Path, question: &str) -> Option<(String, UnixStream)> {
    let mut stream = UnixStream::connect(dir.join("agent.sock")).ok()?;
    stream.set_read_timeout(Some(DEADLINE)).ok()?;
    stream.set_write_timeout(Some(DEADLINE)).ok()?;
    stream.write_all(question.as_bytes()).ok()?;
    let mut answer = [0; 16];
    let length = stream.read(&mut answer).ok()?;
    Some((String::from_utf8_lossy(&answer[..length]).trim().to_owned(), stream))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn only_a_live_agent_that_agrees_takes_them() {
        let dir = tempfile::tempdir().unwrap();
        assert!(offer(dir.path(), "a.json").is_none(), "nobody is there");
        let listener = UnixListener::bind(dir.path().join("agent.sock")).unwrap();
        let agent = std::thread::spawn(move || {
            for answer in ["taken\n", "no\n"] {
                let (mut stream, _) = listener.accept().unwrap();
                let mut question = [0; 64];
                let length = stream.read(&mut question).unwrap();
                assert_eq!(&question[..length], b"take a.json\n");
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        assert!(offer(dir.path(), "a.json").is_some());
        assert!(offer(dir.path(), "a.json").is_none());
        agent.join().unwrap();
        assert!(offer(dir.path(), "a.json").is_none(), "a socket of an agent that has ended");
    }
}
