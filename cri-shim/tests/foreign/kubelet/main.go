// A pod's life by Kubernetes' own code: the CRI client that the kubelet is built with (k8s.io/cri-client) and kubectl's
// executors of exec, attach and port-forward (k8s.io/client-go), against any CRI socket.
//
//	client SOCKET IMAGE DIRECTORY CGROUP
//
// Ends with 0 when everything is as a kubelet would expect it, else with the first thing that is not.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	restclient "k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	utilexec "k8s.io/client-go/util/exec"
	internal "k8s.io/cri-api/pkg/apis"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	remote "k8s.io/cri-client/pkg"
	execs "k8s.io/utils/exec"
)

const patience = time.Minute

func fail(format string, words ...any) {
	fmt.Fprintf(os.Stderr, format+"\n", words...)
	os.Exit(1)
}

func must(what string, err error) {
	if err != nil {
		fail("%s: %v", what, err)
	}
}

func same[T comparable](what string, found, wanted T) {
	if found != wanted {
		fail("%s is %v, expected %v", what, found, wanted)
	}
}

func holds(what, text, part string) {
	if !strings.Contains(text, part) {
		fail("%s does not hold %q: %q", what, part, text)
	}
}

func main() {
	if len(os.Args) != 5 {
		fail("client SOCKET IMAGE DIRECTORY CGROUP")
	}
	// As the kubelet's feature gate CRIListStreaming has it, off and on.
	for _, streaming := range []bool{false, true} {
		life(os.Args[1], os.Args[2], os.Args[3], os.Args[4], streaming)
	}
	fmt.Println("everything is as a kubelet expects it")
}

