//! Static pods: manifests in a directory (or one file) of the node.
//!
//! Output: the complete list after each change, as [`PodEvent::Static`]. The directory is watched, and read every so often
//! in any case. A file that cannot be used is reported once and leaves all others alone; while it is broken, the pod of its
//! last good content goes on, so that a half-written file ends nothing. Names starting with a dot are ignored.

use std::collections::BTreeMap;
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use inotify::{Inotify, WatchMask};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::manifest::{self, MAX_SIZE, Origin};
use super::pods::{PodEvent, StaticSource};

/// Files looked at in a directory.
const MAX_FILES: usize = 1000;
/// Changes of a directory come in groups: they are read together.
const SETTLE: Duration = Duration::from_millis(50);

/// Reads the manifests at `path` until `cancel`.
pub async fn run(
    path: PathBuf,
    node_name: String,
    frequency: Duration,
    events: mpsc::Sender<PodEvent>,
    cancel: CancellationToken,
) {
    let mut reader = Reader { path, node_name, files: BTreeMap::new(), told: BTreeMap::new() };
    loop {
        // Before it is read: a change from now on is told.
        let changes = watch(&reader.path);
        let read = tokio::task::spawn_blocking(move || {
            let pods = reader.read();
            (reader, pods)
        });
        let Ok((back, pods)) = read.await else { return };
        reader = back;
        if let Some(pods) = pods
            && events.send(PodEvent::Static(StaticSource::File, pods)).await.is_err()
        {
            return;
        }
        // Cancel-safe: a token, a timer, and a stream that is made anew.
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(frequency.max(SETTLE)) => {}
            () = changed(changes) => tokio::time::sleep(SETTLE).await,
        }
    }
}

/// Ends with the first change; never where nothing can be watched.
async fn changed(changes: io::Result<Inotify>) {
    let stream = changes.and_then(|changes| changes.into_event_stream([0; 4096]));
    match stream {
        Ok(mut stream) => {
            stream.next().await;
        }
        Err(_unwatchable) => std::future::pending().await,
    }
}

fn watch(path: &Path) -> io::Result<Inotify> {
    let inotify = Inotify::init()?;
    let mask = WatchMask::CLOSE_WRITE
        | WatchMask::MOVE
        | WatchMask::DELETE
        | WatchMask::CREATE
        | WatchMask::DELETE_SELF
        | WatchMask::MOVE_SELF;
    inotify.watches().add(path, mask)?;
    Ok(inotify)
}

struct Reader {
    path: PathBuf,
    node_name: String,
    /// The last good pod of each file.
    files: BTreeMap<PathBuf, Arc<Pod>>,
    /// Problems that the log has.
    told: BTreeMap<PathBuf, String>,
}

