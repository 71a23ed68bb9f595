//! How drivers' devices are: follows what drivers tell (`v1alpha1.DRAResourceHealth`, an optional service), for pods' statuses.
//!
//! Every plugin is asked once it has registered; one that has no such service is not asked again. What a driver told ends with
//! its last stream, and what it said of a device ends with the time that it gave for it.

use std::time::Duration;

use agent_core::health::{Health, Report, of_claims};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod, ResourceStatus};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tracing::{debug, info};

use super::Dra;
use super::wire::{DeviceHealth, HealthList, WATCH_HEALTH, WatchHealth};
use crate::plugins::socket::stream;

/// Pause before a stream that has ended is asked for again.
const AGAIN: Duration = Duration::from_secs(5);
/// A driver that has nothing to tell does not even begin to answer.
const BEGINS: Duration = Duration::from_secs(24 * 3600);

/// A stream of a driver. With the last one goes what it told.
struct Following<'a> {
    dra: &'a Dra,
    driver: &'a str,
}

impl<'a> Following<'a> {
    fn new(dra: &'a Dra, driver: &'a str) -> Self {
        *dra.state().streams.entry(driver.to_owned()).or_default() += 1;
        Self { dra, driver }
    }
}

impl Drop for Following<'_> {
    fn drop(&mut self) {
        let mut state = self.dra.state();
        let left = state.streams.get_mut(self.driver).map_or(0, |streams| {
            *streams = streams.saturating_sub(1);
            *streams
        });
        let is_news = left == 0 && {
            state.streams.remove(self.driver);
            state.health.forget(self.driver)
        };
        drop(state);
        if is_news {
            self.dra.tell_health();
        }
    }
}

impl Dra {
    /// What the container's status says of its devices.
    pub fn health(&self, pod: &Pod, container: &Container, now: Timestamp) -> Vec<ResourceStatus> {
        let state = self.state();
        of_claims(&state.ledger, &state.health, pod, container, now)
    }

    /// Changes when a device is otherwise than it was.
    pub fn health_changes(&self) -> watch::Receiver<u64> {
        self.0.health_changes.subscribe()
    }

    /// When what is known of a device is too old, if nobody says anything until then.
    pub fn next_health_timeout(&self, now: Timestamp) -> Option<Timestamp> {
        self.state().health.next_timeout(now)
    }

    /// Whether that moment has come, and nobody has said anything.
    pub fn health_ends_at(&self, at: Timestamp) -> bool {
        self.state().health.ends_at(at)
    }

    fn tell_health(&self) {
        self.0.health_changes.send_modify(|changes| *changes += 1);
    }

    /// Follows one plugin of a driver until it has gone.
    pub(super) async fn follow_health(self, driver: String, plugin: Channel, gone: CancellationToken) {
        loop {
            // Cancel-safe: what is known goes with the stream.
            let ended = tokio::select! {
                () = gone.cancelled() => return,
                ended = self.take_reports(&driver, &plugin) => ended,
            };
            debug!(%driver, reason = ended.message(), "no more is told of the health of its devices");
            if ended.code() == Code::Unimplemented {
                return;
            }
            tokio::select! {
                () = gone.cancelled() => return,
                () = tokio::time::sleep(AGAIN) => {}
            }
        }
    }

    async fn take_reports(&self, driver: &str, plugin: &Channel) -> Status {
        let lists = stream::<_, HealthList>(plugin, WATCH_HEALTH, WatchHealth {}, BEGINS).await;
        let mut lists = match lists {
            Ok(lists) => lists,
            Err(status) => return status,
        };
        info!(%driver, "it tells of the health of its devices");
        let _following = Following::new(self, driver);
        loop {
            match lists.message().await {
                Ok(Some(list)) => {
                    let reports = list.devices.into_iter().map(report).collect();
                    let changed = self.state().health.take(driver, reports, Timestamp::now());
                    // What holds longer than it did is no news, but moves the time when it is too old.
                    debug!(%driver, changed, "health of its devices");
                    if changed {
                        self.tell_health();
                    }
                }
                Ok(None) => return Status::unavailable("it ended the stream"),
                Err(status) => return status,
            }
        }
    }
}

