//! Writes down who pulled which image with what, and looks it up: `<rootDir>/image_manager`, as upstream keeps it.
//!
//! | file | what |
//! |---|---|
//! | `pulling/sha256-<of the image's name>` | a pull that is under way, or that ended without anybody's knowing how |
//! | `pulled/sha256-<of the image's id>` | an image that the agent pulled, and the credentials that it was pulled with |
//!
//! A pull is written down before it begins. Whatever happens then, an image that the agent pulled is never taken for one that
//! was there before: a pull that nobody saw the end of leaves its file, and at the next start the image, if it is there, counts
//! as pulled with credentials that nobody knows. A file that cannot be understood lets nobody in; the next pull replaces it.
//! The decisions are [`agent_core::pulls`].

mod counters;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use agent_core::pulls::{
    Access, Known, Policy, PullCredentials, PullSecret, PulledRecord, access, repository, written,
};
use cri_shim_api::v1;
use jiff::Timestamp;
use tokio::sync::OnceCell;
use tracing::{info, warn};

use self::counters::Check;
pub(super) use self::counters::Seen;
pub use self::counters::{Family, PullCounters};
use super::auth::{full_reference, sha256};
use super::cri::{Cri, CriError};
use crate::files;

/// Every file of a pull begins with it.
const PREFIX: &str = "sha256-";
/// A file that is being written ends with it.
const UNFINISHED: &str = ".tmp";

/// What is written down of pulls. Clones share it.
#[derive(Debug, Clone)]
pub struct PullRecords(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    policy: Policy,
    pulling: PathBuf,
    pulled: PathBuf,
    counters: Arc<PullCounters>,
    /// One at a time at the files.
    files: Mutex<()>,
    /// Pulls under way, by the image's name.
    under_way: Mutex<BTreeMap<String, UnderWay>>,
    /// What an earlier agent left is put in order.
    in_order: OnceCell<()>,
}

#[derive(Debug, Default)]
struct UnderWay {
    pulls: u32,
    /// One of them was given up: the runtime may have ended it well all the same.
    given_up: bool,
}

/// A pull under way. Dropped without a word, it counts as given up.
#[derive(Debug)]
pub(super) struct Pull {
    records: PullRecords,
    image: String,
    is_over: bool,
}

/// Files of records at one moment: what each is, and when it was written.
pub type Snapshot = BTreeMap<String, (u64, i64, i64)>;

impl PullRecords {
    /// Those below the kubelet's root directory.
    pub fn new(root_dir: &Path, policy: Policy, counters: Arc<PullCounters>) -> Self {
        let directory = root_dir.join("image_manager");
        let (pulling, pulled) = (directory.join("pulling"), directory.join("pulled"));
        counters.count_files(&pulling, &pulled);
        Self(Arc::new(Inner {
            policy,
            pulling,
            pulled,
            counters,
            files: Mutex::default(),
            under_way: Mutex::default(),
            in_order: OnceCell::new(),
        }))
    }

