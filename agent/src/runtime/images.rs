//! Makes sure that a container's image is there, as its pull policy says.
//!
//! Input: image, policy, credentials. Output: the reference to create the container with and the image's user, or the
//! waiting reason upstream shows. Pulls run side by side up to a limit; the queue behind it has no order but arrival. An image
//! that is here already is given to whoever could have pulled it, as [`super::pulls`] knows.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use agent_core::pace::Rate;
use agent_core::pulls::PullCredentials;
use cri_shim_api::v1;
use tokio::sync::Semaphore;
use tracing::debug;

use super::auth::Credential;
use super::cri::{Cri, CriError};
use super::pulls::{PullCounters, PullRecords, Seen};
use super::security::ImageUser;
use crate::config::AgentConfig;
use crate::pace::Pace;

/// Between the look for an image and the container made from it there is never more.
const RECENT: Duration = Duration::from_secs(600);

/// The image is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadyImage {
    /// Reference for CreateContainer.
    pub image_ref: String,
    /// Id that the runtime lists it under.
    pub image_id: String,
    /// User that the image names.
    pub user: ImageUser,
    /// Text of the Pulled event.
    pub event: String,
}

/// The image is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageError {
    /// `ErrImagePull`, `ErrImageNeverPull`, `InvalidImageName`, `ErrImageInspect`.
    pub reason: &'static str,
    /// For people.
    pub message: String,
    /// Whether the runtime could not be asked: nothing is wrong with the image.
    pub runtime_away: bool,
}

/// When to pull.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PullPolicy {
    /// Ask the registry before each start.
    Always,
    /// Only when missing.
    IfNotPresent,
    /// Never.
    Never,
}

impl PullPolicy {
    /// The container's policy; the API has defaulted it.
    pub fn of(container: &k8s_openapi::api::core::v1::Container) -> Self {
        Self::named(container.image_pull_policy.as_deref())
    }

    /// The policy of that name.
    pub fn named(policy: Option<&str>) -> Self {
        match policy {
            Some("Always") => Self::Always,
            Some("Never") => Self::Never,
            _ => Self::IfNotPresent,
        }
    }
}

/// Finds and pulls images.
#[derive(Debug, Clone)]
pub struct Images {
    cri: Cri,
    slots: Arc<Semaphore>,
    /// Pulls in a time.
    pace: Option<Pace>,
    /// Images by id that a container was about to be made from, and when that was.
    ensured: Arc<Mutex<BTreeMap<String, Instant>>>,
    /// Who pulled what with which credentials; `None`: that is nobody's business here.
    records: Option<PullRecords>,
    counters: Arc<PullCounters>,
}

/// What is wanted of an image, and by whom.
struct Wanted<'a> {
    image: &'a str,
    policy: PullPolicy,
    credentials: Vec<Credential>,
    sandbox: Option<v1::PodSandboxConfig>,
}

/// A pull that brought nothing, as far as anybody saw.
struct Unpulled {
    error: ImageError,
    /// The runtime has said so; otherwise it may go on with it.
    is_over: bool,
}

impl Images {
    /// At most `parallel` pulls at the same time.
    pub fn new(cri: Cri, parallel: usize) -> Self {
        Self {
            cri,
            slots: Arc::new(Semaphore::new(parallel.max(1))),
            pace: None,
            ensured: Arc::default(),
            records: None,
            counters: Arc::default(),
        }
    }

    /// As the configuration says.
    pub fn of(config: &AgentConfig, cri: Cri) -> Self {
        let images = Self::new(cri, config.parallel_pulls()).with_rate(config.pull_rate());
        let root_dir = &config.keelson.root_dir;
        let records = config
            .pull_policy()
            .map(|policy| PullRecords::new(root_dir, policy, Arc::clone(&images.counters)));
        Self { records, ..images }
    }

    /// No more pulls in a time than that.
    #[must_use]
    pub fn with_rate(self, rate: Option<Rate>) -> Self {
        Self { pace: rate.map(Pace::new), ..self }
    }

    /// What was asked for, and what came of it.
    pub fn counters(&self) -> Arc<PullCounters> {
        Arc::clone(&self.counters)
    }

    /// Does `remove`, which may remove images, and forgets who pulled those that are gone then.
    pub async fn forgetting<T>(&self, remove: impl Future<Output = T>) -> T {
        let done = remove.await;
        if let Some(records) = &self.records {
            let before = records.snapshot().await;
            match self.cri.images().await {
                Ok(images) => {
                    records.forget(before, images.into_iter().map(|image| image.id).collect()).await;
                }
                Err(error) => debug!(%error, "who pulled images that are gone is not forgotten yet"),
            }
        }
        done
    }

    /// Images that a container is about to be made from: they must not be removed.
    pub fn recent(&self) -> BTreeSet<String> {
        let mut ensured = self.ensured.lock().unwrap_or_else(PoisonError::into_inner);
        ensured.retain(|_, at| at.elapsed() < RECENT);
        ensured.keys().cloned().collect()
    }

