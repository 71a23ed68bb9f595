"""A pod's life by a client of another making: Google's gRPC and protobuf for Python, the messages that
container-runtime-interface-api was made of, and websocket-client. No line of it shares code with the server.

    client.py SOCKET IMAGE DIRECTORY CGROUP

Ends with 0 when everything is as a kubelet would expect it, else with the first thing that is not.
"""

import json
import sys
import threading
import time

import grpc
import websocket
from cri_api.channel import Channel
from cri_api.containers import Containers
from cri_api.images import Images
from cri_api.v1 import api_pb2 as cri
from cri_api.v1.api_pb2_grpc import ImageServiceStub, RuntimeServiceStub

PATIENCE = 60
CALLED = set()


class Counted:
    """A stub that has a deadline, and writes down what was called."""

    def __init__(self, stub):
        self._stub = stub

    def __getattr__(self, name):
        call = getattr(self._stub, name)

        def counted(request, **more):
            CALLED.add(name)
            return call(request, timeout=more.pop("timeout", PATIENCE), **more)

        return counted


def same(what, found, wanted):
    if found != wanted:
        sys.exit(f"{what} is {found!r}, expected {wanted!r}")


def holds(what, text, part):
    if part not in text:
        sys.exit(f"{what} does not hold {part!r}: {text!r}")


def refused(what, code, call):
    try:
        answer = call()
    except grpc.RpcError as error:
        same(f"the code of {what}", error.code(), code)
        return error.details()
    sys.exit(f"{what} was accepted: {answer}")


def until(what, look):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found = look()
        if found:
            return found
        time.sleep(0.02)
    sys.exit(f"waited in vain until {what}")


def stream(url, protocol, send=None):
    """What each channel of a streaming URL got until its end."""
    socket = websocket.create_connection(
        url.replace("http://", "ws://"), subprotocols=[protocol], timeout=PATIENCE
    )
    same("the protocol", socket.getsubprotocol(), protocol)
    if send is not None:
        socket.send_binary(b"\0" + send)
    channels = {}
    while True:
        opcode, data = socket.recv_data()
        if opcode == websocket.ABNF.OPCODE_CLOSE or not data:
            break
        channels[data[0]] = channels.get(data[0], b"") + data[1:]
        if 3 in channels:
            break
    socket.close()
    return channels


