//! Subresources and requests that are answered and forgotten.
//!
//! `object` serves the parts of stored objects (status, approval, scale, finalize, ephemeral containers, resize), `pod` binding and eviction, `token` service account tokens, `review`
//! the questions about users and their rights. Streams (logs, exec, attach, port-forward) and what is meant for
//! kubelets themselves go to [`crate::relay`].

mod object;
mod pod;
mod review;
mod token;

pub(crate) use self::token::token_user;

use control_api::status::ApiError;

use crate::{
    api::{Api, dispatch::ResourceRequest},
    http::body::Reply,
    relay,
};

/// Answer a request for a subresource.
pub(crate) async fn serve(api: &Api, request: ResourceRequest) -> Result<Reply, ApiError> {
    let info = request.target.info;
    let verb = request.target.verb;
    let sub = info.subresource(request.target.sub()).ok_or_else(ApiError::unknown_path)?;
    if !sub.verbs.contains(&verb) {
        return Err(ApiError::method_not_allowed(info, verb));
    }
    match sub.name {
        "approval" | "status" | "ephemeralcontainers" | "resize" | "finalize" => {
            object::serve_part(api, request).await
        }
        "scale" => object::serve_scale(api, request).await,
        "binding" => pod::bind(api, request).await,
        "eviction" => pod::evict(api, request).await,
        "token" => token::serve(api, request).await,
        "log" => relay::logs(api, request).await,
        "exec" | "attach" | "portforward" => relay::upgrade(api, request).await,
        "proxy" => relay::node(api, request).await,
        _ => Err(ApiError::unknown_path()),
    }
}

/// Answer a POST to a resource that is not stored.
pub(crate) async fn serve_create_only(api: &Api, request: ResourceRequest) -> Result<Reply, ApiError> {
    match request.target.info.plural {
        "bindings" => pod::bind(api, request).await,
        _ => review::serve(api, request).await,
    }
}
