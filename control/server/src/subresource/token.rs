//! `serviceaccounts/token`: TokenRequest, and the check that what a token is bound to still exists.

use control_api::{kinds, meta, status::ApiError};
use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    api::{
        Api,
        dispatch::ResourceRequest,
        options::{Freshness, WriteOptions},
        write::{ObjectRef, decode_any},
    },
    auth::{
        AUTHENTICATED, SERVICE_ACCOUNT_USER, User,
        tokens::{Claims, ISSUER, KubernetesClaim, Reference},
    },
    http::{
        body::{self, Reply},
        negotiate,
    },
};

/// Life of a token where the request names none.
const DEFAULT_SECONDS: i64 = 3600;
/// Shortest life that may be asked for.
const LEAST_SECONDS: i64 = 600;
/// Longest life that is given: a day, whatever is asked.
const MOST_SECONDS: i64 = 86_400;
/// What the ServiceAccount admission asks for; such a token may live longer than its holder is told to use it.
const MOUNTED_SECONDS: i64 = 3607;

/// Answer a TokenRequest.
pub(super) async fn serve(api: &Api, request: ResourceRequest) -> Result<Reply, ApiError> {
    let ResourceRequest { target, query, user, http } = request;
    WriteOptions::parse(&query, http.headers())?;
    let format = negotiate::body_format(http.headers())?;
    let (mut body, _) = decode_any(&body::read(http.into_body()).await?, format)?;
    let name = target.name.as_deref().unwrap_or_default();
    let namespace = target.namespace.as_deref().unwrap_or_default();
    let account = api.get_object(target.info, Some(namespace), name, Freshness::Latest).await?;
    let account = account.value().map_err(ApiError::internal)?;
    let seconds = life(&body)?;
    let account_reference = Reference { name: name.to_owned(), uid: meta::uid(&account).to_owned() };
    let account_ref = ObjectRef { info: target.info, namespace: Some(namespace), name };
    let claim = bind(api, &user, account_ref, account_reference, &body).await?;
    let now = jiff::Timestamp::now().as_second();
    let claims = Claims {
        aud: audiences(&body),
        exp: now + seconds,
        iat: now,
        iss: ISSUER.to_owned(),
        jti: api.random.uuid(),
        kubernetes: KubernetesClaim {
            warnafter: (seconds == MOUNTED_SECONDS).then_some(now + seconds),
            ..claim
        },
        nbf: now,
        sub: format!("{SERVICE_ACCOUNT_USER}{namespace}:{name}"),
    };
    let token = api.tokens.sign(&claims).map_err(ApiError::internal)?;
    let end = jiff::Timestamp::from_second(claims.exp).map_err(ApiError::internal)?;
    body["kind"] = json!("TokenRequest");
    body["apiVersion"] = json!("authentication.k8s.io/v1");
    body["spec"]["audiences"] = json!(claims.aud);
    body["spec"]["expirationSeconds"] = json!(seconds);
    body["status"] =
        json!({ "token": token, "expirationTimestamp": end.strftime("%Y-%m-%dT%H:%M:%SZ").to_string() });
    Ok(body::json(StatusCode::CREATED, &body))
}

fn life(request: &Value) -> Result<i64, ApiError> {
    let asked = request.pointer("/spec/expirationSeconds").and_then(Value::as_i64).unwrap_or(DEFAULT_SECONDS);
    if asked < LEAST_SECONDS {
        return Err(ApiError::new(
            control_api::status::Reason::Invalid,
            format!(
                "TokenRequest.authentication.k8s.io \"\" is invalid: spec.expirationSeconds: Invalid value: {asked}: may \
                 not specify a duration less than 10 minutes"
            ),
        ));
    }
    Ok(asked.min(MOST_SECONDS))
}

fn audiences(request: &Value) -> Vec<String> {
    let asked = request.pointer("/spec/audiences").and_then(Value::as_array).into_iter().flatten();
    let asked: Vec<String> = asked.filter_map(Value::as_str).map(str::to_owned).collect();
    if asked.is_empty() { vec![ISSUER.to_owned()] } else { asked }
}

