//! A static pod's manifest: bytes of a file to a pod that can run, or a sentence that says why not. Pure.
//!
//! Files come from whoever may write the directory, by hand: sizes are bounded, fields checked strictly, names by the API's
//! rules. What only the API server could give (Secrets, `ConfigMaps`, service accounts) cannot be used.

use std::fmt::Write as _;

use control_api::{defaults, kinds, schema, validate};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// A larger file is refused.
pub const MAX_SIZE: u64 = 1 << 20;
/// Shown problems of one file.
const MAX_PROBLEMS: usize = 5;
/// Hexadecimal digits of a static pod's uid.
const UID_LENGTH: usize = 32;

/// Where a manifest comes from.
#[derive(Debug, Clone, Copy)]
pub struct Origin<'a> {
    /// This node.
    pub node_name: &'a str,
    /// `file` or `http`.
    pub source: &'a str,
    /// File name, to tell equal manifests apart.
    pub file: &'a str,
    /// When it was first seen.
    pub seen: Timestamp,
}

/// Reads one manifest, YAML or JSON.
pub fn parse(bytes: &[u8], origin: Origin<'_>) -> Result<Pod, String> {
    let document = document(bytes)?;
    let kind = |key: &str| document.get(key).and_then(Value::as_str).unwrap_or_default();
    if (kind("apiVersion"), kind("kind")) != ("v1", "Pod") {
        return Err(format!("expected a v1 Pod, found {:?} {:?}", kind("apiVersion"), kind("kind")));
    }
    complete(document, origin)
}

/// Reads a Pod, or each pod of a `PodList`, YAML or JSON.
pub fn parse_several(bytes: &[u8], origin: Origin<'_>) -> Result<Vec<Result<Pod, String>>, String> {
    let mut document = document(bytes)?;
    if document.get("kind").and_then(Value::as_str) != Some("PodList") {
        return parse(bytes, origin).map(|pod| vec![Ok(pod)]);
    }
    let items = match document.get_mut("items").map(Value::take) {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(items)) => items,
        Some(_) => return Err("items is not a list".to_owned()),
    };
    let pod = |mut item: Value| {
        let fields = item.as_object_mut().ok_or("not an object")?;
        // Items of a list may leave out what the list says.
        for (key, expected) in [("apiVersion", "v1"), ("kind", "Pod")] {
            let given = fields.entry(key).or_insert_with(|| expected.into());
            if given.as_str() != Some(expected) {
                return Err(format!("{key}: expected {expected}, found {given}"));
            }
        }
        complete(item, origin)
    };
    Ok(items.into_iter().map(pod).collect())
}

/// The object in a file.
fn document(bytes: &[u8]) -> Result<Value, String> {
    if bytes.len() as u64 > MAX_SIZE {
        return Err(format!("larger than {MAX_SIZE} bytes"));
    }
    let text = std::str::from_utf8(bytes).map_err(|_invalid| "not UTF-8 text".to_owned())?;
    if text.trim().is_empty() {
        return Err("empty".to_owned());
    }
    let document: Value =
        serde_norway::from_str(text).map_err(|error| format!("not YAML or JSON: {error}"))?;
    if !document.is_object() {
        return Err("not an object with apiVersion, kind, metadata and spec".to_owned());
    }
    Ok(document)
}

fn complete(mut document: Value, origin: Origin<'_>) -> Result<Pod, String> {
    let info = kinds::find("", "v1", "pods").ok_or("this build knows no pods")?;
    let report = schema::check(info, &document);
    if let Some(wrong) = report.type_error.iter().chain(&report.unknown).next() {
        return Err(wrong.clone());
    }
    let uid = uid(&document, origin);
    if let Some(object) = document.as_object_mut() {
        object.remove("status");
        object.entry("metadata").or_insert_with(|| json!({}));
    }
    name(&mut document, origin, &uid)?;
    let spec = document.get_mut("spec").and_then(Value::as_object_mut).ok_or("spec is missing")?;
    spec.insert("nodeName".to_owned(), origin.node_name.into());
    let tolerations = spec.entry("tolerations").or_insert_with(|| json!([]));
    if let Some(tolerations) = tolerations.as_array_mut() {
        tolerations.push(json!({"operator": "Exists", "effect": "NoExecute"}));
    }
    let priority = match spec.get("priorityClassName").and_then(Value::as_str) {
        Some("system-node-critical") => Some(2_000_001_000),
        Some("system-cluster-critical") => Some(2_000_000_000),
        _ => None,
    };
    if let Some(priority) = priority {
        spec.insert("priority".to_owned(), priority.into());
    }
    defaults::apply(info, &mut document);
    let errors: Vec<String> =
        validate::create(info, &document).iter().take(MAX_PROBLEMS).map(ToString::to_string).collect();
    if !errors.is_empty() {
        return Err(errors.join("; "));
    }
    let mut pod: Pod = serde_json::from_value(document).map_err(|error| error.to_string())?;
    if let Some(reference) = api_reference(&pod) {
        return Err(format!("static pods may not reference {reference}"));
    }
    pod.metadata.uid = Some(uid);
    pod.metadata.creation_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(origin.seen));
    Ok(pod)
}