def main(socket, image, directory, cgroup):
    channel = Channel(f"unix://{socket}")
    same("the version that the library chose", channel.version, "v1")
    runtime = Counted(RuntimeServiceStub(channel.channel))
    images = Counted(ImageServiceStub(channel.channel))

    same("the name", runtime.Version(cri.VersionRequest()).runtime_name, "keelson-cri")
    status = runtime.Status(cri.StatusRequest(verbose=True))
    same("the conditions", {c.type: c.status for c in status.status.conditions}["RuntimeReady"], True)
    json.loads(status.info["config"])
    runtime.RuntimeConfig(cri.RuntimeConfigRequest())
    network = cri.NetworkConfig(pod_cidr="10.88.0.0/24")
    runtime.UpdateRuntimeConfig(
        cri.UpdateRuntimeConfigRequest(runtime_config=cri.RuntimeConfig(network_config=network))
    )

    spec = cri.ImageSpec(image=image)
    reference = images.PullImage(cri.PullImageRequest(image=spec)).image_ref
    same("the image's id", images.ImageStatus(cri.ImageStatusRequest(image=spec)).image.id, reference)
    listed = [found.id for found in images.ListImages(cri.ListImagesRequest()).images]
    same("the image is listed", reference in listed, True)
    same("the library's list", any(found["id"] == reference for found in Images(channel).list_images()), True)
    same("a file system", len(images.ImageFsInfo(cri.ImageFsInfoRequest()).image_filesystems) > 0, True)
    wrong = cri.PullImageRequest(image=cri.ImageSpec(image="UPPER/Case"))
    refused("a malformed reference", grpc.StatusCode.INVALID_ARGUMENT, lambda: images.PullImage(wrong))

    events = []
    follower = runtime.GetContainerEvents(cri.GetEventsRequest(), timeout=None)

    def follow():
        try:
            for event in follower:
                events.append((event.container_id, event.container_event_type))
        except grpc.RpcError:
            pass

    reader = threading.Thread(target=follow, daemon=True)
    reader.start()

    pod = cri.PodSandboxConfig(
        metadata=cri.PodSandboxMetadata(name="foreign", uid="foreign-uid", namespace="default"),
        hostname="foreign",
        log_directory=f"{directory}/logs",
        labels={"app": "foreign"},
        annotations={"note": "späße"},
        linux=cri.LinuxPodSandboxConfig(cgroup_parent=cgroup),
    )
    sandbox = runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=pod)).pod_sandbox_id
    again = runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=pod)).pod_sandbox_id
    same("the sandbox of a repeated call", again, sandbox)
    found = runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=sandbox, verbose=True))
    same("its state", found.status.state, cri.SANDBOX_READY)
    same("its annotation", found.status.annotations["note"], "späße")
    chosen = cri.PodSandboxFilter(label_selector={"app": "foreign"})
    items = runtime.ListPodSandbox(cri.ListPodSandboxRequest(filter=chosen)).items
    same("listed sandboxes", [item.id for item in items], [sandbox])

    namespaces = cri.NamespaceOption(pid=cri.CONTAINER)
    config = cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name="main"),
        image=spec,
        command=["/bin/sh", "-c", "echo from main; while read line; do echo got:$line; done; sleep 3600"],
        envs=[cri.KeyValue(key="GREETING", value="grüß dich")],
        log_path="main.log",
        stdin=True,
        linux=cri.LinuxContainerConfig(
            resources=cri.LinuxContainerResources(memory_limit_in_bytes=64 << 20, cpu_shares=512),
            security_context=cri.LinuxContainerSecurityContext(namespace_options=namespaces),
        ),
    )
    create = cri.CreateContainerRequest(pod_sandbox_id=sandbox, config=config, sandbox_config=pod)
    container = runtime.CreateContainer(create).container_id
    runtime.StartContainer(cri.StartContainerRequest(container_id=container))
    found = runtime.ContainerStatus(cri.ContainerStatusRequest(container_id=container, verbose=True))
    same("its state", found.status.state, cri.CONTAINER_RUNNING)
    same("its memory limit", found.status.resources.linux.memory_limit_in_bytes, 64 << 20)
    same("its image's id", found.status.image_id, reference)
    same("the library's container", Containers(channel).get_container(container)["id"], container)
    chosen = cri.ContainerFilter(pod_sandbox_id=sandbox)
    listed = runtime.ListContainers(cri.ListContainersRequest(filter=chosen)).containers
    same("listed containers", [item.id for item in listed], [container])

    run = lambda *words, timeout=30: runtime.ExecSync(  # noqa: E731
        cri.ExecSyncRequest(container_id=container, cmd=list(words), timeout=timeout)
    )
    answer = run("/bin/sh", "-c", "echo $GREETING; echo err >&2; exit 3")
    same("ExecSync", (answer.stdout.decode(), answer.stderr, answer.exit_code), ("grüß dich\n", b"err\n", 3))
    refused("a command that is too slow", grpc.StatusCode.DEADLINE_EXCEEDED, lambda: run("/bin/sleep", "60", timeout=1))

    words = ["/bin/sh", "-c", "read line; echo read:$line; echo err >&2; exit 4"]
    request = cri.ExecRequest(container_id=container, cmd=words, stdin=True, stdout=True, stderr=True)
    got = stream(runtime.Exec(request).url, "v4.channel.k8s.io", b"hello\n")
    same("exec", (got[1], got[2]), (b"read:hello\n", b"err\n"))
    holds("the status", got[3].decode(), '"ExitCode"')
    request = cri.AttachRequest(container_id=container, stdin=True, stdout=True, stderr=True)
    socket = websocket.create_connection(
        runtime.Attach(request).url.replace("http://", "ws://"),
        subprotocols=["v5.channel.k8s.io"],
        timeout=PATIENCE,
    )
    socket.send_binary(b"\0attached\n")
    said = b""
    while b"got:attached\n" not in said:
        data = socket.recv()
        said += data[1:] if data[:1] == b"\1" else b""
    socket.close()
    url = runtime.PortForward(cri.PortForwardRequest(pod_sandbox_id=sandbox, port=[80])).url
    holds("the URL", url, "/portforward/")

    limits = cri.LinuxContainerResources(memory_limit_in_bytes=96 << 20)
    update = cri.UpdateContainerResourcesRequest(container_id=container, linux=limits)
    runtime.UpdateContainerResources(update)
    runtime.UpdatePodSandboxResources(
        cri.UpdatePodSandboxResourcesRequest(pod_sandbox_id=sandbox, resources=limits)
    )
    runtime.ReopenContainerLog(cri.ReopenContainerLogRequest(container_id=container))
    with open(f"{directory}/logs/main.log", encoding="utf-8") as log:
        holds("the log", log.read(), " stdout F from main\n")

    stats = runtime.ContainerStats(cri.ContainerStatsRequest(container_id=container)).stats
    same("its memory is counted", stats.memory.usage_bytes.value > 0, True)
    same("all stats", len(runtime.ListContainerStats(cri.ListContainerStatsRequest()).stats), 1)
    stats = runtime.PodSandboxStats(cri.PodSandboxStatsRequest(pod_sandbox_id=sandbox)).stats
    same("the pod's containers", len(stats.linux.containers), 1)
    same("all pods' stats", len(runtime.ListPodSandboxStats(cri.ListPodSandboxStatsRequest()).stats), 1)
    names = {one.name for one in runtime.ListMetricDescriptors(cri.ListMetricDescriptorsRequest()).descriptors}
    metrics = runtime.ListPodSandboxMetrics(cri.ListPodSandboxMetricsRequest()).pod_metrics
    told = {metric.name for one in metrics for of in one.container_metrics for metric in of.metrics}
    same("metrics without a descriptor", told - names, set())
    same("there are metrics", len(told) > 20, True)
    checkpoint = cri.CheckpointContainerRequest(container_id=container, location=f"{directory}/checkpoint.tar")
    try:
        runtime.CheckpointContainer(checkpoint)
    except grpc.RpcError as error:
        same("why there is no checkpoint", error.code(), grpc.StatusCode.UNIMPLEMENTED)

    runtime.StopContainer(cri.StopContainerRequest(container_id=container, timeout=0))
    found = runtime.ContainerStatus(cri.ContainerStatusRequest(container_id=container)).status
    same("its end", (found.state, found.exit_code), (cri.CONTAINER_EXITED, 137))
    Containers(channel).remove_container(container)
    gone = cri.ContainerStatusRequest(container_id=container)
    refused("a removed container", grpc.StatusCode.NOT_FOUND, lambda: runtime.ContainerStatus(gone))
    runtime.RemoveContainer(cri.RemoveContainerRequest(container_id=container))
    runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=sandbox))
    runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=sandbox))

    wanted = [
        cri.CONTAINER_CREATED_EVENT,
        cri.CONTAINER_STARTED_EVENT,
        cri.CONTAINER_STOPPED_EVENT,
        cri.CONTAINER_DELETED_EVENT,
    ]
    for owner in (container, sandbox):
        until("all events came", lambda owner=owner: (owner, cri.CONTAINER_DELETED_EVENT) in events)
        same("the events", [kind for who, kind in events if who == owner], wanted)
    follower.cancel()
    reader.join(PATIENCE)

    images.RemoveImage(cri.RemoveImageRequest(image=spec))
    same("the removed image", images.ImageStatus(cri.ImageStatusRequest(image=spec)).HasField("image"), False)
    services = cri.DESCRIPTOR.services_by_name.values()
    missed = {method.name for service in services for method in service.methods} - CALLED
    same("calls that were not made", missed, set())
    print(f"{len(CALLED)} calls, gRPC {grpc.__version__}")


main(*sys.argv[1:])
