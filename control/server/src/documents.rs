//! Everything served that is no resource: discovery, OpenAPI, version, health, metrics, token keys.

use std::fmt::Write as _;

use bytes::Bytes;
use control_api::{discovery, kinds, openapi, status::ApiError};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::{
    api::Api,
    auth::tokens::ISSUER,
    http::{
        body::{self, Reply},
        negotiate::{self, Form},
        query::Query,
    },
};

/// Whether a path is served to anyone, so that health checks need no credentials.
pub(crate) fn is_public(path: &str) -> bool {
    let health = ["/healthz", "/livez", "/readyz"];
    path == "/version"
        || health
            .iter()
            .any(|root| path.strip_prefix(root).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')))
}

/// Answer a GET.
pub(crate) async fn serve(
    api: &Api,
    path: &str,
    query: &Query,
    headers: &HeaderMap,
) -> Result<Reply, ApiError> {
    let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    match segments.as_slice() {
        [] => Ok(body::json(StatusCode::OK, &json!({ "paths": root_paths() }))),
        ["version"] => Ok(body::json(StatusCode::OK, &version())),
        [check @ ("healthz" | "livez" | "readyz"), rest @ ..] => health(api, check, rest, query),
        ["metrics"] => Ok(body::text(StatusCode::OK, metrics(api))),
        [".well-known", "openid-configuration"] => Ok(body::json(StatusCode::OK, &openid_configuration(api))),
        ["openid", "v1", "jwks"] => {
            let keys = serde_json::to_vec(&api.tokens.key_set()).map_err(ApiError::internal)?;
            Ok(body::reply(StatusCode::OK, "application/jwk-set+json", body::full(keys)))
        }
        ["api"] => discover(headers, query, true, || discovery::api_versions(&server_address(api))),
        ["apis"] => discover(headers, query, false, discovery::groups),
        ["api", version] => found(discovery::resources("", version), headers),
        ["apis", group] => found(discovery::group(group), headers),
        ["apis", group, version] => found(discovery::resources(group, version), headers),
        ["openapi", "v2"] => openapi_v2(headers).await,
        ["openapi", "v3"] => Ok(tagged(headers, "application/json", openapi::v3_index().to_string().into())),
        ["openapi", "v3", rest @ ..] => {
            let path = rest.join("/");
            let document = blocking(move || openapi::v3_group(&path)).await?;
            let document = document.ok_or_else(ApiError::unknown_path)?;
            Ok(tagged(headers, "application/json", document.into()))
        }
        _ => Err(ApiError::unknown_path()),
    }
}

/// `/version`: the Kubernetes release whose API this is.
fn version() -> Value {
    json!({
        "major": "1",
        "minor": "36",
        "gitVersion": "v1.36.0+keelson",
        "gitCommit": "",
        "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "none",
        "compiler": "rustc",
        "platform": format!("linux/{}", architecture()),
    })
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn server_address(api: &Api) -> String {
    std::net::SocketAddr::new(api.config.advertise_address, api.config.listen.port()).to_string()
}

fn health(api: &Api, check: &str, rest: &[&str], query: &Query) -> Result<Reply, ApiError> {
    let ready = api.ready.load(std::sync::atomic::Ordering::Acquire);
    let stopping = api.shutdown.is_cancelled();
    let checks = [("ping", true), ("watch-cache", ready), ("shutdown", !stopping)];
    let counts = |name: &str| match rest {
        [] => (check == "readyz" || name == "ping") && !query.all("exclude").any(|other| other == name),
        [only] => *only == name,
        _ => false,
    };
    let run: Vec<_> = checks.iter().filter(|(name, _)| counts(name)).collect();
    if run.is_empty() {
        return Err(ApiError::unknown_path());
    }
    let ok = run.iter().all(|(_, good)| *good);
    let status = if ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    if ok && !query.flag("verbose") {
        return Ok(body::text(status, "ok"));
    }
    let mut lines: Vec<String> = run
        .iter()
        .map(|(name, good)| {
            format!("[{}]{name} {}", if *good { '+' } else { '-' }, if *good { "ok" } else { "failed" })
        })
        .collect();
    lines.push(format!("{check} check {}\n", if ok { "passed" } else { "failed" }));
    Ok(body::text(status, lines.join("\n")))
}

fn metrics(api: &Api) -> String {
    let mut text = api.metrics.render();
    text.push_str("# TYPE apiserver_storage_objects gauge\n");
    for cache in api.cache.resources() {
        let (resource, count) = (cache.info().qualified_plural(), cache.len());
        // Writing to a String cannot fail.
        writeln!(text, "apiserver_storage_objects{{resource=\"{resource}\"}} {count}").unwrap_or_default();
    }
    text
}

fn openid_configuration(api: &Api) -> Value {
    json!({
        "issuer": ISSUER,
        "jwks_uri": format!("https://{}/openid/v1/jwks", server_address(api)),
        "response_types_supported": ["id_token"],
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": ["ES256"],
    })
}

fn discover(
    headers: &HeaderMap,
    query: &Query,
    core: bool,
    plain: impl FnOnce() -> Value,
) -> Result<Reply, ApiError> {
    Ok(match negotiate::accept(headers, query)? {
        Form::Discovery(version) => {
            let media_type = match version {
                "v2" => "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList",
                _ => "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList",
            };
            let document = discovery::aggregated(core, version).to_string();
            let mut reply = tagged(headers, media_type, document.into());
            reply.headers_mut().insert(header::VARY, HeaderValue::from_static("Accept"));
            reply
        }
        _ => tagged(headers, "application/json", plain().to_string().into()),
    })
}

fn found(document: Option<Value>, headers: &HeaderMap) -> Result<Reply, ApiError> {
    let document = document.ok_or_else(ApiError::unknown_path)?;
    Ok(tagged(headers, "application/json", document.to_string().into()))
}

async fn openapi_v2(headers: &HeaderMap) -> Result<Reply, ApiError> {
    let accepted = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let names = [openapi::V2_PROTOBUF_MEDIA_TYPE, openapi::V2_PROTOBUF_REQUESTED_TYPE];
    if names.iter().any(|name| accepted.contains(name)) {
        let document = blocking(openapi::v2_protobuf).await?;
        return Ok(tagged(headers, openapi::V2_PROTOBUF_MEDIA_TYPE, document.into()));
    }
    Ok(tagged(headers, "application/json", blocking(openapi::v2_json).await?.into()))
}

/// Making a large document takes milliseconds of CPU; other requests go on meanwhile.
async fn blocking<T: Send + 'static>(make: impl FnOnce() -> T + Send + 'static) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(make).await.map_err(ApiError::internal)
}

