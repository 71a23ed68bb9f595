//! A containerd with containers that the shim under test (or runc's, to compare with) runs.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use containerd_client::services::v1 as api;
use containerd_client::services::v1::container::Runtime;
use containerd_client::services::v1::containers_client::ContainersClient;
use containerd_client::services::v1::events_client::EventsClient;
use containerd_client::services::v1::tasks_client::TasksClient;
use containerd_client::tonic::transport::Channel;
use containerd_client::tonic::{Request, Status};
use containerd_client::types::Mount;
use prost_types::Any;
use serde_json::{Value, json};

use super::containerd::Containerd;
use super::{PATIENCE, wait_for};

const NAMESPACE: &str = "shimtest";
static NEXT: AtomicU32 = AtomicU32::new(0);

/// A containerd and a root file system.
pub struct Node {
    pub containerd: Containerd,
    channel: Channel,
    cgroup: String,
}

/// What a container is made of beyond its command.
#[derive(Clone, Default)]
pub struct Wanted<'a> {
    pub pod: Option<&'a str>,
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
    pub terminal: bool,
    pub runc: bool,
    pub own_socket: Option<PathBuf>,
    /// Changes the specification at last.
    pub adapt: Option<fn(&mut Value)>,
}

/// Reads a FIFO to its end; it has been opened when this returns.
pub fn read_fifo(path: &str) -> tokio::task::JoinHandle<String> {
    let mut pipe = tokio::net::unix::pipe::OpenOptions::new().open_receiver(path).expect("opened");
    tokio::spawn(async move {
        let mut text = Vec::new();
        tokio::io::AsyncReadExt::read_to_end(&mut pipe, &mut text).await.expect("read");
        String::from_utf8_lossy(&text).into_owned()
    })
}

fn with<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", NAMESPACE.parse().expect("ascii"));
    request.set_timeout(PATIENCE);
    request
}

