//! Service variables: `{SVC}_SERVICE_HOST` and the older link style. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, Service};

/// Variables for every service with a cluster address in the pod's namespace (unless `enableServiceLinks` is off)
/// and, always, for `default/kubernetes`. A service of the pod's own namespace wins over that one.
pub fn service_variables(pod: &Pod, services: &[Arc<Service>]) -> BTreeMap<String, String> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let links = pod.spec.as_ref().and_then(|spec| spec.enable_service_links).unwrap_or(true);
    let mut chosen: BTreeMap<&str, &Service> = BTreeMap::new();
    for service in services {
        let name = service.metadata.name.as_deref().unwrap_or_default();
        let own = links && service.metadata.namespace.as_deref() == Some(namespace);
        let api = name == "kubernetes" && service.metadata.namespace.as_deref() == Some("default");
        if own || (api && !chosen.contains_key(name)) {
            chosen.insert(name, service);
        }
    }
    let mut variables = BTreeMap::new();
    for (name, service) in chosen {
        add(&mut variables, name, service);
    }
    variables
}

fn add(variables: &mut BTreeMap<String, String>, name: &str, service: &Service) {
    let Some(spec) = &service.spec else { return };
    let address = spec.cluster_ip.as_deref().unwrap_or_default();
    let ports = spec.ports.as_deref().unwrap_or_default();
    let Some(first) = ports.first().filter(|_| !address.is_empty() && address != "None") else { return };
    let prefix = name.to_uppercase().replace('-', "_");
    let host = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
    let mut set = |suffix: &str, value: String| {
        variables.insert(format!("{prefix}_{suffix}"), value);
    };
    set("SERVICE_HOST", address.to_owned());
    set("SERVICE_PORT", first.port.to_string());
    for port in ports {
        if let Some(port_name) = port.name.as_deref().filter(|name| !name.is_empty()) {
            set(
                &format!("SERVICE_PORT_{}", port_name.to_uppercase().replace('-', "_")),
                port.port.to_string(),
            );
        }
    }
    for (index, port) in ports.iter().enumerate() {
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        let url = format!("{}://{host}:{}", protocol.to_lowercase(), port.port);
        if index == 0 {
            set("PORT", url.clone());
        }
        let link = format!("PORT_{}_{}", port.port, protocol.to_uppercase());
        set(&link, url);
        set(&format!("{link}_PROTO"), protocol.to_lowercase());
        set(&format!("{link}_PORT"), port.port.to_string());
        set(&format!("{link}_ADDR"), address.to_owned());
    }
}
