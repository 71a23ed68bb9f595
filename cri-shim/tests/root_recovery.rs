//! `kill -9` of everything, at every step: afterwards the truth is served, repeated calls succeed and nothing is left. Needs
//! root.

mod support;

use cri_shim_api::v1;
use cri_shim_api::v1::{ContainerEventType, PodSandboxState};
use keelson_cri::steps::Step;
use nix::sys::signal::{Signal, kill};
use support::cri::{Cri, PATIENCE, shell};
use support::life::{CALLS, Call, Life, attempt, usable};

#[tokio::test(flavor = "multi_thread")]
async fn it_may_die_at_every_step_of_every_call() {
    let mut cri = Cri::start().await;
    for step in Step::ALL {
        cri.restart_to_die_at(step.name()).await;
        let mut life = Life::of(cri.pod(step.name()));
        life.go_on(&mut cri, &CALLS, step.name()).await;
        cri.assert_nothing_left().await;
    }
}

/// All but the first container of an image come to be behind the answer.
#[tokio::test(flavor = "multi_thread")]
async fn it_may_die_while_a_later_container_is_made() {
    let mut cri = Cri::start().await;
    for step in [
        Step::ContainerIntent,
        Step::ContainerCreated,
        Step::ContainerSnapshot,
        Step::ContainerRecord,
        Step::ContainerTask,
    ] {
        let name = format!("{}:2", step.name());
        cri.restart_to_die_at(&name).await;
        let pod = cri.pod(&format!("later-{}", step.name()));
        let sandbox = cri.run(&pod).await.unwrap();
        cri.script(&sandbox, &pod, "first", "exec sleep 3600").await;
        let mut life = Life { sandbox, ..Life::of(pod) };
        life.go_on(&mut cri, &[Call::Create, Call::Start, Call::Stop, Call::Remove], &name).await;
        cri.assert_nothing_left().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_process_that_dies_is_told() {
    let mut cri = Cri::start().await;
    let pod = cri.pod("pause");
    let sandbox = cri.run(&pod).await.unwrap();
    let mut events = cri.runtime().get_container_events(v1::GetEventsRequest {}).await.unwrap().into_inner();
    kill(cri.pause_pid(&sandbox).await, Signal::SIGKILL).unwrap();
    let event = tokio::time::timeout(PATIENCE, events.message()).await.unwrap().unwrap().unwrap();
    assert_eq!(
        (event.container_id.as_str(), event.container_event_type()),
        (sandbox.as_str(), ContainerEventType::ContainerStoppedEvent)
    );
    assert_eq!(cri.state_of(&sandbox).await, PodSandboxState::SandboxNotready);
    let refused = cri.create(&sandbox, &pod, shell("late", "true")).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition, "{refused}");
    cri.remove(&sandbox).await;

    let pod = cri.pod("pause-away");
    let sandbox = cri.run(&pod).await.unwrap();
    let pause = cri.pause_pid(&sandbox).await;
    cri.restart().await;
    assert_eq!(cri.state_of(&sandbox).await, PodSandboxState::SandboxReady, "a restart changes nothing");
    cri.kill();
    kill(pause, Signal::SIGKILL).unwrap();
    cri.start_again().await;
    assert_eq!(cri.state_of(&sandbox).await, PodSandboxState::SandboxNotready);
    cri.remove(&sandbox).await;
    cri.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_that_dies_ends_its_containers() {
    let cri = Cri::start().await;
    let pod = cri.pod("shim");
    let sandbox = cri.run(&pod).await.unwrap();
    let id = cri.script(&sandbox, &pod, "main", "exec sleep 3600").await;
    let shims = cri.shims();
    assert!(!shims.is_empty(), "a shim runs the container");
    for shim in shims {
        kill(shim, Signal::SIGKILL).unwrap();
    }
    let ended = cri.ended(&id).await;
    assert_ne!(ended.exit_code, 0, "{ended:?}");
    assert_eq!(cri.state_of(&sandbox).await, PodSandboxState::SandboxReady, "the pod itself goes on");
    let next = cri.script(&sandbox, &pod, "next", "exec sleep 3600").await;
    cri.answers(&next).await;
    cri.remove(&sandbox).await;
    cri.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn containerd_may_die_at_any_moment() {
    let mut cri = Cri::start().await;
    for (round, milliseconds) in [5, 20, 45, 80].into_iter().enumerate() {
        let pod = cri.pod(&format!("containerd-{round}"));
        // The moment of death is the point here; whatever it was, the same must hold afterwards.
        let moment = std::time::Duration::from_millis(milliseconds);
        let work = attempt(&cri, &pod);
        drop(tokio::time::timeout(moment, work).await);
        cri.containerd.restart();
        cri.serves().await;
        let sandbox = usable(&cri, &pod).await;
        cri.remove(&sandbox).await;
        let all = cri.runtime().list_pod_sandbox(v1::ListPodSandboxRequest::default()).await.unwrap();
        for sandbox in all.into_inner().items {
            cri.remove(&sandbox.id).await;
        }
    }
    // What containerd itself lost is found by the next start.
    cri.restart().await;
    cri.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_moment_it_converges() {
    let mut cri = Cri::start().await;
    for (round, milliseconds) in [2, 8, 16, 28, 40, 55, 75, 100].into_iter().enumerate() {
        let pod = cri.pod(&format!("round-{round}"));
        // The moment of death is the point here; whatever it was, the same must hold afterwards.
        let moment = std::time::Duration::from_millis(milliseconds);
        let work = async {
            let sandbox = cri.run(&pod).await?;
            let id = cri.create(&sandbox, &pod, shell("main", "exec sleep 3600")).await?;
            cri.launch(&id).await
        };
        drop(tokio::time::timeout(moment, work).await);
        cri.restart().await;
        let sandbox = usable(&cri, &pod).await;
        let removal = v1::RemovePodSandboxRequest { pod_sandbox_id: sandbox.clone() };
        drop(tokio::time::timeout(moment, cri.runtime().remove_pod_sandbox(removal)).await);
        cri.restart().await;
        cri.remove(&sandbox).await;
        cri.assert_nothing_left().await;
    }
}
