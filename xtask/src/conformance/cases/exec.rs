//! ExecSync: output, exit codes, deadlines, and the identity of what runs.

use anyhow::{Context, Result};
use cri_shim_api::v1;

use super::super::case::{Case, case, holds, refused, refused_with, same};
use super::super::context::{T, resources, security};

pub(crate) fn cases() -> Vec<Case> {
    let group = "exec sync";
    vec![
        case(group, "stdout and stderr come back apart", output),
        case(group, "the exit code comes back, and is no error", exit_code),
        case(group, "binary output is untouched", binary),
        case(group, "1 MiB of output comes back whole", long_output),
        case(group, "output beyond 16 MiB is cut, and does not block the command", endless_output),
        case(group, "a timed-out command answers DeadlineExceeded", timeout),
        case(group, "a timed-out command's process tree is gone", timed_out_tree),
        case(group, "timeout 0 means no timeout", no_timeout),
        case(
            group,
            "a background child that keeps stdout open does not hold the answer for ever",
            kept_output,
        ),
        case(group, "a command that does not exist is an error that names it", missing_command),
        case(group, "an empty command is refused", empty_command),
        case(group, "in an unknown container is NotFound", unknown),
        case(group, "in a created container is refused", in_created),
        case(group, "in an ended container is refused", in_ended),
        case(group, "has the container's user, groups and capabilities", identity),
        case(group, "has the container's namespaces, root and cgroup", places),
        case(group, "has the container's seccomp mode and no_new_privs", confinement),
        case(group, "has the container's environment and working directory", environment),
        case(group, "counts against the container's memory limit", memory_limit),
        case(group, "twenty at once", twenty),
    ]
}

async fn output(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    let answer =
        t.try_exec(&id, &["/bin/sh", "-c", "echo out; echo err >&2"], 60).await.context("ExecSync")?;
    same("stdout", String::from_utf8_lossy(&answer.stdout).as_ref(), "out\n")?;
    same("stderr", String::from_utf8_lossy(&answer.stderr).as_ref(), "err\n")?;
    same("exit_code", answer.exit_code, 0)
}

async fn exit_code(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    for (script, code) in [("exit 3", 3), ("kill -TERM $$", 143), ("exit 255", 255)] {
        let answer = t.try_exec(&id, &["/bin/sh", "-c", script], 60).await.context("ExecSync")?;
        same(script, answer.exit_code, code)?;
    }
    Ok(())
}

async fn binary(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    let script = r"printf '\000\001\r\n\377x'";
    let answer = t.try_exec(&id, &["/bin/sh", "-c", script], 60).await.context("ExecSync")?;
    same("stdout", answer.stdout, b"\x00\x01\r\n\xffx".to_vec())
}

async fn long_output(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    let script = "dd if=/dev/zero bs=1024 count=1024 2>/dev/null";
    let answer = t.try_exec(&id, &["/bin/sh", "-c", script], 60).await.context("ExecSync")?;
    same("bytes", answer.stdout.len(), 1 << 20)
}

async fn endless_output(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    let script = "dd if=/dev/zero bs=1M count=40 2>/dev/null; exit 4";
    let answer = t.try_exec(&id, &["/bin/sh", "-c", script], 100).await.context("ExecSync")?;
    same("exit_code", answer.exit_code, 4)?;
    anyhow::ensure!(answer.stdout.len() <= 16 << 20, "{} bytes came back", answer.stdout.len());
    anyhow::ensure!(answer.stdout.len() >= 15 << 20, "only {} bytes came back", answer.stdout.len());
    Ok(())
}

async fn timeout(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    let result = t.try_exec(&id, &["/bin/sleep", "3000"], 1).await;
    refused_with("a command over its time", result, &[tonic::Code::DeadlineExceeded]).map(drop)
}

async fn timed_out_tree(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    let script = "setsid sleep 4321 & sleep 4321 & (sleep 4321 & wait) & wait";
    let answer = within(&t, &id, &["/bin/sh", "-c", script], 2).await?;
    refused("a command over its time", answer)?;
    t.until("no process of the command is left", || async {
        Ok((!t.sh(&id, "ps -o args").await?.contains("sleep 4321")).then_some(()))
    })
    .await
}

async fn no_timeout(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    let answer = t.try_exec(&id, &["/bin/sh", "-c", "sleep 2; echo done"], 0).await.context("ExecSync")?;
    same("stdout", answer.stdout, b"done\n".to_vec())
}

/// containerd#10094: the answer must not wait longer than the timeout for a stream that a grandchild holds.
async fn kept_output(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    // Whether it is an error or what was printed is left open.
    drop(within(&t, &id, &["/bin/sh", "-c", "sleep 1000 & echo started"], 5).await?);
    Ok(())
}

/// Fails when the answer does not come soon after the command's own timeout.
async fn within(
    t: &T,
    id: &str,
    command: &[&str],
    timeout: i64,
) -> Result<Result<v1::ExecSyncResponse, tonic::Status>> {
    let patience = std::time::Duration::from_secs(30);
    let answer = tokio::time::timeout(patience, t.try_exec(id, command, timeout)).await;
    answer.map_err(|_elapsed| {
        anyhow::anyhow!("no answer after 30 s to a command with a timeout of {timeout} s")
    })
}

