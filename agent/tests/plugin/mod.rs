//! What drivers of ours have in common, whatever they drive: a service and its registration on real sockets, on threads of their
//! own, so that they can be killed at any moment.

#![allow(clippy::unwrap_used, reason = "test helpers fail by panicking")]

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use keelson_agent::plugins::registration::{
    GET_INFO, InfoRequest, NOTIFY, PluginInfo, RegistrationStatus, RegistrationStatusResponse, SERVICE,
};
use keelson_agent::plugins::socket::{Methods, answer, serve, unimplemented};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;

/// Nothing here takes longer, on the slowest machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// What a driver says of itself when it registers, and what it was told then. Outlives its process.
pub(crate) struct Registration {
    pub(crate) kind: &'static str,
    pub(crate) name: String,
    pub(crate) versions: Vec<String>,
    told: Mutex<Vec<RegistrationStatus>>,
}

impl Registration {
    pub(crate) fn new(kind: &'static str, name: &str, version: &str) -> Self {
        Self { kind, name: name.to_owned(), versions: vec![version.to_owned()], told: Mutex::default() }
    }

    /// Waits until the kubelet has told `count` times whether the driver is registered; the last answer.
    pub(crate) async fn told(&self, count: usize) -> RegistrationStatus {
        let begin = Instant::now();
        loop {
            let told = self.told.lock().unwrap().clone();
            if let Some(last) = told.last().filter(|_| told.len() >= count) {
                return last.clone();
            }
            assert!(begin.elapsed() < DEADLINE, "only {told:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// A driver's process. Killed when dropped: its sockets, and what it has mounted, stay behind.
pub(crate) struct Process {
    runtime: Option<Runtime>,
    registration: PathBuf,
}

impl Process {
    /// Serves `driver` on `socket` in the plugin's directory below the kubelet's root directory, and registers it.
    pub(crate) fn start(
        root: &Path,
        socket: &str,
        driver: impl Methods,
        registration: Arc<Registration>,
    ) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let endpoint = root.join("plugins").join(&registration.name).join(socket);
        let at = root.join("plugins_registry").join(format!("{}-reg.sock", registration.name));
        let registrar = Registrar(registration, endpoint.clone());
        let (ready, is_ready) = std::sync::mpsc::channel();
        let registration = at.clone();
        runtime.spawn(async move {
            // The driver first: who registers is called at once.
            let serving = tokio::spawn({
                let endpoint = endpoint.clone();
                async move { serve(&endpoint, driver, CancellationToken::new()).await }
            });
            let begin = Instant::now();
            while let Err(error) = tokio::net::UnixStream::connect(&endpoint).await {
                assert!(begin.elapsed() < DEADLINE, "the driver does not serve: {error}");
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            ready.send(()).unwrap();
            let registering = serve(&at, registrar, CancellationToken::new());
            let (serving, registering) = tokio::join!(serving, registering);
            serving.unwrap().unwrap();
            registering.unwrap();
        });
        is_ready.recv().unwrap();
        Self { runtime: Some(runtime), registration }
    }

    /// Ends as a driver does that is told to: its registration socket goes.
    pub(crate) fn end(self) {
        std::fs::remove_file(&self.registration).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[derive(Clone)]
struct Registrar(Arc<Registration>, PathBuf);

impl Methods for Registrar {
    const NAME: &'static str = SERVICE;

    async fn call(self, request: http::Request<Body>) -> http::Response<Body> {
        let Self(registration, endpoint) = self;
        match request.uri().path() {
            GET_INFO => {
                let info = PluginInfo {
                    kind: registration.kind.to_owned(),
                    name: registration.name.clone(),
                    endpoint: endpoint.display().to_string(),
                    versions: registration.versions.clone(),
                };
                answer(request, move |_: InfoRequest| async move { Ok(info) }).await
            }
            NOTIFY => {
                let take = move |status: RegistrationStatus| async move {
                    registration.told.lock().unwrap().push(status);
                    Ok(RegistrationStatusResponse {})
                };
                answer(request, take).await
            }
            _ => unimplemented(),
        }
    }
}
