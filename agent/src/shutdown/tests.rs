//! The role beside a bus and a logind of ours, over a real socket with a real descriptor for the lock.

use std::io::{IoSlice, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use agent_core::shutdown::{CRITICAL, groups};
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::json;

use super::*;
use crate::pods::directory::{Entry, Signals};
use crate::system_bus::message::{FIXED, REPLY, SIGNAL, assemble, decode, put_signature, put_text, size};

const DEADLINE: Duration = Duration::from_secs(20);

/// Header fields of what the bus sends.
#[derive(Default)]
struct Fields(Vec<u8>);

impl Fields {
    fn number(mut self, code: u8, number: u32) -> Self {
        self.0.resize(self.0.len().next_multiple_of(8), 0);
        self.0.extend([code, 1, b'u', 0]);
        self.0.extend(number.to_le_bytes());
        self
    }

    fn text(mut self, code: u8, kind: u8, text: &str) -> Self {
        self.0.resize(self.0.len().next_multiple_of(8), 0);
        self.0.extend([code, 1, kind, 0]);
        if kind == b'g' {
            put_signature(&mut self.0, text);
        } else {
            put_text(&mut self.0, text);
        }
        self
    }
}

/// What the fake logind is and has been asked.
#[derive(Default)]
struct Logind {
    delay_seconds: u64,
    asked: Vec<String>,
    /// The other ends of the locks it gave.
    locks: Vec<UnixStream>,
    client: Option<UnixStream>,
}

/// Serves one connection after the other.
fn serve(listener: &UnixListener, logind: &Arc<Mutex<Logind>>) {
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { return };
        logind.lock().unwrap().client = stream.try_clone().ok();
        if greet(&mut stream).is_err() {
            continue;
        }
        while let Ok(call) = read(&mut stream) {
            answer(&mut stream, &call, logind);
        }
    }
}

fn greet(stream: &mut UnixStream) -> std::io::Result<()> {
    for answer in ["OK 1234\r\n", "AGREE_UNIX_FD\r\n", ""] {
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            line.extend(byte);
        }
        stream.write_all(answer.as_bytes())?;
    }
    Ok(())
}

fn read(stream: &mut UnixStream) -> std::io::Result<(u32, message::Message)> {
    let mut bytes = vec![0; FIXED];
    stream.read_exact(&mut bytes)?;
    let size = size(&bytes).map_err(std::io::Error::other)?;
    bytes.resize(size, 0);
    stream.read_exact(&mut bytes[FIXED..])?;
    let serial = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
    Ok((serial, decode(&bytes).map_err(std::io::Error::other)?))
}

fn answer(stream: &mut UnixStream, (serial, call): &(u32, message::Message), logind: &Arc<Mutex<Logind>>) {
    let mut logind = logind.lock().unwrap();
    let text = String::from_utf8_lossy(&call.body).into_owned();
    let variant = |kind: u8, bytes: &[u8]| {
        let mut body = vec![1, kind, 0];
        body.resize(if kind == b't' { 8 } else { 4 }, 0);
        body.extend(bytes);
        (Fields::default().number(5, *serial).text(8, b'g', "v"), body)
    };
    let (fields, body) = match call.member.as_str() {
        "Get" if text.contains("InhibitDelayMaxUSec") => {
            variant(b't', &(logind.delay_seconds * 1_000_000).to_le_bytes())
        }
        "Get" => variant(b'b', &0_u32.to_le_bytes()),
        "Inhibit" => {
            logind.asked.push("inhibit".to_owned());
            let (ours, theirs) = UnixStream::pair().unwrap();
            logind.locks.push(ours);
            let fields = Fields::default().number(5, *serial).text(8, b'g', "h").number(9, 1);
            let bytes = assemble(REPLY, 1, &fields.0, &0_u32.to_le_bytes());
            let rights = [theirs.as_raw_fd()];
            let control = [ControlMessage::ScmRights(&rights)];
            let slices = [IoSlice::new(&bytes)];
            sendmsg::<()>(stream.as_raw_fd(), &slices, &control, MsgFlags::empty(), None).unwrap();
            return;
        }
        "KillUnit" => {
            logind.asked.push("reload".to_owned());
            logind.delay_seconds = 60;
            (Fields::default().number(5, *serial), Vec::new())
        }
        _ => (Fields::default().number(5, *serial), Vec::new()),
    };
    stream.write_all(&assemble(REPLY, 1, &fields.0, &body)).unwrap();
}