func life(socket, image, directory, cgroup string, streaming bool) {
	ctx := context.Background()
	endpoint := "unix://" + socket
	runtime, err := remote.NewRemoteRuntimeService(ctx, endpoint, patience, nil, streaming)
	must("the runtime service", err)
	images, err := remote.NewRemoteImageService(ctx, endpoint, patience, nil, streaming)
	must("the image service", err)

	version, err := runtime.Version(ctx, "v1")
	must("Version", err)
	same("the version of the API", version.RuntimeApiVersion, "v1")
	status, err := runtime.Status(ctx, true)
	must("Status", err)
	for _, condition := range status.Status.Conditions {
		same(condition.Type, condition.Status, true)
	}
	_, err = runtime.RuntimeConfig(ctx)
	must("RuntimeConfig", err)
	must("UpdateRuntimeConfig", runtime.UpdateRuntimeConfig(ctx, &cri.RuntimeConfig{NetworkConfig: &cri.NetworkConfig{PodCidr: "10.88.0.0/24"}}))

	spec := &cri.ImageSpec{Image: image}
	id, err := images.PullImage(ctx, spec, nil, nil)
	must("PullImage", err)
	found, err := images.ImageStatus(ctx, spec, true)
	must("ImageStatus", err)
	same("the image's id", found.Image.Id, id)
	listed, err := images.ListImages(ctx, nil)
	must("ListImages", err)
	same("images", len(listed), 1)
	_, err = images.ImageFsInfo(ctx)
	must("ImageFsInfo", err)

	events := make(chan *cri.ContainerEventResponse, 64)
	following, stop := context.WithCancel(ctx)
	go func() {
		// It ends when it is told to.
		_ = runtime.GetContainerEvents(following, events, nil)
	}()

	pod := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: "foreign", Uid: "foreign-uid", Namespace: "default"},
		Hostname:     "foreign",
		LogDirectory: directory + "/logs",
		Labels:       map[string]string{"app": "foreign"},
		Linux:        &cri.LinuxPodSandboxConfig{CgroupParent: cgroup},
	}
	sandbox, err := runtime.RunPodSandbox(ctx, pod, "")
	must("RunPodSandbox", err)
	told, err := runtime.PodSandboxStatus(ctx, sandbox, true)
	must("PodSandboxStatus", err)
	same("the sandbox's state", told.Status.State, cri.PodSandboxState_SANDBOX_READY)
	pods, err := runtime.ListPodSandbox(ctx, &cri.PodSandboxFilter{LabelSelector: map[string]string{"app": "foreign"}})
	must("ListPodSandbox", err)
	same("sandboxes", len(pods), 1)
	_, err = runtime.PodSandboxStatus(ctx, "nothing", false)
	if err == nil || !strings.Contains(err.Error(), "NotFound") {
		fail("an unknown sandbox: %v", err)
	}

	script := "mkdir -p /www; echo served > /www/x; httpd -p 8080 -h /www; echo from main; " +
		"while read line; do echo got:$line; done; sleep 3600"
	config := &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: "main"},
		Image:    spec,
		Command:  []string{"/bin/sh", "-c", script},
		LogPath:  "main.log",
		Stdin:    true,
		Linux: &cri.LinuxContainerConfig{
			Resources: &cri.LinuxContainerResources{MemoryLimitInBytes: 64 << 20},
			SecurityContext: &cri.LinuxContainerSecurityContext{
				NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER},
			},
		},
	}
	container, err := runtime.CreateContainer(ctx, sandbox, config, pod)
	must("CreateContainer", err)
	must("StartContainer", runtime.StartContainer(ctx, container))
	state, err := runtime.ContainerStatus(ctx, container, true)
	must("ContainerStatus", err)
	same("the container's state", state.Status.State, cri.ContainerState_CONTAINER_RUNNING)
	same("its image's id", state.Status.ImageId, id)
	containers, err := runtime.ListContainers(ctx, &cri.ContainerFilter{PodSandboxId: sandbox})
	must("ListContainers", err)
	same("containers", len(containers), 1)

	execSync(ctx, runtime, container)
	for _, way := range ways() {
		streams(ctx, runtime, container, way)
	}
	forwards(ctx, runtime, sandbox)
	figures(ctx, runtime, sandbox, container)

	limits := &cri.ContainerResources{Linux: &cri.LinuxContainerResources{MemoryLimitInBytes: 96 << 20}}
	must("UpdateContainerResources", runtime.UpdateContainerResources(ctx, container, limits))
	_, err = runtime.UpdatePodSandboxResources(ctx, &cri.UpdatePodSandboxResourcesRequest{PodSandboxId: sandbox, Resources: limits.Linux})
	must("UpdatePodSandboxResources", err)
	must("ReopenContainerLog", runtime.ReopenContainerLog(ctx, container))
	log, err := os.ReadFile(directory + "/logs/main.log")
	must("the log", err)
	holds("the log", string(log), " stdout F from main\n")

	must("StopContainer", runtime.StopContainer(ctx, container, 1))
	state, err = runtime.ContainerStatus(ctx, container, false)
	must("ContainerStatus", err)
	same("the container's state", state.Status.State, cri.ContainerState_CONTAINER_EXITED)
	must("RemoveContainer", runtime.RemoveContainer(ctx, container))
	must("RemoveContainer again", runtime.RemoveContainer(ctx, container))
	must("StopPodSandbox", runtime.StopPodSandbox(ctx, sandbox))
	must("RemovePodSandbox", runtime.RemovePodSandbox(ctx, sandbox))

	kinds := map[string][]cri.ContainerEventType{}
	for len(kinds[container])+len(kinds[sandbox]) < 8 {
		select {
		case event := <-events:
			kinds[event.ContainerId] = append(kinds[event.ContainerId], event.ContainerEventType)
		case <-time.After(patience):
			fail("no further event: %v", kinds)
		}
	}
	stop()
	for owner, seen := range kinds {
		same("events of "+owner, fmt.Sprint(seen), "[CONTAINER_CREATED_EVENT CONTAINER_STARTED_EVENT CONTAINER_STOPPED_EVENT CONTAINER_DELETED_EVENT]")
	}
	must("RemoveImage", images.RemoveImage(ctx, spec))
	found, err = images.ImageStatus(ctx, spec, false)
	must("ImageStatus", err)
	same("the removed image", found.Image == nil, true)
	must("Close", runtime.Close(ctx))
}