    /// Does something with the files, where blocking does no harm, and alone.
    async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let inner = Arc::clone(&self.0);
        let done = tokio::task::spawn_blocking(move || {
            let _alone = inner.files.lock().unwrap_or_else(PoisonError::into_inner);
            work(&inner)
        });
        done.await.map_err(io::Error::other).and_then(|done| done)
    }

    /// Once: images whose pull an earlier agent did not see the end of count as pulled by it.
    pub(super) async fn put_in_order(&self, cri: &Cri) -> Result<(), CriError> {
        let put = self.0.in_order.get_or_try_init(|| async {
            let left = self.with(|inner| Ok(inner.intents())).await.unwrap_or_default();
            if left.is_empty() {
                return Ok(());
            }
            let images = cri.images().await?;
            if let Err(error) = self.with(move |inner| inner.adopt(&left, &images)).await {
                warn!(%error, "pulls that an earlier agent did not end stay open");
            }
            Ok(())
        });
        put.await.map(|&()| ())
    }

    /// Whether a pod with these secrets may use the image of this id, which it calls so.
    pub(super) async fn may_use(&self, image: &str, id: &str, own: Vec<PullSecret>) -> bool {
        let (image, id) = (image.to_owned(), id.to_owned());
        let verdict = self.with(move |inner| {
            let repository = repository(&image);
            if !inner.policy.verifies(&repository, true) {
                return Ok(Access::Allowed);
            }
            let known = inner.known(&image, &id)?;
            let verdict = access(&inner.policy, &repository, &known, &own);
            if let (Access::Found { learned: Some(secret) }, Known::Record(mut record)) = (&verdict, known)
                && record.add(&repository, PullCredentials::of_secret(secret.clone()), Timestamp::now())
                && let Err(error) = inner.write(&record)
            {
                warn!(%image, %error, "a secret that gives an image is not written down");
            }
            Ok(verdict)
        });
        let (check, may_use) = match verdict.await {
            Ok(Access::Allowed) => (Check::Allowed, true),
            Ok(Access::Found { .. }) => (Check::Found, true),
            Ok(Access::MustAuthenticate) => (Check::MustAuthenticate, false),
            Err(error) => {
                warn!(%error, "with what an image was pulled is not known: the registry is asked");
                (Check::Error, false)
            }
        };
        self.0.counters.checked(check);
        may_use
    }

    /// An image is about to be pulled.
    pub(super) async fn begin(&self, image: &str) -> io::Result<Pull> {
        let (records, image) = (self.clone(), image.to_owned());
        self.with(move |inner| {
            make_dir(&inner.pulling)?;
            let path = inner.pulling.join(file_name(&image));
            // With none under way it is of one that was given up.
            let is_left = path.exists();
            files::write_private(&path, &written::intent(&image))?;
            let mut all = inner.under_way();
            all.entry(image.clone()).or_insert(UnderWay { pulls: 0, given_up: is_left }).pulls += 1;
            drop(all);
            // Made here: when nobody waits for it any more, its drop takes it out of the count.
            Ok(Pull { records, image, is_over: false })
        })
        .await
    }

    /// The files of records, to be shown to [`Self::forget`]. Taken before the runtime is asked what images there are.
    pub async fn snapshot(&self) -> Snapshot {
        self.with(|inner| snapshot(&inner.pulled)).await.unwrap_or_else(|error| {
            warn!(%error, "records of pulled images cannot be listed");
            Snapshot::new()
        })
    }

    /// Forgets images that the runtime has no more. A record that was written since is of one that came back.
    pub async fn forget(&self, before: Snapshot, ids: BTreeSet<String>) {
        let forgotten = self.with(move |inner| {
            let kept: BTreeSet<String> = ids.iter().map(|id| file_name(id)).collect();
            for (name, seen) in snapshot(&inner.pulled)? {
                if !kept.contains(&name) && before.get(&name) == Some(&seen) {
                    files::remove(&inner.pulled.join(name))?;
                }
            }
            Ok(())
        });
        if let Err(error) = forgotten.await {
            warn!(%error, "records of images that are gone stay for now");
        }
    }
}

impl Pull {
    /// The image is there, under this id, pulled with these.
    pub(super) async fn done(mut self, id: &str, credentials: PullCredentials) {
        let (image, id) = (self.image.clone(), id.to_owned());
        let noted = self.records.with(move |inner| {
            inner.note(&image, &id, Some(credentials))?;
            // Only now: without a record the intent is what says that it was pulled.
            inner.end(&image, true)
        });
        match noted.await {
            Ok(()) => self.is_over = true,
            Err(error) => {
                warn!(image = %self.image, %error, "with what an image was pulled is not written down");
            }
        }
    }

    /// There is none.
    pub(super) async fn failed(mut self) {
        let image = self.image.clone();
        match self.records.with(move |inner| inner.end(&image, false)).await {
            Ok(()) => self.is_over = true,
            Err(error) => {
                warn!(image = %self.image, %error, "that an image is being pulled stays written down");
            }
        }
    }
}

impl Drop for Pull {
    fn drop(&mut self) {
        let mut all = self.records.0.under_way();
        if !self.is_over
            && let Some(under_way) = all.get_mut(&self.image)
        {
            under_way.pulls = under_way.pulls.saturating_sub(1);
            under_way.given_up = true;
            if under_way.pulls == 0 {
                // Its file stays and tells of it.
                all.remove(&self.image);
            }
        }
    }
}

