//! CRI clients of another making, for the tier `compat`: one in Python with Google's gRPC, and one of Kubernetes' own code, the
//! CRI client that the kubelet is built with and kubectl's executors, which Debian packages for its next release.
//!
//! Both are fetched by their packages' ordinary clients (pip, apt) into `target`; nothing is installed but pip itself.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cmd::{Cmd, step};
use crate::images::Packages;
use crate::setup;

/// The CRI's messages for Python, and a WebSocket client.
const PYTHON: &[&str] = &[
    "container-runtime-interface-api==2.0.1",
    "grpcio==1.85.1",
    "protobuf==6.33.6",
    "websocket-client==1.9.2",
];

/// The Debian suite that has Kubernetes 1.36's libraries, and the Go that builds them.
const SUITE: &str = "forky";
const GO: &str = "1.27";

/// What the client is made of: cri-client, client-go, and what they need.
const GO_PACKAGES: &[&str] = &[
    "golang-github-cespare-xxhash-v2-dev",
    "golang-github-davecgh-go-spew-dev",
    "golang-github-docker-spdystream-dev",
    "golang-github-fxamacker-cbor-dev",
    "golang-github-go-logr-logr-dev",
    "golang-github-go-logr-stdr-dev",
    "golang-github-golang-protobuf-1-5-dev",
    "golang-github-gorilla-websocket-dev",
    "golang-github-json-iterator-go-dev",
    "golang-github-modern-go-concurrent-dev",
    "golang-github-modern-go-reflect2-dev",
    "golang-github-munnerz-goautoneg-dev",
    "golang-github-x448-float16-dev",
    "golang-golang-x-net-dev",
    "golang-golang-x-oauth2-dev",
    "golang-golang-x-oauth2-google-dev",
    "golang-golang-x-sys-dev",
    "golang-golang-x-term-dev",
    "golang-golang-x-text-dev",
    "golang-golang-x-time-dev",
    "golang-google-genproto-dev",
    "golang-google-grpc-dev",
    "golang-google-protobuf-dev",
    "golang-gopkg-inf.v0-dev",
    "golang-gopkg-yaml.v2-dev",
    "golang-k8s-api-dev",
    "golang-k8s-apimachinery-dev",
    "golang-k8s-client-go-dev",
    "golang-k8s-component-base-dev",
    "golang-k8s-cri-api-dev",
    "golang-k8s-cri-client-dev",
    "golang-k8s-klog-dev",
    "golang-k8s-kube-openapi-dev",
    "golang-k8s-sigs-json-dev",
    "golang-k8s-sigs-randfill-dev",
    "golang-k8s-sigs-structured-merge-diff-v6-dev",
    "golang-k8s-sigs-yaml-dev",
    "golang-k8s-streaming-dev",
    "golang-k8s-utils-dev",
    "golang-opentelemetry-contrib-dev",
    "golang-opentelemetry-otel-dev",
];

/// Fetches the Python client's packages, unless they are there; gives their directory.
pub(crate) fn python_packages(repo: &Path) -> Result<PathBuf> {
    let place = repo.join("target/foreign/python");
    let marker = place.join("fetched");
    let wanted = PYTHON.join("\n");
    if fs::read_to_string(&marker).is_ok_and(|found| found == wanted) {
        return Ok(place);
    }
    setup::python()?;
    step(&format!("fetching {}", PYTHON.join(" ")), || {
        let quiet = ["install", "--quiet", "--root-user-action", "ignore", "--upgrade", "--target"];
        Cmd::new("pip3").args(quiet).args([&place]).args(PYTHON).output()
    })?;
    fs::write(&marker, wanted).with_context(|| format!("writing {}", marker.display()))?;
    Ok(place)
}

/// Fetches and builds the client of Kubernetes' own code; gives the program.
pub(crate) fn kubelet_client(repo: &Path) -> Result<PathBuf> {
    let place = repo.join("target/foreign");
    let (compiler, sources) = (format!("golang-{GO}-go"), format!("golang-{GO}-src"));
    let names: Vec<&str> = GO_PACKAGES.iter().copied().chain([compiler.as_str(), sources.as_str()]).collect();
    let packages = step(&format!("fetching cri-client, client-go and Go {GO} of Debian {SUITE}"), || {
        Packages::fetch_from(SUITE, &repo.join("target/debs").join(SUITE), &names)
    })?;
    // The compiler's package leads to the sources' by relative links.
    let shared = |name: &str| packages.tree(name).join("usr/share").join(format!("go-{GO}"));
    for entry in fs::read_dir(shared(&sources)).context("reading Go's sources")? {
        let entry = entry?;
        let link = shared(&compiler).join(entry.file_name());
        if fs::symlink_metadata(&link).is_err() {
            symlink(entry.path(), &link).with_context(|| format!("linking {}", link.display()))?;
        }
    }
    let root = packages.tree(&compiler).join("usr/lib").join(format!("go-{GO}"));
    let libraries: Vec<PathBuf> =
        GO_PACKAGES.iter().map(|name| packages.tree(name).join("usr/share/gocode")).collect();
    let libraries: OsString = std::env::join_paths(libraries)?;
    let program = place.join("kubelet-client");
    fs::create_dir_all(&place).with_context(|| format!("creating {}", place.display()))?;
    step("building the client of Kubernetes' own code", || {
        Cmd::new(root.join("bin/go"))
            .args(["build", "-o"])
            .args([&program])
            .args(["cri-shim/tests/foreign/kubelet/main.go"])
            .dir(repo)
            .env("GO111MODULE", "off")
            .env("GOTOOLCHAIN", "local")
            .env("CGO_ENABLED", "0")
            .env("GOROOT", &root)
            .env("GOPATH", &libraries)
            .env("GOCACHE", place.join("go-cache"))
            .output()
    })?;
    Ok(program)
}
