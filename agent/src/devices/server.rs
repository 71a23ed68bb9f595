//! Serves the registration of plugins and the pod-resources API on Unix sockets.

use std::sync::Arc;

use tonic::body::Body;

use super::wire::{self, Empty, GetRequest, GetResponse, PodResourcesList, RegisterRequest};
use super::{Devices, pod_resources};
use crate::contracts::PodLookup;
use crate::dra::Dra;
use crate::numa::Numa;
pub(super) use crate::plugins::socket::{Methods, answer as unary, serve, unimplemented};

/// `v1beta1.Registration`.
#[derive(Clone)]
pub(super) struct Registration(pub(super) Devices);

impl Methods for Registration {
    const NAME: &'static str = "v1beta1.Registration";

    async fn call(self, request: http::Request<Body>) -> http::Response<Body> {
        if request.uri().path() != wire::REGISTER {
            return unimplemented();
        }
        let register =
            move |request: RegisterRequest| async move { self.0.register(request).map(|()| Empty {}) };
        unary(request, register).await
    }
}

/// `v1.PodResourcesLister`.
#[derive(Clone)]
pub(super) struct PodResourcesLister {
    pub(super) devices: Devices,
    pub(super) pods: Arc<dyn PodLookup>,
    pub(super) numa: Numa,
    pub(super) claims: Dra,
}

impl Methods for PodResourcesLister {
    const NAME: &'static str = "v1.PodResourcesLister";

    async fn call(self, request: http::Request<Body>) -> http::Response<Body> {
        match request.uri().path() {
            wire::LIST => {
                let list =
                    move |_: Empty| async move { Ok(PodResourcesList { pods: pod_resources::list(&self) }) };
                unary(request, list).await
            }
            wire::GET => {
                let get = move |wanted: GetRequest| async move {
                    let pod = pod_resources::get(&self, &wanted)?;
                    Ok(GetResponse { pod: Some(pod) })
                };
                unary(request, get).await
            }
            wire::ALLOCATABLE => {
                let allocatable = move |_: Empty| async move { Ok(pod_resources::allocatable(&self)) };
                unary(request, allocatable).await
            }
            _ => unimplemented(),
        }
    }
}
