//! Defaults of probes and lifecycle handlers.

use serde_json::Value;

use crate::value::set_default;

/// Fills in the probes and handlers of a container.
pub(super) fn all(container: &mut Value) {
    for key in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let Some(probe) = container.get_mut(key).filter(|p| p.is_object()) else { continue };
        // An explicit 0 means "default" too.
        for (field, default) in
            [("timeoutSeconds", 1), ("periodSeconds", 10), ("successThreshold", 1), ("failureThreshold", 3)]
        {
            if probe.get(field).is_some_and(|v| v == 0)
                && let Some(map) = probe.as_object_mut()
            {
                map.remove(field);
            }
            set_default(probe, field, default);
        }
        handler(probe);
        if let Some(grpc) = probe.get_mut("grpc")
            && let Some(map) = grpc.as_object_mut()
        {
            map.entry("service").or_insert_with(|| "".into());
        }
    }
    for hook in ["postStart", "preStop"] {
        if let Some(hook) = container.get_mut("lifecycle").and_then(|l| l.get_mut(hook)) {
            handler(hook);
        }
    }
}

fn handler(handler: &mut Value) {
    if let Some(http) = handler.get_mut("httpGet") {
        set_default(http, "path", "/");
        set_default(http, "scheme", "HTTP");
    }
}
