//! Containers and the container runtime: commands, exit statuses, restarts, last words.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::super::super::case::{Case, case, holds, same, skip};
use super::super::context::T;
use super::super::live::container;
use super::prints;

pub(super) fn cases() -> Vec<Case<T>> {
    let (group, runtime) = ("Containers", "Container Runtime");
    vec![
        case(group, "without a command the image's own runs", own_command),
        prints(
            group,
            "arguments alone replace the image's",
            "",
            |pod| pod.main(json!({"command": null, "args": ["echo", "from", "args"]})),
            "from args",
        ),
        prints(
            group,
            "a command and arguments are joined",
            "",
            |pod| pod.main(json!({"command": ["/bin/echo", "a"], "args": ["b c", "d"]})),
            "a b c d",
        ),
        prints(
            group,
            "the working directory is the container's",
            "pwd",
            |pod| pod.main(json!({"workingDir": "/var/log"})),
            "/var/log",
        ),
        prints(
            group,
            "a working directory that the image lacks is made",
            "pwd",
            |pod| pod.main(json!({"workingDir": "/made/for/this"})),
            "/made/for/this",
        ),
        prints(
            group,
            "a terminal is there when the container asks for one",
            "test -t 1 && echo terminal",
            |pod| pod.main(json!({"tty": true, "stdin": true})),
            "terminal",
        ),
        case(runtime, "the exit status of a container that fails is told", exit_status),
        case(runtime, "the exit status of a container that succeeds is told", exit_success),
        case(runtime, "a signal is told as 128 and its number", signalled),
        case(runtime, "a command that is not there is told as StartError with exit code 128", no_command),
        case(runtime, "restartPolicy Always restarts also what succeeds", always),
        case(runtime, "restartPolicy OnFailure restarts what fails until it succeeds", on_failure),
        case(runtime, "restartPolicy OnFailure leaves what succeeds", on_failure_success),
        case(runtime, "restartPolicy Never leaves what fails", never),
        case(runtime, "a container that fails again and again is backed off", backs_off),
        case(runtime, "a rule of the container restarts it on its exit code", restart_rule),
        case(runtime, "a container's own restart policy is not its pod's", own_policy),
        case(runtime, "the termination message comes from its file", message_file),
        case(runtime, "the termination message's file can be elsewhere, for any user", message_elsewhere),
        case(runtime, "without a file FallbackToLogsOnError takes the log of what failed", message_log),
        case(runtime, "FallbackToLogsOnError takes nothing of what succeeded", message_no_log),
        case(runtime, "FallbackToLogsOnError prefers the file", message_file_first),
        case(runtime, "a termination message is cut at 4096 bytes", message_cut),
    ]
}

async fn own_command(t: T) -> Result<()> {
    let live = t.run(t.pod("").main(json!({"command": null}))).await?;
    let state = live.terminated("main").await?;
    same("the exit code of a shell without input", &state["exitCode"], 0)
}

async fn exit_status(t: T) -> Result<()> {
    let live = t.run(t.pod("exit 3")).await?;
    let state = live.terminated("main").await?;
    same("exitCode", &state["exitCode"], 3)?;
    same("reason", &state["reason"], "Error")?;
    for field in ["startedAt", "finishedAt", "containerID"] {
        ensure!(state[field].as_str().is_some_and(|text| !text.is_empty()), "no {field}: {state}");
    }
    let pod = live.ended().await?;
    same("ready", &container(&pod, "main")["ready"], false)?;
    same("started", &container(&pod, "main")["started"], false)
}

async fn exit_success(t: T) -> Result<()> {
    let state = t.run(t.pod("true")).await?.terminated("main").await?;
    same("exitCode", &state["exitCode"], 0)?;
    same("reason", &state["reason"], "Completed")
}

async fn signalled(t: T) -> Result<()> {
    // With the processes shared the shell is not the first one, which its own signals cannot end. `$$$$` is `$$` to it.
    let pod = t.pod("kill -9 $$$$; sleep 3600").spec(json!({"shareProcessNamespace": true}));
    let live = t.run(pod).await?;
    let state = live.terminated("main").await?;
    same("exitCode", &state["exitCode"], 137)?;
    same("reason", &state["reason"], "Error")
}

async fn no_command(t: T) -> Result<()> {
    let live = t.run(t.pod("").main(json!({"command": ["/no/such/program"]}))).await?;
    let state = live.terminated("main").await?;
    same("reason", &state["reason"], "StartError")?;
    same("exitCode", &state["exitCode"], 128)?;
    holds("the message", state["message"].as_str().unwrap_or_default(), "/no/such/program")?;
    live.phase("Failed").await?;
    live.event("Failed", "Error: ").await.map(drop)
}

async fn always(t: T) -> Result<()> {
    let live = t.run(t.pod("true").always()).await?;
    let main = live.restarted("main", 1).await?;
    same("the last state", &main["lastState"]["terminated"]["reason"], "Completed")?;
    live.never("the phase was final", |pod| pod["status"]["phase"] == "Succeeded")
}

