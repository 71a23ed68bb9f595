//! A pod that was made: what became of it, its logs, and what runs in it.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::super::stream::{Finished, Session};
use super::api::{Stream, encode};
use super::board::Kind;
use super::context::T;

/// A pod of a case.
#[derive(Clone)]
pub(crate) struct Live {
    t: T,
    /// Its namespace.
    pub(crate) namespace: String,
    /// Its name.
    pub(crate) name: String,
    /// Its uid.
    pub(crate) uid: String,
}

impl Live {
    /// The pod that the API server answered with.
    pub(crate) fn new(t: &T, made: Value) -> Self {
        let text = |name: &str| made["metadata"][name].as_str().unwrap_or_default().to_owned();
        Self { t: t.clone(), namespace: text("namespace"), name: text("name"), uid: text("uid") }
    }

    /// Whether it is this pod, and not another one of its name.
    fn is(&self, pod: &Value) -> bool {
        pod["metadata"]["uid"] == self.uid.as_str()
    }

    /// Its path at the API.
    pub(crate) fn path(&self) -> String {
        format!("/api/v1/namespaces/{}/pods/{}", self.namespace, self.name)
    }

    /// Every version that was seen, oldest first.
    pub(crate) fn history(&self) -> Vec<Value> {
        let seen = self.t.suite().board.seen();
        let life = seen.life(Kind::Pod, &self.namespace, &self.name);
        life.map(|life| life.versions.clone()).unwrap_or_default()
    }

    /// Waits until the pod is as `accept` wants it.
    pub(crate) async fn until(&self, what: &str, accept: impl Fn(&Value) -> bool) -> Result<Value> {
        self.within(self.t.suite().limit, what, accept).await
    }

    /// The same with another limit.
    pub(crate) async fn within(
        &self,
        limit: Duration,
        what: &str,
        accept: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let look = |seen: &super::board::Seen| {
            let life = seen.life(Kind::Pod, &self.namespace, &self.name).ok_or("nothing of the pod")?;
            let last = life.last().filter(|last| self.is(last)).ok_or("nothing of the pod")?;
            match (accept(last), life.gone) {
                (true, _) => Ok(last.clone()),
                (false, true) => Err(format!("it is gone; before: {}", summary(last))),
                (false, false) => Err(summary(last)),
            }
        };
        self.t.suite().board.wait(&format!("pod {}: {what}", self.name), limit, look).await
    }

    /// Waits until it is gone.
    pub(crate) async fn gone(&self) -> Result<()> {
        let (suite, what) = (self.t.suite(), format!("the end of pod {}", self.name));
        let waited = suite.board.wait(&what, suite.limit, |seen| {
            match seen.life(Kind::Pod, &self.namespace, &self.name) {
                Some(life) if life.gone || !life.last().is_some_and(|last| self.is(last)) => Ok(()),
                Some(life) => Err(life.last().map(summary).unwrap_or_default()),
                None => Err("nothing of the pod".to_owned()),
            }
        });
        waited.await
    }

    /// Waits for a phase.
    pub(crate) async fn phase(&self, phase: &str) -> Result<Value> {
        self.until(phase, |pod| pod["status"]["phase"] == phase).await
    }

    /// Waits until it is ready.
    pub(crate) async fn ready(&self) -> Result<Value> {
        self.until("ready", |pod| condition(pod, "Ready")["status"] == "True").await
    }

    /// Waits until it has ended, well or not.
    pub(crate) async fn ended(&self) -> Result<Value> {
        let over = |pod: &Value| matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
        self.until("its end", over).await
    }

    /// Waits until it has failed, with this reason.
    pub(crate) async fn failed(&self, reason: &str) -> Result<Value> {
        let pod = self.phase("Failed").await?;
        super::super::case::same(
            "status.reason",
            pod["status"]["reason"].as_str().unwrap_or_default(),
            reason,
        )?;
        Ok(pod)
    }

    /// Waits until a container waits for this reason; gives the reason's message.
    pub(crate) async fn waiting(&self, name: &str, reason: &str) -> Result<String> {
        let what = format!("{name} waiting: {reason}");
        let pod =
            self.until(&what, |pod| container(pod, name)["state"]["waiting"]["reason"] == reason).await?;
        Ok(container(&pod, name)["state"]["waiting"]["message"].as_str().unwrap_or_default().to_owned())
    }

    /// Waits until a container has ended; gives its state.
    pub(crate) async fn terminated(&self, name: &str) -> Result<Value> {
        let what = format!("the end of {name}");
        let pod = self.until(&what, |pod| container(pod, name)["state"]["terminated"].is_object()).await?;
        Ok(container(&pod, name)["state"]["terminated"].clone())
    }

    /// Waits until a container was restarted so often; gives its status.
    pub(crate) async fn restarted(&self, name: &str, times: u64) -> Result<Value> {
        let what = format!("{times} restarts of {name}");
        let pod =
            self.until(&what, |pod| container(pod, name)["restartCount"].as_u64() >= Some(times)).await?;
        Ok(container(&pod, name).clone())
    }

    /// Its log; `query` chooses container and options.
    pub(crate) async fn log(&self, query: &str) -> Result<String> {
        self.t.api().text(&format!("{}/log?{query}", self.path())).await.context("the log")
    }

    /// Its log as it grows.
    pub(crate) async fn follow(&self, query: &str) -> Result<Stream> {
        self.t.api().stream(&format!("{}/log?follow=true&{query}", self.path())).await.context("the log")
    }

