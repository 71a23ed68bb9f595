//! Runtime handlers: what may run a pod's containers, found out by really trying ([`probe`]).
//!
//! Input: the configuration and the node. Output: the handlers that are offered with what each of them can do, and the
//! reason for each one that is not, which the log tells and Status tells whoever asks. All are tried at start. One that is
//! refused then, perhaps only because the node was busy booting, is tried again when a pod names it, and by Status where it
//! should be the default; one try of a handler at a time, with growing pauses between them.

mod probe;

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use futures::future::join_all;
use serde_json::{Value, json};
use tokio::time::Instant;

use self::probe::Ground;
use crate::config::{Config, HandlerConfig, HandlerKind};
use crate::containerd::containers::RUNC_SHIM;
use crate::error::RuntimeError;
use crate::flight::Flights;
use crate::host::cgroup::Roots;

/// File name of our own shim.
pub const SHIM: &str = "containerd-shim-keelson-v1";
/// How long the start, and a pod, wait for handlers that are tried; the tries go on, and the next request finds their outcome.
const PATIENCE: Duration = Duration::from_secs(20);
/// Why a handler is not offered that has not been tried to the end yet.
const UNKNOWN: &str = "it has not answered yet";
/// First and longest pause between two tries of a refused handler.
const PAUSES: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));
/// The handler of sandboxes made before handlers were recorded.
const FIRST: &str = "runc";
/// The handlers of pods that name none, where the configuration names none either: the first one that works.
const PREFERRED: [&str; 2] = ["keelson", FIRST];

/// What a handler can do beyond the ordinary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// Bind mounts read-only with everything below them.
    pub recursive_readonly: bool,
    /// Pods with a user namespace of their own.
    pub user_namespaces: bool,
}

/// One handler that works here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handler {
    /// Its name.
    pub name: String,
    /// How it runs containers.
    pub kind: HandlerKind,
    /// The program: runc's stand-in, or our shim.
    pub binary: PathBuf,
    /// What it can do.
    pub features: Features,
}

impl Handler {
    /// The shim as containerd wants it named.
    pub fn shim(&self) -> String {
        match self.kind {
            HandlerKind::Keelson => self.binary.to_string_lossy().into_owned(),
            HandlerKind::Runc => RUNC_SHIM.to_owned(),
        }
    }
}

/// The handlers of this node.
#[derive(Debug)]
pub struct Handlers {
    /// All that may be offered, in the configuration's order.
    wanted: Vec<HandlerConfig>,
    /// The default handler that the configuration names.
    configured: Option<String>,
    ground: Ground,
    known: RwLock<Known>,
    tries: Flights<()>,
    pauses: (Duration, Duration),
}

/// What the tries have found. Each wanted handler is in one of the lists.
#[derive(Debug, Default)]
struct Known {
    offered: Vec<Arc<Handler>>,
    refused: Vec<Refused>,
    /// The handler of pods that name none.
    default: String,
}

/// A handler that is not offered.
#[derive(Debug)]
struct Refused {
    name: String,
    /// Why it is not offered.
    reason: String,
    /// When that was found.
    tried: Instant,
    /// How long it is not tried again.
    pause: Duration,
}

impl Refused {
    fn is_due(&self) -> bool {
        self.tried.elapsed() >= self.pause
    }
}

impl Handlers {
    /// Tries every handler.
    pub async fn find(config: &Config, cgroups: Roots) -> Arc<Self> {
        let scratch = config.state_dir.join("probes");
        let ground = Ground { shim_binary: config.shim_binary.clone(), scratch, cgroups };
        let wanted = config.handlers.clone().unwrap_or_else(defaults);
        let this = Arc::new(Self::new(wanted, config.default_handler.clone(), ground, PAUSES));
        if tokio::time::timeout(PATIENCE, this.try_all()).await.is_err() {
            this.choose_default();
        }
        if let Some(problem) = this.default_problem() {
            tracing::error!(problem, "pods without a runtime class cannot run");
        }
        this
    }

    fn new(
        wanted: Vec<HandlerConfig>,
        configured: Option<String>,
        ground: Ground,
        pauses: (Duration, Duration),
    ) -> Self {
        let untried = |handler: &HandlerConfig| Refused {
            name: handler.name.clone(),
            reason: UNKNOWN.to_owned(),
            tried: Instant::now(),
            pause: Duration::ZERO,
        };
        let known = Known { refused: wanted.iter().map(untried).collect(), ..Known::default() };
        let known = RwLock::new(known);
        Self { wanted, configured, ground, known, tries: Flights::default(), pauses }
    }

    async fn try_all(self: &Arc<Self>) {
        join_all(self.wanted.iter().map(|handler| self.try_again(&handler.name))).await;
        self.choose_default();
    }

