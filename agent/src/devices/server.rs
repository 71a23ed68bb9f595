//! Serves the registration of plugins and the pod-resources API on Unix sockets.

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tonic::body::Body;
use tonic::server::NamedService;

use super::wire::{self, Empty, GetRequest, GetResponse, PodResourcesList, RegisterRequest};
use super::{Devices, pod_resources};
use crate::contracts::PodLookup;
use crate::dra::Dra;
use crate::numa::Numa;
pub(super) use crate::plugins::socket::{answer as unary, serve, unimplemented};

/// `v1beta1.Registration`.
#[derive(Clone)]
pub(super) struct Registration(pub(super) Devices);

impl NamedService for Registration {
    const NAME: &'static str = "v1beta1.Registration";
}

impl tower::Service<http::Request<Body>> for Registration {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let devices = self.0.clone();
        async move {
            if request.uri().path() != wire::REGISTER {
                return Ok(unimplemented());
            }
            let register =
                move |request: RegisterRequest| async move { devices.register(request).map(|()| Empty {}) };
            Ok(unary(request, register).await)
        }
        .boxed()
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

impl NamedService for PodResourcesLister {
    const NAME: &'static str = "v1.PodResourcesLister";
}

impl tower::Service<http::Request<Body>> for PodResourcesLister {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let lister = self.clone();
        async move {
            Ok(match request.uri().path() {
                wire::LIST => {
                    let list = move |_: Empty| async move {
                        Ok(PodResourcesList { pods: pod_resources::list(&lister) })
                    };
                    unary(request, list).await
                }
                wire::GET => {
                    let get = move |wanted: GetRequest| async move {
                        let pod = pod_resources::get(&lister, &wanted)?;
                        Ok(GetResponse { pod: Some(pod) })
                    };
                    unary(request, get).await
                }
                wire::ALLOCATABLE => {
                    let allocatable = move |_: Empty| async move { Ok(pod_resources::allocatable(&lister)) };
                    unary(request, allocatable).await
                }
                _ => unimplemented(),
            })
        }
        .boxed()
    }
}