impl Node {
    pub async fn start() -> Self {
        let containerd = Containerd::start();
        let root = containerd.dir().join("rootfs");
        for dir in ["bin", "proc", "sys", "dev", "tmp", "etc"] {
            std::fs::create_dir_all(root.join(dir)).expect("made");
        }
        std::fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static is installed");
        for name in
            ["sh", "cat", "echo", "sleep", "setsid", "stty", "tr", "head", "yes", "kill", "true", "ls", "dd"]
        {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).expect("linked");
        }
        std::fs::write(root.join("etc/passwd"), "root:x:0:0::/:/bin/sh\n").expect("written");
        let channel = containerd_client::connect(containerd.socket()).await.expect("connected");
        let cgroup = format!("/keelson-shim-test-{}", std::process::id());
        Self { containerd, channel, cgroup }
    }

    pub fn dir(&self) -> &Path {
        self.containerd.dir()
    }

    /// Starts the killed containerd again.
    pub async fn start_containerd(&mut self) {
        self.containerd.start_again();
        self.channel = containerd_client::connect(self.containerd.socket()).await.expect("connected");
    }

    pub fn tasks(&self) -> TasksClient<Channel> {
        TasksClient::new(self.channel.clone())
    }

    /// A new FIFO, and its path.
    pub fn fifo(&self, name: &str) -> String {
        let path = self.dir().join(format!("{name}-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("made");
        path.display().to_string()
    }

    fn spec(&self, id: &str, script: &str, wanted: &Wanted<'_>) -> Value {
        let mut annotations = json!({});
        if let Some(pod) = wanted.pod {
            annotations["io.kubernetes.cri.sandbox-id"] = pod.into();
        }
        if let Some(socket) = &wanted.own_socket {
            annotations["io.keelson.cri.shim-socket"] = socket.display().to_string().into();
        }
        let caps =
            ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_NET_BIND_SERVICE"];
        let mut spec = json!({
            "ociVersion": "1.0.2",
            "process": {
                "terminal": wanted.terminal,
                "user": { "uid": 0, "gid": 0, "additionalGids": [7, 9] },
                "args": ["/bin/sh", "-c", script],
                "env": ["PATH=/bin", "TERM=xterm"],
                "cwd": "/",
                "capabilities": { "bounding": caps, "effective": caps, "permitted": caps },
                // Equal, because runc 1.1 raises the soft limit of an exec to the hard one (Go's runtime does).
                "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 512, "soft": 512 }],
                "noNewPrivileges": true,
                // Without one runc's shim hands its own on, which it raises.
                "oomScoreAdj": 100
            },
            "root": { "path": "rootfs", "readonly": false },
            "hostname": "box",
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                  "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
                { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                  "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
                { "destination": "/sys", "type": "sysfs", "source": "sysfs",
                  "options": ["nosuid", "noexec", "nodev", "ro"] }
            ],
            "annotations": annotations,
            "linux": {
                "cgroupsPath": format!("{}/{id}", self.cgroup),
                "resources": {
                    "devices": [{ "allow": false, "access": "rwm" }],
                    "memory": { "limit": 64 << 20 },
                    "cpu": { "shares": 512 },
                    "pids": { "limit": 400 }
                },
                "namespaces": [
                    { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }, { "type": "network" }
                ],
                "seccomp": {
                    "defaultAction": "SCMP_ACT_ALLOW",
                    "architectures": ["SCMP_ARCH_X86_64"],
                    "syscalls": [{ "names": ["swapon", "kexec_load"], "action": "SCMP_ACT_ERRNO" }]
                },
                "maskedPaths": ["/proc/kcore", "/proc/keys"],
                "readonlyPaths": ["/proc/sys", "/proc/bus"]
            }
        });
        if let Some(adapt) = wanted.adapt {
            adapt(&mut spec);
        }
        spec
    }

    /// Makes a container and its task, not yet running; gives its id and process.
    pub async fn create(&self, script: &str, wanted: &Wanted<'_>) -> Result<(String, u32), Status> {
        let id = format!("c{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let spec = self.spec(&id, script, wanted);
        let name = if wanted.runc {
            "io.containerd.runc.v2"
        } else {
            env!("CARGO_BIN_EXE_containerd-shim-keelson-v1")
        };
        let container = api::Container {
            id: id.clone(),
            runtime: Some(Runtime { name: name.to_owned(), options: None }),
            spec: Some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Spec".to_owned(),
                value: spec.to_string().into_bytes(),
            }),
            labels: HashMap::new(),
            ..api::Container::default()
        };
        let request = api::CreateContainerRequest { container: Some(container) };
        ContainersClient::new(self.channel.clone()).create(with(request)).await?;
        let root = Mount {
            r#type: "bind".to_owned(),
            source: self.dir().join("rootfs").display().to_string(),
            options: vec!["rbind".to_owned(), "rw".to_owned()],
            ..Mount::default()
        };
        let request = api::CreateTaskRequest {
            container_id: id.clone(),
            rootfs: vec![root],
            stdin: wanted.stdin.clone(),
            stdout: wanted.stdout.clone(),
            stderr: wanted.stderr.clone(),
            terminal: wanted.terminal,
            ..api::CreateTaskRequest::default()
        };
        let pid = self.tasks().create(with(request)).await?.into_inner().pid;
        Ok((id, pid))
    }

    /// Makes and starts a container.
    pub async fn run(&self, script: &str, wanted: &Wanted<'_>) -> (String, u32) {
        let (id, pid) = self.create(script, wanted).await.expect("created");
        self.start_process(&id, "").await.expect("started");
        (id, pid)
    }

    pub async fn start_process(&self, id: &str, exec: &str) -> Result<u32, Status> {
        let request = api::StartRequest { container_id: id.to_owned(), exec_id: exec.to_owned() };
        Ok(self.tasks().start(with(request)).await?.into_inner().pid)
    }

    pub async fn wait(&self, id: &str, exec: &str) -> u32 {
        let request = api::WaitRequest { container_id: id.to_owned(), exec_id: exec.to_owned() };
        self.tasks().wait(with(request)).await.expect("ended").into_inner().exit_status
    }

    pub async fn kill(&self, id: &str, exec: &str, signal: u32) -> Result<(), Status> {
        let request =
            api::KillRequest { container_id: id.to_owned(), exec_id: exec.to_owned(), signal, all: false };
        self.tasks().kill(with(request)).await.map(drop)
    }

    pub async fn delete(&self, id: &str) -> Result<u32, Status> {
        let request = api::DeleteTaskRequest { container_id: id.to_owned() };
        Ok(self.tasks().delete(with(request)).await?.into_inner().exit_status)
    }

    pub async fn state(&self, id: &str) -> Result<containerd_client::types::v1::Process, Status> {
        let request = api::GetRequest { container_id: id.to_owned(), exec_id: String::new() };
        Ok(self.tasks().get(with(request)).await?.into_inner().process.expect("a process"))
    }

    pub async fn pids(&self, id: &str) -> Vec<u32> {
        let request = api::ListPidsRequest { container_id: id.to_owned() };
        let answer = self.tasks().list_pids(with(request)).await.expect("listed").into_inner();
        answer.processes.into_iter().map(|process| process.pid).collect()
    }

    pub async fn resize(&self, id: &str, width: u32, height: u32) {
        let request =
            api::ResizePtyRequest { container_id: id.to_owned(), exec_id: String::new(), width, height };
        self.tasks().resize_pty(with(request)).await.expect("resized");
    }

    pub async fn pause(&self, id: &str) -> Result<(), Status> {
        self.tasks().pause(with(api::PauseTaskRequest { container_id: id.to_owned() })).await.map(drop)
    }

    pub async fn resume(&self, id: &str) -> Result<(), Status> {
        self.tasks().resume(with(api::ResumeTaskRequest { container_id: id.to_owned() })).await.map(drop)
    }

    pub async fn metrics(&self, id: &str) -> Any {
        let request = api::MetricsRequest { filters: vec![format!("id=={id}")] };
        let answer = self.tasks().metrics(with(request)).await.expect("figures").into_inner();
        answer.metrics.into_iter().find(|metric| metric.id == id).expect("of it").data.expect("data")
    }

    pub async fn update_memory(&self, id: &str, limit: u64) {
        let request = api::UpdateTaskRequest {
            container_id: id.to_owned(),
            resources: Some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned(),
                value: json!({ "memory": { "limit": limit } }).to_string().into_bytes(),
            }),
            ..api::UpdateTaskRequest::default()
        };
        self.tasks().update(with(request)).await.expect("updated");
    }

    /// Runs a command through containerd; gives its output and code.
    pub async fn exec(&self, id: &str, args: &[&str]) -> Result<(String, u32), Status> {
        let exec = format!("e{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let (stdout, stderr) = (self.fifo("exec"), self.fifo("exec"));
        let process = self.process_of(id).await;
        let mut process: Value = process["process"].clone();
        process["args"] = args.into();
        process["terminal"] = false.into();
        let request = api::ExecProcessRequest {
            container_id: id.to_owned(),
            exec_id: exec.clone(),
            stdout: stdout.clone(),
            stderr: stderr.clone(),
            spec: Some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
                value: process.to_string().into_bytes(),
            }),
            ..api::ExecProcessRequest::default()
        };
        self.tasks().exec(with(request)).await?;
        let (reader, _errors) = (read_fifo(&stdout), read_fifo(&stderr));
        let result = async {
            self.start_process(id, &exec).await?;
            let code = self.wait(id, &exec).await;
            Ok(code)
        };
        let result = result.await;
        let request = api::DeleteProcessRequest { container_id: id.to_owned(), exec_id: exec.clone() };
        self.tasks().delete_process(with(request)).await?;
        let code = match result {
            Ok(code) => code,
            Err(status) => {
                reader.abort();
                return Err(status);
            }
        };
        let output = tokio::time::timeout(PATIENCE, reader).await.expect("in time").expect("read");
        Ok((output, code))
    }

    async fn process_of(&self, id: &str) -> Value {
        let request = api::GetContainerRequest { id: id.to_owned() };
        let answer = ContainersClient::new(self.channel.clone()).get(with(request)).await.expect("found");
        let spec = answer.into_inner().container.expect("a container").spec.expect("a spec");
        serde_json::from_slice(&spec.value).expect("JSON")
    }

    /// Topics of the events about a container, collected until one of them is `last`.
    pub async fn topics_until(&self, last: &'static str) -> tokio::task::JoinHandle<Vec<String>> {
        let mut client = EventsClient::new(self.channel.clone());
        let mut request = Request::new(api::SubscribeRequest::default());
        request.metadata_mut().insert("containerd-namespace", NAMESPACE.parse().expect("ascii"));
        // containerd answers with the first event, so there has to be one.
        let mut publisher = client.clone();
        let poke = async {
            loop {
                let event = Any { type_url: "containerd.events.TaskOOM".to_owned(), value: Vec::new() };
                let request = api::PublishRequest { topic: "/test/begin".to_owned(), event: Some(event) };
                publisher.publish(with(request)).await.expect("published");
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        };
        let mut stream = tokio::select! {
            subscribed = client.subscribe(request) => subscribed.expect("subscribed").into_inner(),
            () = poke => unreachable!("it goes on until the stream has begun"),
        };
        tokio::spawn(async move {
            let mut topics = Vec::new();
            while let Ok(Ok(Some(event))) = tokio::time::timeout(PATIENCE, stream.message()).await {
                if event.topic.starts_with("/tasks/") {
                    topics.push(event.topic.clone());
                }
                if event.topic == last {
                    break;
                }
            }
            topics
        })
    }

    /// The shims that run for this containerd.
    pub fn shims(&self) -> Vec<i32> {
        let marker = self.containerd.socket().display().to_string();
        let mut shims = super::processes_with("containerd-shim-keelson-v1");
        shims.retain(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            line.contains(&marker) && !line.contains("start") && !line.contains("delete")
        });
        shims
    }

    /// The test's cgroup in every hierarchy that has it.
    fn cgroup_roots(&self) -> Vec<PathBuf> {
        let name = self.cgroup.trim_start_matches('/');
        let mut roots = vec![PathBuf::from("/sys/fs/cgroup")];
        roots.extend(
            std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path()),
        );
        roots.into_iter().map(|root| root.join(name)).filter(|path| path.is_dir()).collect()
    }

    /// Directories of the containers' cgroups that exist, in every hierarchy.
    pub fn cgroups(&self) -> Vec<PathBuf> {
        let children = |pod: PathBuf| {
            let entries = std::fs::read_dir(pod).into_iter().flatten().flatten().map(|entry| entry.path());
            entries.filter(|path| path.is_dir()).collect::<Vec<_>>()
        };
        self.cgroup_roots().into_iter().flat_map(children).collect()
    }

    /// Root file systems of containers that are mounted.
    pub fn mounted_roots(&self) -> Vec<String> {
        let mounts = std::fs::read_to_string("/proc/self/mounts").expect("mounts");
        let marker = self.dir().join("state").display().to_string();
        let of_it = mounts.lines().filter(|line| line.contains(&marker) && line.contains("rootfs"));
        of_it.map(ToOwned::to_owned).collect()
    }

    /// Nothing of any container is left.
    pub fn assert_clean(&self) {
        wait_for("the shims end", || self.shims().is_empty());
        wait_for("the cgroups go", || self.cgroups().is_empty());
        let left = self.mounted_roots();
        assert!(left.is_empty(), "mounts are left: {left:?}");
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for pid in self.shims() {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).ok();
        }
        for cgroup in self.cgroups() {
            let procs = std::fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
            for pid in procs.lines().filter_map(|pid| pid.parse().ok()) {
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)
                    .ok();
            }
        }
        let begun = std::time::Instant::now();
        while !self.cgroups().is_empty() && begun.elapsed() < std::time::Duration::from_secs(5) {
            for cgroup in self.cgroups() {
                std::fs::remove_dir(&cgroup).ok();
            }
        }
        for root in self.cgroup_roots() {
            std::fs::remove_dir(root).ok();
        }
    }
}
