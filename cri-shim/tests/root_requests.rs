//! Requests that make no sense: each gets a precise status, and nothing is left behind. Needs root.

mod support;

use std::time::Duration;

use cri_shim_api::v1;
use cri_shim_api::v1::ContainerEventType::{
    ContainerCreatedEvent, ContainerDeletedEvent, ContainerStartedEvent, ContainerStoppedEvent,
};
use keelson_cri::steps::Step;
use support::cri::{Cri, PATIENCE, shell};
use tonic::Code;

/// The code of a refused request; `Ok` for one that was answered.
fn code<T>(answer: Result<T, tonic::Status>) -> Code {
    answer.err().map_or(Code::Ok, |status| status.code())
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_unknown_ids_are_refused_and_forgotten() {
    let cri = Cri::start().await;
    let memory = || {
        let text = std::fs::read_to_string(format!("/proc/{}/status", cri.pid())).expect("status");
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("memory").to_owned();
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number")
    };
    let mut runtime = cri.runtime();
    let mut before = 0;
    for number in 0..10_000 {
        if number == 1_000 {
            before = memory();
        }
        let (id, sandbox) = (format!("{number:064x}"), format!("{number:064x}"));
        let answer = match number % 10 {
            0 => code(
                runtime
                    .container_status(v1::ContainerStatusRequest { container_id: id, verbose: true })
                    .await,
            ),
            1 => code(
                runtime
                    .pod_sandbox_status(v1::PodSandboxStatusRequest {
                        pod_sandbox_id: sandbox,
                        verbose: true,
                    })
                    .await,
            ),
            2 => code(runtime.start_container(v1::StartContainerRequest { container_id: id }).await),
            3 => code(runtime.container_stats(v1::ContainerStatsRequest { container_id: id }).await),
            4 => {
                code(runtime.pod_sandbox_stats(v1::PodSandboxStatsRequest { pod_sandbox_id: sandbox }).await)
            }
            5 => code(
                runtime
                    .exec_sync(v1::ExecSyncRequest { container_id: id, cmd: vec!["true".into()], timeout: 1 })
                    .await,
            ),
            6 => code(runtime.reopen_container_log(v1::ReopenContainerLogRequest { container_id: id }).await),
            7 => code(
                runtime
                    .attach(v1::AttachRequest { container_id: id, stdout: true, ..Default::default() })
                    .await,
            ),
            8 => code(
                runtime
                    .port_forward(v1::PortForwardRequest { pod_sandbox_id: sandbox, port: vec![80] })
                    .await,
            ),
            _ => code(
                runtime
                    .update_container_resources(v1::UpdateContainerResourcesRequest {
                        container_id: id,
                        linux: Some(v1::LinuxContainerResources::default()),
                        ..Default::default()
                    })
                    .await,
            ),
        };
        assert_eq!(answer, Code::NotFound, "request {number}");
    }
    for number in 0..100 {
        let id = format!("{number:064x}");
        let stop = v1::StopContainerRequest { container_id: id.clone(), timeout: 0 };
        assert_eq!(code(runtime.stop_container(stop).await), Code::Ok, "stopping what is not there is fine");
        let remove = v1::RemovePodSandboxRequest { pod_sandbox_id: id };
        assert_eq!(code(runtime.remove_pod_sandbox(remove).await), Code::Ok);
    }
    let after = memory();
    assert!(after < before + 8192, "{before} kB before, {after} kB after");
    cri.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn giant_and_empty_requests_get_a_precise_status() {
    let cri = Cri::start().await;
    let mut runtime = cri.runtime();
    let giant = v1::ContainerStatusRequest { container_id: "x".repeat(1 << 20), verbose: false };
    let status = runtime.container_status(giant).await.expect_err("unknown");
    assert_eq!(status.code(), Code::NotFound);
    assert!(status.message().len() < 4096, "a message that fits into a header");
    // Four MiB of annotations are a request like any other; beyond 16 MiB it is refused before it is read.
    let mut pod = cri.pod("giant");
    pod.annotations.insert("note".into(), "x".repeat(5 << 20));
    let sandbox = cri.run(&pod).await.expect("a big request is served");
    cri.remove(&sandbox).await;
    pod.annotations.insert("note".into(), "x".repeat(17 << 20));
    assert_eq!(code(cri.run(&pod).await), Code::OutOfRange);
    let image = v1::ImageSpec { image: "x".repeat(17 << 20), ..Default::default() };
    let request = v1::ImageStatusRequest { image: Some(image), verbose: false };
    assert_eq!(code(cri.images().image_status(request).await), Code::OutOfRange);

    let empty = v1::RunPodSandboxRequest::default();
    assert_eq!(code(runtime.run_pod_sandbox(empty).await), Code::InvalidArgument);
    let mut unnamed = cri.pod("unnamed");
    unnamed.metadata = None;
    assert_eq!(code(cri.run(&unnamed).await), Code::InvalidArgument);
    let create = v1::CreateContainerRequest { pod_sandbox_id: "none".into(), ..Default::default() };
    assert_eq!(code(runtime.create_container(create).await), Code::InvalidArgument, "no configuration");
    let create = v1::CreateContainerRequest {
        pod_sandbox_id: "none".into(),
        config: Some(shell("main", "true")),
        ..Default::default()
    };
    assert_eq!(code(runtime.create_container(create).await), Code::NotFound, "no such sandbox");
    let pull = v1::PullImageRequest::default();
    assert_eq!(code(cri.images().pull_image(pull).await), Code::InvalidArgument);
    cri.assert_nothing_left().await;
}

/// A gRPC call by hand: a path and the bytes of a message. Gives the status of the answer.
async fn raw(cri: &Cri, path: &'static str, body: &'static [u8]) -> Option<i32> {
    use http_body_util::{BodyExt, Full};
    let stream = tokio::net::UnixStream::connect(cri.dir().join("cri.sock")).await.expect("connected");
    let io = hyper_util::rt::TokioIo::new(stream);
    let executor = hyper_util::rt::TokioExecutor::new();
    let (mut client, connection) = hyper::client::conn::http2::handshake(executor, io).await.expect("http/2");
    let connection = tokio::spawn(connection);
    let request = http::Request::post(format!("http://cri{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(bytes::Bytes::from_static(body)))
        .expect("a request");
    let answer = tokio::time::timeout(PATIENCE, client.send_request(request))
        .await
        .expect("in time")
        .expect("an answer");
    let head = answer.headers().get("grpc-status").cloned();
    let body = answer.into_body().collect().await.expect("a body");
    let status = head.or_else(|| body.trailers().and_then(|trailers| trailers.get("grpc-status").cloned()));
    connection.abort();
    status.and_then(|status| status.to_str().ok().and_then(|text| text.parse().ok()))
}

const STATUS: &str = "/runtime.v1.RuntimeService/ContainerStatus";

#[tokio::test(flavor = "multi_thread")]
async fn malformed_messages_and_paths_are_refused() {
    let cri = Cri::start().await;
    // A field of length 100 in a message of 3 bytes.
    assert_eq!(raw(&cri, STATUS, &[0, 0, 0, 0, 3, 0x0a, 100, b'x']).await, Some(Code::Internal as i32));
    // A name that is no UTF-8.
    assert_eq!(raw(&cri, STATUS, &[0, 0, 0, 0, 3, 0x0a, 1, 0xff]).await, Some(Code::Internal as i32));
    // A compressed message, which nobody agreed on.
    assert_eq!(raw(&cri, STATUS, &[1, 0, 0, 0, 1, 0]).await, Some(Code::Internal as i32));
    let unknown = raw(&cri, "/runtime.v1.RuntimeService/Nonsense", &[0, 0, 0, 0, 0]).await;
    assert_eq!(unknown, Some(Code::Unimplemented as i32));
    assert_eq!(
        raw(&cri, "/runtime.v1alpha2.RuntimeService/Version", &[0; 5]).await,
        Some(Code::Unimplemented as i32)
    );
    // And it still works.
    let answer = cri.runtime().version(v1::VersionRequest::default()).await.expect("answered").into_inner();
    assert_eq!(answer.runtime_name, "keelson-cri");
    let mode = std::fs::metadata(cri.dir().join("cri.sock")).expect("a socket").permissions();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode) & 0o777, 0o600, "only root may ask");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_that_does_not_read_holds_nobody_up() {
    let cri = Cri::start().await;
    let slow = cri.runtime().get_container_events(v1::GetEventsRequest {}).await.expect("followed");
    let mut quick =
        cri.runtime().get_container_events(v1::GetEventsRequest {}).await.expect("followed").into_inner();
    let pod = cri.pod("followed");
    let sandbox = cri.run(&pod).await.expect("running");
    let id = cri.script(&sandbox, &pod, "main", "exit 3").await;
    cri.ended(&id).await;
    cri.remove(&sandbox).await;
    let mut seen = Vec::new();
    loop {
        let event = tokio::time::timeout(PATIENCE, quick.message()).await;
        let event = event.unwrap_or_else(|_| panic!("only {seen:?}")).expect("open").expect("an event");
        let who = if event.container_id == sandbox { "sandbox" } else { "container" };
        seen.push((who, event.container_event_type()));
        if event.container_event_type() == ContainerDeletedEvent && who == "sandbox" {
            break;
        }
    }
    for kind in [ContainerCreatedEvent, ContainerStartedEvent, ContainerStoppedEvent, ContainerDeletedEvent] {
        assert!(seen.contains(&("container", kind)), "{kind:?} is not in {seen:?}");
        assert!(seen.contains(&("sandbox", kind)), "{kind:?} of the sandbox is not in {seen:?}");
    }
    drop(slow);
    cri.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_removed_while_its_container_is_at_a_step_takes_it_along() {
    let mut cri = Cri::start().await;
    // The first container of an image is made before the answer, later ones behind it.
    for (step, later) in [
        (Step::ContainerIntent, false),
        (Step::ContainerSnapshot, false),
        (Step::ContainerRecord, false),
        (Step::ContainerIntent, true),
    ] {
        let name = format!("{}{}", step.name(), if later { ":2" } else { "" });
        let held = cri.restart_to_hold_at(&name).await;
        let pod = cri.pod(&format!("held-{}-{later}", step.name()));
        let sandbox = cri.run(&pod).await.expect("running");
        if later {
            cri.script(&sandbox, &pod, "first", "exec sleep 3600").await;
        }
        let remove = async {
            let goes_on = held.reached().await;
            tokio::time::timeout(PATIENCE, cri.remove(&sandbox)).await.expect("it waits for the creation");
            drop(goes_on);
        };
        let (created, ()) = tokio::join!(cri.create(&sandbox, &pod, shell("main", "true")), remove);
        let status = created.expect_err("its pod is gone");
        assert!(
            matches!(status.code(), Code::NotFound | Code::FailedPrecondition),
            "{name}: refused for another reason: {status:?}"
        );
        cri.assert_nothing_left().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_removed_while_its_container_is_made_takes_it_along() {
    let cri = Cri::start().await;
    for round in 0..24_u64 {
        let name = format!("cut-{round}");
        let pod = cri.pod(&name);
        let sandbox = cri.run(&pod).await.expect("running");
        let remove = async {
            // Not to wait for anything: each round meets the creation at another of its steps.
            tokio::time::sleep(Duration::from_micros(round / 2 * 500)).await;
            cri.remove(&sandbox).await;
        };
        let (created, ()) = tokio::join!(cri.create(&sandbox, &pod, shell("main", "true")), remove);
        if let Err(status) = created {
            assert!(
                matches!(status.code(), Code::NotFound | Code::FailedPrecondition),
                "refused for another reason: {status:?}"
            );
        }
    }
    cri.assert_nothing_left().await;
}