    /// Waits until the log of `main` holds a text; gives all of it.
    pub(crate) async fn says(&self, text: &str) -> Result<String> {
        let mut stream = self.follow("container=main").await?;
        let limit = self.t.suite().limit;
        let read = tokio::time::timeout(limit, stream.until(text)).await;
        let read =
            read.with_context(|| format!("the log does not hold {text:?} after {} s", limit.as_secs()))?;
        read.map(str::to_owned)
    }

    /// A session of exec or attach in a container: `query` has the streams and the command.
    pub(crate) async fn session(&self, verb: &str, query: &str) -> Result<Session> {
        self.t.api().session(&format!("{}/{verb}?{query}", self.path())).await
    }

    /// Runs a shell script in a container.
    pub(crate) async fn exec_in(&self, container: &str, script: &str) -> Result<Finished> {
        let query = format!(
            "container={container}&stdout=true&stderr=true&command=sh&command=-c&command={}",
            encode(script)
        );
        self.session("exec", &query).await?.finish().await
    }

    /// Runs a shell script in `main`, which must succeed; gives what it printed, trimmed.
    pub(crate) async fn exec(&self, script: &str) -> Result<String> {
        let done = self.exec_in("main", script).await.with_context(|| format!("`{script}`"))?;
        let errors = String::from_utf8_lossy(&done.stderr).into_owned();
        ensure!(done.exit_code() == Some(0), "`{script}`: {}; {errors}", done.status);
        Ok(done.text().trim().to_owned())
    }

    /// Asks the first process of `main` to end. The command may be gone with its container before it can tell how it ended.
    pub(crate) async fn end_main(&self) -> Result<()> {
        self.exec_in("main", "kill -TERM 1").await.map(drop)
    }

    /// Runs a script in `main` again and again until it succeeds: for what the node changes by itself.
    pub(crate) async fn exec_until(&self, script: &str) -> Result<()> {
        let limit = self.t.suite().limit;
        let looped = format!(
            "i=0; until {script}; do i=$((i+1)); [ $i -lt {} ] || exit 1; sleep 0.2; done",
            limit.as_secs() * 5
        );
        self.exec(&looped).await.map(drop)
    }

    /// Waits for an event about the pod with this reason, whose message holds `part`.
    pub(crate) async fn event(&self, reason: &str, part: &str) -> Result<Value> {
        let (suite, what) = (self.t.suite(), format!("event {reason} with {part:?} of pod {}", self.name));
        let waited = suite.board.wait(&what, suite.limit, |seen| {
            let mut told = Vec::new();
            for event in seen.all(Kind::Event, &self.namespace) {
                let message = event["message"].as_str().unwrap_or_default();
                if event["involvedObject"]["uid"] != self.uid.as_str() {
                    continue;
                }
                if event["reason"] == reason && message.contains(part) {
                    return Ok(event.clone());
                }
                told.push(format!("{}: {message}", event["reason"].as_str().unwrap_or_default()));
            }
            Err(told.join(" | "))
        });
        waited.await
    }

    /// Deletes it with some seconds of grace.
    pub(crate) async fn delete(&self, grace: u64) -> Result<()> {
        let options = json!({"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": grace});
        self.t.api().delete(&self.path(), &options).await.map(drop)
    }

    /// A strategic merge patch of the pod.
    pub(crate) async fn patch(&self, patch: Value) -> Result<Value> {
        self.t.api().patch(&self.path(), &patch).await
    }

    /// Its first address.
    pub(crate) async fn address(&self) -> Result<String> {
        let pod = self.until("its address", |pod| pod["status"]["podIP"].is_string()).await?;
        Ok(pod["status"]["podIP"].as_str().unwrap_or_default().to_owned())
    }

    /// Fails unless no version that was seen is as `forbid` tells.
    pub(crate) fn never(&self, what: &str, forbid: impl Fn(&Value) -> bool) -> Result<()> {
        match self.history().iter().find(|pod| forbid(pod)) {
            Some(pod) => bail!("{what}: {}", summary(pod)),
            None => Ok(()),
        }
    }
}

/// Status of a container, of whatever kind; `null` when there is none.
pub(crate) fn container<'a>(pod: &'a Value, name: &str) -> &'a Value {
    ["containerStatuses", "initContainerStatuses", "ephemeralContainerStatuses"]
        .iter()
        .filter_map(|list| pod["status"][list].as_array())
        .flatten()
        .find(|status| status["name"] == name)
        .unwrap_or(&Value::Null)
}

/// A condition; `null` when there is none.
pub(crate) fn condition<'a>(pod: &'a Value, kind: &str) -> &'a Value {
    let mut all = pod["status"]["conditions"].as_array().into_iter().flatten();
    all.find(|condition| condition["type"] == kind).unwrap_or(&Value::Null)
}

/// A pod's status in a line.
pub(crate) fn summary(pod: &Value) -> String {
    let status = &pod["status"];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut parts = vec![format!(
        "phase {:?} {} {}",
        text(&status["phase"]),
        text(&status["reason"]),
        text(&status["message"])
    )];
    for list in ["initContainerStatuses", "containerStatuses", "ephemeralContainerStatuses"] {
        for container in status[list].as_array().into_iter().flatten() {
            parts.push(format!(
                "{}: ready {}, restarts {}, state {}, last {}",
                text(&container["name"]),
                container["ready"],
                container["restartCount"],
                container["state"],
                container["lastState"]
            ));
        }
    }
    parts.join("; ")
}