func execSync(ctx context.Context, runtime internal.RuntimeService, container string) {
	out, _, err := runtime.ExecSync(ctx, container, []string{"/bin/sh", "-c", "echo out; exit 3"}, 30*time.Second)
	var code execs.CodeExitError
	if !errors.As(err, &code) {
		fail("ExecSync: %v", err)
	}
	same("the exit code", code.Code, 3)
	same("the output", string(out), "out\n")
	_, _, err = runtime.ExecSync(ctx, container, []string{"/bin/sleep", "60"}, time.Second)
	if !errors.Is(err, remote.ErrCommandTimedOut) {
		fail("a command that is too slow: %v", err)
	}
}

// A way to stream, by its name.
type way struct {
	name  string
	first bool
	make  func(address string) (remotecommand.Executor, error)
}

func parsed(address string) *url.URL {
	place, err := url.Parse(address)
	must("the URL", err)
	return place
}

func ways() []way {
	config := &restclient.Config{}
	all := []way{{"WebSocket", false, func(address string) (remotecommand.Executor, error) {
		return remotecommand.NewWebSocketExecutor(config, http.MethodGet, address)
	}}}
	all = append(all, way{"SPDY", false, func(address string) (remotecommand.Executor, error) {
		return remotecommand.NewSPDYExecutor(config, http.MethodPost, parsed(address))
	}})
	for _, protocol := range []string{"v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"} {
		all = append(all, way{"SPDY " + protocol, protocol == "channel.k8s.io", func(address string) (remotecommand.Executor, error) {
			transport, upgrader, err := spdy.RoundTripperFor(config)
			if err != nil {
				return nil, err
			}
			return remotecommand.NewSPDYExecutorForProtocols(transport, upgrader, http.MethodPost, parsed(address), protocol)
		}})
	}
	return all
}

// One size of a terminal.
type size struct{ told bool }

func (size *size) Next() *remotecommand.TerminalSize {
	if size.told {
		return nil
	}
	size.told = true
	return &remotecommand.TerminalSize{Width: 83, Height: 29}
}

func streams(ctx context.Context, runtime internal.RuntimeService, container string, way way) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	request := &cri.ExecRequest{
		ContainerId: container,
		Cmd:         []string{"/bin/sh", "-c", "head -c 640000; echo err >&2; exit 4"},
		Stdin:       true, Stdout: true, Stderr: true,
	}
	answer, err := runtime.Exec(ctx, request)
	must("Exec", err)
	executor, err := way.make(answer.Url)
	must(way.name, err)
	var out, errs bytes.Buffer
	// The first version of the protocol cannot tell the end of the input, so the command counts.
	input := strings.Repeat("0123456789abcdef", 40_000)
	err = executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: strings.NewReader(input), Stdout: &out, Stderr: &errs})
	var code utilexec.CodeExitError
	if errors.As(err, &code) {
		same("the exit code by "+way.name, code.Code, 4)
	} else if way.first && err == nil {
		// Its client does not wait for the error stream.
	} else if err == nil || !strings.Contains(err.Error(), "4") {
		// The older protocols tell it in words.
		fail("exec by %s: %v", way.name, err)
	}
	same("stdout by "+way.name, out.String() == input, true)
	same("stderr by "+way.name, errs.String(), "err\n")

	if strings.Contains(way.name, "channel") {
		return
	}
	terminal := &cri.ExecRequest{
		ContainerId: container,
		Cmd:         []string{"/bin/sh", "-c", "until [ \"$(stty size 2>/dev/null)\" = '29 83' ]; do :; done; echo sized"},
		Stdout:      true, Tty: true,
	}
	answer, err = runtime.Exec(ctx, terminal)
	must("Exec", err)
	executor, err = way.make(answer.Url)
	must(way.name, err)
	out.Reset()
	must("a terminal by "+way.name, executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: &out, Tty: true, TerminalSizeQueue: &size{}}))
	same("a terminal by "+way.name, out.String(), "sized\r\n")

	attached, err := runtime.Attach(ctx, &cri.AttachRequest{ContainerId: container, Stdin: true, Stdout: true, Stderr: true})
	must("Attach", err)
	executor, err = way.make(attached.Url)
	must(way.name, err)
	reader, writer := io.Pipe()
	input_, inputWriter := io.Pipe()
	attachment, leave := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() {
		ended <- executor.StreamWithContext(attachment, remotecommand.StreamOptions{Stdin: input_, Stdout: writer, Stderr: io.Discard})
	}()
	_, err = inputWriter.Write([]byte(way.name + "\n"))
	must("the container's input", err)
	said := make([]byte, len("got:"+way.name))
	_, err = io.ReadFull(reader, said)
	must("the container's answer", err)
	same("the answer", string(said), "got:"+way.name)
	leave()
	// It was cut off.
	_ = reader.Close()
	_ = inputWriter.Close()
	<-ended
}

