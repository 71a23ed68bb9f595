//! The DRA drivers of this node: how each is called, and since when it is away.
//!
//! A driver may have several plugins at once, while it is updated: the newest is called, an older one only where the newest
//! cannot be reached.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use prost::Message;
use tokio::sync::Notify;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::Code;
use tonic::transport::Channel;

use super::wire::{Method, Service};
use crate::csi::wire::CallError;
use crate::plugins::Plugin;
use crate::plugins::socket::{channel, unary};

/// A plugin that registered.
#[derive(Debug, Clone)]
struct Registered {
    channel: Channel,
    service: Service,
    /// Where it serves.
    endpoint: PathBuf,
    /// Its registration socket.
    socket: PathBuf,
    /// Ends what follows it.
    _gone: Arc<DropGuard>,
}

/// Whether a driver can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Presence {
    /// It can.
    Here,
    /// It cannot, since then.
    Away(Instant),
    /// It cannot, and what it told of its devices is gone.
    Forgotten,
}

#[derive(Debug)]
struct Driver {
    /// Oldest first.
    plugins: Vec<Registered>,
    presence: Presence,
}

/// All of them, by name.
#[derive(Debug, Default)]
pub(super) struct Drivers {
    known: Mutex<BTreeMap<String, Driver>>,
    changed: Notify,
}

impl Drivers {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Driver>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a plugin in, or says why not: how it is called, and what is cancelled when it has gone.
    pub(super) fn register(&self, plugin: &Plugin) -> Result<(Channel, CancellationToken), String> {
        let service = choose(&plugin.versions).map_err(|problem| {
            format!(
                "invalid supported gRPC versions of DRA driver plugin {} at endpoint {}: {problem}",
                plugin.name,
                plugin.endpoint.display()
            )
        })?;
        let (channel, gone) = (channel(plugin.endpoint.clone()), CancellationToken::new());
        let mut known = self.lock();
        let driver = known
            .entry(plugin.name.clone())
            .or_insert_with(|| Driver { plugins: Vec::new(), presence: Presence::Here });
        // One that comes back in its own place without having gone.
        driver.plugins.retain(|other| other.endpoint != plugin.endpoint && other.socket != plugin.socket);
        driver.plugins.push(Registered {
            channel: channel.clone(),
            service,
            endpoint: plugin.endpoint.clone(),
            socket: plugin.socket.clone(),
            _gone: Arc::new(gone.clone().drop_guard()),
        });
        driver.presence = Presence::Here;
        drop(known);
        self.changed.notify_one();
        Ok((channel, gone))
    }

    /// The plugin's registration socket has gone.
    pub(super) fn deregister(&self, plugin: &Plugin) {
        let mut known = self.lock();
        if let Some(driver) = known.get_mut(&plugin.name) {
            driver.plugins.retain(|other| other.socket != plugin.socket);
            if driver.plugins.is_empty() && driver.presence == Presence::Here {
                driver.presence = Presence::Away(Instant::now());
            }
        }
        drop(known);
        self.changed.notify_one();
    }

    /// Whether the driver can be called, or upstream's words for its absence.
    pub(super) fn check(&self, name: &str) -> Result<(), String> {
        if name.is_empty() {
            return Err("DRA driver name is empty".to_owned());
        }
        let is_there = self.lock().get(name).is_some_and(|driver| !driver.plugins.is_empty());
        is_there.then_some(()).ok_or_else(|| format!("DRA driver {name} is not registered"))
    }

