//! Projected volumes and the tokens of service accounts.

use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use serde_json::{Value, json};

use super::super::super::case::{Case, case, holds, same};
use super::super::context::T;
use super::super::live::container;

pub(super) fn cases() -> Vec<Case<T>> {
    let (group, tokens) = ("Projected combined", "ServiceAccounts");
    vec![
        case(group, "files of several sources lie in one directory", combined),
        case(group, "defaultMode and modes of items are kept", modes),
        case(group, "changes of a source reach the files", updates),
        case(group, "a source that is missing holds the pod back until it comes", missing),
        case(group, "an optional source may be missing", optional),
        case(group, "two sources with one path are refused", same_path),
        case(group, "a path that leads out is refused", leads_out),
        case(tokens, "every container has a token, the authority and the namespace", mounted),
        case(tokens, "automountServiceAccountToken false keeps them away", not_mounted),
        case(tokens, "the token authenticates its service account, and names the pod", authenticates),
        case(tokens, "a projected token has its audience and its time", audience),
        case(tokens, "a token file belongs to who reads it", token_modes),
        case(tokens, "a service account that is missing refuses the pod", no_account),
        case(tokens, "a pod runs as the service account that it names", other_account),
    ]
}

async fn combined(t: T) -> Result<()> {
    t.config_map("map", json!({"m": "map"})).await?;
    t.secret("secret", json!({"s": "secret"})).await?;
    let sources = json!([
        {"configMap": {"name": "map"}},
        {"secret": {"name": "secret", "items": [{"key": "s", "path": "deep/s"}]}},
        {"downwardAPI": {"items": [{"path": "name", "fieldRef": {"fieldPath": "metadata.name"}}]}},
        {"serviceAccountToken": {"path": "token", "expirationSeconds": 600}},
    ]);
    let pod = t
        .pod("cd /v/all; cat m deep/s name; test -s token && echo /token")
        .volume("all", json!({"projected": {"sources": sources}}));
    let name = pod.name();
    same("the files", t.output(pod).await?, format!("mapsecret{name}/token\n"))
}

async fn modes(t: T) -> Result<()> {
    t.config_map("map", json!({"a": "1", "b": "2"})).await?;
    let items = json!([{"key": "a", "path": "a"}, {"key": "b", "path": "b", "mode": 0o440}]);
    let volume = json!({"projected": {"defaultMode": 0o400, "sources": [{"configMap": {"name": "map", "items": items}}]}});
    let output = t.output(t.pod("cd /v/all; stat -L -c %a a b").volume("all", volume)).await?;
    same("the modes", output.as_str(), "400\n440\n")
}

async fn updates(t: T) -> Result<()> {
    t.config_map("map", json!({"m": "old"})).await?;
    t.secret("secret", json!({"s": "old"})).await?;
    let sources = json!([{"configMap": {"name": "map"}}, {"secret": {"name": "secret"}}]);
    let live = t.ready(t.idle().volume("all", json!({"projected": {"sources": sources}}))).await?;
    same("the files", live.exec("cat /v/all/m /v/all/s").await?.as_str(), "oldold")?;
    t.api().merge(&t.path("configmaps/map").await?, &json!({"data": {"m": "new"}})).await?;
    live.exec_until("[ \"$(cat /v/all/m /v/all/s)\" = newold ]").await?;
    t.api().merge(&t.path("secrets/secret").await?, &json!({"stringData": {"s": "new"}})).await?;
    live.exec_until("[ \"$(cat /v/all/m /v/all/s)\" = newnew ]").await
}

async fn missing(t: T) -> Result<()> {
    t.config_map("map", json!({"m": "map"})).await?;
    let sources = json!([{"configMap": {"name": "map"}}, {"secret": {"name": "late"}}]);
    let live = t
        .run(t.pod("cat /v/all/m /v/all/s").volume("all", json!({"projected": {"sources": sources}})))
        .await?;
    live.event("FailedMount", "\"late\" not found").await?;
    live.never("it ran", |pod| container(pod, "main")["state"]["running"].is_object())?;
    t.secret("late", json!({"s": "secret"})).await?;
    live.phase("Succeeded").await?;
    same("the log", live.log("").await?.as_str(), "mapsecret")
}

async fn optional(t: T) -> Result<()> {
    t.config_map("map", json!({"m": "map"})).await?;
    let sources = json!([{"configMap": {"name": "map"}}, {"secret": {"name": "never", "optional": true}}]);
    let pod = t.pod("ls /v/all").volume("all", json!({"projected": {"sources": sources}}));
    same("the files", t.output(pod).await?.as_str(), "m\n")
}

async fn same_path(t: T) -> Result<()> {
    let item = json!([{"key": "a", "path": "same"}]);
    let sources =
        json!([{"configMap": {"name": "x", "items": item}}, {"secret": {"name": "y", "items": item}}]);
    let refused = t.refused(t.idle().volume("all", json!({"projected": {"sources": sources}}))).await?;
    same("the code", refused.code, 422)?;
    holds("the message", &refused.message, "conflict")
}