fn going_down(logind: &Arc<Mutex<Logind>>, yes: bool) {
    let fields = Fields::default()
        .text(1, b'o', "/org/freedesktop/login1")
        .text(2, b's', "org.freedesktop.login1.Manager")
        .text(3, b's', "PrepareForShutdown")
        .text(8, b'g', "b");
    let bytes = assemble(SIGNAL, 9, &fields.0, &u32::from(yes).to_le_bytes());
    logind.lock().unwrap().client.as_mut().unwrap().write_all(&bytes).unwrap();
}

/// A pod in the directory, and how its end is told.
fn pod(directory: &PodDirectory, uid: &str, priority: i32) -> watch::Sender<PodView> {
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": uid, "uid": uid},
        "spec": {"priority": priority, "terminationGracePeriodSeconds": 20, "containers": []}}))
    .unwrap();
    let view = PodView { pod: Arc::new(pod), ..PodView::default() };
    let (sender, view) = watch::channel(view);
    directory.insert(uid, Entry { signals: watch::Sender::new(Signals::default()), view });
    sender
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < DEADLINE, "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn fake_logind(directory: &Path) -> Arc<Mutex<Logind>> {
    let listener = UnixListener::bind(directory.join("bus")).unwrap();
    let logind = Arc::new(Mutex::new(Logind { delay_seconds: 5, ..Logind::default() }));
    let shared = Arc::clone(&logind);
    std::thread::spawn(move || serve(&listener, &shared));
    logind
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_end_in_order_and_then_the_node_may_go() {
    let directory = tempfile::tempdir().unwrap();
    let logind = fake_logind(directory.path());
    let pods = PodDirectory::default();
    let (web, dns) = (pod(&pods, "web", 0), pod(&pods, "dns", CRITICAL));
    let (evictions, mut sent) = mpsc::channel(4);
    let (sender, state) = watch::channel(false);
    let settings = directory.path().join("logind.conf.d");
    let shutdown = Shutdown {
        groups: groups(30, 10),
        pods,
        evictions,
        going_down: sender,
        bus: directory.path().join("bus"),
        logind_settings: settings.clone(),
    };
    let cancel = CancellationToken::new();
    let role = tokio::spawn(run(shutdown, cancel.clone()));
    until("no lock is taken", || logind.lock().unwrap().locks.len() == 1).await;
    // Five seconds were too short: logind was told to wait longer before the lock was taken.
    assert_eq!(logind.lock().unwrap().asked, ["reload", "inhibit"]);
    let text = std::fs::read_to_string(settings.join("99-kubelet.conf")).unwrap();
    assert!(text.contains("InhibitDelayMaxSec=30"), "{text}");
    assert!(!*state.borrow());
    going_down(&logind, true);
    let first = tokio::time::timeout(DEADLINE, sent.recv()).await.expect("in time").expect("an eviction");
    assert_eq!((first.uid.as_str(), first.reason, first.grace), ("web", "Terminated", 20));
    assert!(*state.borrow());
    let over = |view: &mut PodView| {
        view.status = Arc::new(PodStatus { phase: Some("Failed".to_owned()), ..PodStatus::default() });
    };
    assert!(sent.try_recv().is_err(), "critical pods wait for the others");
    web.send_modify(over);
    let second = tokio::time::timeout(DEADLINE, sent.recv()).await.expect("in time").expect("an eviction");
    assert_eq!((second.uid.as_str(), second.grace), ("dns", 10), "no more time than its group has");
    let lock = logind.lock().unwrap().locks[0].try_clone().unwrap();
    lock.set_nonblocking(true).unwrap();
    let is_held = || (&lock).read(&mut [0]).is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock);
    assert!(is_held(), "pods still run");
    dns.send_modify(over);
    until("the lock is not given back", || !is_held()).await;
    // The shutdown was called off: the node takes pods again and holds the next one back.
    going_down(&logind, false);
    until("no new lock is taken", || logind.lock().unwrap().locks.len() == 2).await;
    assert!(!*state.borrow());
    cancel.cancel();
    role.await.unwrap();
}

#[tokio::test]
async fn without_a_bus_the_agent_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let (evictions, _sent) = mpsc::channel(1);
    let shutdown = Shutdown {
        groups: groups(30, 10),
        pods: PodDirectory::default(),
        evictions,
        going_down: watch::Sender::new(false),
        bus: directory.path().join("nothing"),
        logind_settings: directory.path().to_owned(),
    };
    let problem = shutdown.session(&mut Duration::from_secs(1)).await.expect_err("there is no bus");
    assert!(chain(&problem).contains("the system bus is away"), "{}", chain(&problem));
}