func forwards(ctx context.Context, runtime internal.RuntimeService, sandbox string) {
	for _, tunnel := range []bool{false, true} {
		answer, err := runtime.PortForward(ctx, &cri.PortForwardRequest{PodSandboxId: sandbox, Port: []int32{8080}})
		must("PortForward", err)
		config := &restclient.Config{}
		transport, upgrader, err := spdy.RoundTripperFor(config)
		must("SPDY", err)
		dialer := spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, parsed(answer.Url))
		if tunnel {
			dialer, err = portforward.NewSPDYOverWebsocketDialer(parsed(answer.Url), config)
			must("the tunnel", err)
		}
		stop, ready := make(chan struct{}), make(chan struct{})
		forwarder, err := portforward.New(dialer, []string{"0:8080"}, stop, ready, io.Discard, os.Stderr)
		must("port-forward", err)
		ended := make(chan error, 1)
		go func() { ended <- forwarder.ForwardPorts() }()
		select {
		case <-ready:
		case err := <-ended:
			fail("port-forward: %v", err)
		case <-time.After(patience):
			fail("port-forward is not ready")
		}
		ports, err := forwarder.GetPorts()
		must("ports", err)
		for range 3 {
			page, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/x", ports[0].Local))
			must("a request to the forwarded port", err)
			body, err := io.ReadAll(page.Body)
			must("its answer", err)
			same("the answer", string(body), "served\n")
			must("the connection", page.Body.Close())
		}
		close(stop)
		must("port-forward", <-ended)
	}
}

func figures(ctx context.Context, runtime internal.RuntimeService, sandbox, container string) {
	one, err := runtime.ContainerStats(ctx, container)
	must("ContainerStats", err)
	same("memory is counted", one.Memory.UsageBytes.Value > 0, true)
	many, err := runtime.ListContainerStats(ctx, nil)
	must("ListContainerStats", err)
	same("containers with stats", len(many), 1)
	pod, err := runtime.PodSandboxStats(ctx, sandbox)
	must("PodSandboxStats", err)
	same("the pod's containers", len(pod.Linux.Containers), 1)
	pods, err := runtime.ListPodSandboxStats(ctx, nil)
	must("ListPodSandboxStats", err)
	same("pods with stats", len(pods), 1)
	descriptors, err := runtime.ListMetricDescriptors(ctx)
	must("ListMetricDescriptors", err)
	same("there are descriptors", len(descriptors) > 50, true)
	metrics, err := runtime.ListPodSandboxMetrics(ctx)
	must("ListPodSandboxMetrics", err)
	same("pods with metrics", len(metrics), 1)
}
