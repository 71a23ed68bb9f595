//! keelson-cri on a containerd of its own, with a stand-in for the CNI plugins and a registry of its own.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use cri_shim_api::v1;
use cri_shim_api::v1::image_service_client::ImageServiceClient;
use cri_shim_api::v1::runtime_service_client::RuntimeServiceClient;
use hyper_util::rt::TokioIo;
use serde_json::json;
use tonic::transport::{Channel, Endpoint};

use super::containerd::Containerd;
use super::registry::{Registry, layer};

/// How long anything may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Records what it attached in a directory, and gives every pod the same address.
const PLUGIN: &str = r#"#!/bin/sh
case "$CNI_COMMAND" in
ADD) : > "DIR/$CNI_CONTAINERID"; echo '{"cniVersion":"1.1.0","ips":[{"address":"10.88.0.7/24"},{"address":"fd00::7/64"}]}' ;;
DEL) rm -f "DIR/$CNI_CONTAINERID" ;;
esac
"#;

/// An operation that stays at a step, see [`Cri::restart_to_hold_at`].
pub struct Held {
    fifo: PathBuf,
}

impl Held {
    /// Waits until it is there; dropping what is given back lets it go on.
    pub async fn reached(&self) -> std::fs::File {
        let begun = tokio::time::Instant::now();
        loop {
            let mut writing = std::fs::OpenOptions::new();
            std::os::unix::fs::OpenOptionsExt::custom_flags(&mut writing, nix::libc::O_NONBLOCK);
            // Without a reader it is refused.
            if let Ok(file) = writing.write(true).open(&self.fifo) {
                return file;
            }
            assert!(begun.elapsed() < PATIENCE, "the step is never reached");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// A server under test.
pub struct Cri {
    /// Its containerd.
    pub containerd: Containerd,
    registry: Registry,
    child: Child,
    cgroup: String,
    netns: Option<PathBuf>,
}

impl Cri {
    /// Starts everything and pulls a busybox image called `docker.io/library/busybox:latest`.
    pub async fn start() -> Self {
        let containerd = Containerd::start();
        let registry = Registry::start().await;
        let dir = containerd.dir();
        for sub in ["net.d", "attached", "bin", "certs.d/docker.io"] {
            std::fs::create_dir_all(dir.join(sub)).expect("made");
        }
        let plugin = dir.join("bin/stand-in");
        let text = PLUGIN.replace("DIR", &dir.join("attached").display().to_string());
        std::fs::write(&plugin, text).expect("written");
        std::fs::set_permissions(&plugin, std::fs::Permissions::from_mode(0o755)).expect("executable");
        let hosts = format!("[host.\"http://{}\"]\n", registry.address());
        std::fs::write(dir.join("certs.d/docker.io/hosts.toml"), hosts).expect("written");
        std::fs::write(dir.join("cri.yaml"), configuration(dir)).expect("written");
        push_busybox(&registry);
        let child = spawn(dir, None, None);
        let cgroup = format!("/keelson-cri-test-{}", std::process::id());
        let this = Self { containerd, registry, child, cgroup, netns: None };
        this.wait_until_serving().await;
        this.configure_network();
        this.wait_for("NetworkReady").await;
        this.pull("busybox").await;
        this
    }

    /// Restarts the server in another network namespace, which its CNI plugins take for the node's. The registry is not
    /// reached from there.
    pub async fn move_to(&mut self, netns: &Path) {
        self.netns = Some(netns.to_owned());
        self.restart().await;
    }

    /// The directory everything is in.
    pub fn dir(&self) -> &Path {
        self.containerd.dir()
    }

    /// Writes the CNI configuration.
    pub fn configure_network(&self) {
        let list = json!({ "cniVersion": "1.1.0", "name": "test", "plugins": [{ "type": "stand-in" }] });
        let new = self.dir().join("net.d/new");
        std::fs::write(&new, list.to_string()).expect("written");
        std::fs::rename(new, self.dir().join("net.d/10-test.conflist")).expect("renamed");
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("reaped");
    }

    /// Starts it again.
    pub async fn start_again(&mut self) {
        self.child = spawn(self.dir(), self.netns.as_deref(), None);
        self.wait_until_serving().await;
    }

    /// Kills it and starts it again such that it aborts at a step.
    pub async fn restart_to_die_at(&mut self, step: &str) {
        self.restart_to(keelson_cri::steps::ABORT_AT, step).await;
    }

    /// Kills it and starts it again such that it stops at a step, until it is sent SIGCONT.
    pub async fn restart_to_halt_at(&mut self, step: &str) {
        self.restart_to(keelson_cri::steps::HALT_AT, step).await;
    }

    /// Kills it and starts it again such that one operation stays at a step while others go on.
    pub async fn restart_to_hold_at(&mut self, step: &str) -> Held {
        let fifo = self.dir().join(format!("hold-{}", step.replace(':', "-")));
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).expect("made");
        let point = format!("{step}={}", fifo.display());
        self.restart_to(keelson_cri::steps::HOLD_AT, &point).await;
        Held { fifo }
    }

    async fn restart_to(&mut self, variable: &str, step: &str) {
        self.kill();
        self.child = spawn(self.dir(), self.netns.as_deref(), Some((variable, step)));
        self.wait_until_serving().await;
    }

    /// Whether it has stopped, as [`Cri::restart_to_halt_at`] told it to.
    pub fn halted(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap_or_default();
        stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(self.pid().cast_signed());
        nix::sys::signal::kill(pid, signal).expect("signalled");
    }

    /// Waits until it has died by itself; the signal that ended it.
    pub async fn died(&mut self) -> Option<i32> {
        let begun = tokio::time::Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("waited") {
                return std::os::unix::process::ExitStatusExt::signal(&status);
            }
            assert!(begun.elapsed() < PATIENCE, "it still runs");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Changes a part of the configuration and restarts with it.
    pub async fn reconfigure(&mut self, changes: &serde_json::Value) {
        self.kill();
        self.reconfigure_stopped(changes).await;
    }

    /// Changes a part of the configuration of a server that was killed, and starts it again.
    pub async fn reconfigure_stopped(&mut self, changes: &serde_json::Value) {
        let path = self.dir().join("cri.yaml");
        let text = std::fs::read_to_string(&path).expect("read");
        let mut all: serde_json::Value = serde_json::from_str(&text).expect("JSON is YAML");
        for (key, value) in changes.as_object().expect("an object") {
            all[key] = value.clone();
        }
        std::fs::write(&path, all.to_string()).expect("written");
        self.start_again().await;
    }

    /// What a sandbox's verbose status says of its pause process.
    pub async fn pause_pid(&self, sandbox: &str) -> nix::unistd::Pid {
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: sandbox.to_owned(), verbose: true };
        let info = self.runtime().pod_sandbox_status(request).await.expect("status").into_inner().info;
        let info: serde_json::Value = serde_json::from_str(&info["info"]).expect("JSON");
        nix::unistd::Pid::from_raw(info["pid"].as_i64().expect("a pid").try_into().expect("a pid"))
    }

    /// The state of a sandbox.
    pub async fn state_of(&self, sandbox: &str) -> v1::PodSandboxState {
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: sandbox.to_owned(), verbose: false };
        let answer = self.runtime().pod_sandbox_status(request).await.expect("status").into_inner();
        answer.status.expect("status").state()
    }

    /// The shims of its containerd.
    pub fn shims(&self) -> Vec<nix::unistd::Pid> {
        shims(&self.dir().display().to_string())
    }

    /// `kill -9` and a new start.
    pub async fn restart(&mut self) {
        self.kill();
        self.start_again().await;
    }

    /// Asks it to stop and gives its exit code.
    pub fn terminate(&mut self) -> Option<i32> {
        let pid = nix::unistd::Pid::from_raw(self.child.id().try_into().expect("a pid"));
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("signalled");
        self.child.wait().expect("reaped").code()
    }

    /// A client of the runtime service.
    pub fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(channel(&self.dir().join("cri.sock")))
    }

