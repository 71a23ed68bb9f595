//! Images with a runtime made of memory, served on a real unix socket, and files on a real disk.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use cri_shim_api::v1::image_service_server::{ImageService, ImageServiceServer};
use k8s_openapi::api::core::v1::Secret;
use serde_json::json;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

use super::*;
use crate::config::AgentConfig;
use crate::runtime::auth::credentials;
use crate::runtime::cri;
use crate::runtime::images::{ImageError, Images, PullPolicy, ReadyImage};

const APP: &str = "r.example/team/app:1";
const OPEN: &str = "nginx";

/// Images by name, with their ids; those of `r.example` want the password `good`.
#[derive(Debug, Default)]
struct Registry {
    here: BTreeMap<String, String>,
    pulls: Vec<String>,
    /// What is asked now never ends.
    stalls: bool,
}

#[derive(Debug, Clone, Default)]
struct FakeImages(Arc<Mutex<Registry>>);

impl FakeImages {
    fn lock(&self) -> MutexGuard<'_, Registry> {
        self.0.lock().unwrap()
    }

    fn id(name: &str) -> String {
        format!("sha256:{}", repository(name))
    }

    fn preload(&self, name: &str) {
        self.lock().here.insert(full_reference(name), Self::id(name));
    }

    /// What was pulled since the last question.
    fn pulled(&self) -> Vec<String> {
        std::mem::take(&mut self.lock().pulls)
    }
}

fn named(image: Option<v1::ImageSpec>) -> String {
    image.unwrap_or_default().image
}

#[tonic::async_trait]
impl ImageService for FakeImages {
    type StreamImagesStream = tokio_stream::Empty<Result<v1::StreamImagesResponse, Status>>;

    async fn list_images(
        &self,
        _request: Request<v1::ListImagesRequest>,
    ) -> Result<Response<v1::ListImagesResponse>, Status> {
        let registry = self.lock();
        let image = |(name, id): (&String, &String)| v1::Image {
            id: id.clone(),
            repo_tags: vec![name.clone()],
            ..v1::Image::default()
        };
        Ok(Response::new(v1::ListImagesResponse { images: registry.here.iter().map(image).collect() }))
    }

    async fn image_status(
        &self,
        request: Request<v1::ImageStatusRequest>,
    ) -> Result<Response<v1::ImageStatusResponse>, Status> {
        let name = named(request.into_inner().image);
        let registry = self.lock();
        let mut all = registry.here.iter();
        let found = all.find(|(known, id)| **known == full_reference(&name) || **id == name);
        let image = found.map(|(_, id)| v1::Image { id: id.clone(), ..v1::Image::default() });
        Ok(Response::new(v1::ImageStatusResponse { image, ..v1::ImageStatusResponse::default() }))
    }

    async fn pull_image(
        &self,
        request: Request<v1::PullImageRequest>,
    ) -> Result<Response<v1::PullImageResponse>, Status> {
        let request = request.into_inner();
        let name = named(request.image);
        let password = request.auth.map(|auth| auth.password).unwrap_or_default();
        self.lock().pulls.push(format!("{name} {password}"));
        if name.starts_with("r.example/") && !password.starts_with("good") {
            return Err(Status::unknown("pull access denied"));
        }
        self.preload(&name);
        let stalls = self.lock().stalls;
        if stalls {
            std::future::pending::<()>().await;
        }
        Ok(Response::new(v1::PullImageResponse { image_ref: Self::id(&name) }))
    }

    async fn remove_image(
        &self,
        _request: Request<v1::RemoveImageRequest>,
    ) -> Result<Response<v1::RemoveImageResponse>, Status> {
        Err(Status::unimplemented("remove_image"))
    }

    async fn image_fs_info(
        &self,
        _request: Request<v1::ImageFsInfoRequest>,
    ) -> Result<Response<v1::ImageFsInfoResponse>, Status> {
        Err(Status::unimplemented("image_fs_info"))
    }

    async fn stream_images(
        &self,
        _request: Request<v1::StreamImagesRequest>,
    ) -> Result<Response<Self::StreamImagesStream>, Status> {
        Err(Status::unimplemented("stream_images"))
    }
}