    /// Brings `image` here if the policy wants it. `on_pull` is called right before a pull starts.
    pub async fn ensure(
        &self,
        image: &str,
        policy: PullPolicy,
        credentials: Vec<Credential>,
        sandbox: Option<v1::PodSandboxConfig>,
        on_pull: impl FnOnce() + Send,
    ) -> Result<ReadyImage, ImageError> {
        let mut seen = Seen::default();
        let wanted = Wanted { image, policy, credentials, sandbox };
        let ensured = Box::pin(self.find_or_pull(wanted, on_pull, &mut seen)).await;
        self.counters.ensured(policy, seen);
        if let Ok(ready) = &ensured {
            let mut known = self.ensured.lock().unwrap_or_else(PoisonError::into_inner);
            known.insert(ready.image_id.clone(), Instant::now());
        }
        ensured
    }

    async fn find_or_pull(
        &self,
        wanted: Wanted<'_>,
        on_pull: impl FnOnce() + Send,
        seen: &mut Seen,
    ) -> Result<ReadyImage, ImageError> {
        let image = wanted.image;
        if !is_valid_name(image) {
            let message = format!(
                "Failed to apply default image tag \"{image}\": couldn't parse image name: invalid reference format"
            );
            return Err(ImageError { reason: "InvalidImageName", message, runtime_away: false });
        }
        let present = self.inspect(image).await?;
        if let Some(records) = &self.records {
            // Before the first pull: what is on disk is of an earlier agent.
            records.put_in_order(&self.cri).await.map_err(|error| not_inspected(image, &error))?;
        }
        if wanted.policy != PullPolicy::Always {
            seen.present = Some(present.is_some());
            match present {
                Some(found) => {
                    if let Some(ready) = self.if_allowed(&wanted, found).await {
                        seen.required = Some(false);
                        return Ok(ready);
                    }
                }
                None if wanted.policy == PullPolicy::Never => return Err(never_pulled(image)),
                None => {}
            }
        }
        seen.required = Some(true);
        // Whoever may not use it is not told that it is here.
        if wanted.policy == PullPolicy::Never {
            Err(never_pulled(image))
        } else {
            self.pull(wanted, on_pull).await
        }
    }

    /// The image that is here, for a pod that may use it.
    async fn if_allowed(&self, wanted: &Wanted<'_>, found: v1::Image) -> Option<ReadyImage> {
        let image = wanted.image;
        let Some(records) = &self.records else {
            return Some(ready(found, format!("Container image \"{image}\" already present on machine")));
        };
        let own = wanted.credentials.iter().map(|credential| credential.source.clone()).collect();
        let event =
            format!("Container image \"{image}\" already present on machine and can be accessed by the pod");
        records.may_use(image, &found.id, own).await.then(|| ready(found, event))
    }

    async fn inspect(&self, image: &str) -> Result<Option<v1::Image>, ImageError> {
        self.cri.image(spec(image)).await.map_err(|error| not_inspected(image, &error))
    }

    /// Pulls when it is its turn, and writes down with what.
    async fn pull(
        &self,
        wanted: Wanted<'_>,
        on_pull: impl FnOnce() + Send,
    ) -> Result<ReadyImage, ImageError> {
        let image = wanted.image;
        on_pull();
        let waiting_since = Instant::now();
        if self.pace.as_ref().is_some_and(|pace| !pace.try_take()) {
            let message = "pull QPS exceeded".to_owned();
            return Err(ImageError { reason: "ErrImagePull", message, runtime_away: false });
        }
        // The semaphore is never closed.
        let _slot = self.slots.acquire().await.ok();
        // Only now: one that was given up while it waited has changed nothing.
        let begun = match &self.records {
            Some(records) => Some(records.begin(image).await.map_err(|error| ImageError {
                reason: "ErrImagePull",
                message: format!(
                    "Failed to record image pull intent for container image \"{image}\": {error}"
                ),
                runtime_away: false,
            })?),
            None => None,
        };
        let pulled = self.pull_now(wanted, waiting_since).await;
        if let Some(begun) = begun {
            match &pulled {
                Ok((_, Some(id), credentials)) => {
                    begun.done(id, credentials.clone()).await;
                }
                Err(Unpulled { is_over: true, .. }) => begun.failed().await,
                // It may have gone well, or go on, without anybody's having seen it.
                _ => drop(begun),
            }
        }
        pulled.map(|(ready, ..)| ready).map_err(|unpulled| unpulled.error)
    }

    /// The image, the id that the runtime lists it under, and what it was pulled with.
    async fn pull_now(
        &self,
        wanted: Wanted<'_>,
        waiting_since: Instant,
    ) -> Result<(ReadyImage, Option<String>, PullCredentials), Unpulled> {
        let Wanted { image, credentials, sandbox, .. } = wanted;
        let since = Instant::now();
        let (image_ref, used) = Box::pin(self.try_credentials(image, credentials, sandbox)).await?;
        let (took, with_wait) = (since.elapsed(), waiting_since.elapsed());
        let found = match self.cri.image(spec(&image_ref)).await.ok().flatten() {
            Some(found) => found,
            None => self
                .inspect(image)
                .await
                .map_err(|error| Unpulled { error, is_over: false })?
                .unwrap_or_default(),
        };
        let event = format!(
            "Successfully pulled image \"{image}\" in {} ({} including waiting). Image size: {} bytes.",
            rounded(took),
            rounded(with_wait),
            found.size
        );
        let mut ready = ready(found, event);
        let id = Some(ready.image_id.clone()).filter(|id| !id.is_empty());
        if id.is_none() {
            // Gone already, or known by no name.
            ready.image_id.clone_from(&image_ref);
        }
        Ok((ReadyImage { image_ref, ..ready }, id, used))
    }