async fn missing_command(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    let error = refused("a missing command", t.try_exec(&id, &["/bin/nobody-has-this"], 60).await)?;
    holds("the error", error.message(), "nobody-has-this")?;
    same("a later command", t.sh(&id, "echo fine").await?.as_str(), "fine")
}

async fn empty_command(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    refused("an empty command", t.try_exec(&id, &[], 60).await).map(drop)
}

async fn unknown(t: T) -> Result<()> {
    refused_with("ExecSync", t.try_exec("nothing", &["true"], 60).await, &[tonic::Code::NotFound]).map(drop)
}

async fn in_created(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let id = t.create(&pod, &t.shell("true")).await?;
    refused("ExecSync in a created container", t.try_exec(&id, &["true"], 60).await).map(drop)
}

async fn in_ended(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let id = t.launch(&pod, &t.shell("true")).await?;
    t.exited(&id).await?;
    refused("ExecSync in an ended container", t.try_exec(&id, &["true"], 60).await).map(drop)
}

/// Lines of `/proc/<pid>/status` that tell who a process is.
const IDENTITY: &str = "^(Uid|Gid|Groups|CapInh|CapPrm|CapEff|CapBnd|CapAmb):";

async fn compare(t: &T, id: &str, script: impl Fn(&str) -> String) -> Result<()> {
    let first = t.sh(id, &script("1")).await?;
    let own = t.sh(id, &script("self")).await?;
    anyhow::ensure!(!first.trim().is_empty(), "nothing to compare");
    same("the command's own view", own, first)
}

async fn identity(t: T) -> Result<()> {
    let (_, id) = t
        .idle_with(|config| {
            let context = security(config);
            context.run_as_user = Some(v1::Int64Value { value: 1000 });
            context.run_as_group = Some(v1::Int64Value { value: 3000 });
            context.supplemental_groups = vec![4000, 4001];
            let add_capabilities = vec!["NET_ADMIN".to_owned()];
            context.capabilities = Some(v1::Capability { add_capabilities, ..Default::default() });
        })
        .await?;
    compare(&t, &id, |pid| format!("grep -E '{IDENTITY}' /proc/{pid}/status")).await?;
    let (_, id) = t.idle().await?;
    compare(&t, &id, |pid| format!("grep -E '{IDENTITY}' /proc/{pid}/status")).await
}

async fn places(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    compare(&t, &id, |pid| {
        format!("for n in ipc mnt net pid uts user cgroup; do readlink /proc/{pid}/ns/$n; done")
    })
    .await?;
    compare(&t, &id, |pid| format!("cat /proc/{pid}/cgroup")).await?;
    compare(&t, &id, |pid| format!("cat /proc/{pid}/mountinfo")).await
}

async fn confinement(t: T) -> Result<()> {
    let (_, id) = t
        .idle_with(|config| {
            let context = security(config);
            context.no_new_privs = true;
            context.seccomp = Some(v1::SecurityProfile::default());
        })
        .await?;
    compare(&t, &id, |pid| format!("grep -E '^(NoNewPrivs|Seccomp|Seccomp_filters):' /proc/{pid}/status"))
        .await?;
    holds("the command", &t.sh(&id, "grep Seccomp: /proc/self/status").await?, "2")?;
    compare(&t, &id, |pid| format!("cat /proc/{pid}/limits /proc/{pid}/oom_score_adj")).await
}

async fn environment(t: T) -> Result<()> {
    let (_, id) = t
        .idle_with(|config| {
            config.envs = vec![v1::KeyValue { key: "GIVEN".to_owned(), value: "x y".to_owned() }];
            config.working_dir = "/home/conf".to_owned();
        })
        .await?;
    let text = t.sh(&id, "echo $GIVEN:$FROM_IMAGE:$HOSTNAME:$(pwd)").await?;
    anyhow::ensure!(text.starts_with("x y:yes:pod-") && text.ends_with(":/home/conf"), "{text}");
    Ok(())
}

async fn memory_limit(t: T) -> Result<()> {
    let (_, id) = t.idle_with(|config| resources(config).memory_limit_in_bytes = 24 << 20).await?;
    let script = "dd if=/dev/zero of=/dev/null bs=64M count=10";
    // A kernel may end the whole container with it.
    if let Ok(answer) = t.try_exec(&id, &["/bin/sh", "-c", script], 100).await {
        anyhow::ensure!(answer.exit_code != 0, "64 MiB fit into a limit of 24 MiB");
    }
    Ok(())
}

async fn twenty(t: T) -> Result<()> {
    let (_, id) = t.idle().await?;
    let scripts: Vec<String> = (0..20).map(|number| format!("echo {number}; exit {number}")).collect();
    let runs = scripts.iter().map(|script| async {
        let command = ["/bin/sh", "-c", script.as_str()];
        t.try_exec(&id, &command, 100).await
    });
    for (number, answer) in futures::future::join_all(runs).await.into_iter().enumerate() {
        let answer = answer.with_context(|| format!("ExecSync {number}"))?;
        same("stdout", String::from_utf8_lossy(&answer.stdout).trim().to_owned(), number.to_string())?;
        same("exit_code", usize::try_from(answer.exit_code)?, number)?;
    }
    Ok(())
}
