//! The offer to an agent that carries host ports in its eBPF data plane.
//!
//! An agent that wants them listens on the socket `agent.sock` in the directory of the records. It is told `take FILE` and
//! answers `taken` once its maps have the ports of that record, or anything else to leave them to nftables; `drop FILE`
//! is answered with `dropped` once they are gone. A socket that nobody listens on, or an answer that does not come within
//! the deadline, means that there is no agent. An agent that starts reads the records, takes what it wants and marks it
//! `"carrier": "agent"` under the lock; before it leaves it hands back by marking `nftables` and calling GC.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

/// Longest wait for the agent's answer.
const DEADLINE: Duration = Duration::from_secs(1);

/// Whether a live agent has taken the ports of this record.
pub(super) fn offer(dir: &Path, file: &str) -> bool {
    ask(dir, &format!("take {file}\n")).is_some_and(|answer| answer == "taken")
}

/// Tells a live agent that the record goes; one that does not answer finds it gone when it looks.
pub(super) fn withdraw(dir: &Path, file: &str) -> bool {
    ask(dir, &format!("drop {file}\n")).is_some_and(|answer| answer == "dropped")
}

fn ask(dir: &Path, question: &str) -> Option<String> {
    let mut stream = UnixStream::connect(dir.join("agent.sock")).ok()?;
    stream.set_read_timeout(Some(DEADLINE)).ok()?;
    stream.set_write_timeout(Some(DEADLINE)).ok()?;
    stream.write_all(question.as_bytes()).ok()?;
    let mut answer = [0; 16];
    let length = stream.read(&mut answer).ok()?;
    Some(String::from_utf8_lossy(&answer[..length]).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn only_a_live_agent_that_agrees_takes_them() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!offer(dir.path(), "a.json"), "nobody is there");
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
        assert!(offer(dir.path(), "a.json"));
        assert!(!offer(dir.path(), "a.json"));
        agent.join().unwrap();
        assert!(!offer(dir.path(), "a.json"), "a socket of an agent that has ended");
    }
}
