//! The shared cluster, kubectl, HTTP and waiting.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Root of the checkout.
pub(crate) fn repo() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is in the checkout")
}

/// `cargo xtask <args>`, without cargo.
pub(crate) fn xtask(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(args)
        .current_dir(repo())
        .stdin(Stdio::null())
        .output()
        .expect("xtask starts")
}

/// What a program printed on both channels.
pub(crate) fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The kubeconfig that `up` prints.
pub(crate) fn kubeconfig() -> PathBuf {
    repo().join("target/up/kubeconfig")
}

/// Brings the cluster up once for all tests.
pub(crate) fn cluster() {
    static UP: OnceLock<()> = OnceLock::new();
    UP.get_or_init(|| {
        let output = xtask(&["up", "--detach"]);
        assert!(output.status.success(), "up failed: {}", said(&output));
        let text = said(&output);
        assert!(text.contains("kubeconfig: "), "{text}");
        assert!(text.matches("\n  ").count() >= 3, "three commands to try: {text}");
    });
}

/// A kubectl command.
pub(crate) fn kubectl_command(args: &[&str]) -> Command {
    let mut command = Command::new("kubectl");
    command.arg("--kubeconfig").arg(kubeconfig()).args(args).stdin(Stdio::null());
    command
}

/// Runs kubectl, which must succeed, and returns its output.
#[track_caller]
pub(crate) fn kubectl(args: &[&str]) -> String {
    let output = kubectl_command(args).output().expect("kubectl starts");
    assert!(output.status.success(), "kubectl {}: {}", args.join(" "), said(&output));
    said(&output)
}

/// Runs kubectl, which must fail, and returns what it said.
#[track_caller]
pub(crate) fn kubectl_fails(args: &[&str]) -> String {
    let output = kubectl_command(args).output().expect("kubectl starts");
    assert!(!output.status.success(), "kubectl {} should fail: {}", args.join(" "), said(&output));
    said(&output)
}

/// Applies a manifest given as text; the result may be an error.
pub(crate) fn apply_text(manifest: &str, extra: &[&str]) -> Output {
    let mut child = Command::new("kubectl")
        .arg("--kubeconfig")
        .arg(kubeconfig())
        .args(["apply", "-f", "-"])
        .args(extra)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("kubectl starts");
    child.stdin.take().expect("piped").write_all(manifest.as_bytes()).expect("kubectl reads");
    child.wait_with_output().expect("kubectl ends")
}

/// Applies a manifest, which must succeed.
#[track_caller]
pub(crate) fn apply(manifest: &str, extra: &[&str]) {
    let output = apply_text(manifest, extra);
    assert!(output.status.success(), "apply: {}", said(&output));
}