    /// A client of the image service.
    pub fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(channel(&self.dir().join("cri.sock")))
    }

    /// Pulls an image from the registry of its own.
    pub async fn pull(&self, image: &str) -> String {
        let spec = v1::ImageSpec { image: image.to_owned(), ..v1::ImageSpec::default() };
        let request = v1::PullImageRequest { image: Some(spec), ..v1::PullImageRequest::default() };
        self.images().pull_image(request).await.expect("pulled").into_inner().image_ref
    }

    /// The configuration of a pod called `name`.
    pub fn pod(&self, name: &str) -> v1::PodSandboxConfig {
        let metadata = v1::PodSandboxMetadata {
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            namespace: "default".to_owned(),
            attempt: 0,
        };
        let linux = v1::LinuxPodSandboxConfig {
            cgroup_parent: format!("{}/{name}", self.cgroup),
            ..v1::LinuxPodSandboxConfig::default()
        };
        v1::PodSandboxConfig {
            metadata: Some(metadata),
            hostname: name.to_owned(),
            log_directory: self.dir().join("podlogs").join(name).display().to_string(),
            labels: BTreeMap::from([("app".to_owned(), name.to_owned())]),
            annotations: BTreeMap::from([("note".to_owned(), "kept".to_owned())]),
            linux: Some(linux),
            ..v1::PodSandboxConfig::default()
        }
    }

    /// The registry that it pulls from as docker.io.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Runs the program beside the server, with the same configuration.
    pub fn command(&self, arguments: &[&str]) -> std::process::Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_keelson-cri"));
        command.arg("--config").arg(self.dir().join("cri.yaml")).args(arguments);
        command.output().expect("keelson-cri runs")
    }

    /// Serves an image and pulls it.
    pub async fn push(&self, name: &str, layers: &[Vec<u8>], config: serde_json::Value) {
        self.registry.push(&format!("library/{name}"), "latest", layers, config, false);
        self.pull(name).await;
    }

    /// The handlers that are offered, by name, with what they can do.
    pub async fn handlers(&self) -> Vec<v1::RuntimeHandler> {
        let answer = self.runtime().status(v1::StatusRequest::default()).await.expect("status");
        let named = |handler: &v1::RuntimeHandler| !handler.name.is_empty();
        answer.into_inner().runtime_handlers.into_iter().filter(named).collect()
    }

    /// Runs a sandbox with a handler.
    pub async fn run_with(&self, pod: &v1::PodSandboxConfig, handler: &str) -> Result<String, tonic::Status> {
        let request =
            v1::RunPodSandboxRequest { config: Some(pod.clone()), runtime_handler: handler.to_owned() };
        Ok(self.runtime().run_pod_sandbox(request).await?.into_inner().pod_sandbox_id)
    }

    /// Runs a container to its end: what it wrote to both streams, and its status. It must not print `END` itself.
    pub async fn output(
        &self,
        sandbox: &str,
        pod: &v1::PodSandboxConfig,
        mut config: v1::ContainerConfig,
    ) -> (String, v1::ContainerStatus) {
        let name = config.metadata.as_ref().expect("a name").name.clone();
        if let Some(script) = config.command.last_mut() {
            *script = format!("{{ {script}\n}} 2>&1; code=$?; echo END; exit $code");
        }
        let id = Box::pin(self.create(sandbox, pod, config)).await.expect("created");
        self.launch(&id).await.expect("started");
        let pod_name = pod.metadata.as_ref().expect("a name").name.clone();
        let log = self.log_has(&pod_name, &name, "END\n").await;
        let lines: Vec<&str> = log.lines().filter_map(|line| line.splitn(4, ' ').nth(3)).collect();
        let text = lines.join("\n");
        let text = text.strip_suffix("END").unwrap_or(&text);
        (text.strip_suffix('\n').unwrap_or(text).to_owned(), self.ended(&id).await)
    }

    /// Runs a sandbox.
    pub async fn run(&self, pod: &v1::PodSandboxConfig) -> Result<String, tonic::Status> {
        let request =
            v1::RunPodSandboxRequest { config: Some(pod.clone()), ..v1::RunPodSandboxRequest::default() };
        Ok(self.runtime().run_pod_sandbox(request).await?.into_inner().pod_sandbox_id)
    }

    /// Makes a container.
    pub async fn create(
        &self,
        sandbox: &str,
        pod: &v1::PodSandboxConfig,
        config: v1::ContainerConfig,
    ) -> Result<String, tonic::Status> {
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: sandbox.to_owned(),
            config: Some(config),
            sandbox_config: Some(pod.clone()),
        };
        Ok(Box::pin(self.runtime().create_container(request)).await?.into_inner().container_id)
    }

    /// Starts a container.
    pub async fn launch(&self, id: &str) -> Result<(), tonic::Status> {
        let request = v1::StartContainerRequest { container_id: id.to_owned() };
        self.runtime().start_container(request).await.map(drop)
    }

    /// Makes and starts a container that runs a shell script.
    pub async fn script(
        &self,
        sandbox: &str,
        pod: &v1::PodSandboxConfig,
        name: &str,
        script: &str,
    ) -> String {
        let id = self.create(sandbox, pod, shell(name, script)).await.expect("created");
        self.launch(&id).await.expect("started");
        id
    }

    /// A container's status.
    pub async fn status(&self, id: &str) -> v1::ContainerStatus {
        let request = v1::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        self.runtime().container_status(request).await.expect("status").into_inner().status.expect("status")
    }

    /// Waits until a container has ended.
    pub async fn ended(&self, id: &str) -> v1::ContainerStatus {
        let mut last = self.status(id).await;
        let begun = tokio::time::Instant::now();
        while last.state() != v1::ContainerState::ContainerExited {
            assert!(begun.elapsed() < PATIENCE, "still not ended: {last:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
            last = self.status(id).await;
        }
        last
    }

    /// Runs a command in a container.
    pub async fn exec(&self, id: &str, command: &[&str]) -> v1::ExecSyncResponse {
        let cmd = command.iter().map(|word| (*word).to_owned()).collect();
        let request = v1::ExecSyncRequest { container_id: id.to_owned(), cmd, timeout: 30 };
        self.runtime().exec_sync(request).await.expect("run").into_inner()
    }

    /// Waits until commands run in a container again.
    pub async fn answers(&self, id: &str) {
        let begun = tokio::time::Instant::now();
        loop {
            let cmd = vec!["/bin/echo".to_owned()];
            let request = v1::ExecSyncRequest { container_id: id.to_owned(), cmd, timeout: 30 };
            match self.runtime().exec_sync(request).await {
                Ok(_) => return,
                Err(status) => assert!(begun.elapsed() < PATIENCE, "{status}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until a container's log holds `text`.
    pub async fn log_has(&self, pod: &str, name: &str, text: &str) -> String {
        let path = self.dir().join("podlogs").join(pod).join(format!("{name}.log"));
        let begun = tokio::time::Instant::now();
        loop {
            let log = std::fs::read_to_string(&path).unwrap_or_default();
            if log.contains(text) {
                return log;
            }
            assert!(begun.elapsed() < PATIENCE, "{text:?} is not in {log:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Stops and removes a sandbox.
    pub async fn remove(&self, sandbox: &str) {
        let stop = v1::StopPodSandboxRequest { pod_sandbox_id: sandbox.to_owned() };
        self.runtime().stop_pod_sandbox(stop).await.expect("stopped");
        let remove = v1::RemovePodSandboxRequest { pod_sandbox_id: sandbox.to_owned() };
        self.runtime().remove_pod_sandbox(remove).await.expect("removed");
    }

    /// Waits until it works, also after containerd was away.
    pub async fn serves(&self) {
        self.wait_until_serving().await;
    }

    async fn wait_until_serving(&self) {
        self.wait_for("RuntimeReady").await;
    }

    async fn wait_for(&self, condition: &str) {
        let begun = tokio::time::Instant::now();
        loop {
            let answer = self.runtime().status(v1::StatusRequest::default()).await;
            let conditions = answer.map(|answer| answer.into_inner().status.unwrap_or_default().conditions);
            if let Ok(all) = &conditions
                && all.iter().any(|known| known.r#type == condition && known.status)
            {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "{condition} is not true: {conditions:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The cgroup of this test below each controller.
    pub fn cgroups(&self) -> Vec<PathBuf> {
        let below = self.cgroup.trim_start_matches('/');
        let root = Path::new("/sys/fs/cgroup");
        let mut roots: Vec<PathBuf> = names(root).iter().map(|name| root.join(name)).collect();
        roots.push(root.to_owned());
        roots.iter().map(|root| root.join(below)).filter(|path| path.is_dir()).collect()
    }
}

impl Drop for Cri {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.dir().join("cri.log")).unwrap_or_default();
            #[allow(clippy::print_stderr, reason = "a failed test tells why")]
            {
                eprintln!("--- log of keelson-cri ---\n{log}");
            }
        }
        drop(self.child.kill());
        drop(self.child.wait());
        // The guard of containerd ends shims and unmounts; cgroups go once their processes have.
        for process in shims(&self.dir().display().to_string()) {
            nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGKILL).ok();
        }
        for cgroup in self.cgroups() {
            for process in members(&cgroup) {
                nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGKILL).ok();
            }
        }
        for cgroup in self.cgroups() {
            let begun = std::time::Instant::now();
            while cgroup.is_dir() && begun.elapsed() < Duration::from_secs(5) {
                for path in walk(&cgroup).iter().rev() {
                    drop(std::fs::remove_dir(path));
                }
            }
        }
    }
}

/// A container that runs a shell script and logs to `<name>.log`.
pub fn shell(name: &str, script: &str) -> v1::ContainerConfig {
    let metadata = v1::ContainerMetadata { name: name.to_owned(), attempt: 0 };
    let image = v1::ImageSpec { image: "busybox".to_owned(), ..v1::ImageSpec::default() };
    v1::ContainerConfig {
        metadata: Some(metadata),
        image: Some(image),
        command: vec!["/bin/sh".to_owned(), "-c".to_owned(), script.to_owned()],
        log_path: format!("{name}.log"),
        linux: Some(v1::LinuxContainerConfig {
            security_context: Some(v1::LinuxContainerSecurityContext {
                namespace_options: Some(v1::NamespaceOption {
                    pid: v1::NamespaceMode::Container.into(),
                    ..v1::NamespaceOption::default()
                }),
                seccomp: Some(v1::SecurityProfile::default()),
                masked_paths: vec!["/proc/kcore".to_owned()],
                readonly_paths: vec!["/proc/sys".to_owned()],
                ..v1::LinuxContainerSecurityContext::default()
            }),
            ..v1::LinuxContainerConfig::default()
        }),
        ..v1::ContainerConfig::default()
    }
}

fn configuration(dir: &Path) -> String {
    let path = |name: &str| dir.join(name).display().to_string();
    json!({
        "listen": path("cri.sock"),
        "containerdSocket": path("containerd.sock"),
        "stateDir": path("cri/state"),
        "rootDir": path("cri/root"),
        "netnsDir": path("cri/netns"),
        "cni": { "confDir": path("net.d"), "binDir": path("bin"), "cacheDir": path("cni-cache") },
        "registryConfigDir": path("certs.d"),
        // Every test holds for each handler; one is chosen for a run. Named, so that nothing falls back to another.
        "defaultHandler": std::env::var("KEELSON_TEST_HANDLER").unwrap_or_else(|_| "keelson".to_owned()),
        "cdiDirs": [path("cdi")],
        "metrics": { "socket": path("metrics.sock") },
    })
    .to_string()
}

fn spawn(dir: &Path, netns: Option<&Path>, variable: Option<(&str, &str)>) -> Child {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(dir.join("cri.log")).expect("log");
    let program = env!("CARGO_BIN_EXE_keelson-cri");
    let mut command = match netns {
        // It becomes the program that it runs, so the process is the server.
        Some(netns) => {
            let mut command = Command::new("nsenter");
            command.arg(format!("--net={}", netns.display())).arg(program);
            command
        }
        None => Command::new(program),
    };
    command
        .arg("--config")
        .arg(dir.join("cri.yaml"))
        .envs(variable)
        // Programs that a test puts there stand in for the host's.
        .env("PATH", format!("{}:{}", dir.join("path").display(), std::env::var("PATH").unwrap_or_default()))
        .stderr(log)
        .spawn()
        .expect("keelson-cri runs")
}

fn push_busybox(registry: &Registry) {
    let config = json!({ "Env": ["PATH=/bin", "FROM_IMAGE=yes"], "Cmd": ["/bin/sh"] });
    registry.push("library/busybox", "latest", &busybox_layers(), config, false);
}

/// The programs and the users of the busybox image.
pub fn busybox_layers() -> Vec<Vec<u8>> {
    let busybox = std::fs::read("/bin/busybox").expect("busybox-static is installed");
    let programs = [
        "sh", "cat", "echo", "sleep", "id", "hostname", "head", "env", "kill", "ls", "tr", "dd", "mount",
        "stty", "mkdir", "httpd",
    ];
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(busybox.len() as u64);
    header.set_mode(0o755);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    archive.append_data(&mut header, "bin/busybox", busybox.as_slice()).expect("appended");
    for program in programs {
        let mut link = tar::Header::new_gnu();
        link.set_entry_type(tar::EntryType::Symlink);
        link.set_size(0);
        link.set_mode(0o777);
        link.set_uid(0);
        link.set_gid(0);
        link.set_mtime(0);
        archive.append_link(&mut link, format!("bin/{program}"), "busybox").expect("appended");
    }
    let programs = archive.into_inner().expect("finished");
    let users = layer(&[
        ("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nweb:x:33:33::/:/bin/sh\n", 0o644),
        ("etc/group", b"root:x:0:\nweb:x:33:\nextra:x:77:web\n", 0o644),
    ]);
    vec![programs, users]
}

fn channel(socket: &Path) -> Channel {
    let socket = socket.to_owned();
    Endpoint::from_static("http://cri.invalid").connect_with_connector_lazy(tower::service_fn(
        move |_: http::Uri| {
            let socket = socket.clone();
            async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
        },
    ))
}

/// What is in a directory; nothing when there is none.
pub fn names(directory: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// A directory and all below it, parents first.
pub fn walk(directory: &Path) -> Vec<PathBuf> {
    let mut all = vec![directory.to_owned()];
    let mut next = 0;
    while next < all.len() {
        let entries = std::fs::read_dir(&all[next]).into_iter().flatten().flatten();
        let below: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
        all.extend(below);
        next += 1;
    }
    all
}

fn members(cgroup: &Path) -> Vec<nix::unistd::Pid> {
    let text: String = walk(cgroup)
        .iter()
        .filter_map(|path| std::fs::read_to_string(path.join("cgroup.procs")).ok())
        .collect();
    text.lines().filter_map(|pid| pid.parse().ok()).map(nix::unistd::Pid::from_raw).collect()
}

/// Shims whose command line names a directory.
pub fn shims(marker: &str) -> Vec<nix::unistd::Pid> {
    let ours = |pid: &i32| {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).into_owned();
        command.contains("containerd-shim") && command.contains(marker)
    };
    names(Path::new("/proc"))
        .iter()
        .filter_map(|name| name.parse().ok())
        .filter(ours)
        .map(nix::unistd::Pid::from_raw)
        .collect()
}