fn report(told: DeviceHealth) -> Report {
    let device = told.device.unwrap_or_default();
    Report {
        pool: device.pool_name,
        device: device.device_name,
        health: match told.health {
            1 => Health::Healthy,
            2 => Health::Unhealthy,
            _ => Health::Unknown,
        },
        message: told.message,
        timeout: told.health_check_timeout_seconds,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Instant;

    use agent_core::claims::{Device, Usable};
    use serde_json::json;
    use tokio_stream::StreamExt as _;
    use tokio_stream::wrappers::WatchStream;
    use tonic::body::Body;
    use tonic::server::Grpc;
    use tonic::{Request, Response};
    use tonic_prost::ProstCodec;

    use super::super::DraSettings;
    use super::super::wire::DeviceId;
    use super::*;
    use crate::plugins::socket::{Methods, serve, unimplemented};
    use crate::plugins::{Plugin, PluginHandler as _};
    use crate::sources::objects::Objects;
    use crate::sources::offline;

    /// A driver that tells what is put into it.
    #[derive(Clone)]
    struct Driver(watch::Receiver<HealthList>);

    impl Methods for Driver {
        const NAME: &'static str = "v1alpha1.DRAResourceHealth";

        async fn call(self, request: http::Request<Body>) -> http::Response<Body> {
            if request.uri().path() != WATCH_HEALTH {
                return unimplemented();
            }
            let service = tower::service_fn(move |_: Request<WatchHealth>| {
                let lists = WatchStream::new(self.0.clone()).map(Ok::<_, Status>);
                async move { Ok::<_, Status>(Response::new(lists)) }
            });
            Grpc::new(ProstCodec::<HealthList, WatchHealth>::default())
                .server_streaming(service, request)
                .await
        }
    }

    fn list(health: i32, message: &str) -> HealthList {
        let device = DeviceId { pool_name: "pool".to_owned(), device_name: "a".to_owned() };
        let device = DeviceHealth {
            device: Some(device),
            health,
            message: message.to_owned(),
            ..DeviceHealth::default()
        };
        HealthList { devices: vec![device] }
    }

    #[tokio::test]
    async fn a_driver_tells_how_its_devices_are_until_it_goes() {
        let dir = tempfile::tempdir().unwrap();
        let client = offline::client();
        let objects = Arc::new(Objects::new(client.clone()));
        let dra = Dra::load(DraSettings::new(dir.path(), "n"), objects, client);
        let key = ("ns".to_owned(), "c".to_owned());
        let usable = Usable { key: key.clone(), uid: "cu".to_owned(), drivers: ["d".to_owned()].into() };
        dra.change(|ledger| {
            ledger.reserve("u", &[usable]).unwrap();
            let device = Device { pool: "pool".to_owned(), device: "a".to_owned(), ..Device::default() };
            ledger.prepared(&key, "d", vec![device]);
        });
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "ns", "uid": "u"},
            "spec": {
                "containers": [{"name": "a", "resources": {"claims": [{"name": "own"}]}}],
                "resourceClaims": [{"name": "own", "resourceClaimName": "c"}],
            },
        }))
        .unwrap();
        let shown = || {
            let container = &pod.spec.as_ref().unwrap().containers[0];
            let all = dra.health(&pod, container, Timestamp::now());
            let device = all[0].resources.as_ref().unwrap()[0].clone();
            assert_eq!((all[0].name.as_str(), device.resource_id.as_str()), ("claim:own", "d/pool/a"));
            (device.health.unwrap(), device.message)
        };
        let mut changes = dra.health_changes();
        let mut wait = async |wanted: (&str, Option<&str>)| {
            let begin = Instant::now();
            let wanted = (wanted.0.to_owned(), wanted.1.map(str::to_owned));
            while shown() != wanted {
                assert!(begin.elapsed() < Duration::from_secs(60), "{:?} instead of {wanted:?}", shown());
                tokio::time::timeout(Duration::from_secs(60), changes.changed()).await.unwrap().unwrap();
            }
        };
        assert_eq!(shown(), ("Unknown".to_owned(), None));
        let (tell, told) = watch::channel(list(1, ""));
        let socket = dir.path().join("driver.sock");
        let stop = CancellationToken::new();
        let serving = stop.clone();
        let at = socket.clone();
        tokio::spawn(async move { serve(&at, Driver(told), serving).await });
        while !socket.exists() {
            tokio::task::yield_now().await;
        }
        let plugin = Plugin {
            name: "d".to_owned(),
            endpoint: socket.clone(),
            versions: vec!["v1.DRAPlugin".to_owned(), "v1alpha1.DRAResourceHealth".to_owned()],
            socket,
        };
        dra.register(&plugin).await.unwrap();
        wait(("Healthy", None)).await;
        tell.send(list(2, "too hot")).unwrap();
        wait(("Unhealthy", Some("too hot"))).await;
        assert!(dra.next_health_timeout(Timestamp::now()).is_some());
        dra.deregister(&plugin).await;
        wait(("Unknown", None)).await;
        stop.cancel();
    }
}