impl Reader {
    /// All pods there are; `None` when the directory cannot be read just now.
    fn read(&mut self) -> Option<Vec<Arc<Pod>>> {
        let paths = match self.paths() {
            Ok(paths) => paths,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let path = self.path.clone();
                self.tell(&path, Some(format!("static pods: {error}")));
                Vec::new()
            }
            Err(error) => {
                let path = self.path.clone();
                self.tell(&path, Some(format!("static pods are left as they are: {error}")));
                return None;
            }
        };
        self.files.retain(|path, _| paths.contains(path));
        self.told.retain(|path, _| paths.contains(path) || *path == self.path);
        for path in &paths {
            match self.pod(path) {
                Ok(pod) => {
                    let known = self.files.get(path);
                    if known.is_none_or(|known| known.metadata.uid != pod.metadata.uid) {
                        self.files.insert(path.clone(), Arc::new(pod));
                    }
                    self.tell(path, None);
                }
                Err(problem) => {
                    let rest = if self.files.contains_key(path) {
                        "; its last good content stays in force"
                    } else {
                        ""
                    };
                    self.tell(path, Some(format!("static pod manifest not used: {problem}{rest}")));
                }
            }
        }
        Some(self.unique())
    }

    /// Of two files with one pod the first by name counts.
    fn unique(&mut self) -> Vec<Arc<Pod>> {
        let mut pods: BTreeMap<(String, String), (PathBuf, Arc<Pod>)> = BTreeMap::new();
        let mut duplicates = Vec::new();
        for (path, pod) in &self.files {
            let metadata = &pod.metadata;
            let key =
                (metadata.namespace.clone().unwrap_or_default(), metadata.name.clone().unwrap_or_default());
            match pods.get(&key) {
                None => {
                    pods.insert(key, (path.clone(), Arc::clone(pod)));
                }
                Some((first, _)) => duplicates.push((path.clone(), first.clone(), key)),
            }
        }
        for (path, first, (namespace, name)) in duplicates {
            let problem = format!(
                "static pod manifest not used: {namespace}/{name} is defined by {} already",
                first.display()
            );
            self.tell(&path, Some(problem));
        }
        pods.into_values().map(|(_, pod)| pod).collect()
    }

    fn paths(&self) -> io::Result<Vec<PathBuf>> {
        if !std::fs::metadata(&self.path)?.is_dir() {
            return Ok(vec![self.path.clone()]);
        }
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(&self.path)? {
            let entry = entry?;
            let is_hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
            if !is_hidden && std::fs::metadata(entry.path()).is_ok_and(|metadata| metadata.is_file()) {
                paths.push(entry.path());
            }
        }
        paths.sort();
        if paths.len() > MAX_FILES {
            return Err(io::Error::other(format!("more than {MAX_FILES} files")));
        }
        Ok(paths)
    }

    fn pod(&self, path: &Path) -> Result<Pod, String> {
        // A pipe put in the file's place must not block.
        let mut options = std::fs::OpenOptions::new();
        let file = options
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(|error| error.to_string())?;
        if !file.metadata().is_ok_and(|metadata| metadata.is_file()) {
            return Err("not a file".to_owned());
        }
        let mut bytes = Vec::new();
        file.take(MAX_SIZE + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        let origin =
            Origin { node_name: &self.node_name, source: "file", file: &file, seen: Timestamp::now() };
        manifest::parse(&bytes, origin)
    }

    /// Logs a problem once, and its end.
    fn tell(&mut self, path: &Path, problem: Option<String>) {
        match problem {
            Some(problem) if self.told.get(path) != Some(&problem) => {
                warn!(file = %path.display(), "{problem}");
                self.told.insert(path.to_owned(), problem);
            }
            Some(_) => {}
            None => {
                if self.told.remove(path).is_some() {
                    info!(file = %path.display(), "static pod manifest is good now");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEADLINE: Duration = Duration::from_secs(20);

    fn manifest(name: &str, image: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec: {{containers: [{{name: a, image: {image}}}]}}\n"
        )
    }

    fn names(pods: &[Arc<Pod>]) -> Vec<String> {
        pods.iter().filter_map(|pod| pod.metadata.name.clone()).collect()
    }

    fn images(pods: &[Arc<Pod>]) -> Vec<String> {
        pods.iter().filter_map(|pod| pod.spec.as_ref()?.containers[0].image.clone()).collect()
    }

    fn reader(path: &Path) -> Reader {
        Reader {
            path: path.to_owned(),
            node_name: "n".to_owned(),
            files: BTreeMap::new(),
            told: BTreeMap::new(),
        }
    }

    #[test]
    fn one_bad_file_leaves_the_others_alone() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write("a.yaml", &manifest("a", "one"));
        write("b.yaml", "not: [a pod");
        write("c.yaml", &manifest("a", "duplicate"));
        write(".hidden.yaml", &manifest("hidden", "i"));
        std::fs::create_dir(dir.path().join("subdir")).unwrap();
        std::os::unix::fs::symlink("nowhere", dir.path().join("dangling")).unwrap();
        nix::unistd::mkfifo(&dir.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut reader = reader(dir.path());
        assert_eq!(names(&reader.read().unwrap()), ["a-n"]);
        write("a.yaml", "half wri");
        assert_eq!(images(&reader.read().unwrap()), ["one"], "the last good content stays");
        write("a.yaml", &manifest("a", "two"));
        assert_eq!(images(&reader.read().unwrap()), ["two"]);
        std::fs::remove_file(dir.path().join("a.yaml")).unwrap();
        assert_eq!(images(&reader.read().unwrap()), ["duplicate"], "the next file takes its place");
        std::fs::remove_dir_all(dir.path()).unwrap();
        assert_eq!(names(&reader.read().unwrap()), [""; 0]);
    }

    #[tokio::test]
    async fn changes_are_noticed_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let (sender, mut events) = mpsc::channel(16);
        let cancel = CancellationToken::new();
        let hour = Duration::from_secs(3600);
        let task = tokio::spawn(run(dir.path().to_owned(), "n".to_owned(), hour, sender, cancel.clone()));
        let mut wait_for = async |expected: &[&str]| {
            let waiting = async {
                loop {
                    let Some(PodEvent::Static(StaticSource::File, pods)) = events.recv().await else {
                        panic!("a list")
                    };
                    if names(&pods) == expected {
                        return;
                    }
                }
            };
            tokio::time::timeout(DEADLINE, waiting).await.expect("in time");
        };
        wait_for(&[]).await;
        std::fs::write(dir.path().join("a.yaml"), manifest("a", "i")).unwrap();
        wait_for(&["a-n"]).await;
        std::fs::rename(dir.path().join("a.yaml"), dir.path().join(".gone")).unwrap();
        wait_for(&[]).await;
        cancel.cancel();
        task.await.unwrap();
    }
}
