//! Logs through the API.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;

use super::super::super::case::{Case, case, holds, same};
use super::super::api::refusal;
use super::super::context::{IDLE, T};
use super::super::live::Live;

pub(super) fn cases() -> Vec<Case<T>> {
    let group = "Kubelet logs";
    vec![
        case(group, "standard output and standard error are both there, in their order", both),
        case(group, "tailLines gives the last lines", tail),
        case(group, "limitBytes cuts", limit),
        case(group, "timestamps go before each line", timestamps),
        case(group, "sinceTime leaves out what is older", since_time),
        case(group, "sinceSeconds leaves out what is older", since_seconds),
        case(group, "follow goes on until the container ends", follow),
        case(group, "follow begins with the last lines when told so", follow_tail),
        case(group, "previous is the log of the container before", previous),
        case(group, "previous of a container that was never restarted is refused", no_previous),
        case(group, "the log of a pod that has ended can be read", ended),
        case(group, "the log of a container that waits for its image is refused with the reason", waiting),
        case(group, "one of several containers must be named", which),
        case(group, "a container that the pod does not have is refused", unknown),
        case(group, "long lines and many lines come whole", long),
        case(group, "the log survives a restart of the container as its previous one", survives),
    ]
}

/// A pod that printed ten numbered lines and has ended.
async fn ten(t: &T) -> Result<Live> {
    let live = t.run(t.pod("for i in 1 2 3 4 5 6 7 8 9 10; do echo line $i; done")).await?;
    live.phase("Succeeded").await?;
    Ok(live)
}

async fn both(t: T) -> Result<()> {
    let live = t.run(t.pod("echo out; sleep 0.2; echo err >&2; sleep 0.2; echo out again")).await?;
    live.phase("Succeeded").await?;
    same("the log", live.log("").await?.as_str(), "out\nerr\nout again\n")
}

async fn tail(t: T) -> Result<()> {
    let live = ten(&t).await?;
    same("two lines", live.log("tailLines=2").await?.as_str(), "line 9\nline 10\n")?;
    same("no line", live.log("tailLines=0").await?.as_str(), "")?;
    same("more than there are", live.log("tailLines=99").await?.lines().count(), 10)
}

async fn limit(t: T) -> Result<()> {
    let live = ten(&t).await?;
    same("ten bytes", live.log("limitBytes=10").await?.as_str(), "line 1\nlin")
}

async fn timestamps(t: T) -> Result<()> {
    let live = ten(&t).await?;
    let log = live.log("timestamps=true").await?;
    for (number, line) in log.lines().enumerate() {
        let (time, text) = line.split_once(' ').unwrap_or_default();
        same("the text", text.to_owned(), format!("line {}", number + 1))?;
        ensure!(time.len() >= 20 && time.as_bytes()[10] == b'T', "the time is {time:?}");
    }
    same("lines", log.lines().count(), 10)
}

async fn since_time(t: T) -> Result<()> {
    let live = t.run(t.pod("echo old; sleep 2; echo new")).await?;
    live.phase("Succeeded").await?;
    let stamped = live.log("timestamps=true").await?;
    let time = stamped.lines().next().and_then(|line| line.split('.').next()).unwrap_or_default();
    // Whole seconds: a second after the first line, and a second before the other.
    let (start, seconds) = time.split_at(time.len().saturating_sub(2));
    let next = seconds.parse::<u32>()? + 1;
    if next < 60 {
        let log = live.log(&format!("sinceTime={start}{next:02}Z")).await?;
        same("the log", log.as_str(), "new\n")?;
    }
    same("all of it", live.log("sinceTime=2020-01-01T00:00:00Z").await?.as_str(), "old\nnew\n")
}

async fn since_seconds(t: T) -> Result<()> {
    let live = t.ready(t.pod("echo old; sleep 4; echo new; trap 'exit 0' TERM; sleep 3600 & wait")).await?;
    live.says("new\n").await?;
    same("the last hour", live.log("sinceSeconds=3600").await?.as_str(), "old\nnew\n")?;
    let log = live.log("sinceSeconds=2").await?;
    ensure!(!log.contains("old"), "the last two seconds: {log:?}");
    Ok(())
}