struct Bench {
    dir: tempfile::TempDir,
    runtime: FakeImages,
    images: Images,
    settings: String,
}

impl Bench {
    fn new(settings: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let runtime = FakeImages::default();
        let listener = UnixListener::bind(dir.path().join("cri.sock")).unwrap();
        let server =
            tonic::transport::Server::builder().add_service(ImageServiceServer::new(runtime.clone()));
        tokio::spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
        let images = Self::images(dir.path(), settings);
        Self { dir, runtime, images, settings: settings.to_owned() }
    }

    fn images(dir: &Path, settings: &str) -> Images {
        let yaml = format!(
            "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n{settings}\nkeelson: {{nodeName: n, \
             nodeIP: 10.0.0.1, kubeconfig: /x, rootDir: {}}}\n",
            dir.display()
        );
        let config = AgentConfig::parse(Path::new("test"), &yaml).unwrap();
        let socket = dir.join("cri.sock");
        Images::of(&config, cri::connect(socket.clone(), socket, Duration::from_secs(60)))
    }

    /// As after kill -9.
    fn restart(&mut self) {
        self.images = Self::images(self.dir.path(), &self.settings);
    }

    async fn ask(&self, image: &str, policy: PullPolicy, own: &[Secret]) -> Result<ReadyImage, ImageError> {
        let secrets: Vec<Arc<Secret>> = own.iter().cloned().map(Arc::new).collect();
        self.images.ensure(image, policy, credentials(image, &secrets), None, || ()).await
    }

    /// Whether a pod that would rather not pull gets the image, and what was pulled for it.
    async fn get(&self, image: &str, own: &[Secret]) -> (bool, Vec<String>) {
        let got = self.ask(image, PullPolicy::IfNotPresent, own).await.is_ok();
        (got, self.runtime.pulled())
    }

    fn files(&self, directory: &str) -> Vec<PathBuf> {
        let directory = self.dir.path().join("image_manager").join(directory);
        let names = snapshot(&directory).unwrap().into_keys();
        names.map(|name| directory.join(name)).collect()
    }

    fn metric(&self, labels: &str) -> u64 {
        let families = self.images.counters().families().into_iter();
        let mut samples = families.flat_map(|(name, _, _, samples)| {
            samples.into_iter().map(move |(labels, count)| (format!("{name}{labels}"), count))
        });
        samples.find(|(known, _)| known == labels).map_or(0, |(_, count)| count)
    }
}

fn secret(name: &str, password: &str) -> Secret {
    let auths = json!({"auths": {"r.example": {"username": "me", "password": password}}});
    let secret = json!({
        "metadata": {"name": name, "namespace": "ns", "uid": format!("uid-{name}")},
        "data": {".dockerconfigjson": base64(&auths.to_string())},
    });
    serde_json::from_value(secret).unwrap()
}

fn base64(text: &str) -> String {
    use ::base64::Engine as _;
    ::base64::engine::general_purpose::STANDARD.encode(text)
}

fn pulled(image: &str, password: &str) -> Vec<String> {
    vec![format!("{image} {password}")]
}

#[tokio::test]
async fn who_has_not_what_an_image_was_pulled_with_must_ask_the_registry() {
    let bench = Bench::new("");
    let (mine, theirs) = ([secret("mine", "good")], [secret("theirs", "bad")]);
    assert_eq!(bench.get(APP, &mine).await, (true, pulled(APP, "good")));
    let ready = bench.ask(APP, PullPolicy::IfNotPresent, &mine).await.unwrap();
    let words =
        format!("Container image \"{APP}\" already present on machine and can be accessed by the pod");
    assert_eq!((ready.event, bench.runtime.pulled().len()), (words, 0));
    // Without credentials, and with wrong ones.
    let refused = bench.ask(APP, PullPolicy::IfNotPresent, &[]).await.unwrap_err();
    let words = "rpc error: code = Unknown desc = pull access denied";
    assert_eq!((refused.reason, refused.message.as_str()), ("ErrImagePull", words));
    assert_eq!(bench.runtime.pulled(), pulled(APP, ""));
    assert_eq!(bench.get(APP, &theirs).await, (false, pulled(APP, "bad")));
    // Whoever never pulls is not even told that it is there.
    let never = bench.ask(APP, PullPolicy::Never, &theirs).await.unwrap_err();
    let words = format!("Container image \"{APP}\" is not present with pull policy of Never");
    assert_eq!((never.reason, never.message), ("ErrImageNeverPull", words));
    assert!(bench.ask(APP, PullPolicy::Never, &mine).await.is_ok());
    assert!(bench.runtime.pulled().is_empty() && bench.files("pulling").is_empty());
    let checks = |result: &str| {
        bench.metric(&format!("kubelet_imagemanager_image_mustpull_checks_total{{result=\"{result}\"}}"))
    };
    assert_eq!((checks("credentialRecordFound"), checks("mustAuthenticate"), checks("error")), (2, 3, 0));
    let ensured = |labels: &str| {
        bench.metric(&format!("kubelet_image_manager_ensure_image_requests_total{{{labels}}}"))
    };
    let labels = "present_locally=\"true\",pull_policy=\"never\",pull_required=\"true\"";
    assert_eq!(ensured(labels), 1);
    assert_eq!(bench.metric("kubelet_imagemanager_ondisk_pulledrecords"), 1);
}

