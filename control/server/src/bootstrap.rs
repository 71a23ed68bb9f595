//! What every cluster has: the four namespaces, the two priority classes of the system, and the `kubernetes` Service with its endpoints.
//!
//! Runs at every start and changes only what differs, so that a new advertised address or port takes effect.

use control_api::{
    admit::SYSTEM_PRIORITIES,
    kinds::{self, ResourceInfo},
    status::{ApiError, Reason},
};
use serde_json::{Value, json};

use crate::{
    api::{
        Api,
        options::WriteOptions,
        write::{ObjectRef, Part, Write},
    },
    auth::User,
};

const NAMESPACES: [&str; 4] = ["default", "kube-system", "kube-public", "kube-node-lease"];

/// Bring the built-in objects into being.
pub(crate) async fn run(api: &Api) -> Result<(), ApiError> {
    for name in NAMESPACES {
        let object = json!({
            "metadata": { "name": name, "labels": { "kubernetes.io/metadata.name": name } },
            "spec": { "finalizers": ["kubernetes"] },
        });
        ensure(api, resource("", "namespaces")?, None, name, &object, &[]).await?;
    }
    let classes =
        kinds::find("scheduling.k8s.io", "v1", "priorityclasses").ok_or_else(ApiError::unknown_path)?;
    for (name, value, description) in SYSTEM_PRIORITIES {
        let object = json!({ "metadata": { "name": name }, "value": value, "description": description });
        ensure(api, classes, None, name, &object, &[]).await?;
    }
    let default = Some("default");
    ensure(api, resource("", "services")?, default, "kubernetes", &service(api), &["/spec/ports"]).await?;
    ensure(api, resource("", "endpoints")?, default, "kubernetes", &endpoints(api), &["/subsets"]).await?;
    let slices = resource("discovery.k8s.io", "endpointslices")?;
    ensure(api, slices, default, "kubernetes", &slice(api), &["/endpoints", "/ports"]).await
}

fn resource(group: &str, plural: &str) -> Result<&'static ResourceInfo, ApiError> {
    kinds::find(group, "v1", plural).ok_or_else(ApiError::unknown_path)
}

/// Create the object, or set these parts of an existing one.
async fn ensure(
    api: &Api,
    info: &'static ResourceInfo,
    namespace: Option<&str>,
    name: &str,
    object: &Value,
    parts: &[&str],
) -> Result<(), ApiError> {
    let user = User::system();
    let mut write = Write::new(&user, WriteOptions::internal());
    if api.cached(info, namespace, name).is_none() {
        match api.create(info, namespace, object.clone(), &mut write).await {
            Err(error) if error.reason == Reason::AlreadyExists => {}
            other => return other.map(|_| ()),
        }
    }
    if parts.is_empty() {
        return Ok(());
    }
    let change = |old: &Value, _: &mut Write<'_>| {
        let mut new = old.clone();
        for part in parts {
            let field = part.rsplit('/').next().unwrap_or_default();
            let parent = part.rsplit_once('/').map_or("", |(parent, _)| parent);
            let wanted = object.pointer(part).cloned().unwrap_or_default();
            if let Some(parent) = new.pointer_mut(parent).and_then(Value::as_object_mut) {
                parent.insert(field.to_owned(), wanted);
            }
        }
        Ok(new)
    };
    let target = ObjectRef { info, namespace, name };
    api.update(target, Part::MAIN, &mut write, change).await.map(|_| ())
}

fn service(api: &Api) -> Value {
    let address = api.allocator.api_server_address().to_string();
    json!({
        "metadata": {
            "name": "kubernetes",
            "labels": { "component": "apiserver", "provider": "kubernetes" },
        },
        "spec": {
            "type": "ClusterIP",
            "clusterIP": address,
            "clusterIPs": [address],
            "ports": [{ "name": "https", "protocol": "TCP", "port": 443, "targetPort": api.config.listen.port() }],
        },
    })
}

fn endpoints(api: &Api) -> Value {
    json!({
        "metadata": {
            "name": "kubernetes",
            "labels": { "endpointslice.kubernetes.io/skip-mirror": "true" },
        },
        "subsets": [{
            "addresses": [{ "ip": api.config.advertise_address.to_string() }],
            "ports": [{ "name": "https", "port": api.config.listen.port(), "protocol": "TCP" }],
        }],
    })
}

fn slice(api: &Api) -> Value {
    let address = api.config.advertise_address;
    json!({
        "metadata": {
            "name": "kubernetes",
            "labels": { "kubernetes.io/service-name": "kubernetes" },
        },
        "addressType": if address.is_ipv6() { "IPv6" } else { "IPv4" },
        "endpoints": [{ "addresses": [address.to_string()], "conditions": { "ready": true } }],
        "ports": [{ "name": "https", "port": api.config.listen.port(), "protocol": "TCP" }],
    })
}