async fn follow(t: T) -> Result<()> {
    let live = t.ready(t.pod("echo begins; until test -e /tmp/go; do sleep 0.1; done; echo ends")).await?;
    let mut stream = live.follow("container=main").await?;
    stream.until("begins\n").await?;
    live.exec("touch /tmp/go").await?;
    let rest = tokio::time::timeout(t.suite().limit, stream.rest()).await;
    same("the log", rest??.as_str(), "begins\nends\n")
}

async fn follow_tail(t: T) -> Result<()> {
    let live = t.ready(t.pod(&format!("echo one; echo two; echo three; echo up >&2; {IDLE}"))).await?;
    live.says("up\n").await?;
    let mut stream = live.follow("tailLines=2").await?;
    same("the log", stream.until("up\n").await?, "three\nup\n")
}

async fn previous(t: T) -> Result<()> {
    let script = format!(
        "echo run $(cat /v/kept/runs 2>/dev/null | wc -l); echo >> /v/kept/runs; test $(wc -l < /v/kept/runs) -ge 2 || exit 1; {IDLE}"
    );
    let live = t.run(t.pod(&script).always().volume("kept", json!({"emptyDir": {}}))).await?;
    live.restarted("main", 1).await?;
    live.ready().await?;
    same("the previous log", live.log("previous=true").await?.as_str(), "run 0\n")?;
    live.says("run 1\n").await.map(drop)
}

async fn no_previous(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    let refused = refusal("the log", live.log("previous=true").await)?;
    same("the code", refused.code, 400)?;
    let wanted = format!("previous terminated container \"main\" in pod \"{}\" not found", live.name);
    same("the message", refused.message, wanted)
}

async fn ended(t: T) -> Result<()> {
    let live = t.run(t.pod("echo last words; exit 1")).await?;
    live.phase("Failed").await?;
    same("the log", live.log("").await?.as_str(), "last words\n")
}

async fn waiting(t: T) -> Result<()> {
    let live =
        t.run(t.idle().main(json!({"image": "127.0.0.1:1/none:v1", "imagePullPolicy": "Never"}))).await?;
    live.waiting("main", "ErrImageNeverPull").await?;
    let refused = refusal("the log", live.log("").await)?;
    same("the code", refused.code, 400)?;
    let wanted =
        format!("container \"main\" in pod \"{}\" is waiting to start: ErrImageNeverPull", live.name);
    same("the message", refused.message, wanted)
}

async fn which(t: T) -> Result<()> {
    let live = t
        .ready(t.idle().beside("other", "echo other; trap 'exit 0' TERM; sleep 3600 & wait", json!({})))
        .await?;
    let refused = refusal("the log", live.log("").await)?;
    same("the code", refused.code, 400)?;
    holds("the message", &refused.message, "a container name must be specified for pod")?;
    holds("the message", &refused.message, "[main other]")?;
    same("the other's log", live.log("container=other").await?.as_str(), "other\n")
}

async fn unknown(t: T) -> Result<()> {
    let live = t.ready(t.idle()).await?;
    let refused = refusal("the log", live.log("container=none").await)?;
    same("the code", refused.code, 400)?;
    same("the message", refused.message, format!("container none is not valid for pod {}", live.name))
}

async fn long(t: T) -> Result<()> {
    let script = "head -c 40000 /dev/zero | tr '\\0' x; echo; i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i+1)); done";
    let live = t.run(t.pod(script)).await?;
    live.within(Duration::from_secs(150), "its end", |pod| pod["status"]["phase"] == "Succeeded").await?;
    let log = live.log("").await?;
    let mut lines = log.lines();
    same("the long line's length", lines.next().map(str::len), Some(40000))?;
    for (number, line) in lines.enumerate() {
        same("a line", line.to_owned(), number.to_string())?;
    }
    same("lines", log.lines().count(), 20001)
}

async fn survives(t: T) -> Result<()> {
    let live = t.ready(t.pod(&format!("echo run; {IDLE}")).always()).await?;
    live.end_main().await?;
    live.restarted("main", 1).await?;
    same("the previous log", live.log("previous=true").await?.as_str(), "run\n")
}
