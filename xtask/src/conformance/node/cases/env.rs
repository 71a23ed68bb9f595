//! Environment variables: expansion, references, services.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::super::super::case::{Case, case, holds, same};
use super::super::context::T;
use super::super::live::container;
use super::super::pod::Pod;
use super::prints;

const EXPANSION: &str = "Variable Expansion";
const DOWNWARD: &str = "Downward API";

pub(super) fn cases() -> Vec<Case<T>> {
    let services = "Pods";
    let (maps, secrets) = ("ConfigMap", "Secrets");
    vec![
        prints(
            EXPANSION,
            "a variable can be made of earlier ones",
            "echo $C",
            |pod| {
                pod.env(json!([{"name": "A", "value": "a"}, {"name": "B", "value": "b"}, {"name": "C", "value": "$(A)-$(B)"}]))
            },
            "a-b",
        ),
        prints(
            EXPANSION,
            "a variable that comes later is not put in",
            "echo \"$C\"",
            |pod| pod.env(json!([{"name": "C", "value": "$(A)"}, {"name": "A", "value": "a"}])),
            "$(A)",
        ),
        prints(
            EXPANSION,
            "$$ escapes",
            "echo \"$C\"",
            |pod| pod.env(json!([{"name": "A", "value": "a"}, {"name": "C", "value": "$$(A) $$$(A) $(A"}])),
            "$(A) $a $(A",
        ),
        prints(
            EXPANSION,
            "an unknown variable stays as it is written",
            "echo \"$C\"",
            |pod| pod.env(json!([{"name": "C", "value": "$(NONE)/$()"}])),
            "$(NONE)/$()",
        ),
        prints(
            EXPANSION,
            "commands take variables",
            "",
            |pod| {
                pod.env(json!([{"name": "A", "value": "a b"}]))
                    .main(json!({"command": ["sh", "-c", "echo '$(A)' '$$(A)'"]}))
            },
            "a b $(A)",
        ),
        prints(
            EXPANSION,
            "arguments take variables",
            "",
            |pod| {
                pod.env(json!([{"name": "A", "value": "a b"}]))
                    .main(json!({"command": ["echo"], "args": ["[$(A)]", "$(NONE)"]}))
            },
            "[a b] $(NONE)",
        ),
        prints(
            EXPANSION,
            "the last of two values of a name counts",
            "echo $A",
            |pod| pod.env(json!([{"name": "A", "value": "1"}, {"name": "A", "value": "2"}])),
            "2",
        ),
        case(DOWNWARD, "name, namespace, uid, node and service account are variables", fields),
        case(DOWNWARD, "addresses of pod and node are variables", addresses),
        case(DOWNWARD, "one label or annotation is a variable", labels),
        case(DOWNWARD, "limits and requests are variables, in units of the divisor", resources),
        case(DOWNWARD, "without a limit the node's allocatable is told", allocatable),
        case(DOWNWARD, "a field that no variable can have is refused", bad_field),
        case(maps, "a key is a variable", |t| key(t, false)),
        case(maps, "all keys are variables, with a prefix", |t| all_keys(t, false)),
        case(maps, "a variable of a map that is missing holds the container back until it comes", |t| {
            missing(t, false)
        }),
        case(maps, "a variable of a key that is missing is told", |t| missing_key(t, false)),
        case(maps, "an optional variable may be missing", |t| optional(t, false)),
        case(maps, "a container's own variable goes before the map's", precedence),
        case(secrets, "a key is a variable", |t| key(t, true)),
        case(secrets, "all keys are variables, with a prefix", |t| all_keys(t, true)),
        case(
            secrets,
            "a variable of a secret that is missing holds the container back until it comes",
            |t| missing(t, true),
        ),
        case(secrets, "a variable of a key that is missing is told", |t| missing_key(t, true)),
        case(secrets, "an optional variable may be missing", |t| optional(t, true)),
        case(services, "services of the namespace are variables", service_variables),
        case(services, "enableServiceLinks false leaves only the API server's", no_links),
        case(services, "a variable of the pod goes before a service's", own_before_service),
    ]
}

fn field(name: &str, path: &str) -> Value {
    json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}})
}

async fn fields(t: T) -> Result<()> {
    let env = json!([
        field("A", "metadata.name"),
        field("B", "metadata.namespace"),
        field("C", "metadata.uid"),
        field("D", "spec.nodeName"),
        field("E", "spec.serviceAccountName")
    ]);
    let live = t.run(t.pod("echo $A $B $C $D $E").env(env)).await?;
    live.phase("Succeeded").await?;
    let expected = format!("{} {} {} {} default\n", live.name, live.namespace, live.uid, t.node());
    same("the output", live.log("").await?, expected)
}