/// Asks until `look` gives a value; the panic tells what was seen last.
#[track_caller]
pub(crate) fn wait_for<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Result<T, String>) -> T {
    let end = Instant::now() + limit;
    loop {
        match look() {
            Ok(value) => return value,
            Err(last) => assert!(Instant::now() < end, "{what}: not within {limit:?}; last seen: {last}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Waits until kubectl's output satisfies `accept`.
#[track_caller]
pub(crate) fn wait_kubectl(what: &str, args: &[&str], accept: impl Fn(&str) -> bool) -> String {
    wait_for(what, Duration::from_secs(90), || {
        let output = kubectl_command(args).output().expect("kubectl starts");
        let text = said(&output);
        if output.status.success() && accept(&text) { Ok(text) } else { Err(text) }
    })
}

/// A namespace that goes with the test.
pub(crate) struct Namespace(pub(crate) String);

impl Namespace {
    /// Makes it and waits until pods can be made in it.
    pub(crate) fn new(name: &str) -> Self {
        cluster();
        kubectl(&["create", "namespace", name]);
        wait_kubectl("default service account", &["-n", name, "get", "serviceaccount", "default"], |_| true);
        Self(name.to_owned())
    }

    /// kubectl in this namespace.
    #[track_caller]
    pub(crate) fn kubectl(&self, args: &[&str]) -> String {
        kubectl(&[&["-n", &self.0], args].concat())
    }

    /// Waits in this namespace.
    #[track_caller]
    pub(crate) fn wait(&self, what: &str, args: &[&str], accept: impl Fn(&str) -> bool) -> String {
        wait_kubectl(what, &[&["-n", &self.0], args].concat(), accept)
    }

    /// Applies into this namespace.
    #[track_caller]
    pub(crate) fn apply(&self, manifest: &str) {
        apply(manifest, &["-n", &self.0]);
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let output = kubectl_command(&["delete", "namespace", &self.0, "--timeout=90s"]).output();
        if !std::thread::panicking() {
            let output = output.expect("kubectl starts");
            assert!(output.status.success(), "deleting the namespace: {}", said(&output));
        }
    }
}

/// GET over a new connection: status line, headers and body.
pub(crate) fn get(address: &str) -> Result<String, String> {
    let fail = |error: std::io::Error| format!("GET {address}: {error}");
    let target = address.parse().map_err(|error| format!("{address}: {error}"))?;
    let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(2)).map_err(fail)?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).map_err(fail)?;
    write!(stream, "GET / HTTP/1.1\r\nHost: nginx\r\nConnection: close\r\n\r\n").map_err(fail)?;
    let mut text = String::new();
    stream.read_to_string(&mut text).map_err(fail)?;
    Ok(text)
}

/// The pod that answered, by the header that the demo image adds.
pub(crate) fn served_by(response: &str) -> Option<&str> {
    response.lines().find_map(|line| line.strip_prefix("X-Served-By: ")).map(str::trim)
}

/// Asks `address` until every name in `pods` has answered; each answer must be one of them.
#[track_caller]
pub(crate) fn answers_from_all(address: &str, pods: &[String]) {
    let mut missing: Vec<&str> = pods.iter().map(String::as_str).collect();
    wait_for(&format!("{address} answered by all of {pods:?}"), Duration::from_secs(30), || {
        let response = get(address)?;
        let pod = served_by(&response).ok_or_else(|| format!("no pod name in {response}"))?;
        assert!(pods.iter().any(|name| name == pod), "{pod} answered, which is not one of {pods:?}");
        missing.retain(|name| *name != pod);
        if missing.is_empty() { Ok(()) } else { Err(format!("silent: {missing:?}")) }
    });
}

/// Names of the pods with a label.
pub(crate) fn pods(namespace: &str, label: &str) -> Vec<String> {
    let list =
        kubectl(&["-n", namespace, "get", "pods", "-l", label, "-o", "jsonpath={.items[*].metadata.name}"]);
    list.split_whitespace().map(str::to_owned).collect()
}

/// The node's address.
pub(crate) fn node_address() -> String {
    kubectl(&["get", "nodes", "-o", "jsonpath={.items[0].status.addresses[?(@.type=='InternalIP')].address}"])
}

/// Pid of a component as `status` tells it.
pub(crate) fn pid_of(component: &str) -> Option<i32> {
    let output = xtask(&["status", "--json"]);
    let lines: serde_json::Value = serde_json::from_slice(&output.stdout).expect("status prints JSON");
    lines.as_array()?.iter().find(|line| line["name"] == component)?["pid"].as_i64()?.try_into().ok()
}

/// The network namespace, of those that the runtime keeps in `dir`, that has an address.
pub(crate) fn namespace_with(dir: impl AsRef<Path>, address: &str) -> PathBuf {
    let wanted = format!(" {address}/");
    let has = |path: &PathBuf| {
        let shown = Command::new("nsenter")
            .arg(format!("--net={}", path.display()))
            .args(["ip", "-o", "address"])
            .output()
            .expect("nsenter starts");
        said(&shown).contains(&wanted)
    };
    let mut paths =
        std::fs::read_dir(&dir).expect("the runtime's directory").flatten().map(|entry| entry.path());
    paths.find(has).unwrap_or_else(|| panic!("no namespace with {address} below {}", dir.as_ref().display()))
}
