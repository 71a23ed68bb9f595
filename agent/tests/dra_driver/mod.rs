//! A DRA driver of ours: serves its plugin and its registration on real sockets, and notes what it is asked.

#![allow(clippy::unwrap_used, reason = "test helpers fail by panicking")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use keelson_agent::dra::wire::{
    Claims, Device, Method, Prepared, PreparedClaim, Service, Unprepared, UnpreparedClaim,
};
use keelson_agent::plugins::registration::RegistrationStatus;
use keelson_agent::plugins::socket::{Methods, answer, unimplemented};
use tonic::Status;
use tonic::body::Body;

use crate::plugin::{Process, Registration};

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
    registration: Arc<Registration>,
    service: Service,
    /// Requests of the claims that its devices are for; each gets a device of its own.
    requests: Vec<String>,
    calls: Mutex<Vec<String>>,
    fault: Mutex<Option<Fault>>,
}

impl Shared {
    pub(crate) fn new(name: &str, service: Service, requests: &[&str]) -> Arc<Self> {
        Arc::new(Self {
            registration: Arc::new(Registration::new("DRAPlugin", name, service.told())),
            service,
            requests: requests.iter().map(|&request| request.to_owned()).collect(),
            calls: Mutex::default(),
            fault: Mutex::default(),
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
        self.registration.told(count).await
    }

    /// A process of the driver, below the kubelet's root directory.
    pub(crate) fn start(self: &Arc<Self>, root: &Path) -> Process {
        let (driver, registration) = (Arc::clone(self), Arc::clone(&self.registration));
        match self.service {
            Service::V1 => Process::start(root, "dra.sock", V1(driver), registration),
            Service::V1Beta1 => Process::start(root, "dra.sock", V1Beta1(driver), registration),
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
            cdi_device_ids: vec![format!("{}/device={claim}-{request}", self.registration.name)],
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

#[derive(Clone)]
struct V1(Arc<Shared>);

impl Methods for V1 {
    const NAME: &'static str = "k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin";

    async fn call(self, request: http::Request<Body>) -> http::Response<Body> {
        call(self.0, request).await
    }
}

/// The same service under its older name.
#[derive(Clone)]
struct V1Beta1(Arc<Shared>);

impl Methods for V1Beta1 {
    const NAME: &'static str = "k8s.io.kubelet.pkg.apis.dra.v1beta1.DRAPlugin";

    async fn call(self, request: http::Request<Body>) -> http::Response<Body> {
        call(self.0, request).await
    }
}

async fn call(shared: Arc<Shared>, request: http::Request<Body>) -> http::Response<Body> {
    let path = request.uri().path().to_owned();
    if path == shared.service.path(Method::Prepare) {
        answer(request, move |asked| async move { shared.prepare(asked).await }).await
    } else if path == shared.service.path(Method::Unprepare) {
        answer(request, move |asked| async move { shared.unprepare(asked).await }).await
    } else {
        unimplemented()
    }
}