/// The claim with what the token is bound to; a node may ask only for tokens of its own pods.
async fn bind(
    api: &Api,
    user: &User,
    account: ObjectRef<'_>,
    serviceaccount: Reference,
    request: &Value,
) -> Result<KubernetesClaim, ApiError> {
    let namespace = account.namespace.unwrap_or_default();
    let mut claim =
        KubernetesClaim { namespace: namespace.to_owned(), serviceaccount, ..KubernetesClaim::default() };
    let text = |field: &str| {
        let pointer = format!("/spec/boundObjectRef/{field}");
        request.pointer(&pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
    };
    let (kind, name, uid) = (text("kind"), text("name"), text("uid"));
    if let Some(node) = user.node()
        && kind != "Pod"
    {
        let why = format!("node \"{node}\" may request tokens bound to its pods only");
        return Err(ApiError::forbidden(account.info, account.name, &why));
    }
    if kind.is_empty() {
        return Ok(claim);
    }
    let plural = match kind.as_str() {
        "Pod" => "pods",
        "Secret" => "secrets",
        "Node" => "nodes",
        _ => {
            return Err(ApiError::bad_request(format!(
                "cannot bind token for a {kind}; supported: Node, Pod, Secret"
            )));
        }
    };
    let info = kinds::find("", "v1", plural).ok_or_else(ApiError::unknown_path)?;
    let bound = api.get_object(info, Some(namespace), &name, Freshness::Latest).await?;
    let bound = bound.value().map_err(ApiError::internal)?;
    if !uid.is_empty() && uid != meta::uid(&bound) {
        let why = format!(
            "the UID in the bound object reference ({uid}) does not match the UID in record. The object might have been \
             deleted and then recreated"
        );
        return Err(ApiError::conflict(info, &name, &why));
    }
    let reference = Reference { name, uid: meta::uid(&bound).to_owned() };
    match kind.as_str() {
        "Pod" => {
            bind_pod(api, user, account, &bound, &mut claim)?;
            claim.pod = Some(reference);
        }
        "Secret" => claim.secret = Some(reference),
        _ => claim.node = Some(reference),
    }
    Ok(claim)
}

fn bind_pod(
    api: &Api,
    user: &User,
    account: ObjectRef<'_>,
    pod: &Value,
    claim: &mut KubernetesClaim,
) -> Result<(), ApiError> {
    let text = |pointer: &str| pod.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    let (node, used) = (text("/spec/nodeName"), text("/spec/serviceAccountName"));
    if used != account.name {
        return Err(ApiError::bad_request(format!(
            "cannot bind token for serviceaccount \"{}\" to pod running with different serviceaccount name.",
            account.name
        )));
    }
    if let Some(own) = user.node().filter(|own| *own != node) {
        let why = format!("node \"{own}\" may request tokens of its own pods only");
        return Err(ApiError::forbidden(account.info, account.name, &why));
    }
    let nodes = kinds::find("", "v1", "nodes").ok_or_else(ApiError::unknown_path)?;
    claim.node = match api.cached(nodes, None, node) {
        Some(found) => {
            let found = found.value().map_err(ApiError::internal)?;
            Some(Reference { name: node.to_owned(), uid: meta::uid(&found).to_owned() })
        }
        None => None,
    };
    Ok(())
}

/// The user of a token meant for one of the audiences, if it was signed here and everything it is bound to still exists.
pub(crate) fn token_user(api: &Api, token: &str, audiences: &[&str]) -> Option<(User, Vec<String>)> {
    let claims = api.tokens.verify(token, audiences).ok()?;
    let claim = &claims.kubernetes;
    let exists = |plural: &str, reference: &Reference| {
        let info = kinds::find("", "v1", plural)?;
        let object = api.cached(info, Some(&claim.namespace), &reference.name)?;
        (meta::uid(&object.value().ok()?) == reference.uid).then_some(())
    };
    exists("serviceaccounts", &claim.serviceaccount)?;
    if let Some(pod) = &claim.pod {
        exists("pods", pod)?;
    }
    if let Some(secret) = &claim.secret {
        exists("secrets", secret)?;
    }
    let mut extra =
        vec![("authentication.kubernetes.io/credential-id".to_owned(), format!("JTI={}", claims.jti))];
    for (kind, reference) in [("pod", &claim.pod), ("node", &claim.node)] {
        if let Some(reference) = reference {
            extra.push((format!("authentication.kubernetes.io/{kind}-name"), reference.name.clone()));
            extra.push((format!("authentication.kubernetes.io/{kind}-uid"), reference.uid.clone()));
        }
    }
    let user = User {
        name: claims.sub.clone(),
        uid: claim.serviceaccount.uid.clone(),
        groups: vec![
            "system:serviceaccounts".to_owned(),
            format!("system:serviceaccounts:{}", claim.namespace),
            AUTHENTICATED.to_owned(),
        ],
        extra,
    };
    let matched = claims.aud.into_iter().filter(|aud| audiences.contains(&aud.as_str())).collect();
    Some((user, matched))
}