    /// Each credential in turn, or none at all when there is none: the reference, and what did it.
    async fn try_credentials(
        &self,
        image: &str,
        credentials: Vec<Credential>,
        sandbox: Option<v1::PodSandboxConfig>,
    ) -> Result<(String, PullCredentials), Unpulled> {
        let mut attempts: Vec<Option<Credential>> = credentials.into_iter().map(Some).collect();
        if attempts.is_empty() {
            attempts.push(None);
        }
        let (mut last, mut is_over) = (None, true);
        for attempt in attempts {
            let (auth, source) = attempt.map(|credential| (credential.auth, credential.source)).unzip();
            let request =
                v1::PullImageRequest { image: Some(spec(image)), auth, sandbox_config: sandbox.clone() };
            match self.cri.pull(request).await {
                Ok(image_ref) => {
                    let used = source.map_or_else(PullCredentials::none_needed, PullCredentials::of_secret);
                    return Ok((image_ref, used));
                }
                Err(error) => {
                    is_over &= error.is_answer();
                    last = Some(error);
                }
            }
        }
        let error = last.expect("at least one attempt was made");
        let runtime_away = error.is_unavailable();
        Err(Unpulled {
            error: ImageError { reason: "ErrImagePull", message: error.message, runtime_away },
            is_over,
        })
    }
}

fn not_inspected(image: &str, error: &CriError) -> ImageError {
    ImageError {
        reason: "ErrImageInspect",
        message: format!("Failed to inspect image \"{image}\": {error}"),
        runtime_away: error.is_unavailable(),
    }
}

fn never_pulled(image: &str) -> ImageError {
    ImageError {
        reason: "ErrImageNeverPull",
        message: format!("Container image \"{image}\" is not present with pull policy of Never"),
        runtime_away: false,
    }
}

fn spec(image: &str) -> v1::ImageSpec {
    v1::ImageSpec { image: image.to_owned(), ..v1::ImageSpec::default() }
}

fn ready(image: v1::Image, event: String) -> ReadyImage {
    ReadyImage {
        image_ref: image.id.clone(),
        image_id: image.id,
        user: ImageUser { uid: image.uid.map(|uid| uid.value), name: image.username },
        event,
    }
}

/// Seconds with milliseconds, as upstream rounds durations in this event.
fn rounded(duration: std::time::Duration) -> String {
    if duration.as_secs() == 0 {
        return format!("{}ms", duration.as_millis());
    }
    let text = format!("{:.3}", duration.as_secs_f64());
    format!("{}s", text.trim_end_matches('0').trim_end_matches('.'))
}

/// What a registry reference may look like, without deciding more than the runtime will.
fn is_valid_name(image: &str) -> bool {
    let name = image.split('@').next().unwrap_or_default();
    let path = name.rsplit_once('/').map_or("", |(path, _)| path);
    let last = name.rsplit('/').next().unwrap_or_default();
    let repository = last.split(':').next().unwrap_or_default();
    let part_is_valid = |part: &str| {
        !part.is_empty()
            && part.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c))
    };
    // The host may have upper case and a port.
    let mut parts = path.split('/').filter(|_| !path.is_empty());
    let host_is_valid = parts.next().is_none_or(|host| {
        !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || "._-:[]".contains(c))
    });
    host_is_valid && parts.all(part_is_valid) && part_is_valid(repository)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn pulls_beyond_the_rate_fail_as_upstream() {
        use crate::runtime::cri;
        let socket = std::path::PathBuf::from("/nonexistent/cri.sock");
        let cri = cri::connect(socket.clone(), socket, Duration::from_secs(1));
        let images = Images::new(cri, 1).with_rate(Rate::of(1, 1));
        let wanted =
            || Wanted { image: "image", policy: PullPolicy::Always, credentials: Vec::new(), sandbox: None };
        let pull = || images.pull(wanted(), || ());
        assert_ne!(pull().await.unwrap_err().message, "pull QPS exceeded");
        let second = pull().await.unwrap_err();
        assert_eq!((second.reason, second.message.as_str()), ("ErrImagePull", "pull QPS exceeded"));
    }

    #[test]
    fn names_that_no_registry_has_are_refused() {
        for name in
            ["nginx", "nginx:1.17.9", "docker.io/library/nginx", "r:5000/a/b@sha256:00", "localhost/x_y"]
        {
            assert!(is_valid_name(name), "{name}");
        }
        for name in ["", "Nginx", "nginx image", ":1", "a//b", "r/UPPER/b"] {
            assert!(!is_valid_name(name), "{name}");
        }
    }
}
