//! Clients of another making drive a pod: Python with Google's gRPC, and Kubernetes' own code, the CRI client that the kubelet
//! is built with and kubectl's executors. `cargo xtask test compat` fetches both. Needs root.

mod support;

use std::path::Path;

use support::cri::{Cri, PATIENCE};

/// Runs a client on a server of its own; what it said.
async fn drive(mut command: tokio::process::Command) -> String {
    let cri = Cri::start().await;
    command
        .arg(cri.dir().join("cri.sock"))
        .arg("busybox")
        .arg(cri.dir().join("foreign"))
        .arg(cri.pod("foreign").linux.expect("set").cgroup_parent)
        .kill_on_drop(true);
    let output =
        tokio::time::timeout(6 * PATIENCE, command.output()).await.expect("in time").expect("it runs");
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}{}", said(&output.stdout), said(&output.stderr));
    cri.assert_nothing_left().await;
    said(&output.stdout)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Python packages: `cargo xtask test compat` fetches them and names their place"]
async fn a_client_in_python_is_served() {
    let packages =
        std::env::var("KEELSON_TEST_PYTHON_CLIENT").expect("KEELSON_TEST_PYTHON_CLIENT is a directory");
    let mut command = tokio::process::Command::new("python3");
    command
        .env("PYTHONPATH", packages)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/foreign/client.py"));
    let said = drive(command).await;
    assert!(said.contains("35 calls"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a program of Kubernetes' libraries: `cargo xtask test compat` builds it and names it"]
async fn kubernetes_own_client_is_served() {
    let program =
        std::env::var("KEELSON_TEST_KUBELET_CLIENT").expect("KEELSON_TEST_KUBELET_CLIENT is a program");
    let said = drive(tokio::process::Command::new(program)).await;
    assert!(said.contains("as a kubelet expects"), "{said}");
}
