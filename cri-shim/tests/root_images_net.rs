//! Getting images over the network as it is: TLS, credentials, mirrors, redirects, proxies, retries. On a real containerd,
//! with registries in this process. Needs root.

mod support;

use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use keelson_cri::containerd::Client;
use keelson_cri::images::auth::Credentials;
use keelson_cri::images::{ImageStore, Places, Settings, service};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::json;
use support::containerd::Containerd;
use support::registry::{Fault, Registry, digest, gzip, layer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Code;

struct Fixture {
    containerd: Containerd,
    client: Client,
    store: ImageStore,
}

impl Fixture {
    async fn start() -> Self {
        rustls::crypto::aws_lc_rs::default_provider().install_default().ok();
        let containerd = Containerd::start();
        let client = Client::new(&containerd.socket(), "keelson").expect("a client");
        client.ensure_namespace().await.expect("a namespace");
        let places = Places {
            registry_config_dir: containerd.dir().join("certs.d"),
            state_dir: containerd.dir().join("cri"),
            snapshotter: "overlayfs".to_owned(),
        };
        let settings = Settings { pinned: vec!["quay.test/pinned".to_owned()], ..Settings::default() };
        let store = ImageStore::new(client.clone(), places, settings);
        Self { containerd, client, store }
    }

    /// A file of a registry's configuration.
    fn configure(&self, registry: &str, file: &str, text: &str) {
        let directory = self.containerd.dir().join("certs.d").join(registry);
        std::fs::create_dir_all(&directory).expect("made");
        std::fs::write(directory.join(file), text).expect("written");
    }

    async fn refusal(&self, image: &str) -> tonic::Status {
        service::status(&self.store.pull(image, None).await.expect_err("refused"))
    }
}

fn layers() -> Vec<Vec<u8>> {
    let noise: Vec<u8> =
        (0..600_000_u32).flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    vec![layer(&[("noise", &noise, 0o644)]), layer(&[("etc/second", b"2", 0o644)])]
}

fn user(name: &str, password: &str) -> Credentials {
    Credentials { username: name.to_owned(), password: password.to_owned(), ..Credentials::default() }
}

/// An authority, and certificates of it for this machine as PEM.
struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).expect("signed").pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    fn issue(&self) -> (String, String) {
        let key = KeyPair::generate().expect("a key");
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let params = CertificateParams::new(names).expect("parameters");
        (params.signed_by(&key, &self.issuer).expect("signed").pem(), key.serialize_pem())
    }

    fn server(&self, clients: bool) -> rustls::ServerConfig {
        let (certificate, key) = self.issue();
        let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).expect("PEM")];
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("PEM");
        let builder = rustls::ServerConfig::builder();
        let builder = if clients {
            let mut roots = rustls::RootCertStore::empty();
            roots.add(CertificateDer::from_pem_slice(self.pem.as_bytes()).expect("PEM")).expect("a root");
            let verifier =
                rustls::server::WebPkiClientVerifier::builder(Arc::new(roots)).build().expect("built");
            builder.with_client_cert_verifier(verifier)
        } else {
            builder.with_no_client_auth()
        };
        builder.with_single_cert(chain, key).expect("a configuration")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_checked_and_shown_as_configured() {
    let fixture = Fixture::start().await;
    let authority = Authority::new();
    let plain = Registry::start_tls(authority.server(false)).await;
    let strict = Registry::start_tls(authority.server(true)).await;
    for registry in [&plain, &strict] {
        registry.push("library/demo", "1", &layers()[1..], json!({}), false);
    }
    let (certificate, key) = authority.issue();
    let other = Authority::new();
    #[allow(clippy::type_complexity, reason = "a table: name, registry, settings, files, result")]
    let table: [(&str, &Registry, &str, &[(&str, &str)], Result<(), &str>); 8] = [
        ("unknown.test", &plain, "", &[], Err("certificate")),
        ("other.test", &plain, "ca = \"ca.pem\"\n", &[("ca.pem", &other.pem)], Err("certificate")),
        ("ca.test", &plain, "ca = [\"ca.pem\"]\n", &[("ca.pem", &authority.pem)], Ok(())),
        ("skip.test", &plain, "skip_verify = true\n", &[], Ok(())),
        ("missing.test", &plain, "ca = \"none.pem\"\n", &[], Err("none.pem")),
        ("nocert.test", &strict, "ca = \"ca.pem\"\n", &[("ca.pem", &authority.pem)], Err("")),
        (
            "client.test",
            &strict,
            "ca = \"ca.pem\"\nclient = [[\"c.pem\", \"k.pem\"]]\n",
            &[("ca.pem", &authority.pem), ("c.pem", &certificate), ("k.pem", &key)],
            Ok(()),
        ),
        (
            "one-file.test",
            &strict,
            "skip_verify = true\nclient = \"both.pem\"\n",
            &[("both.pem", &format!("{certificate}\n{key}"))],
            Ok(()),
        ),
    ];
    for (name, registry, settings, files, wanted) in table {
        for (file, text) in files {
            fixture.configure(name, file, text);
        }
        fixture.configure(
            name,
            "hosts.toml",
            &format!("server = \"https://{}\"\n{settings}", registry.address()),
        );
        let result = fixture.store.pull(&format!("{name}/library/demo:1"), None).await;
        match (result, wanted) {
            (Ok(_), Ok(())) => {}
            (Err(error), Err(text)) => {
                let status = service::status(&error);
                assert!(
                    status.message().contains(text) && status.message().contains(name),
                    "{name}: {status}"
                );
            }
            (result, _) => panic!("{name}: {result:?}"),
        }
    }
    // Docker's files, without a hosts.toml, for a registry by its address.
    let address = strict.address();
    let (_, port) = address.rsplit_once(':').expect("a port");
    let docker = format!("localhost:{port}");
    fixture.configure(&docker, "hosts.toml", &format!("server = \"https://{docker}\"\n"));
    fixture.store.pull(&format!("{docker}/library/demo:1"), None).await.expect_err("no files yet");
    std::fs::remove_file(fixture.containerd.dir().join("certs.d").join(&docker).join("hosts.toml"))
        .expect("removed");
    for (file, text) in [("ca.crt", &authority.pem), ("c.cert", &certificate), ("c.key", &key)] {
        fixture.configure(&docker, file, text);
    }
    fixture.store.pull(&format!("{docker}/library/demo:1"), None).await.expect("pulled");
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_reach_their_registry_and_no_other() {
    let fixture = Fixture::start().await;
    let home = Registry::start().await;
    let elsewhere = Registry::start().await;
    let id = home.push("library/demo", "1", &layers(), json!({}), false);
    elsewhere.push("library/demo", "1", &layers(), json!({}), false);
    home.protect_basic("user", "secret");
    let text = format!("server = \"http://{}\"\n[header]\nx-team = [\"a\"]\n", home.address());
    fixture.configure("quay.test", "hosts.toml", &text);
    assert_eq!(fixture.refusal("quay.test/library/demo:1").await.code(), Code::PermissionDenied);
    let blob = digest(&gzip(&layers()[0]));
    let there = format!("http://{}/v2/library/demo/blobs/{blob}?signature=s", elsewhere.address());
    home.fault(&blob, Fault::Status(307, vec![("location", there)]), 1);
    let image =
        fixture.store.pull("quay.test/library/demo:1", Some(user("user", "secret"))).await.expect("pulled");
    assert_eq!(image.id, id);
    assert!(home.headers().iter().any(|headers| headers.contains_key("authorization")));
    assert!(home.headers().iter().all(|headers| headers.get("x-team").is_some_and(|team| team == "a")));
    let elsewhere = elsewhere.headers();
    assert_eq!(elsewhere.len(), 1, "the redirect was followed once");
    assert!(
        !elsewhere[0].contains_key("authorization") && !elsewhere[0].contains_key("x-team"),
        "{elsewhere:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn mirrors_are_asked_first_and_ranges_are_resumed() {
    let fixture = Fixture::start().await;
    let (near, far) = (Registry::start().await, Registry::start().await);
    let blob = digest(&gzip(&layers()[0]));
    far.push("library/demo", "1", &layers(), json!({}), true);
    // The near mirror may not say what a tag is, has the first layer only, and forgets how to send a part.
    near.push("library/demo", "1", &layers(), json!({}), true);
    let second = digest(&gzip(&layers()[1]));
    near.fault(&second, Fault::Status(404, vec![]), 1000);
    near.fault(&blob, Fault::Cut, 1);
    near.fault(&blob, Fault::NoRange, 1);
    far.fault("manifests/1", Fault::Status(503, vec![("retry-after", "1".to_owned())]), 2);
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\ncapabilities = [\"pull\"]\n\
         [host.\"http://127.0.0.1:1\"]\ncapabilities = [\"pull\", \"resolve\"]\n",
        far.address(),
        near.address(),
    );
    fixture.configure("_default", "hosts.toml", &text);
    let begun = std::time::Instant::now();
    let image = fixture.store.pull("any.test/library/demo:1", None).await.expect("pulled");
    assert!(begun.elapsed() >= std::time::Duration::from_secs(2), "the pauses asked for were made");
    assert_eq!(image.repo_tags, ["any.test/library/demo:1"]);
    let near = near.requests();
    assert!(near.iter().all(|request| !request.contains("manifests/1?")), "{near:?}");
    assert!(near.iter().all(|request| request.contains("ns=any.test")), "{near:?}");
    let of_blob: Vec<_> = near.iter().filter(|request| request.contains(&blob)).collect();
    assert!(of_blob.len() == 2 && of_blob[1].contains("bytes="), "{of_blob:?}");
    assert!(far.requests().iter().any(|request| request.contains(&second)), "{:?}", far.requests());
    let mounted = fixture.store.mount_readonly(&image, "test/0").await.expect("mounted");
    assert_eq!(std::fs::metadata(mounted.join("noise")).expect("there").len(), 2_400_000);
    fixture.store.unmount("test/0").await.expect("unmounted");
}

#[tokio::test(flavor = "multi_thread")]
async fn pinned_images_and_many_removals() {
    let fixture = Fixture::start().await;
    let registry = Registry::start().await;
    registry.push("pinned", "latest", &layers()[1..], json!({"User": "app:5"}), false);
    registry.push("other", "latest", &layers()[1..], json!({"User": "7"}), false);
    fixture.configure("quay.test", "hosts.toml", &format!("server = \"http://{}\"\n", registry.address()));
    assert!(fixture.store.pull("quay.test/pinned", None).await.expect("pulled").pinned);
    let other = fixture.store.pull("quay.test/other", None).await.expect("pulled");
    assert!(!other.pinned);
    let removals = (0..5).map(|_| fixture.store.remove(&other.id));
    for removed in futures::future::join_all(removals).await {
        removed.expect("removed or gone");
    }
    let left = fixture.store.list().await.expect("listed");
    assert_eq!(
        left.iter().map(|image| image.repo_tags[0].as_str()).collect::<Vec<_>>(),
        ["quay.test/pinned:latest"]
    );
}

/// A proxy that only knows one place, and what it was asked for.
async fn proxy(to: String) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("an address").to_string();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&asked);
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let (to, log) = (to.clone(), Arc::clone(&log));
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let Ok(byte) = client.read_u8().await else { return };
                    head.push(byte);
                }
                let text = String::from_utf8_lossy(&head).into_owned();
                let line = text.lines().next().unwrap_or_default().to_owned();
                let mut server = tokio::net::TcpStream::connect(&to).await.expect("connected");
                if line.starts_with("CONNECT ") {
                    client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.expect("answered");
                } else {
                    server.write_all(text.as_bytes()).await.expect("passed on");
                }
                log.lock().expect("unpoisoned").push(line);
                drop(tokio::io::copy_bidirectional(&mut client, &mut server).await);
            });
        }
    });
    (address, asked)
}