#[tokio::test]
async fn a_copied_and_a_renewed_secret_are_as_good_also_after_a_restart() {
    let mut bench = Bench::new("");
    assert!(bench.get(APP, &[secret("first", "good")]).await.0);
    bench.runtime.pulled();
    for own in [secret("copy", "good"), secret("copy", "good, renewed")] {
        bench.restart();
        assert_eq!(bench.get(APP, &[own]).await, (true, Vec::new()));
    }
    // What the copy was is known no more, what the first one is, is.
    let text = fs::read_to_string(&bench.files("pulled")[0]).unwrap();
    let record = written::read_record(&text).unwrap();
    let names: Vec<&str> = record.credentials["r.example/team/app"]
        .kubernetes_secrets
        .iter()
        .map(|secret| secret.name.as_str())
        .collect();
    assert_eq!(names, ["copy", "first"]);
    assert_eq!(fs::metadata(&bench.files("pulled")[0]).unwrap().mode() & 0o777, 0o600);
}

#[tokio::test]
async fn what_needs_no_credentials_is_for_everybody() {
    let bench = Bench::new("imagePullCredentialsVerificationPolicy: AlwaysVerify");
    assert_eq!(bench.get(OPEN, &[]).await, (true, pulled(OPEN, "")));
    for own in [vec![], vec![secret("any", "bad")]] {
        assert_eq!(bench.get("docker.io/library/nginx:latest", &own).await, (true, Vec::new()));
    }
}

#[tokio::test]
async fn policies_differ_in_images_that_were_there_before() {
    for (policy, pulls) in [
        ("", 0),
        ("imagePullCredentialsVerificationPolicy: NeverVerify", 0),
        ("imagePullCredentialsVerificationPolicy: AlwaysVerify", 1),
        (
            "imagePullCredentialsVerificationPolicy: NeverVerifyAllowlistedImages\n\
             preloadedImagesVerificationAllowlist: [r.example/team/*]",
            0,
        ),
        (
            "imagePullCredentialsVerificationPolicy: NeverVerifyAllowlistedImages\n\
             preloadedImagesVerificationAllowlist: [r.example/other]",
            1,
        ),
        ("featureGates: {KubeletEnsureSecretPulledImages: false}", 0),
    ] {
        let bench = Bench::new(policy);
        bench.runtime.preload(APP);
        let (got, asked) = bench.get(APP, &[]).await;
        assert_eq!((got, asked.len()), (pulls == 0, pulls), "{policy}");
        assert!(bench.files("pulling").is_empty() && bench.files("pulled").is_empty(), "{policy}");
    }
}

