//! Kubernetes API server: HTTP, TLS, authentication, authorization, admission, watch cache, discovery, OpenAPI.
