//! Death at every step of every call where more hangs on a pod than its processes, and death of others than the server:
//! afterwards the truth is served, repeated calls succeed and nothing is left. Needs root.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use cri_shim_api::v1;
use cri_shim_api::v1::ContainerState;
use keelson_cri::steps::Step;
use nix::sys::signal::{Signal, kill};
use serde_json::json;
use support::cri::{Cri, PATIENCE, shell};
use support::leftovers::settles;
use support::life::{CALLS, Call, Life, usable};
use support::pods::{image_mount, mount, own_users, push_data};

/// A container of an image that declares volumes, with an image and a directory of the node mounted.
fn with_volumes(cri: &Cri, name: &str) -> v1::ContainerConfig {
    let mut config = shell("main", "exec sleep 3600");
    config.image = Some(v1::ImageSpec { image: "data".into(), ..v1::ImageSpec::default() });
    let host = cri.dir().join("given").join(name);
    config.mounts = vec![
        image_mount("data", "/all", ""),
        image_mount("data", "/part", "data/sub"),
        mount(&host, "/given"),
    ];
    config
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_with_volumes_survive_death_at_every_step() {
    let mut cri = Cri::start().await;
    push_data(&cri).await;
    for step in Step::ALL {
        cri.restart_to_die_at(step.name()).await;
        let name = format!("volumes-{}", step.name());
        let mut life = Life::with(cri.pod(&name), with_volumes(&cri, &name));
        life.go_on(&mut cri, &CALLS, step.name()).await;
        cri.assert_nothing_left().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_with_users_of_their_own_survive_death_at_every_step() {
    let mut cri = Cri::start().await;
    push_data(&cri).await;
    for step in Step::ALL {
        cri.restart_to_die_at(step.name()).await;
        let name = format!("users-{}", step.name());
        let mut pod = cri.pod(&name);
        let linux = pod.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().namespace_options = Some(own_users());
        let mut config = with_volumes(&cri, &name);
        let security = config.linux.get_or_insert_default().security_context.get_or_insert_default();
        security.namespace_options = Some(own_users());
        let maps = own_users().userns_options.expect("set");
        let given = config.mounts.last_mut().expect("a mount");
        (given.uid_mappings, given.gid_mappings) = (maps.uids, maps.gids);
        let mut life = Life::with(pod, config);
        life.go_on(&mut cri, &CALLS, step.name()).await;
        cri.assert_nothing_left().await;
    }
}

/// A network namespace that plays the node's, with our own CNI plugins; gone when dropped.
struct Node {
    dir: tempfile::TempDir,
    netns: PathBuf,
}

/// A port of the node.
const PORT: i32 = 31_080;

impl Node {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let netns =
            cni_plugins_host::netns::create_named(&dir.path().join("netns"), "node").expect("a netns");
        let this = Self { dir, netns };
        this.inside(&["ip", "link", "set", "lo", "up"]);
        this
    }

    fn inside(&self, words: &[&str]) -> String {
        let netns = format!("--net={}", self.netns.display());
        let output = Command::new("nsenter").arg(netns).args(words).output().expect("nsenter runs");
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Puts our plugins in the place of the stand-in.
    fn configure(&self, cri: &Cri) {
        let program = Path::new(env!("CARGO_BIN_EXE_keelson-cri")).with_file_name("keelson-cni");
        assert!(
            program.exists(),
            "{} is missing: cargo build --release --bin keelson-cni",
            program.display()
        );
        let installed =
            Command::new(&program).arg("install").arg(cri.dir().join("bin")).status().expect("it runs");
        assert!(installed.success());
        let (state, log) = (self.dir.path().join("run"), self.dir.path().join("cni.log"));
        let list = json!({ "cniVersion": "1.1.0", "name": "test", "plugins": [
            {
                "type": "keelson-bridge", "bridge": "kft0", "isGateway": true, "stateDir": state, "logFile": log,
                "ipam": {
                    "type": "keelson-ipam", "dataDir": self.dir.path().join("ipam"),
                    "ranges": [[{"subnet": "10.88.0.0/29"}]],
                },
            },
            { "type": "keelson-portmap", "capabilities": {"portMappings": true}, "stateDir": state, "logFile": log },
            { "type": "keelson-bandwidth", "capabilities": {"bandwidth": true}, "stateDir": state, "logFile": log },
        ]});
        let new = cri.dir().join("net.d/new");
        std::fs::write(&new, list.to_string()).expect("written");
        std::fs::rename(new, cri.dir().join("net.d/10-test.conflist")).expect("renamed");
    }

    /// What pods have of the node's network: interfaces, the port, leases.
    fn left(&self) -> Vec<String> {
        let mut left: Vec<String> =
            self.inside(&["ip", "-o", "link", "show", "type", "veth"]).lines().map(str::to_owned).collect();
        let rules = self.inside(&["nft", "list", "ruleset"]);
        left.extend(rules.lines().filter(|line| line.contains(&PORT.to_string())).map(str::to_owned));
        let program = Path::new(env!("CARGO_BIN_EXE_keelson-cri")).with_file_name("keelson-cni");
        let leases = Command::new(program)
            .args(["leases", "--data-dir"])
            .arg(self.dir.path().join("ipam"))
            .output()
            .expect("it runs");
        left.extend(String::from_utf8_lossy(&leases.stdout).lines().map(str::to_owned));
        left
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        drop(cni_plugins_host::netns::remove(&self.netns));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_with_ports_of_the_node_survive_death_at_every_step() {
    let node = Node::new();
    let mut cri = Cri::start().await;
    cri.move_to(&node.netns).await;
    node.configure(&cri);
    for step in Step::ALL {
        cri.restart_to_die_at(step.name()).await;
        let mut pod = cri.pod(&format!("ports-{}", step.name()));
        let mapping = v1::PortMapping { container_port: 80, host_port: PORT, ..Default::default() };
        pod.port_mappings = vec![mapping];
        pod.annotations.insert("kubernetes.io/ingress-bandwidth".into(), "10M".into());
        // The range has five addresses: one that is lost shows.
        let mut life = Life::of(pod);
        life.go_on(&mut cri, &CALLS, step.name()).await;
        cri.assert_nothing_left().await;
        // The kernel takes interfaces away a moment after DEL has answered.
        settles(&format!("on the node, at {}", step.name()), || node.left()).await;
    }
}

/// What dies while the server stands at a step.
#[derive(Clone, Copy, Debug)]
enum Death {
    /// containerd, which comes back when the call has ended.
    Containerd,
    /// containerd, which is back before the server goes on.
    ContainerdShortly,
    /// Every shim.
    Shims,
    /// The pause process.
    Pause,
}

async fn dies_at_every_step(death: Death, steps: &[Step]) {
    let mut cri = Cri::start().await;
    for step in steps {
        cri.restart_to_halt_at(step.name()).await;
        let pod = cri.pod(&format!("dies-{}", step.name()));
        let mut life = Life::of(pod.clone());
        let mut died = false;
        for call in CALLS {
            let pause = match death {
                Death::Pause if matches!(call, Call::Create | Call::Start | Call::Update | Call::Stop) => {
                    Some(cri.pause_pid(&life.sandbox).await)
                }
                _ => None,
            };
            let deed = |cri: &mut Cri| happens(death, cri, pause);
            let (result, now) = Box::pin(life.halted_at_step(&mut cri, call, deed)).await;
            died |= now;
            if now {
                comes_back(death, &mut cri).await;
            }
            let Err(status) = result else { continue };
            assert!(died, "{call:?} before anything died: {status}");
            if matches!(call, Call::Run | Call::Create | Call::Start | Call::Update) {
                // As a kubelet, which starts over when the pod does not come to be.
                life.sandbox = usable(&cri, &pod).await;
            }
            ends(&mut life, &cri, step).await;
            break;
        }
        if !died {
            let begun = tokio::time::Instant::now();
            while !cri.halted() {
                assert!(begun.elapsed() < PATIENCE, "{} is never reached", step.name());
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
            happens(death, &mut cri, None);
            cri.signal(Signal::SIGCONT);
            comes_back(death, &mut cri).await;
        }
        cri.assert_nothing_left().await;
    }
}

fn happens(death: Death, cri: &mut Cri, pause: Option<nix::unistd::Pid>) {
    match death {
        Death::Containerd => cri.containerd.kill(),
        Death::ContainerdShortly => cri.containerd.restart(),
        Death::Shims => {
            for shim in cri.shims() {
                // It may have ended by itself.
                kill(shim, Signal::SIGKILL).ok();
            }
        }
        // A process group is never meant.
        Death::Pause => drop(pause.filter(|pid| pid.as_raw() > 1).map(|pid| kill(pid, Signal::SIGKILL))),
    }
}

async fn comes_back(death: Death, cri: &mut Cri) {
    if matches!(death, Death::Containerd) {
        cri.containerd.start_again();
    }
    cri.serves().await;
}

/// A kubelet's way to the end of a pod: again until it works.
async fn ends(life: &mut Life, cri: &Cri, step: &Step) {
    for call in [Call::Stop, Call::Remove] {
        let begun = tokio::time::Instant::now();
        while let Err(status) = life.call(cri.runtime(), call).await {
            assert!(begun.elapsed() < PATIENCE, "{call:?} at {}: {status}", step.name());
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn containerd_may_die_at_every_step() {
    Box::pin(dies_at_every_step(Death::Containerd, Step::ALL)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn containerd_may_be_restarted_at_every_step() {
    Box::pin(dies_at_every_step(Death::ContainerdShortly, Step::ALL)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shims_may_die_at_every_step() {
    Box::pin(dies_at_every_step(Death::Shims, Step::ALL)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pause_process_may_die_at_every_step() {
    Box::pin(dies_at_every_step(Death::Pause, Step::ALL)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stuck_shim_keeps_no_other_pod_waiting() {
    let mut cri = Cri::start().await;
    let stuck_pod = cri.pod("stuck");
    let stuck = cri.run(&stuck_pod).await.expect("running");
    let hung = cri.script(&stuck, &stuck_pod, "main", "exec sleep 3600").await;
    let shims = cri.shims();
    assert!(!shims.is_empty(), "a shim runs the container");
    let other_pod = cri.pod("other");
    let other = cri.run(&other_pod).await.expect("running");
    let runs = cri.script(&other, &other_pod, "main", "exec sleep 3600").await;

    for shim in &shims {
        kill(*shim, Signal::SIGSTOP).expect("stopped");
    }
    cri.restart().await;
    cri.answers(&runs).await;
    let next = cri.script(&other, &other_pod, "next", "echo lives").await;
    assert_eq!(cri.ended(&next).await.exit_code, 0);
    cri.remove(&other).await;
    for shim in &shims {
        kill(*shim, Signal::SIGCONT).expect("continued");
    }
    assert_eq!(cri.status(&hung).await.state(), ContainerState::ContainerRunning, "nobody ended it");
    cri.answers(&hung).await;
    cri.remove(&stuck).await;
    cri.assert_nothing_left().await;
}
