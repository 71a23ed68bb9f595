//! What every request goes through: read the target, authenticate, authorize, limit, answer, count.

use std::{convert::Infallible, sync::Arc, time::Duration};

use control_api::status::{ApiError, Reason};
use http::{Method, Request};
use hyper::body::Incoming;
use tokio::{sync::Semaphore, time::Instant};

use crate::{
    api::{Api, dispatch::ResourceRequest},
    auth::{
        User, authn,
        authz::{self, Action},
        bootstrap,
        tokens::ISSUER,
    },
    documents,
    http::{
        body::{self, Reply},
        query::Query,
        target::{ResourceTarget, Target},
    },
    subresource,
};

/// How long a request may take, unless it is a watch or a stream.
const DEADLINE: Duration = Duration::from_secs(60);
/// So many reads run at a time.
const READS: usize = 400;
/// So many writes run at a time.
const WRITES: usize = 200;

/// Answers requests; shared by all connections.
pub(crate) struct Pipeline {
    api: Arc<Api>,
    reads: Semaphore,
    writes: Semaphore,
}

impl Pipeline {
    /// A pipeline over an API.
    pub(crate) fn new(api: Arc<Api>) -> Self {
        Self { api, reads: Semaphore::new(READS), writes: Semaphore::new(WRITES) }
    }

    /// Answer one request. `certificate` is the user of the connection's client certificate.
    pub(crate) async fn handle(
        &self,
        certificate: Option<&User>,
        request: Request<Incoming>,
    ) -> Result<Reply, Infallible> {
        let began = Instant::now();
        let query = Query::parse(request.uri().query());
        let target = Target::parse(request.method(), request.uri().path(), &query);
        let (verb, resource) = match &target {
            Target::Resource(target) => (target.verb, target.resource()),
            Target::Other { verb, .. } => (*verb, String::new()),
        };
        let answer = self.answer(certificate, request, target, query).await;
        let reply = answer.unwrap_or_else(|error| body::error(&error));
        self.api.metrics.request(verb, &resource, reply.status().as_u16(), began.elapsed());
        Ok(reply)
    }

    async fn answer(
        &self,
        certificate: Option<&User>,
        request: Request<Incoming>,
        target: Target,
        query: Query,
    ) -> Result<Reply, ApiError> {
        if let Target::Other { path, verb: "get" | "head" } = &target
            && documents::is_public(path)
        {
            return documents::serve(&self.api, path, &query, request.headers()).await;
        }
        let user = authn::impersonate(self.authenticate(certificate, &request)?, request.headers())?;
        authorize(&user, &target)?;
        match target {
            Target::Other { path, verb } => {
                if !matches!(verb, "get" | "head") {
                    return Err(ApiError::unknown_path());
                }
                documents::serve(&self.api, &path, &query, request.headers()).await
            }
            Target::Resource(target) => self.answer_resource(user, request, target, query).await,
        }
    }

    async fn answer_resource(
        &self,
        user: User,
        http: Request<Incoming>,
        target: ResourceTarget,
        query: Query,
    ) -> Result<Reply, ApiError> {
        let long = target.is_long_running();
        let reads = matches!(*http.method(), Method::GET | Method::HEAD);
        let permit = if reads { self.reads.try_acquire() } else { self.writes.try_acquire() };
        let permit = permit
            .map_err(|_full| ApiError::too_many_requests("Too many requests, please try again later.", 1))?;
        let answer = self.api.serve_resource(ResourceRequest { target, query, user, http });
        if long {
            // The stream's life is not the limit's business, only its beginning.
            let reply = answer.await;
            drop(permit);
            return reply;
        }
        let reply = tokio::time::timeout(DEADLINE, answer).await;
        drop(permit);
        reply.unwrap_or_else(|_elapsed| {
            Err(ApiError::new(
                Reason::Timeout,
                format!("Timeout: request did not complete within {} seconds", DEADLINE.as_secs()),
            ))
        })
    }

    fn authenticate(
        &self,
        certificate: Option<&User>,
        request: &Request<Incoming>,
    ) -> Result<User, ApiError> {
        if let Some(user) = certificate {
            return Ok(user.clone());
        }
        let token = authn::bearer_token(request.headers()).ok_or_else(ApiError::unauthorized)?;
        if bootstrap::is_token(token) {
            return bootstrap::user(&self.api, token).ok_or_else(ApiError::unauthorized);
        }
        let (user, _) =
            subresource::token_user(&self.api, token, &[ISSUER]).ok_or_else(ApiError::unauthorized)?;
        Ok(user)
    }
}

fn authorize(user: &User, target: &Target) -> Result<(), ApiError> {
    match target {
        Target::Other { path, verb } => {
            let action = Action::Path { verb, path };
            if authz::allowed(user, action) {
                return Ok(());
            }
            Err(ApiError::new(Reason::Forbidden, format!("forbidden: {}", authz::refusal(user, action))))
        }
        Target::Resource(target) => {
            let resource = target.resource();
            let action = Action::Resource {
                verb: target.verb,
                group: target.info.group,
                resource: &resource,
                namespace: target.namespace.as_deref().unwrap_or_default(),
                name: target.name.as_deref().unwrap_or_default(),
            };
            if authz::allowed(user, action) {
                return Ok(());
            }
            let name = target.name.as_deref().unwrap_or_default();
            Err(ApiError::forbidden(target.info, name, &authz::refusal(user, action)))
        }
    }
}