async fn on_failure(t: T) -> Result<()> {
    let script = "test -e /v/kept/second && exit 0; touch /v/kept/second; exit 4";
    let pod =
        t.pod(script).spec(json!({"restartPolicy": "OnFailure"})).volume("kept", json!({"emptyDir": {}}));
    let live = t.run(pod).await?;
    let pod = live.phase("Succeeded").await?;
    let main = container(&pod, "main");
    same("restarts", &main["restartCount"], 1)?;
    same("the last exit code", &main["lastState"]["terminated"]["exitCode"], 4)
}

async fn on_failure_success(t: T) -> Result<()> {
    let pod =
        t.run(t.pod("true").spec(json!({"restartPolicy": "OnFailure"}))).await?.phase("Succeeded").await?;
    same("restarts", &container(&pod, "main")["restartCount"], 0)
}

async fn never(t: T) -> Result<()> {
    let pod = t.run(t.pod("exit 9")).await?.phase("Failed").await?;
    same("restarts", &container(&pod, "main")["restartCount"], 0)
}

async fn backs_off(t: T) -> Result<()> {
    let live = t.run(t.pod("exit 1").always()).await?;
    let message = live.waiting("main", "CrashLoopBackOff").await?;
    let name = format!("restarting failed container=main pod={}_{}({})", live.name, live.namespace, live.uid);
    holds("the message", &message, &name)?;
    ensure!(message.starts_with("back-off "), "the message is {message:?}");
    live.event("BackOff", "Back-off restarting failed container main in pod ").await.map(drop)
}

/// Makes the pod unless the cluster drops a field of `main` that it does not know.
async fn run_with_field(t: &T, pod: super::super::pod::Pod, field: &str) -> Result<super::super::live::Live> {
    let live = t.run(pod).await?;
    let made = live.until("it is there", Value::is_object).await?;
    if made["spec"]["containers"][0].get(field).is_none() {
        return skip(format!("the cluster does not know containers[].{field}"));
    }
    Ok(live)
}

async fn restart_rule(t: T) -> Result<()> {
    let rules = json!({"restartPolicy": "Never", "restartPolicyRules":
        [{"action": "Restart", "exitCodes": {"operator": "In", "values": [42]}}]});
    let script = "test -e /v/kept/second && exit 43; touch /v/kept/second; exit 42";
    let pod = t.pod(script).main(rules).volume("kept", json!({"emptyDir": {}}));
    let live = run_with_field(&t, pod, "restartPolicyRules").await?;
    let pod = live.phase("Failed").await?;
    let main = container(&pod, "main");
    same("restarts", &main["restartCount"], 1)?;
    same("the exit code", &main["state"]["terminated"]["exitCode"], 43)
}

async fn own_policy(t: T) -> Result<()> {
    let pod = t.pod("exit 5").always().main(json!({"restartPolicy": "Never"}));
    let pod = pod.beside("other", "trap 'exit 0' TERM; sleep 3600 & wait", json!({}));
    let live = run_with_field(&t, pod, "restartPolicy").await?;
    live.terminated("main").await?;
    let pod =
        live.until("the other runs", |pod| container(pod, "other")["state"]["running"].is_object()).await?;
    same("restarts", &container(&pod, "main")["restartCount"], 0)?;
    same("the phase", &pod["status"]["phase"], "Running")
}

/// The termination message of `main` when a script has run.
async fn message(t: &T, script: &str, main: Value) -> Result<String> {
    let live = t.run(t.pod(script).main(main)).await?;
    let state = live.terminated("main").await?;
    Ok(state["message"].as_str().unwrap_or_default().to_owned())
}

async fn message_file(t: T) -> Result<()> {
    let said = message(&t, "printf DONE > /dev/termination-log", json!({})).await?;
    same("the message", said.as_str(), "DONE")
}

async fn message_elsewhere(t: T) -> Result<()> {
    let main = json!({"terminationMessagePath": "/dev/other-log", "securityContext": {"runAsUser": 10000}});
    let said = message(&t, "printf ELSEWHERE > /dev/other-log", main).await?;
    same("the message", said.as_str(), "ELSEWHERE")
}

async fn message_log(t: T) -> Result<()> {
    let main = json!({"terminationMessagePolicy": "FallbackToLogsOnError"});
    let said = message(&t, "echo first; echo last; exit 1", main).await?;
    same("the message", said.trim_end(), "first\nlast")
}

async fn message_no_log(t: T) -> Result<()> {
    let main = json!({"terminationMessagePolicy": "FallbackToLogsOnError"});
    let said = message(&t, "echo words", main).await?;
    same("the message", said.as_str(), "")
}

async fn message_file_first(t: T) -> Result<()> {
    let main = json!({"terminationMessagePolicy": "FallbackToLogsOnError"});
    let said = message(&t, "echo words; printf FILE > /dev/termination-log; exit 1", main).await?;
    same("the message", said.as_str(), "FILE")
}

async fn message_cut(t: T) -> Result<()> {
    let said = message(&t, "head -c 5000 /dev/zero | tr '\\0' x > /dev/termination-log", json!({})).await?;
    same("the message's length", said.len(), 4096)
}