/// `<name>-<node>`, as upstream, so that the same manifest on two nodes makes two pods; and the annotations by which
/// everybody tells a static pod.
fn name(document: &mut Value, origin: Origin<'_>, uid: &str) -> Result<(), String> {
    let metadata =
        document.get_mut("metadata").and_then(Value::as_object_mut).ok_or("metadata is not an object")?;
    let name = metadata.get("name").and_then(Value::as_str).unwrap_or_default();
    if name.is_empty() {
        return Err("metadata.name is missing".to_owned());
    }
    let name = format!("{name}-{}", origin.node_name.to_lowercase());
    metadata.insert("name".to_owned(), name.into());
    for key in [
        "generateName",
        "uid",
        "resourceVersion",
        "generation",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "ownerReferences",
        "finalizers",
        "managedFields",
        "creationTimestamp",
    ] {
        metadata.remove(key);
    }
    let namespace = metadata.entry("namespace").or_insert(Value::Null);
    if namespace.as_str().unwrap_or_default().is_empty() {
        *namespace = "default".into();
    }
    let annotations = metadata.entry("annotations").or_insert(Value::Null);
    if annotations.is_null() {
        *annotations = json!({});
    }
    let annotations = annotations.as_object_mut().ok_or("metadata.annotations is not an object")?;
    annotations.remove("kubernetes.io/config.mirror");
    annotations.insert("kubernetes.io/config.source".to_owned(), origin.source.into());
    annotations.insert("kubernetes.io/config.hash".to_owned(), uid.into());
    annotations.insert("kubernetes.io/config.seen".to_owned(), origin.seen.to_string().into());
    Ok(())
}

/// Of node, file and content: a changed manifest is another pod.
fn uid(document: &Value, origin: Origin<'_>) -> String {
    let mut digest = Sha256::new();
    for part in [origin.node_name, origin.source, origin.file, &document.to_string()] {
        digest.update((part.len() as u64).to_be_bytes());
        digest.update(part.as_bytes());
    }
    let mut text = String::with_capacity(2 * UID_LENGTH);
    for byte in digest.finalize() {
        // Writing to a string cannot fail.
        write!(text, "{byte:02x}").ok();
    }
    text.truncate(UID_LENGTH);
    text
}

