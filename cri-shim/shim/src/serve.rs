//! The shim's main loop: waits for calls, ends of processes and orphans, and hands each to its place.

use std::fs::File;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::process::{WaitId, WaitIdOptions, waitid};

use crate::host;
use crate::options::Options;
use crate::publisher::Publisher;
use crate::shim::{Shim, Watched};
use crate::ttrpc::{Connection, Incoming};
use crate::{own, task};

/// How long the first container may take to be made.
const FIRST_PATIENCE: Duration = Duration::from_secs(60);
/// After how long without work the shim takes itself to be idle.
const SETTLE: Duration = Duration::from_secs(1);
/// How often once containerd needs it no more.
const LAST_LOOK: Duration = Duration::from_millis(10);
/// How long containerd may take for the last events.
const LAST_EVENTS: Duration = Duration::from_secs(2);

/// Serves until nobody needs the shim any more. The listening socket is `listener`.
pub fn run(options: &Options, listener: UnixListener) -> io::Result<()> {
    host::memory::economize();
    // The bundle goes with its container, the shim may stay for others of the pod.
    std::env::set_current_dir("/")?;
    prctl::set_child_subreaper(true)?;
    // Not the number of the descriptor that the program was run from.
    prctl::set_name(c"containerd-shim")?;
    let socket = listener.local_addr()?.as_pathname().map(Path::to_owned);
    let events = std::env::var_os("TTRPC_ADDRESS").map(PathBuf::from);
    // Before there are threads, so that none of them takes the signal.
    let mut ends = SigSet::empty();
    ends.add(Signal::SIGCHLD);
    ends.thread_block()?;
    let children = SignalFd::with_flags(&ends, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let shim = Arc::new(Shim::new(Publisher::new(events, &options.namespace), FIRST_PATIENCE)?);
    shim.watch(Watched::Listener(listener))?;
    shim.watch(Watched::Children(children))?;
    let program = host::memory::Program::find();
    let mut settled = false;
    while !over(&shim) {
        // A shim that is to end waits for its last answers only; one at rest until something happens, or until nobody
        // comes any more.
        let patience = match settled {
            _ if shim.was_told_idle() => Some(LAST_LOOK),
            true => shim.expects_for(),
            false => Some(SETTLE),
        };
        let events = shim.next_events(patience);
        let quiet = events.is_empty();
        if quiet && !settled {
            host::memory::trim();
            if shim.busy.load(Ordering::Acquire) == 0 {
                program.unload();
            }
        }
        settled = quiet;
        for token in events {
            if let Some(watched) = shim.take(token) {
                step(&shim, token, watched);
            }
        }
        reap_orphans(&shim);
    }
    // Nobody shall find a socket that nobody serves.
    for path in socket.into_iter().chain(shim.own_socket()) {
        std::fs::remove_file(path).ok();
    }
    shim.events.flush(LAST_EVENTS);
    Ok(())
}

fn over(shim: &Shim) -> bool {
    shim.ending.load(Ordering::Acquire)
        || (!shim.is_used()
            && shim.expects_for().is_none()
            && (shim.was_told_idle() || shim.connections.load(Ordering::Acquire) == 0))
}

/// Listens at `path` for root alone; a socket that a dead shim left is replaced.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let _held = hold_folder(path)?;
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Held while a socket of this folder is put in its place, or found dead and taken away. Between binding and listening a socket
/// refuses as a dead one does, and `delete` of a pod's last container may look just then.
pub fn hold_folder(path: &Path) -> io::Result<File> {
    let folder = File::open(path.parent().unwrap_or(Path::new("/")))?;
    folder.lock()?;
    Ok(folder)
}

/// Takes the next connection. Without room for another one whoever connects waits.
fn accept(listener: &UnixListener) -> Option<UnixStream> {
    match listener.accept() {
        Ok((socket, _)) => Some(socket),
        Err(error) => {
            if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) {
                // It stays ready: others need the time to close theirs.
                std::thread::sleep(LAST_LOOK);
            }
            None
        }
    }
}

fn step(shim: &Arc<Shim>, token: u64, mut watched: Watched) {
    let stays = match &mut watched {
        Watched::Listener(listener) => {
            if let Some(socket) = accept(listener)
                && let Ok(connection) = Connection::new(socket)
                && shim.watch(Watched::Connection(Arc::new(connection), Incoming::default())).is_ok()
            {
                shim.connections.fetch_add(1, Ordering::AcqRel);
            }
            true
        }
        Watched::OwnListener(listener) => {
            if let Some(socket) = accept(listener) {
                own::accept(shim, socket);
            }
            true
        }
        Watched::Connection(connection, incoming) => {
            let mut requests = Vec::new();
            let open = incoming.read(connection, &mut requests).unwrap_or(false);
            for (request, responder) in requests {
                task::handle(shim, request, responder);
            }
            if !open {
                shim.connections.fetch_sub(1, Ordering::AcqRel);
            }
            open
        }
        // What has ended is looked for after all events.
        Watched::Children(signals) => {
            while let Ok(Some(_)) = signals.read_signal() {}
            true
        }
        Watched::Wake(wake) => {
            wake.read().ok();
            true
        }
        Watched::Process { container, exec, pidfd, .. } => !shim.look_after(container, exec, pidfd),
        Watched::Oom(container, watch) => match watch.kills() {
            Ok(Some(kills)) => {
                shim.oom_kills(container, kills);
                true
            }
            _ => false,
        },
    };
    if stays {
        shim.put_back(token, watched);
    } else {
        shim.unwatch(&watched);
    }
}

/// Reaps processes whose own parent died: the shim is their parent now. Children of threads that still work are theirs.
fn reap_orphans(shim: &Arc<Shim>) {
    let peek = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    while let Some(pid) = host::orphans::peek() {
        let token = u32::try_from(pid.as_raw_nonzero().get()).ok().and_then(|pid| shim.token_of(pid));
        match token.and_then(|token| Some((token, shim.take(token)?))) {
            Some((token, watched)) => step(shim, token, watched),
            None => {
                if waitid(WaitId::Pid(pid), peek.difference(WaitIdOptions::NOWAIT)).is_err() {
                    return;
                }
            }
        }
    }
}
