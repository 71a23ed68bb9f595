//! `/var/log/containers`-style links, by which log collectors find a container's log.
//!
//! Input: [`LogLink`]s. Output: symbolic links in one directory. Nothing depends on them, so failures are logged and
//! forgotten.

use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use futures::FutureExt;
use futures::future::BoxFuture;
use tracing::warn;

use crate::contracts::{LogLink, LogLinks};
use crate::files::remove;

/// The longest file name; a longer link name is cut before the container id, as upstream does.
const MAX_NAME: usize = 251;

/// Links in one directory.
#[derive(Debug)]
pub struct Links {
    dir: PathBuf,
}

impl Links {
    /// Keeps links in `dir`, which is made on first use.
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }
}

impl LogLinks for Links {
    fn link(&self, link: LogLink) -> BoxFuture<'_, ()> {
        let path = self.dir.join(name(&link));
        blocking(move || make(&path, &link.log_path).map_err(|error| (path, error)))
    }

    fn remove_dangling(&self) -> BoxFuture<'_, ()> {
        let dir = self.dir.clone();
        blocking(move || sweep(&dir).map_err(|error| (dir, error)))
    }
}

/// `<pod>_<namespace>_<container>-<id>.log`.
fn name(link: &LogLink) -> String {
    let suffix = format!("-{}.log", link.container_id);
    let mut stem = format!("{}_{}_{}", link.pod, link.namespace, link.container);
    stem.truncate(MAX_NAME.saturating_sub(suffix.len()));
    stem + &suffix
}

fn make(path: &Path, target: &Path) -> io::Result<()> {
    if std::fs::read_link(path).is_ok_and(|current| current == target) {
        return Ok(());
    }
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let temporary = path.with_extension("tmp");
    remove(&temporary)?;
    symlink(target, &temporary)?;
    std::fs::rename(&temporary, path)
}

fn sweep(dir: &Path) -> io::Result<()> {
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        let dangling = path.is_symlink() && !path.exists();
        if dangling {
            remove(&path)?;
        }
    }
    Ok(())
}

fn blocking<'a>(
    work: impl FnOnce() -> Result<(), (PathBuf, io::Error)> + Send + 'static,
) -> BoxFuture<'a, ()> {
    tokio::task::spawn_blocking(work)
        .map(|outcome| match outcome {
            Ok(Ok(())) => {}
            Ok(Err((path, error))) => warn!(path = %path.display(), %error, "log links are incomplete"),
            Err(error) => warn!(%error, "log link task failed"),
        })
        .boxed()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(target: &Path) -> LogLink {
        LogLink {
            namespace: "ns".to_owned(),
            pod: "web".to_owned(),
            container: "nginx".to_owned(),
            container_id: "abc".to_owned(),
            log_path: target.to_owned(),
        }
    }

    #[tokio::test]
    async fn links_follow_the_log_and_go_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let links = Links::new(&dir.path().join("containers"));
        let log = dir.path().join("0.log");
        std::fs::write(&log, "x").unwrap();
        links.link(link(Path::new("/nowhere"))).await;
        links.link(link(&log)).await;
        let path = dir.path().join("containers/web_ns_nginx-abc.log");
        assert_eq!(std::fs::read_link(&path).unwrap(), log);
        links.remove_dangling().await;
        assert!(path.is_symlink());
        std::fs::remove_file(&log).unwrap();
        links.remove_dangling().await;
        assert!(!path.is_symlink());
    }

    #[test]
    fn long_names_keep_the_id() {
        let mut link = link(Path::new("/x"));
        link.pod = "p".repeat(300);
        let name = name(&link);
        assert_eq!(name.len(), MAX_NAME);
        assert!(name.ends_with("-abc.log"));
    }
}