/// What of the pod only the API server could provide.
fn api_reference(pod: &Pod) -> Option<&'static str> {
    let spec = pod.spec.as_ref()?;
    if spec.service_account_name.as_deref().is_some_and(|name| !name.is_empty()) {
        return Some("a service account");
    }
    if spec.image_pull_secrets.iter().flatten().next().is_some() {
        return Some("an image pull secret");
    }
    if spec.resource_claims.iter().flatten().next().is_some() {
        return Some("a resource claim");
    }
    for volume in spec.volumes.iter().flatten() {
        let mut projected = volume.projected.iter().flat_map(|projected| projected.sources.iter().flatten());
        let needs_api = projected.any(|source| {
            source.config_map.is_some() || source.secret.is_some() || source.service_account_token.is_some()
        });
        if volume.config_map.is_some() || volume.secret.is_some() || needs_api {
            return Some("a ConfigMap, Secret or token in a volume");
        }
        if volume.persistent_volume_claim.is_some() || volume.ephemeral.is_some() {
            return Some("a persistent volume claim");
        }
    }
    agent_core::model::containers(spec).find_map(|entry| {
        let references = agent_core::env::references(entry.container);
        let any = !references.config_maps.is_empty() || !references.secrets.is_empty();
        any.then_some("a ConfigMap or Secret in its environment")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(file: &str) -> Origin<'_> {
        Origin { node_name: "node-1", source: "file", file, seen: Timestamp::UNIX_EPOCH }
    }

    const GOOD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  priorityClassName: system-node-critical
  containers: [{name: a, image: nginx}]
";

    #[test]
    fn a_manifest_becomes_a_pod_of_this_node() {
        let pod = parse(GOOD.as_bytes(), origin("web.yaml")).expect("good");
        let metadata = &pod.metadata;
        assert_eq!(
            (metadata.name.as_deref(), metadata.namespace.as_deref()),
            (Some("web-node-1"), Some("default"))
        );
        let spec = pod.spec.as_ref().expect("a spec");
        assert_eq!((spec.node_name.as_deref(), spec.priority), (Some("node-1"), Some(2_000_001_000)));
        assert_eq!(spec.restart_policy.as_deref(), Some("Always"), "defaulted");
        assert_eq!(metadata.uid.as_ref().map(String::len), Some(UID_LENGTH));
        assert!(agent_core::model::is_static(&pod));
        let again = parse(GOOD.as_bytes(), origin("web.yaml")).expect("good");
        assert_eq!(again, pod, "the same file is the same pod after a restart");
        let json = "{\"apiVersion\":\"v1\",\"kind\":\"Pod\",\"metadata\":{\"name\":\"j\"},\"spec\":{\"containers\":[{\"name\":\"a\",\"image\":\"i\"}]}}";
        assert!(parse(json.as_bytes(), origin("j.json")).is_ok());
        let other = parse(GOOD.replace("nginx", "busybox").as_bytes(), origin("web.yaml")).expect("good");
        assert_ne!(other.metadata.uid, metadata.uid, "a changed file is another pod");
        let elsewhere = parse(GOOD.as_bytes(), origin("copy.yaml")).expect("good");
        assert_ne!(elsewhere.metadata.uid, metadata.uid);
    }

    #[track_caller]
    fn refused(text: &str, why: &str) {
        let problem = parse(text.as_bytes(), origin("x")).expect_err(text);
        assert!(problem.contains(why), "{problem}");
    }

    #[test]
    fn what_cannot_run_is_refused_with_its_reason() {
        refused("", "empty");
        refused("[1, 2]", "not an object");
        refused("a: [", "not YAML or JSON");
        refused(
            "apiVersion: apps/v1\nkind: Deployment\n",
            "expected a v1 Pod, found \"apps/v1\" \"Deployment\"",
        );
        refused(&format!("{GOOD}---{GOOD}"), "not YAML or JSON");
        refused(&GOOD.replace("containers", "containerz"), "containerz");
        refused(&GOOD.replace("name: web,", "name: '../../etc',"), "metadata.name: Invalid value");
        refused(&GOOD.replace("name: web,", "namespace: 'a/b', name: web,"), "metadata.namespace");
        refused(&GOOD.replace("name: web,", ""), "metadata.name is missing");
        refused(&GOOD.replace("[{name: a, image: nginx}]", "[]"), "spec.containers");
        refused(&format!("{GOOD}  serviceAccountName: admin\n"), "may not reference a service account");
        refused(
            &format!("{GOOD}  volumes: [{{name: v, secret: {{secretName: s}}}}]\n"),
            "may not reference a ConfigMap, Secret",
        );
        refused(
            &GOOD.replace("image: nginx", "image: nginx, envFrom: [{secretRef: {name: s}}]"),
            "may not reference a ConfigMap or Secret in its environment",
        );
        let huge = "#".repeat(usize::try_from(MAX_SIZE).unwrap() + 1);
        refused(&huge, "larger than");
        assert!(parse(&[0xff, 0xfe], origin("x")).expect_err("bytes").contains("UTF-8"));
        // Aliases that grow tenfold per line.
        let mut bomb = "a: &a [x,x,x,x,x,x,x,x,x,x]\n".to_owned();
        for (name, before) in
            ["b", "c", "d", "e", "f", "g", "h", "i"].into_iter().zip(["a", "b", "c", "d", "e", "f", "g", "h"])
        {
            writeln!(bomb, "{name}: &{name} [{}]", vec![format!("*{before}"); 10].join(",")).unwrap();
        }
        refused(&bomb, "");
    }

    #[test]
    fn forged_identity_is_dropped() {
        let forged = GOOD.replace(
            "name: web,",
            "name: web, uid: ../x, ownerReferences: [{apiVersion: v1, kind: Node, name: n, uid: u}], annotations: {kubernetes.io/config.mirror: x, keep: y},",
        );
        let pod = parse(forged.as_bytes(), origin("x")).expect("good");
        let annotations = pod.metadata.annotations.expect("some");
        assert!(!annotations.contains_key("kubernetes.io/config.mirror") && annotations.contains_key("keep"));
        assert!(pod.metadata.owner_references.is_none());
        assert!(pod.metadata.uid.is_some_and(|uid| uid.bytes().all(|byte| byte.is_ascii_hexdigit())));
    }
}