fn command(directory: &Path, config: &Path, image: &str, proxy: &str, except: &str) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_keelson-cri"))
        .current_dir(directory)
        .arg("--config")
        .arg(config)
        .args(["image", "pull", image])
        .env("HTTP_PROXY", format!("http://{proxy}"))
        .env("HTTPS_PROXY", format!("http://{proxy}"))
        .env("NO_PROXY", except)
        .output()
        .expect("started")
}

#[tokio::test(flavor = "multi_thread")]
async fn proxies_of_the_environment_are_used_where_they_should_be() {
    let fixture = Fixture::start().await;
    let authority = Authority::new();
    let registry = Registry::start_tls(authority.server(false)).await;
    registry.push("library/demo", "1", &layers()[1..], json!({}), false);
    let http = Registry::start().await;
    http.push("library/demo", "1", &layers()[1..], json!({}), false);
    let dir = fixture.containerd.dir();
    let path = |name: &str| dir.join(name).display().to_string();
    let config = json!({
        "listen": path("cri.sock"), "containerdSocket": fixture.containerd.socket(), "containerdNamespace": "cli",
        "stateDir": path("cri"), "rootDir": path("cri-root"), "netnsDir": path("netns"),
        "cni": {"confDir": path("net.d"), "binDir": path("bin"), "cacheDir": path("cache")},
        "registryConfigDir": path("certs.d"),
    });
    std::fs::write(dir.join("cri.yaml"), config.to_string()).expect("written");
    let run = |image: &str, proxy: &str, except: &str| {
        let output = command(dir, &dir.join("cri.yaml"), image, proxy, except);
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    fixture.configure("https.test", "ca.pem", &authority.pem);
    fixture.configure(
        "https.test",
        "hosts.toml",
        "server = \"https://localhost.https.test\"\nskip_verify = true\n",
    );
    fixture.configure("http.test", "hosts.toml", "server = \"http://http.test\"\n");
    let (address, asked) = proxy(registry.address()).await;
    let (done, log) = tokio::task::block_in_place(|| run("https.test/library/demo:1", &address, ""));
    assert!(done, "{log}");
    let lines = asked.lock().expect("unpoisoned").clone();
    assert!(
        !lines.is_empty() && lines.iter().all(|line| line.starts_with("CONNECT localhost.https.test:443")),
        "{lines:?}"
    );
    let (address, asked) = proxy(http.address()).await;
    let (done, log) = tokio::task::block_in_place(|| run("http.test/library/demo:1", &address, ""));
    assert!(done, "{log}");
    let lines = asked.lock().expect("unpoisoned").clone();
    assert!(
        !lines.is_empty() && lines.iter().all(|line| line.starts_with("GET http://http.test/v2/")),
        "{lines:?}"
    );
    let before = lines.len();
    let (done, _) =
        tokio::task::block_in_place(|| run("http.test/library/demo:1", &address, "http.test,other"));
    assert!(!done, "without the proxy nobody is called http.test");
    assert_eq!(asked.lock().expect("unpoisoned").len(), before);
    drop(fixture.client);
}