/// A document with an ETag; 304 where the client has it already.
fn tagged(headers: &HeaderMap, media_type: &'static str, document: Bytes) -> Reply {
    let digest: [u8; 32] = Sha256::digest(&document).into();
    let (head, _) = digest.split_first_chunk::<16>().unwrap_or((&[0; 16], &[]));
    let tag = format!("\"{:032X}\"", u128::from_be_bytes(*head));
    let known = headers.get(header::IF_NONE_MATCH).and_then(|value| value.to_str().ok());
    let mut reply = if known.is_some_and(|known| known.split(',').any(|one| one.trim() == tag)) {
        body::reply(StatusCode::NOT_MODIFIED, media_type, body::full(Bytes::new()))
    } else {
        body::reply(StatusCode::OK, media_type, body::full(document))
    };
    if let Ok(tag) = HeaderValue::from_str(&tag) {
        reply.headers_mut().insert(header::ETAG, tag);
    }
    reply
}

fn root_paths() -> Vec<String> {
    let groups = kinds::group_versions();
    let mut paths: Vec<String> = groups
        .iter()
        .map(|(group, version)| match *group {
            "" => format!("/api/{version}"),
            group => format!("/apis/{group}/{version}"),
        })
        .collect();
    paths.extend(
        groups.iter().filter(|(group, _)| !group.is_empty()).map(|(group, _)| format!("/apis/{group}")),
    );
    let fixed = [
        "/api",
        "/apis",
        "/healthz",
        "/livez",
        "/metrics",
        "/openapi/v2",
        "/openapi/v3",
        "/readyz",
        "/version",
    ];
    paths.extend(fixed.map(str::to_owned));
    paths.sort();
    paths
}