async fn addresses(t: T) -> Result<()> {
    let env = json!([
        field("A", "status.podIP"),
        field("B", "status.podIPs"),
        field("C", "status.hostIP"),
        field("D", "status.hostIPs")
    ]);
    let live = t.ready(t.idle().env(env)).await?;
    let pod = live.until("its address", |pod| pod["status"]["podIP"].is_string()).await?;
    let joined = |list: &str| {
        let all = pod["status"][list].as_array().into_iter().flatten();
        all.filter_map(|address| address["ip"].as_str()).collect::<Vec<_>>().join(",")
    };
    let text = |name: &str| pod["status"][name].as_str().unwrap_or_default().to_owned();
    let expected = format!("{} {} {} {}", text("podIP"), joined("podIPs"), text("hostIP"), joined("hostIPs"));
    same("the variables", live.exec("echo $A $B $C $D").await?, expected)
}

async fn labels(t: T) -> Result<()> {
    let env = json!([
        field("A", "metadata.labels['color']"),
        field("B", "metadata.annotations['note']"),
        field("C", "metadata.labels['none']")
    ]);
    let metadata = json!({"labels": {"color": "blue"}, "annotations": {"note": "two words"}});
    same(
        "the output",
        t.output(t.pod("echo \"$A|$B|$C\"").metadata(metadata).env(env)).await?.as_str(),
        "blue|two words|\n",
    )
}

fn resource(name: &str, what: &str, divisor: &str) -> Value {
    json!({"name": name, "valueFrom": {"resourceFieldRef": {"resource": what, "divisor": divisor}}})
}

async fn resources(t: T) -> Result<()> {
    let env = json!([
        resource("A", "limits.cpu", "0"),
        resource("B", "limits.cpu", "1m"),
        resource("C", "limits.memory", "1Mi"),
        resource("D", "requests.cpu", "1m"),
        resource("E", "requests.memory", "0")
    ]);
    let amounts =
        json!({"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {"cpu": "1250m", "memory": "64Mi"}});
    let pod = t.pod("echo $A $B $C $D $E").env(env).main(json!({"resources": amounts}));
    same("the output", t.output(pod).await?.as_str(), "2 1250 64 10 16777216\n")
}

async fn allocatable(t: T) -> Result<()> {
    let env = json!([resource("A", "limits.cpu", "1m"), resource("B", "limits.memory", "0")]);
    let told = &t.suite().node_object["status"]["allocatable"];
    let text = |name: &str| told[name].as_str().unwrap_or_default();
    let expected =
        format!("{} {}\n", super::resources::milli(text("cpu")), super::resources::bytes(text("memory")));
    same("the output", t.output(t.pod("echo $A $B").env(env)).await?, expected)
}

async fn bad_field(t: T) -> Result<()> {
    let refused = t.refused(t.idle().env(json!([field("A", "spec.containers")]))).await?;
    same("the code", refused.code, 422)?;
    holds("the message", &refused.message, "fieldPath")
}

fn selector(secret: bool, name: &str, key: &str, optional: bool) -> Value {
    let kind = if secret { "secretKeyRef" } else { "configMapKeyRef" };
    json!({kind: {"name": name, "key": key, "optional": optional}})
}

async fn make(t: &T, secret: bool, data: Value) -> Result<()> {
    if secret { t.secret("data", data).await } else { t.config_map("data", data).await }
}

async fn key(t: T, secret: bool) -> Result<()> {
    make(&t, secret, json!({"a": "one line\nand another"})).await?;
    let pod =
        t.pod("echo \"$A\"").env(json!([{"name": "A", "valueFrom": selector(secret, "data", "a", false)}]));
    same("the output", t.output(pod).await?.as_str(), "one line\nand another\n")
}

fn all_of(secret: bool, more: Value) -> Value {
    let kind = if secret { "secretRef" } else { "configMapRef" };
    let mut source = json!({kind: {"name": "data"}});
    if let (Some(source), Value::Object(more)) = (source.as_object_mut(), more) {
        source.extend(more);
    }
    source
}

async fn all_keys(t: T, secret: bool) -> Result<()> {
    make(&t, secret, json!({"A": "1", "B": "2"})).await?;
    let from = json!([all_of(secret, json!({})), all_of(secret, json!({"prefix": "P_"}))]);
    let pod = t.pod("echo $A $B $P_A $P_B").main(json!({"envFrom": from}));
    same("the output", t.output(pod).await?.as_str(), "1 2 1 2\n")
}

async fn missing(t: T, secret: bool) -> Result<()> {
    let pod = t.pod("echo $A").env(json!([{"name": "A", "valueFrom": selector(secret, "data", "a", false)}]));
    let live = t.run(pod).await?;
    let message = live.waiting("main", "CreateContainerConfigError").await?;
    let word = if secret { "secret" } else { "configmap" };
    same("the message", message, format!("{word} \"data\" not found"))?;
    live.event("Failed", &format!("Error: {word} \"data\" not found")).await?;
    make(&t, secret, json!({"a": "came"})).await?;
    live.phase("Succeeded").await?;
    same("the log", live.log("").await?.as_str(), "came\n")
}

async fn missing_key(t: T, secret: bool) -> Result<()> {
    make(&t, secret, json!({"a": "1"})).await?;
    let live = t
        .run(t.idle().env(json!([{"name": "A", "valueFrom": selector(secret, "data", "none", false)}])))
        .await?;
    let message = live.waiting("main", "CreateContainerConfigError").await?;
    let word = if secret { "Secret" } else { "ConfigMap" };
    same("the message", message, format!("couldn't find key none in {word} {}/data", live.namespace))?;
    live.never("it ran", |pod| container(pod, "main")["state"]["running"].is_object())
}

async fn optional(t: T, secret: bool) -> Result<()> {
    let kind = if secret { "secretRef" } else { "configMapRef" };
    let from = json!([{kind: {"name": "none", "optional": true}}]);
    let pod = t
        .pod("echo \"[$A]\"")
        .env(json!([{"name": "A", "valueFrom": selector(secret, "none", "none", true)}]));
    same("the output", t.output(pod.main(json!({"envFrom": from}))).await?.as_str(), "[]\n")
}

async fn precedence(t: T) -> Result<()> {
    t.config_map("data", json!({"A": "map", "B": "map"})).await?;
    t.config_map("second", json!({"B": "second"})).await?;
    let from = json!([{"configMapRef": {"name": "data"}}, {"configMapRef": {"name": "second"}}]);
    let pod =
        t.pod("echo $A $B $C").env(json!([{"name": "A", "value": "own"}, {"name": "C", "value": "$(B)!"}]));
    same("the output", t.output(pod.main(json!({"envFrom": from}))).await?.as_str(), "own second second!\n")
}

/// A service; its address.
async fn service(t: &T, name: &str) -> Result<String> {
    let object = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {"selector": {"app": "none"}, "ports": [{"name": "web", "port": 8080}, {"name": "dns", "port": 53, "protocol": "UDP"}]}});
    let made = t.api().post(&t.path("services").await?, &object).await?;
    let address = made["spec"]["clusterIP"].as_str().unwrap_or_default().to_owned();
    ensure!(!address.is_empty(), "the service has no address: {made}");
    Ok(address)
}

