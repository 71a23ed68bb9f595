//! The manager with a device plugin of ours, over real sockets.

use std::collections::HashMap;
use std::time::Instant;

use serde_json::json;
use tokio::task::JoinHandle;
use tokio_stream::StreamExt as _;
use tonic::body::Body;
use tonic::server::Grpc;
use tonic::{Request, Response};
use tonic_prost::ProstCodec;

use super::wire::{
    AllocatableResponse, CdiDevice, DeviceNode, GetRequest, GetResponse, Mount, NumaNode, PluginDevice,
    PodResourcesList, Topology,
};
use super::*;
use crate::config::AgentConfig;
use crate::contracts::{ContainerRef, LookupError};

const TEST_DEADLINE: Duration = Duration::from_secs(20);
const RESOURCE: &str = "example.com/dev";

/// A device plugin: tells what its watch holds, and notes what it is asked.
#[derive(Clone)]
struct FakePlugin {
    devices: watch::Receiver<Vec<(&'static str, bool)>>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl FakePlugin {
    fn note(&self, what: &str, ids: &[String]) {
        self.asked.lock().unwrap().push(format!("{what} {}", ids.join(",")));
    }
}

impl server::Methods for FakePlugin {
    const NAME: &'static str = "v1beta1.DevicePlugin";

