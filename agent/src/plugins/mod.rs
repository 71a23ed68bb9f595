//! Plugins of the node that register by a socket in `<rootDir>/plugins_registry`: who is there, and who has gone.
//!
//! Input: sockets that come and go (inotify). Output: calls of a [`PluginHandler`] for each type of plugin. A socket that is
//! there when the agent starts is a plugin like any other: that is how plugins are found again after a restart. Device plugins
//! of the older kind have a socket of their own ([`crate::devices`]).

pub mod registration;
pub mod socket;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::StreamExt as _;
use inotify::{EventMask, Inotify, WatchMask};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use self::registration::{Ends, follow};
pub use self::registration::{Handlers, Plugin, PluginHandler};

/// Directories below each other that are looked into.
const DEPTH: usize = 4;
/// Sockets at most; nobody has so many plugins.
const MOST: usize = 1024;
/// How often the directory is read where its changes cannot be told.
const POLL: Duration = Duration::from_secs(5);

/// Where plugins put their registration sockets.
pub fn directory(root_dir: &Path) -> PathBuf {
    root_dir.join("plugins_registry")
}

/// Which socket: a path may have another one the next moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    inode: u64,
    made: (i64, i64),
}

/// Follows the plugins of `directory` until `cancel`.
pub async fn run(directory: PathBuf, handlers: Handlers, cancel: CancellationToken) {
    let mut registry = Registry { handlers, cancel: cancel.clone(), known: BTreeMap::new() };
    loop {
        // Cancel-safe: what is known stays known.
        tokio::select! {
            () = cancel.cancelled() => return,
            ended = registry.watch(&directory) => if let Err(error) = ended {
                warn!(directory = %directory.display(), %error, "plugins are looked for every {} s", POLL.as_secs());
            },
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(POLL) => {}
        }
    }
}

struct Registry {
    handlers: Handlers,
    cancel: CancellationToken,
    known: BTreeMap<PathBuf, (Identity, Ends)>,
}

impl Registry {
    /// Follows changes until they cannot be told any more. Reads the directory at least once.
    async fn watch(&mut self, directory: &Path) -> io::Result<()> {
        std::fs::create_dir_all(directory)?;
        let inotify = Inotify::init();
        let Ok(inotify) = inotify else {
            self.take(&scan(directory)?.0);
            return inotify.map(|_| ());
        };
        let mask = WatchMask::CREATE | WatchMask::DELETE | WatchMask::MOVE | WatchMask::DELETE_SELF;
        let mut watches = inotify.watches();
        watches.add(directory, mask)?;
        let mut events = inotify.into_event_stream([0; 4096])?;
        loop {
            let (sockets, directories) = scan(directory)?;
            for below in &directories {
                // One that has gone again tells its parent.
                if let Err(error) = watches.add(below, mask)
                    && error.kind() != io::ErrorKind::NotFound
                {
                    return Err(error);
                }
            }
            self.take(&sockets);
            let Some(event) = events.next().await else { return Ok(()) };
            if event?.mask.intersects(EventMask::DELETE_SELF | EventMask::IGNORED) && !directory.exists() {
                self.take(&BTreeMap::new());
                return Ok(());
            }
        }
    }

    /// These are the sockets now.
    fn take(&mut self, sockets: &BTreeMap<PathBuf, Identity>) {
        self.known.retain(|path, (_, ends)| {
            let stays = sockets.contains_key(path);
            if !stays {
                ends.gone.cancel();
            }
            stays
        });
        for (path, identity) in sockets {
            if self.known.get(path).is_some_and(|(known, _)| known == identity) {
                continue;
            }
            let ends = Ends {
                all: self.cancel.clone(),
                gone: CancellationToken::new(),
                replaced: CancellationToken::new(),
            };
            if let Some((_, former)) = self.known.insert(path.clone(), (*identity, ends.clone())) {
                former.replaced.cancel();
            }
            tokio::spawn(follow(path.clone(), Handlers::clone(&self.handlers), ends));
        }
    }
}

/// The sockets, and the directories between them.
fn scan(directory: &Path) -> io::Result<(BTreeMap<PathBuf, Identity>, BTreeSet<PathBuf>)> {
    let (mut sockets, mut directories) = (BTreeMap::new(), BTreeSet::new());
    let mut left = vec![(directory.to_owned(), 0)];
    while let Some((current, depth)) = left.pop() {
        let entries = match std::fs::read_dir(&current) {
            Err(_gone) if depth > 0 => continue,
            entries => entries?,
        };
        for entry in entries.flatten() {
            let is_hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
            let Ok(metadata) = entry.metadata() else { continue };
            if is_hidden {
                continue;
            }
            if metadata.is_dir() && depth < DEPTH {
                directories.insert(entry.path());
                left.push((entry.path(), depth + 1));
            } else if metadata.file_type().is_socket() && sockets.len() < MOST {
                let identity =
                    Identity { inode: metadata.ino(), made: (metadata.mtime(), metadata.mtime_nsec()) };
                sockets.insert(entry.path(), identity);
            }
        }
    }
    Ok((sockets, directories))
}

#[cfg(test)]
mod tests;