impl Inner {
    fn under_way(&self) -> MutexGuard<'_, BTreeMap<String, UnderWay>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of an image that is there.
    fn known(&self, image: &str, id: &str) -> io::Result<Known> {
        if let Some(record) = self.record(id)? {
            return Ok(Known::Record(record));
        }
        // Between the end of a pull and its record the image may be asked for by another of its names. What was given up is
        // told by its file.
        if self.under_way().iter().any(|(other, under_way)| under_way.pulls > 0 && may_be_same(image, other))
        {
            return Ok(Known::Pulling);
        }
        let Some(text) = files::read(&self.pulling.join(file_name(image)))? else {
            return Ok(Known::Nothing);
        };
        let intended = written::read_intent(&text).map_err(io::Error::other)?;
        Ok(if intended == image { Known::Pulling } else { Known::Nothing })
    }

    fn record(&self, id: &str) -> io::Result<Option<PulledRecord>> {
        let path = self.pulled.join(file_name(id));
        let Some(text) = files::read(&path)? else { return Ok(None) };
        let record = written::read_record(&text)
            .map_err(|problem| io::Error::other(format!("{}: {problem}", path.display())))?;
        Ok((record.image_ref == id).then_some(record))
    }

    fn write(&self, record: &PulledRecord) -> io::Result<()> {
        make_dir(&self.pulled)?;
        files::write_private(&self.pulled.join(file_name(&record.image_ref)), &written::record(record))
    }

    /// Writes down that an image was pulled; with `None` nobody knows how.
    fn note(&self, image: &str, id: &str, credentials: Option<PullCredentials>) -> io::Result<()> {
        let now = Timestamp::now();
        let known = self.record(id).unwrap_or_else(|error| {
            warn!(%image, %error, "what was written down of an image is replaced");
            None
        });
        let mut record = known.unwrap_or_else(|| PulledRecord::new(id, now));
        if let Some(credentials) = credentials {
            record.add(&repository(image), credentials, now);
        }
        record.touch(now);
        self.write(&record)
    }

    /// A pull has ended. The last one takes the file with it, unless nobody knows how another ended.
    fn end(&self, image: &str, has_record: bool) -> io::Result<()> {
        let mut all = self.under_way();
        let Some(under_way) = all.get_mut(image) else { return Ok(()) };
        under_way.given_up &= !has_record;
        if under_way.pulls > 1 {
            under_way.pulls -= 1;
            return Ok(());
        }
        if !under_way.given_up {
            files::remove(&self.pulling.join(file_name(image)))?;
        }
        all.remove(image);
        Ok(())
    }

    /// Images whose pull is written down as under way.
    fn intents(&self) -> Vec<String> {
        let mut images = Vec::new();
        for name in snapshot(&self.pulling).unwrap_or_default().into_keys() {
            let path = self.pulling.join(name);
            let text = files::read(&path).map_err(|error| error.to_string());
            match text.and_then(|text| text.map(|text| written::read_intent(&text)).transpose()) {
                Ok(image) => images.extend(image),
                Err(problem) => warn!(path = %path.display(), %problem, "a pull that is not understood"),
            }
        }
        images
    }

    /// Makes records of the images among these that the runtime has.
    fn adopt(&self, left: &[String], images: &[v1::Image]) -> io::Result<()> {
        for image in left {
            let full = full_reference(image);
            let is_named = |name: &String| *name == *image || *name == full;
            let mut names = images.iter().filter(|found| {
                found.repo_tags.iter().chain(&found.repo_digests).any(is_named) || found.id == *image
            });
            // An image that is not there may still be on its way: what is written down of it stays.
            let Some(found) = names.next() else { continue };
            info!(%image, id = %found.id, "an earlier agent pulled it, nobody knows with what");
            self.note(image, &found.id, None)?;
            files::remove(&self.pulling.join(file_name(image)))?;
        }
        Ok(())
    }
}

/// Whether two names can be those of one image: the same, or one tells a digest of the same repository.
fn may_be_same(one: &str, other: &str) -> bool {
    full_reference(one) == full_reference(other)
        || ((one.contains('@') || other.contains('@')) && repository(one) == repository(other))
}

fn make_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// The file of an image, by its name or its id.
fn file_name(image: &str) -> String {
    format!("{PREFIX}{}", sha256(image))
}

/// The whole files of a directory; one that is not there has none.
fn snapshot(directory: &Path) -> io::Result<Snapshot> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Snapshot::new()),
        entries => entries?,
    };
    let mut files = Snapshot::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(PREFIX) && !name.ends_with(UNFINISHED) {
            let found = entry.metadata()?;
            files.insert(name, (found.ino(), found.mtime(), found.mtime_nsec()));
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests;