    /// The handler of this name; the default one for an empty name.
    pub fn get(&self, name: &str) -> Result<Arc<Handler>, RuntimeError> {
        self.known().get(name)
    }

    /// The same; one that was refused is tried again first, unless that was done a moment ago.
    pub async fn obtain(self: &Arc<Self>, name: &str) -> Result<Arc<Handler>, RuntimeError> {
        let found = self.get(name);
        if found.is_ok() {
            return found;
        }
        let tries = self.due(name);
        let tries = join_all(tries.iter().map(|name| self.try_again(name)));
        if tokio::time::timeout(PATIENCE, tries).await.is_ok() {
            return self.get(name);
        }
        let (name, seconds) = (self.known().named(name).to_owned(), PATIENCE.as_secs());
        let problem = format!("runtime handler {name:?} is tried again, for more than {seconds} s so far");
        Err(RuntimeError::Handler { problem })
    }

    /// As [`Self::get`] for the handler a record names; sandboxes of the first version name none and ran with runc.
    pub fn of_record(&self, name: &str) -> Result<Arc<Handler>, RuntimeError> {
        self.get(recorded(name))
    }

    /// As [`Self::obtain`] for the handler a record names.
    pub async fn obtain_of_record(self: &Arc<Self>, name: &str) -> Result<Arc<Handler>, RuntimeError> {
        self.obtain(recorded(name)).await
    }

    /// How the handler that a record names runs containers, also when it is not offered any more: what it started lives on.
    pub fn kind_of_record(&self, name: &str) -> Option<HandlerKind> {
        self.wanted(recorded(name)).map(|handler| handler.kind)
    }

    /// Tries the handler again that should be the default and is refused, in the background: a kubelet that is told that the
    /// runtime is not ready asks for no pod.
    pub fn look_again(self: &Arc<Self>) {
        let due = if self.default_problem().is_some() {
            self.due("")
        } else {
            self.best().map(|best| self.due(&best)).unwrap_or_default()
        };
        for name in due.into_iter().filter(|name| !self.tries.has(name)) {
            let this = Arc::clone(self);
            tokio::spawn(async move { this.try_again(&name).await });
        }
    }

    /// The handlers that are offered.
    pub fn offered(&self) -> Vec<Arc<Handler>> {
        self.known().offered.clone()
    }

    /// Why pods that name no handler cannot run, if so.
    pub fn default_problem(&self) -> Option<String> {
        let known = self.known();
        known.get("").err().map(|_| known.problem_with(&known.default))
    }

    /// For Status: what is there, what is not and why.
    pub fn info(&self) -> Value {
        let known = self.known();
        let offered = known.offered.iter().map(|handler| {
            let kind = match handler.kind {
                HandlerKind::Keelson => "keelson",
                HandlerKind::Runc => "runc",
            };
            json!({ "name": handler.name, "kind": kind, "binary": handler.binary })
        });
        let refused = known.refused.iter().map(|handler| {
            json!({
                "name": handler.name,
                "reason": handler.reason,
                "triedSecondsAgo": handler.tried.elapsed().as_secs(),
                "triedAgainAfterSeconds": handler.pause.as_secs(),
            })
        });
        json!({
            "default": known.default,
            "offered": offered.collect::<Vec<_>>(),
            "refused": refused.collect::<Vec<_>>(),
        })
    }

    fn wanted(&self, name: &str) -> Option<&HandlerConfig> {
        self.wanted.iter().find(|handler| handler.name == name)
    }

    /// Those of the handlers that a name can mean that are refused and may be tried again. Without a name that is every one
    /// that could be the default.
    fn due(&self, name: &str) -> Vec<String> {
        let named = if name.is_empty() { self.configured.as_deref() } else { Some(name) };
        let known = self.known();
        let due = known.refused.iter().filter(|refused| named.is_none_or(|name| refused.name == name));
        due.filter(|refused| refused.is_due()).map(|refused| refused.name.clone()).collect()
    }

    /// Tries a handler that is not offered, or waits for whoever does; it goes on when nobody waits any more.
    async fn try_again(self: &Arc<Self>, name: &str) {
        let (this, name_) = (Arc::clone(self), name.to_owned());
        let work = async move {
            // Whoever was a moment too late to join finds it done.
            let due = this.due(&name_);
            if let Some(handler) = this.wanted(&name_).filter(|_| !due.is_empty()) {
                let outcome = this.ground.probe(handler).await;
                this.settle(handler, outcome);
                // The start chooses once it knows of all.
                if !this.known().default.is_empty() {
                    this.choose_default();
                }
            }
            Ok(())
        };
        // What it found is what is known afterwards.
        drop(self.tries.join(name, work).await);
    }

