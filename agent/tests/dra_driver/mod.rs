//! A DRA driver of ours: serves its plugin and its registration on real sockets, and notes what it is asked.

#![allow(clippy::unwrap_used, reason = "test helpers fail by panicking")]

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use keelson_agent::dra::wire::{
    Claims, Device, Method, Prepared, PreparedClaim, Service, Unprepared, UnpreparedClaim,
};
use keelson_agent::plugins::registration::{
    GET_INFO, InfoRequest, NOTIFY, PluginInfo, RegistrationStatus, RegistrationStatusResponse, SERVICE,
};
use keelson_agent::plugins::socket::{answer, serve, unimplemented};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::body::Body;
use tonic::server::NamedService;

use crate::plane::DEADLINE;

/// What is wrong with the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It fails as a whole.
    Fails,
    /// It cannot do what is asked for a claim.
    Refuses,
    /// It forgets to answer for a claim.
    Skips,
    /// It never answers.
    Hangs,
}

/// The driver's memory; it outlives its process.
pub(crate) struct Shared {
    pub(crate) name: String,
    service: Service,
    /// Requests of the claims that its devices are for; each gets a device of its own.
    requests: Vec<String>,
    calls: Mutex<Vec<String>>,
    fault: Mutex<Option<Fault>>,
    registrations: Mutex<Vec<RegistrationStatus>>,
}

impl Shared {
    pub(crate) fn new(name: &str, service: Service, requests: &[&str]) -> Arc<Self> {
        Arc::new(Self {
            name: name.to_owned(),
            service,
            requests: requests.iter().map(|&request| request.to_owned()).collect(),
            calls: Mutex::default(),
            fault: Mutex::default(),
            registrations: Mutex::default(),
        })
    }