async fn leads_out(t: T) -> Result<()> {
    let sources = json!([{"configMap": {"name": "x", "items": [{"key": "a", "path": "../out"}]}}]);
    let refused = t.refused(t.idle().volume("all", json!({"projected": {"sources": sources}}))).await?;
    same("the code", refused.code, 422)?;
    holds("the message", &refused.message, "'..'")
}

const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

async fn mounted(t: T) -> Result<()> {
    let script = "cd /var/run/secrets/kubernetes.io/serviceaccount; grep -c BEGIN.CERTIFICATE ca.crt; test -s token && cat namespace; touch new 2>/dev/null || echo ' kept'";
    let output = t.output(t.pod(script)).await?;
    let namespace = t.namespace().await?;
    let lines: Vec<&str> = output.lines().collect();
    ensure!(lines.first().is_some_and(|count| *count != "0"), "no authority: {output:?}");
    same("the rest", lines.get(1).copied(), Some(format!("{namespace} kept").as_str()))
}

async fn not_mounted(t: T) -> Result<()> {
    let pod = t
        .pod(&format!("test -e {ACCOUNT} || echo none"))
        .spec(json!({"automountServiceAccountToken": false}));
    same("the output", t.output(pod).await?.trim(), "none")
}

/// The claims of a token.
fn claims(token: &str) -> Result<Value> {
    let part = token.trim().split('.').nth(1).context("no token")?;
    let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(part).context("no base64")?;
    Ok(serde_json::from_slice(&bytes)?)
}

async fn review(t: &T, token: &str, audiences: Value) -> Result<Value> {
    let body = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token.trim(), "audiences": audiences}});
    Ok(t.api().post("/apis/authentication.k8s.io/v1/tokenreviews", &body).await?["status"].take())
}

async fn authenticates(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    let token = live.exec(&format!("cat {ACCOUNT}/token")).await?;
    let status = review(&t, &token, json!([])).await?;
    same("authenticated", &status["authenticated"], true)?;
    let user = format!("system:serviceaccount:{}:default", live.namespace);
    same("the user", &status["user"]["username"], user.as_str())?;
    let bound = &claims(&token)?["kubernetes.io"];
    same("the pod's name", &bound["pod"]["name"], live.name.as_str())?;
    same("the pod's uid", &bound["pod"]["uid"], live.uid.as_str())?;
    same("the node", &bound["node"]["name"], t.node())
}

async fn audience(t: T) -> Result<()> {
    let source = json!({"serviceAccountToken": {"path": "deep/token", "audience": "vault", "expirationSeconds": 7200}});
    let live = t.ready(t.idle().volume("all", json!({"projected": {"sources": [source]}}))).await?;
    let token = live.exec("cat /v/all/deep/token").await?;
    let claims = claims(&token)?;
    same("the audience", &claims["aud"], &json!(["vault"]))?;
    let lifetime = claims["exp"].as_i64().unwrap_or_default() - claims["iat"].as_i64().unwrap_or_default();
    same("the time", lifetime, 7200)?;
    same("for its audience", &review(&t, &token, json!(["vault"])).await?["authenticated"], true)?;
    ensure!(
        review(&t, &token, json!([])).await?["authenticated"] != true,
        "the API server takes it for its own"
    );
    Ok(())
}

async fn token_modes(t: T) -> Result<()> {
    let script = format!("stat -L -c '%a %u %g' {ACCOUNT}/token; head -c 1 {ACCOUNT}/token | wc -c");
    // Readable for all, for the user that all containers run as, for the group of the volumes.
    let plain = t.output(t.pod(&script)).await?;
    same("as root", plain.as_str(), "644 0 0\n1\n")?;
    let user = t.output(t.pod(&script).spec(json!({"securityContext": {"runAsUser": 1000}}))).await?;
    ensure!(user.starts_with("600 1000 "), "as a user: {user:?}");
    ensure!(user.ends_with("\n1\n"), "a user cannot read it: {user:?}");
    let group = t
        .output(t.pod(&script).spec(json!({"securityContext": {"runAsUser": 1000, "fsGroup": 2000}})))
        .await?;
    ensure!(group.ends_with(" 2000\n1\n"), "with fsGroup: {group:?}");
    Ok(())
}

async fn no_account(t: T) -> Result<()> {
    let refused = t.refused(t.idle().spec(json!({"serviceAccountName": "nobody"}))).await?;
    same("the code", refused.code, 403)?;
    holds("the message", &refused.message, "serviceaccount \"nobody\" not found")
}

async fn other_account(t: T) -> Result<()> {
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "robot"}});
    t.api().post(&t.path("serviceaccounts").await?, &account).await?;
    let live = t.ready(t.idle().spec(json!({"serviceAccountName": "robot"}))).await?;
    let token = live.exec(&format!("cat {ACCOUNT}/token")).await?;
    let user = format!("system:serviceaccount:{}:robot", live.namespace);
    same("the user", &review(&t, &token, json!([])).await?["user"]["username"], user.as_str())
}