    /// Takes up what a try has found.
    fn settle(&self, handler: &HandlerConfig, outcome: Result<(PathBuf, Features), String>) {
        let mut known = self.known_mut();
        let place = known.refused.iter().position(|refused| refused.name == handler.name);
        match outcome {
            Ok((binary, features)) => {
                tracing::info!(
                    handler = handler.name,
                    binary = %binary.display(),
                    rro = features.recursive_readonly,
                    user_namespaces = features.user_namespaces,
                    "handler is offered"
                );
                if let Some(place) = place {
                    known.refused.remove(place);
                }
                let (name, kind) = (handler.name.clone(), handler.kind);
                known.offered.push(Arc::new(Handler { name, kind, binary, features }));
                let order = |name: &str| self.wanted.iter().position(|wanted| wanted.name == name);
                known.offered.sort_by_key(|handler| order(&handler.name));
            }
            Err(reason) => {
                let earlier = place.map(|place| known.refused.remove(place));
                if earlier.as_ref().is_none_or(|earlier| earlier.reason != reason) {
                    tracing::warn!(handler = handler.name, reason, "handler is not offered");
                }
                let pause = earlier.map(|earlier| earlier.pause * 2).unwrap_or_default();
                let pause = pause.clamp(self.pauses.0, self.pauses.1);
                known.refused.push(Refused {
                    name: handler.name.clone(),
                    reason,
                    tried: Instant::now(),
                    pause,
                });
            }
        }
    }

    /// The handler of pods that name none, where everything works.
    fn best(&self) -> Option<String> {
        let preferred = PREFERRED.into_iter().find(|name| self.wanted(name).is_some());
        let first = preferred.or_else(|| self.wanted.first().map(|handler| handler.name.as_str()));
        self.configured.clone().or_else(|| first.map(str::to_owned))
    }

    /// Settles which handler runs pods that name none.
    fn choose_default(&self) {
        let best = self.best().unwrap_or_default();
        let mut known = self.known_mut();
        let chosen = if self.configured.is_some() {
            best
        } else {
            let others = self.wanted.iter().map(|handler| handler.name.as_str());
            let works = |name: &&str| known.offered.iter().any(|handler| handler.name == *name);
            let chosen = PREFERRED.into_iter().chain(others).find(works).unwrap_or(&best).to_owned();
            if let Some(refused) = known.refused.iter().find(|handler| handler.name == best)
                && chosen != best
                && chosen != known.default
            {
                let (instead, reason) = (&chosen, &refused.reason);
                tracing::warn!(
                    handler = best,
                    instead,
                    reason,
                    "the default handler does not work on this node"
                );
            }
            chosen
        };
        if !known.default.is_empty() && chosen != known.default {
            tracing::info!(handler = chosen, "pods without a runtime class run with it from now on");
        }
        known.default = chosen;
    }

    // What is known is whole between two calls, also when a thread panicked in the middle of another one's.
    fn known(&self) -> RwLockReadGuard<'_, Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn known_mut(&self) -> RwLockWriteGuard<'_, Known> {
        self.known.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    /// The handler that a pod's name for it means.
    fn named<'a>(&'a self, name: &'a str) -> &'a str {
        if name.is_empty() { &self.default } else { name }
    }

    fn get(&self, name: &str) -> Result<Arc<Handler>, RuntimeError> {
        let name = self.named(name);
        let found = self.offered.iter().find(|handler| handler.name == name);
        found.cloned().ok_or_else(|| RuntimeError::Handler { problem: self.problem_with(name) })
    }

    fn problem_with(&self, name: &str) -> String {
        let names: Vec<&str> = self.offered.iter().map(|handler| handler.name.as_str()).collect();
        let there = if names.is_empty() {
            "there are none".to_owned()
        } else {
            format!("there are {}", names.join(", "))
        };
        match self.refused.iter().find(|refused| refused.name == name) {
            Some(Refused { reason, .. }) => {
                format!("runtime handler {name:?} does not work on this node: {reason}; {there}")
            }
            None => format!("runtime handler {name:?} is not configured; {there}"),
        }
    }
}

/// The handler that a record names.
fn recorded(name: &str) -> &str {
    if name.is_empty() { FIRST } else { name }
}

/// What is offered where the configuration says nothing.
fn defaults() -> Vec<HandlerConfig> {
    let handler = |name: &str, kind| HandlerConfig { name: name.to_owned(), kind, binary: None };
    vec![
        handler("keelson", HandlerKind::Keelson),
        handler("runc", HandlerKind::Runc),
        handler("crun", HandlerKind::Runc),
    ]
}

#[cfg(test)]
mod tests;