    /// One call of the driver.
    pub(super) async fn call<Q, A>(
        &self,
        name: &str,
        method: Method,
        request: Q,
        deadline: Duration,
    ) -> Result<A, String>
    where
        Q: Message + Clone + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        self.check(name)?;
        let plugins = self.lock().get(name).map(|driver| driver.plugins.clone()).unwrap_or_default();
        let mut problem = format!("DRA driver {name} is not registered");
        for plugin in plugins.into_iter().rev() {
            let path = plugin.service.path(method);
            match unary(&plugin.channel, path, request.clone(), deadline).await {
                Ok(answer) => return Ok(answer),
                Err(status) => {
                    let is_away = status.code() == Code::Unavailable;
                    problem = format!("{}: {}", method.name(), CallError::from(status));
                    if !is_away {
                        break;
                    }
                }
            }
        }
        Err(problem)
    }

    /// Every driver's sockets.
    pub(super) fn endpoints(&self) -> BTreeMap<String, Vec<PathBuf>> {
        let known = self.lock();
        let sockets = |driver: &Driver| driver.plugins.iter().map(|plugin| plugin.endpoint.clone()).collect();
        known.iter().map(|(name, driver)| (name.clone(), sockets(driver))).collect()
    }

    /// The driver told of devices to an earlier agent; it is away, unless it has registered by now.
    pub(super) fn expect(&self, name: &str) {
        let away = || Driver { plugins: Vec::new(), presence: Presence::Away(Instant::now()) };
        self.lock().entry(name.to_owned()).or_insert_with(away);
    }

    /// Notes whether the driver answered at one of its sockets; tells how it stands now.
    pub(super) fn note(&self, name: &str, answered: bool) -> Presence {
        let mut known = self.lock();
        let Some(driver) = known.get_mut(name) else { return Presence::Forgotten };
        if answered && !driver.plugins.is_empty() {
            driver.presence = Presence::Here;
        } else if driver.presence == Presence::Here {
            driver.presence = Presence::Away(Instant::now());
        }
        driver.presence
    }

    /// What the absent driver told is gone.
    pub(super) fn forget(&self, name: &str) {
        let mut known = self.lock();
        let Some(driver) = known.get_mut(name) else { return };
        if driver.plugins.is_empty() {
            known.remove(name);
        } else if driver.presence != Presence::Here {
            driver.presence = Presence::Forgotten;
        }
    }

    /// Waits until a driver comes or goes.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }
}

/// The newest service that both sides have.
fn choose(versions: &[String]) -> Result<Service, String> {
    if versions.is_empty() {
        return Err("empty list of supported gRPC services (aka supported versions)".to_owned());
    }
    let found = Service::ALL.into_iter().find(|service| versions.iter().any(|told| told == service.told()));
    found.ok_or_else(|| {
        let list = |names: Vec<&str>| {
            names.into_iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(" ")
        };
        format!(
            "none of services supported by the plugin ([{}]) are supported by the kubelet ([{}])",
            list(versions.iter().map(String::as_str).collect()),
            list(Service::ALL.into_iter().map(Service::told).collect())
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plugin(name: &str, socket: &str, versions: &[&str]) -> Plugin {
        Plugin {
            name: name.to_owned(),
            endpoint: PathBuf::from(format!("/plugins/{socket}")),
            versions: versions.iter().map(|&version| version.to_owned()).collect(),
            socket: PathBuf::from(format!("/registry/{socket}")),
        }
    }

    #[test]
    fn the_newest_service_wins_and_strange_ones_are_refused() {
        let owned = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        assert_eq!(choose(&owned(&["v1beta1.DRAPlugin", "v1.DRAPlugin"])), Ok(Service::V1));
        assert_eq!(
            choose(&owned(&["v1alpha1.DRAResourceHealth", "v1beta1.DRAPlugin"])),
            Ok(Service::V1Beta1)
        );
        let refused = Drivers::default().register(&plugin("d", "s", &["1.0.0"])).unwrap_err();
        assert_eq!(
            refused,
            "invalid supported gRPC versions of DRA driver plugin d at endpoint /plugins/s: none of services \
             supported by the plugin ([\"1.0.0\"]) are supported by the kubelet ([\"v1.DRAPlugin\" \
             \"v1beta1.DRAPlugin\"])"
        );
        assert!(choose(&[]).unwrap_err().starts_with("empty list"));
    }

    // Within a runtime: channels are made that connect later.
    #[tokio::test]
    async fn a_driver_is_away_when_its_last_plugin_has_gone() {
        let drivers = Drivers::default();
        assert_eq!(drivers.check("d").unwrap_err(), "DRA driver d is not registered");
        let (old, new) = (plugin("d", "old", &["v1.DRAPlugin"]), plugin("d", "new", &["v1.DRAPlugin"]));
        drivers.register(&old).unwrap();
        drivers.register(&new).unwrap();
        drivers.register(&new).unwrap();
        assert_eq!(drivers.endpoints()["d"].len(), 2, "one that registers twice is one");
        drivers.deregister(&old);
        assert_eq!(drivers.note("d", true), Presence::Here);
        drivers.deregister(&new);
        assert!(drivers.check("d").is_err());
        assert!(matches!(drivers.note("d", false), Presence::Away(_)));
        drivers.expect("d");
        drivers.register(&old).unwrap();
        assert_eq!(drivers.note("d", true), Presence::Here);
        // Registered, and not there: its devices are forgotten once, not again and again.
        assert!(matches!(drivers.note("d", false), Presence::Away(_)));
        drivers.forget("d");
        assert_eq!(drivers.note("d", false), Presence::Forgotten);
        assert_eq!(drivers.note("d", true), Presence::Here);
    }
}