    /// What it was asked since the last look: `prepare <claim>`.
    pub(crate) fn take_calls(&self) -> Vec<String> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }

    pub(crate) fn set_fault(&self, fault: Option<Fault>) {
        *self.fault.lock().unwrap() = fault;
    }

    /// Waits until it was told `count` times whether it is registered; the last answer.
    pub(crate) async fn told(&self, count: usize) -> RegistrationStatus {
        let begin = std::time::Instant::now();
        loop {
            let told = self.registrations.lock().unwrap().clone();
            if told.len() >= count {
                return told[count - 1].clone();
            }
            assert!(begin.elapsed() < DEADLINE, "not registered");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn begin(&self, what: &str, asked: &Claims) -> Result<Option<Fault>, Status> {
        for claim in &asked.claims {
            assert!(!claim.uid.is_empty() && !claim.namespace.is_empty());
            self.calls.lock().unwrap().push(format!("{what} {}", claim.name));
        }
        let fault = *self.fault.lock().unwrap();
        match fault {
            Some(Fault::Fails) => Err(Status::internal("no such hardware")),
            Some(Fault::Hangs) => std::future::pending().await,
            fault => Ok(fault),
        }
    }

    async fn prepare(&self, asked: Claims) -> Result<Prepared, Status> {
        let fault = self.begin("prepare", &asked).await?;
        let device = |claim: &str, request: &String| Device {
            request_names: vec![request.clone()],
            pool_name: "pool".to_owned(),
            device_name: format!("dev-{request}"),
            cdi_device_ids: vec![format!("{}/device={claim}-{request}", self.name)],
            share_id: None,
        };
        let result = |claim: &str| match fault {
            Some(Fault::Refuses) => {
                PreparedClaim { devices: Vec::new(), error: "the device is on fire".to_owned() }
            }
            _ => PreparedClaim {
                devices: self.requests.iter().map(|request| device(claim, request)).collect(),
                error: String::new(),
            },
        };
        let answered = asked.claims.iter().filter(|_| fault != Some(Fault::Skips));
        Ok(Prepared { claims: answered.map(|claim| (claim.uid.clone(), result(&claim.name))).collect() })
    }

    async fn unprepare(&self, asked: Claims) -> Result<Unprepared, Status> {
        let fault = self.begin("unprepare", &asked).await?;
        let error = if fault == Some(Fault::Refuses) { "it is in use" } else { "" };
        let result = |uid: &String| (uid.clone(), UnpreparedClaim { error: error.to_owned() });
        let claims: BTreeMap<_, _> = asked.claims.iter().map(|claim| result(&claim.uid)).collect();
        Ok(Unprepared { claims })
    }
}

/// The driver's process. Killed when dropped: its sockets stay behind.
pub(crate) struct Process {
    runtime: Option<Runtime>,
    registration: PathBuf,
}

impl Process {
    /// Starts below the kubelet's root directory.
    pub(crate) fn start(shared: &Arc<Shared>, root: &Path) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let endpoint = root.join("plugins").join(&shared.name).join("dra.sock");
        let registration = root.join("plugins_registry").join(format!("{}-reg.sock", shared.name));
        let registrar = Registrar(Arc::clone(shared), endpoint.clone());
        let (driver, at) = (Arc::clone(shared), registration.clone());
        // The plugin first: who registers is called at once.
        let (ready, is_ready) = std::sync::mpsc::channel();
        runtime.spawn(async move {
            let serving = tokio::spawn({
                let endpoint = endpoint.clone();
                async move {
                    match driver.service {
                        Service::V1 => serve(&endpoint, V1(driver), CancellationToken::new()).await,
                        Service::V1Beta1 => serve(&endpoint, V1Beta1(driver), CancellationToken::new()).await,
                    }
                }
            });
            while tokio::net::UnixStream::connect(&endpoint).await.is_err() {
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

fn serve_call(shared: Arc<Shared>, request: http::Request<Body>) -> BoxFuture<'static, http::Response<Body>> {
    async move {
        let path = request.uri().path().to_owned();
        if path == shared.service.path(Method::Prepare) {
            answer(request, move |asked| async move { shared.prepare(asked).await }).await
        } else if path == shared.service.path(Method::Unprepare) {
            answer(request, move |asked| async move { shared.unprepare(asked).await }).await
        } else {
            unimplemented()
        }
    }
    .boxed()
}

/// The same service under each of its names.
macro_rules! driver {
    ($name:ident, $service:literal) => {
        #[derive(Clone)]
        struct $name(Arc<Shared>);

        impl NamedService for $name {
            const NAME: &'static str = $service;
        }

        impl tower::Service<http::Request<Body>> for $name {
            type Response = http::Response<Body>;
            type Error = Infallible;
            type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

            fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
                Poll::Ready(Ok(()))
            }

            fn call(&mut self, request: http::Request<Body>) -> Self::Future {
                serve_call(Arc::clone(&self.0), request).map(Ok).boxed()
            }
        }
    };
}

driver!(V1, "k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin");
driver!(V1Beta1, "k8s.io.kubelet.pkg.apis.dra.v1beta1.DRAPlugin");

#[derive(Clone)]
struct Registrar(Arc<Shared>, PathBuf);

impl NamedService for Registrar {
    const NAME: &'static str = SERVICE;
}

impl tower::Service<http::Request<Body>> for Registrar {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let Self(shared, endpoint) = self.clone();
        async move {
            Ok(match request.uri().path() {
                GET_INFO => {
                    let info = PluginInfo {
                        kind: "DRAPlugin".to_owned(),
                        name: shared.name.clone(),
                        endpoint: endpoint.display().to_string(),
                        versions: vec![shared.service.told().to_owned()],
                    };
                    answer(request, move |_: InfoRequest| async move { Ok(info) }).await
                }
                NOTIFY => {
                    let take = move |status: RegistrationStatus| async move {
                        shared.registrations.lock().unwrap().push(status);
                        Ok(RegistrationStatusResponse {})
                    };
                    answer(request, take).await
                }
                _ => unimplemented(),
            })
        }
        .boxed()
    }
}