#[tokio::test]
async fn a_pull_that_nobody_saw_the_end_of_opens_the_image_to_nobody() {
    let mut bench = Bench::new("");
    bench.runtime.lock().stalls = true;
    let secrets = [secret("mine", "good")];
    // The pod goes while the image comes.
    let begun = async {
        while bench.runtime.lock().pulls.is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        _ = bench.ask(APP, PullPolicy::IfNotPresent, &secrets) => panic!("the registry stalls"),
        () = begun => {}
    }
    bench.runtime.lock().stalls = false;
    assert_eq!(bench.runtime.pulled().len(), 1);
    assert_eq!((bench.files("pulling").len(), bench.files("pulled").len()), (1, 0));
    assert_eq!(bench.get(APP, &[]).await, (false, pulled(APP, "")));
    assert_eq!(bench.files("pulling").len(), 1, "that another failed says nothing of the first");
    // The same for the agent that comes after.
    bench.restart();
    assert!(!bench.get(APP, &[]).await.0);
    assert_eq!((bench.files("pulling").len(), bench.files("pulled").len()), (0, 1));
    assert!(bench.get(APP, &secrets).await.0);
    bench.runtime.pulled();
    assert_eq!(bench.get(APP, &secrets).await, (true, Vec::new()));
}

#[tokio::test]
async fn an_intent_without_an_image_stays_until_the_image_comes() {
    let mut bench = Bench::new("");
    let intent = bench.dir.path().join("image_manager/pulling").join(file_name(APP));
    fs::create_dir_all(intent.parent().unwrap()).unwrap();
    fs::write(&intent, written::intent(APP)).unwrap();
    fs::write(intent.with_file_name("sha256-broken"), "{").unwrap();
    fs::write(intent.with_file_name("sha256-half.tmp"), "{").unwrap();
    assert!(bench.get(OPEN, &[]).await.0);
    assert!(intent.exists());
    bench.runtime.preload(APP);
    bench.restart();
    assert!(!bench.get(APP, &[]).await.0, "an agent began to pull it");
}

#[tokio::test]
async fn a_record_that_is_not_understood_is_replaced_by_the_next_pull() {
    for text in [
        "",
        "{\"kind\":\"ImagePulledRecord\",\"apiVersion\":\"kubelet.config.k8s.io/v2\",\"imageRef\":\"x\"}",
    ] {
        let bench = Bench::new("");
        let mine = [secret("mine", "good")];
        assert!(bench.get(APP, &mine).await.0);
        bench.runtime.pulled();
        let file = bench.files("pulled").remove(0);
        fs::write(&file, text).unwrap();
        assert_eq!(bench.get(APP, &[]).await, (false, pulled(APP, "")));
        assert_eq!(bench.get(APP, &mine).await, (true, pulled(APP, "good")));
        assert_eq!(bench.get(APP, &mine).await, (true, Vec::new()));
    }
}

#[tokio::test]
async fn who_pulled_an_image_is_forgotten_with_it_and_not_when_it_came_back() {
    let bench = Bench::new("");
    let mine = [secret("mine", "good")];
    assert!(bench.get(APP, &mine).await.0 && bench.get(OPEN, &[]).await.0);
    bench.images.forgetting(async {}).await;
    assert_eq!(bench.files("pulled").len(), 2);
    bench.runtime.lock().here.remove(&full_reference(OPEN));
    bench.images.forgetting(async {}).await;
    assert_eq!(bench.files("pulled").len(), 1);
    // It goes, and comes back after the runtime was asked.
    let records = PullRecords::new(bench.dir.path(), Policy::AlwaysVerify, Arc::default());
    let before = records.snapshot().await;
    bench.runtime.lock().here.clear();
    assert!(bench.get(APP, &mine).await.0);
    records.forget(before, BTreeSet::new()).await;
    assert_eq!(bench.files("pulled").len(), 1);
}

#[tokio::test]
async fn pulls_side_by_side_leave_one_record_and_no_intent() {
    let bench = Bench::new("");
    let failed = AtomicU32::new(0);
    let asked = (0..8).map(|number| {
        let own = [secret(&format!("s{number}"), if number % 2 == 0 { "good" } else { "bad" })];
        let (bench, failed) = (&bench, &failed);
        async move {
            if bench.ask(APP, PullPolicy::Always, &own).await.is_err() {
                failed.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    futures::future::join_all(asked).await;
    assert_eq!(failed.into_inner(), 4);
    assert_eq!((bench.files("pulling").len(), bench.files("pulled").len()), (0, 1));
    let text = fs::read_to_string(&bench.files("pulled")[0]).unwrap();
    let record = written::read_record(&text).unwrap();
    assert_eq!(record.credentials["r.example/team/app"].kubernetes_secrets.len(), 4);
}
