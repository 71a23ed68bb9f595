//! Files that are read again when they change.

use std::hash::{BuildHasher as _, RandomState};
use std::path::PathBuf;
use std::time::Duration;

use futures::StreamExt as _;
use inotify::{Inotify, WatchMask};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::files;

/// Files of a pair are written one after the other: they are read together.
const SETTLE: Duration = Duration::from_millis(200);

/// What files held when they were read last; not their content, which may be a key.
#[derive(Clone)]
pub(super) struct Seen {
    hasher: RandomState,
    print: u64,
}

impl Seen {
    /// Looks at the files. To be made before they are used: a change after that is then never missed.
    pub(super) fn of(files: &[PathBuf]) -> Self {
        let mut seen = Self { hasher: RandomState::new(), print: 0 };
        seen.print = seen.look(files);
        seen
    }

    fn look(&self, files: &[PathBuf]) -> u64 {
        let read = |file: &PathBuf| files::read(file).ok().flatten();
        self.hasher.hash_one(files.iter().map(read).collect::<Vec<_>>())
    }
}

/// Calls `reload` whenever `files` hold something else than `seen`, until `cancel`. What `reload` refuses is tried again with
/// the next change.
pub(super) async fn follow<R: Future<Output = bool>>(
    files: impl Fn() -> Vec<PathBuf>,
    mut seen: Seen,
    reload: impl Fn() -> R,
    cancel: CancellationToken,
) {
    loop {
        let watched = files();
        // Before the look: what changes between the two is an event.
        let mut events = match watch(&watched) {
            Ok(events) => events,
            Err(error) => {
                warn!(%error, "changes of certificates' files are not seen");
                return cancel.cancelled().await;
            }
        };
        let print = seen.look(&watched);
        if print != seen.print && reload().await {
            seen.print = print;
            // Other files may be named now.
            continue;
        }
        // Cancel-safe: a token, and a watch that is made anew.
        tokio::select! {
            () = cancel.cancelled() => return,
            _ = events.next() => {}
        }
        tokio::time::sleep(SETTLE).await;
    }
}

/// Events of the files' directories: files are mostly replaced, not written.
fn watch(files: &[PathBuf]) -> std::io::Result<inotify::EventStream<[u8; 4096]>> {
    let inotify = Inotify::init()?;
    let mask = WatchMask::CLOSE_WRITE | WatchMask::MOVED_TO | WatchMask::CREATE;
    for directory in files.iter().filter_map(|file| file.parent()) {
        inotify.watches().add(directory, mask)?;
    }
    inotify.into_event_stream([0; 4096])
}