/// Runs such a pod until the node knows the service: pods get the services that there are when they start.
async fn with_services(t: &T, pod: impl Fn() -> Pod, line: &str) -> Result<String> {
    let end = tokio::time::Instant::now() + t.suite().limit;
    loop {
        let output = t.output(pod()).await?;
        if output.contains(line) || tokio::time::Instant::now() >= end {
            return Ok(output);
        }
    }
}

async fn service_variables(t: T) -> Result<()> {
    let address = service(&t, "my-service").await?;
    let output = with_services(&t, || t.pod("env"), "MY_SERVICE_SERVICE_HOST").await?;
    let lines: Vec<&str> = output.lines().collect();
    for line in [
        format!("MY_SERVICE_SERVICE_HOST={address}"),
        "MY_SERVICE_SERVICE_PORT=8080".to_owned(),
        "MY_SERVICE_SERVICE_PORT_WEB=8080".to_owned(),
        "MY_SERVICE_SERVICE_PORT_DNS=53".to_owned(),
        format!("MY_SERVICE_PORT=tcp://{address}:8080"),
        format!("MY_SERVICE_PORT_8080_TCP=tcp://{address}:8080"),
        "MY_SERVICE_PORT_8080_TCP_PROTO=tcp".to_owned(),
        "MY_SERVICE_PORT_8080_TCP_PORT=8080".to_owned(),
        format!("MY_SERVICE_PORT_8080_TCP_ADDR={address}"),
        format!("MY_SERVICE_PORT_53_UDP=udp://{address}:53"),
    ] {
        ensure!(lines.contains(&line.as_str()), "{line} is missing: {output}");
    }
    holds("the environment", &output, "KUBERNETES_SERVICE_HOST=")
}

async fn no_links(t: T) -> Result<()> {
    service(&t, "my-service").await?;
    with_services(&t, || t.pod("env"), "MY_SERVICE_SERVICE_HOST").await?;
    let output = t.output(t.pod("env").spec(json!({"enableServiceLinks": false}))).await?;
    ensure!(!output.contains("MY_SERVICE"), "the service is told: {output}");
    holds("the environment", &output, "KUBERNETES_SERVICE_HOST=")
}

async fn own_before_service(t: T) -> Result<()> {
    service(&t, "my-service").await?;
    with_services(&t, || t.pod("env"), "MY_SERVICE_SERVICE_HOST").await?;
    let env = json!([{"name": "MY_SERVICE_SERVICE_HOST", "value": "own"}, {"name": "PORT", "value": "$(MY_SERVICE_SERVICE_PORT)"}]);
    same(
        "the output",
        t.output(t.pod("echo $MY_SERVICE_SERVICE_HOST $PORT").env(env)).await?.as_str(),
        "own 8080\n",
    )
}