    async fn call(self, request: http::Request<Body>) -> http::Response<Body> {
        match request.uri().path() {
            wire::LIST_AND_WATCH => {
                let service = tower::service_fn(move |_: Request<Empty>| {
                    let lists = lists_of(self.devices.clone());
                    async move { Ok::<_, Status>(Response::new(lists)) }
                });
                Grpc::new(ProstCodec::<DeviceList, Empty>::default()).server_streaming(service, request).await
            }
            wire::PREFERRED => {
                let prefer = move |asked: PreferredRequest| async move {
                    let asked = &asked.containers[0];
                    // The last ones: another choice than the agent's own.
                    let ids = asked.available.iter().rev().take(usize::try_from(asked.size).unwrap());
                    Ok(PreferredResponse { containers: vec![DeviceIds { ids: ids.cloned().collect() }] })
                };
                server::unary(request, prefer).await
            }
            wire::ALLOCATE => {
                let allocate = move |asked: AllocateRequest| async move {
                    let ids = asked.containers[0].ids.clone();
                    self.note("allocate", &ids);
                    let node = |id: &String| DeviceNode {
                        container_path: format!("/dev/{id}"),
                        host_path: "/dev/null".to_owned(),
                        permissions: "rw".to_owned(),
                    };
                    let answer = ContainerAnswer {
                        envs: HashMap::from([("DEVICES".to_owned(), ids.join(","))]),
                        mounts: vec![Mount {
                            container_path: "/lib/dev".to_owned(),
                            host_path: "/opt/dev".to_owned(),
                            read_only: true,
                        }],
                        devices: ids.iter().map(node).collect(),
                        annotations: HashMap::from([("vendor".to_owned(), "yes".to_owned())]),
                        cdi_devices: vec![CdiDevice { name: "example.com/dev=all".to_owned() }],
                    };
                    Ok(AllocateResponse { containers: vec![answer] })
                };
                server::unary(request, allocate).await
            }
            wire::PRE_START => {
                let pre_start = move |asked: DeviceIds| async move {
                    self.note("prestart", &asked.ids);
                    Ok(Empty {})
                };
                server::unary(request, pre_start).await
            }
            _ => server::unimplemented(),
        }
    }
}

fn lists_of(
    devices: watch::Receiver<Vec<(&'static str, bool)>>,
) -> impl futures::Stream<Item = Result<DeviceList, Status>> + Send {
    tokio_stream::wrappers::WatchStream::new(devices).map(|devices| {
        let device = |(id, healthy): (&str, bool)| PluginDevice {
            id: id.to_owned(),
            health: if healthy { "Healthy" } else { "Unhealthy" }.to_owned(),
            topology: Some(Topology { nodes: vec![NumaNode { id: 1 }] }),
        };
        Ok(DeviceList { devices: devices.into_iter().map(device).collect() })
    })
}

/// A running plugin; ends when dropped.
struct Running {
    devices: watch::Sender<Vec<(&'static str, bool)>>,
    asked: Arc<Mutex<Vec<String>>>,
    cancel: CancellationToken,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

impl Running {
    async fn start(root: &Path, options: Options, devices: &[(&'static str, bool)]) -> Self {
        let directory = root.join("device-plugins");
        let (sender, receiver) = watch::channel(devices.to_vec());
        let (asked, cancel) = (Arc::default(), CancellationToken::new());
        let plugin = FakePlugin { devices: receiver, asked: Arc::clone(&asked) };
        let (socket, ended) = (directory.join("fake.sock"), cancel.clone());
        tokio::spawn(async move { server::serve(&socket, plugin, ended).await });
        let begin = Instant::now();
        loop {
            let request = RegisterRequest {
                version: "v1beta1".to_owned(),
                endpoint: "fake.sock".to_owned(),
                resource_name: RESOURCE.to_owned(),
                options: Some(options),
            };
            let kubelet = wire::channel(directory.join("kubelet.sock"));
            let socket_is_there = directory.join("fake.sock").exists();
            let told = wire::unary::<_, Empty>(&kubelet, wire::REGISTER, request, DEADLINE).await;
            if socket_is_there && told.is_ok() {
                return Self { devices: sender, asked, cancel };
            }
            assert!(begin.elapsed() < TEST_DEADLINE, "{told:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut *self.asked.lock().unwrap())
    }
}

struct Pods(Vec<Arc<Pod>>);

impl PodLookup for Pods {
    fn pods(&self) -> Vec<Arc<Pod>> {
        self.0.clone()
    }

    fn container(&self, _: &str, pod: &str, _: Option<&str>, _: &str) -> Result<ContainerRef, LookupError> {
        Err(LookupError::NotRunning { pod: pod.to_owned() })
    }

    fn previous_container(
        &self,
        _: &str,
        pod: &str,
        _: Option<&str>,
        _: &str,
    ) -> Result<ContainerRef, LookupError> {
        Err(LookupError::NotRunning { pod: pod.to_owned() })
    }

    fn sandbox(&self, _: &str, pod: &str, _: Option<&str>) -> Result<String, LookupError> {
        Err(LookupError::NotRunning { pod: pod.to_owned() })
    }
}

fn pod(root: &Path, uid: &str, count: u64) -> Arc<Pod> {
    std::fs::create_dir_all(root.join("pods").join(uid)).unwrap();
    let limits = json!({"limits": {RESOURCE: count.to_string()}});
    let pod = json!({"metadata": {"name": uid, "namespace": "ns", "uid": uid},
        "spec": {"containers": [{"name": "a", "resources": limits}]}});
    Arc::new(serde_json::from_value(pod).unwrap())
}

fn container(pod: &Pod) -> &Container {
    &pod.spec.as_ref().unwrap().containers[0]
}

/// A manager that listens: what an earlier one left is cleared away by then.
async fn start(
    root: &Path,
    pods: Vec<Arc<Pod>>,
) -> (Devices, CancellationToken, JoinHandle<anyhow::Result<()>>) {
    let cancel = CancellationToken::new();
    let devices = Devices::load(root, cancel.clone());
    let text = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\ntlsCertFile: /c\n\
                tlsPrivateKeyFile: /k\nkeelson: {nodeName: n1, nodeIP: 192.0.2.1, kubeconfig: /kc}\n";
    let config = AgentConfig::parse(Path::new("test"), text).unwrap();
    let numa = Numa::load(&config, 1 << 30, devices.clone()).unwrap();
    let client = crate::sources::offline::client();
    let objects = Arc::new(crate::sources::objects::Objects::new(client.clone()));
    let claims = Dra::load(crate::dra::DraSettings::new(root, "n1"), objects, client);
    let both = (numa, claims);
    let run = tokio::spawn(devices.clone().run(root.to_owned(), Arc::new(Pods(pods)), both, cancel.clone()));
    let begin = Instant::now();
    loop {
        let kubelet = wire::channel(root.join("device-plugins/kubelet.sock"));
        let nonsense = RegisterRequest::default();
        let told = wire::unary::<_, Empty>(&kubelet, wire::REGISTER, nonsense, DEADLINE).await;
        if told.as_ref().is_err_and(|status| status.code() == tonic::Code::InvalidArgument) {
            return (devices, cancel, run);
        }
        assert!(begin.elapsed() < TEST_DEADLINE, "{told:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn counts(devices: &Devices, expected: (u64, u64)) {
    let mut counts = devices.counts();
    let waiting = counts.wait_for(|counts| counts.get(RESOURCE) == Some(&expected));
    tokio::time::timeout(TEST_DEADLINE, waiting).await.expect("in time").expect("it runs");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn devices_are_told_given_kept_and_freed() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let (one, two) = (pod(root, "one", 2), pod(root, "two", 1));
    let pods = vec![Arc::clone(&one), Arc::clone(&two)];
    let (devices, cancel, run) = start(root, pods.clone()).await;
    let options = Options { pre_start_required: true, get_preferred_allocation_available: true };
    let plugin = Running::start(root, options, &[("d0", true), ("d1", true), ("d2", false)]).await;
    counts(&devices, (3, 2)).await;
    plugin.devices.send_replace(vec![("d0", true), ("d1", true), ("d2", true)]);
    counts(&devices, (3, 3)).await;
    // What cannot be written down is not given.
    let in_the_way = root.join("device-plugins/.keelson_allocations.json");
    std::fs::create_dir(&in_the_way).unwrap();
    for _ in 0..2 {
        let refused = devices.allocate(&one, container(&one)).await.unwrap_err();
        assert!(refused.contains("cannot write down who has which device"), "{refused}");
    }
    std::fs::remove_dir(&in_the_way).unwrap();
    assert_eq!(plugin.asked(), ["allocate d1,d2", "allocate d1,d2"]);
    // The plugin's preference counts, and its answer reaches the container.
    let given = devices.allocate(&one, container(&one)).await.unwrap();
    assert_eq!(given.variables["DEVICES"], "d1,d2");
    assert_eq!(given.devices[0], ("/dev/d1".to_owned(), "/dev/null".to_owned(), "rw".to_owned()));
    assert_eq!(given.mounts, [("/lib/dev".to_owned(), "/opt/dev".to_owned(), true)]);
    assert_eq!((given.annotations["vendor"].as_str(), given.cdi_devices.len()), ("yes", 1));
    assert_eq!(plugin.asked(), ["allocate d1,d2", "prestart d1,d2"]);
    // A container that starts again keeps its devices.
    assert_eq!(devices.allocate(&one, container(&one)).await.unwrap(), given);
    assert_eq!(plugin.asked(), ["prestart d1,d2"]);
    let none = pod(root, "none", 0);
    assert_eq!(devices.allocate(&none, container(&none)).await.unwrap(), Allocation::default());
    let much = pod(root, "much", 2);
    let refused = devices.allocate(&much, container(&much)).await.unwrap_err();
    assert!(refused.contains("Requested: 2, Available: 1"), "{refused}");
    // What others may read.
    let socket = root.join("pod-resources/kubelet.sock");
    let channel = wire::channel(socket);
    let listed: PodResourcesList =
        wire::unary(&channel, wire::LIST, Empty {}, DEADLINE).await.expect("a list");
    let found = &listed.pods[0].containers[0].devices[0];
    assert_eq!((listed.pods.len(), found.device_ids.join(",")), (2, "d1,d2".to_owned()));
    assert_eq!(found.topology.as_ref().unwrap().nodes[0].id, 1);
    let asked = |name: &str| GetRequest { pod_name: name.to_owned(), pod_namespace: "ns".to_owned() };
    let got: GetResponse = wire::unary(&channel, wire::GET, asked("two"), DEADLINE).await.expect("a pod");
    assert!(got.pod.unwrap().containers[0].devices.is_empty());
    let missing = wire::unary::<_, GetResponse>(&channel, wire::GET, asked("x"), DEADLINE).await;
    assert_eq!(missing.unwrap_err().code(), tonic::Code::NotFound);
    let all: AllocatableResponse =
        wire::unary(&channel, wire::ALLOCATABLE, Empty {}, DEADLINE).await.expect("all of them");
    assert_eq!(all.devices.len(), 3);
    // Another agent: the grants are kept, the plugin has to come again.
    cancel.cancel();
    run.await.unwrap().unwrap();
    drop(plugin);
    let (devices, cancel, run) = start(root, pods).await;
    assert_eq!(devices.counts().borrow()[RESOURCE], (0, 0));
    let plugin = Running::start(root, Options::default(), &[("d0", true), ("d1", true), ("d2", true)]).await;
    counts(&devices, (3, 3)).await;
    assert_eq!(devices.allocate(&one, container(&one)).await.unwrap(), given);
    assert_eq!(devices.allocate(&two, container(&two)).await.unwrap().variables["DEVICES"], "d0");
    assert_eq!(plugin.asked(), ["allocate d0"]);
    devices.release("one").await;
    assert_eq!(devices.allocate(&much, container(&much)).await.unwrap().variables["DEVICES"], "d1,d2");
    // A plugin that dies leaves devices that nobody gets.
    drop(plugin);
    counts(&devices, (3, 0)).await;
    cancel.cancel();
    run.await.unwrap().unwrap();
}

#[test]
fn plugins_that_cannot_work_are_refused() {
    let request = |version: &str, name: &str, endpoint: &str| RegisterRequest {
        version: version.to_owned(),
        resource_name: name.to_owned(),
        endpoint: endpoint.to_owned(),
        options: None,
    };
    assert!(check(&request("v1beta1", "example.com/gpu", "gpu.sock")).is_ok());
    for (version, name, endpoint) in [
        ("v1alpha", "example.com/gpu", "gpu.sock"),
        ("v1beta1", "cpu", "gpu.sock"),
        ("v1beta1", "kubernetes.io/gpu", "gpu.sock"),
        ("v1beta1", "example.com/", "gpu.sock"),
        ("v1beta1", "example.com/a b", "gpu.sock"),
        ("v1beta1", "example.com/gpu", "../../x.sock"),
        ("v1beta1", "example.com/gpu", ""),
    ] {
        assert!(check(&request(version, name, endpoint)).is_err(), "{version} {name} {endpoint}");
    }
}

#[test]
fn a_broken_checkpoint_and_pods_that_are_gone_count_for_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let plugins = directory.path().join("device-plugins");
    let mut ledger = Ledger::default();
    ledger.set_devices(RESOURCE, BTreeMap::new());
    let grant = Grant { ids: ["d0".to_owned()].into(), answer: vec![1, 2] };
    ledger.grant(("gone".to_owned(), "a".to_owned()), RESOURCE, grant.clone());
    checkpoint::save(&plugins, &ledger).unwrap();
    assert_eq!(checkpoint::load(&plugins, directory.path()).grants().count(), 0);
    std::fs::create_dir_all(directory.path().join("pods/gone")).unwrap();
    assert_eq!(checkpoint::load(&plugins, directory.path()), ledger);
    std::fs::write(plugins.join("keelson_allocations.json"), "{half").unwrap();
    assert_eq!(checkpoint::load(&plugins, directory.path()), Ledger::default());
}
