//! Output on its way: to logs that are rotated, to clients that are slow, past processes that hold on to it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use super::{Pump, Sink, Streams};

const PATIENCE: Duration = Duration::from_secs(30);

struct Started {
    pump: Pump,
    out: File,
    err: File,
    drained: mpsc::Receiver<()>,
}

fn start(log: &Path) -> Started {
    let pipe = || -> (OwnedFd, OwnedFd) { nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap() };
    let ((stdout, out), (stderr, err)) = (pipe(), pipe());
    let (told, drained) = mpsc::channel();
    let streams =
        Streams { stdout, stderr: Some(stderr), sink: Sink::Log(Some(log.to_owned())), input: None };
    let pump = Pump::start(streams, move || told.send(()).unwrap()).unwrap();
    Started { pump, out: out.into(), err: err.into(), drained }
}

#[test]
fn both_streams_reach_the_log_before_the_end_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("pod/web/0.log");
    let Started { pump, mut out, mut err, drained } = start(&log);
    out.write_all(b"one\ntw").unwrap();
    err.write_all(b"oops\n").unwrap();
    drop((out, err));
    drained.recv_timeout(PATIENCE).unwrap();
    let text = std::fs::read_to_string(&log).unwrap();
    for end in [" stdout F one\n", " stdout P tw\n", " stderr F oops\n"] {
        assert!(text.contains(end), "{end:?} is not in {text:?}");
    }
    std::fs::remove_file(&log).unwrap();
    pump.reopen().unwrap();
    assert!(log.exists(), "who rotates the log of an ended container finds a new one");
}

#[test]
fn a_rotated_log_loses_no_line() {
    const LINES: usize = 20_000;
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("0.log");
    let Started { pump, mut out, err, drained } = start(&log);
    let writer = std::thread::spawn(move || {
        for number in 0..LINES {
            out.write_all(format!("{number}\n").as_bytes()).unwrap();
        }
    });
    let mut files = Vec::new();
    while !writer.is_finished() && files.len() < 50 {
        let rotated = dir.path().join(format!("{}.old", files.len()));
        std::fs::rename(&log, &rotated).unwrap();
        pump.reopen().unwrap();
        files.push(rotated);
    }
    writer.join().unwrap();
    drop(err);
    drained.recv_timeout(PATIENCE).unwrap();
    files.push(log);
    let text: String = files.iter().map(|file| std::fs::read_to_string(file).unwrap()).collect();
    let numbers = text.lines().map(|line| line.rsplit(' ').next().unwrap().parse::<usize>().unwrap());
    assert!(numbers.eq(0..LINES), "a line is missing, doubled or out of order");
}

#[test]
fn a_client_that_does_not_read_holds_nobody_up() {
    let dir = tempfile::tempdir().unwrap();
    let Started { pump, mut out, err, drained } = start(&dir.path().join("0.log"));
    let (lazy, theirs) = UnixStream::pair().unwrap();
    assert!(pump.follow(theirs));
    let line = [b'x'; 1023];
    for _ in 0..4096 {
        out.write_all(&line).unwrap();
        out.write_all(b"\n").unwrap();
    }
    drop((out, err));
    drained.recv_timeout(PATIENCE).unwrap();
    let (_, theirs) = UnixStream::pair().unwrap();
    assert!(!pump.follow(theirs), "there is nothing to come");
    drop(lazy);
}

#[test]
fn an_end_is_told_although_somebody_holds_the_pipe() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("0.log");
    let Started { pump, mut out, err, drained } = start(&log);
    out.write_all(b"last\n").unwrap();
    drop(err);
    pump.process_ended();
    drained.recv_timeout(PATIENCE).unwrap();
    assert!(std::fs::read_to_string(&log).unwrap().ends_with("F last\n"));
    out.write_all(b"later\n").unwrap();
    drop(out);
    pump.stop();
}

#[test]
fn a_terminal_takes_input_and_gives_output_to_a_fifo() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("out");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let terminal = nix::pty::openpty(None, None).unwrap();
    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
    let sink = File::options().read(true).write(true).open(&fifo).unwrap();
    let mut there = File::open(&fifo).unwrap();
    let input = Some((File::from(reader), terminal.master.try_clone().unwrap()));
    let (told, drained) = mpsc::channel();
    let streams = Streams { stdout: terminal.master, stderr: None, sink: Sink::Fifo(sink), input };
    let _pump = Pump::start(streams, move || told.send(()).unwrap()).unwrap();
    File::from(writer).write_all(b"typed\n").unwrap();
    let mut program = File::from(terminal.slave);
    let mut line = [0; 6];
    program.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"typed\n");
    program.write_all(b"said\n").unwrap();
    drop(program);
    drained.recv_timeout(PATIENCE).unwrap();
    let mut text = String::new();
    there.read_to_string(&mut text).unwrap();
    assert_eq!(text, "typed\r\nsaid\r\n", "the echo and the word");
}

#[test]
fn a_disk_that_takes_nothing_holds_no_end_up() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("0.log");
    nix::unistd::mkfifo(&log, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let disk = File::options().read(true).write(true).open(&log).unwrap();
    let Started { pump, mut out, err, drained } = start(&log);
    let (said, saying) = mpsc::channel();
    std::thread::spawn(move || {
        // More than both pipes hold, so that the log's writer stands still.
        let _full = out.write_all(&vec![b'x'; 200_000]);
        drop((out, err));
        said.send(()).ok();
    });
    assert!(saying.recv_timeout(Duration::from_millis(200)).is_err(), "somebody took it all");
    pump.process_ended();
    drained.recv_timeout(PATIENCE).unwrap();
    drop(disk);
}
