//! Kubernetes API vocabulary as pure functions: kinds, defaults, validation, patches, selectors, tables, OpenAPI.
