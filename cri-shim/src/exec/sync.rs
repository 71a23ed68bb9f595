//! ExecSync: a command's output and exit code, with a real deadline.
//!
//! Input: container, command, time limit. Output: at most [`MAX_OUTPUT`] bytes per stream; the rest is read and dropped.
//! When the limit passes, or the caller goes away, the process and everything it started is killed.

use std::time::Duration;

use tokio::net::unix::pipe;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

use super::Executor;
use super::error::ExecError;
use super::process::{ExecProcess, Moved, read_piece};
use crate::telemetry::stage;

/// Most bytes kept of each stream.
pub const MAX_OUTPUT: usize = 16 << 20;

/// How much longer than its limit a command may take to be started, or to be ended.
const START_PATIENCE: Duration = Duration::from_secs(3);

/// How long output may stand still after the process's end, while something it started holds the stream open.
const QUIET: Duration = Duration::from_millis(250);

/// How long the shim may take to close the streams of a deleted process.
const DRAIN_DEADLINE: Duration = Duration::from_secs(5);

/// What a command left.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExecOutput {
    /// Its output.
    pub stdout: Vec<u8>,
    /// Its errors.
    pub stderr: Vec<u8>,
    /// Its exit code.
    pub exit_code: u32,
}

impl Executor {
    /// Runs `command` in `container` and waits for it, at most for `limit`.
    pub async fn exec_sync(
        &self,
        container: &str,
        command: &[String],
        limit: Option<Duration>,
    ) -> Result<ExecOutput, ExecError> {
        // The work is a task of its own, so that a caller who gives up leaves nobody to clean up but it.
        let abandoned = CancellationToken::new();
        let guard = abandoned.clone().drop_guard();
        let shown = command.join(" ");
        let (executor, container, command) = (self.clone(), container.to_owned(), command.to_vec());
        let work = async move { executor.run(&container, &command, limit, abandoned).await };
        // What it logs belongs to the request.
        let work = tokio::spawn(work.in_current_span());
        // A command that waits for its turn, or for a shim, to be started has no process to end yet. It is ended once it has.
        let too_late = async {
            match limit {
                Some(limit) => tokio::time::sleep(limit + START_PATIENCE).await,
                None => std::future::pending().await,
            }
        };
        // Cancel-safe: the work goes on without us.
        let result = tokio::select! {
            result = work => result?,
            () = too_late => {
                let after = limit.unwrap_or_default();
                return Err(ExecError::Timeout { command: shown, after });
            }
        };
        drop(guard.disarm());
        result
    }

    async fn run(
        &self,
        container: &str,
        command: &[String],
        limit: Option<Duration>,
        abandoned: CancellationToken,
    ) -> Result<ExecOutput, ExecError> {
        let begun = tokio::time::Instant::now();
        let starting = stage("exec_start", ExecProcess::start(self, container, command, false, false));
        let (process, ends) = starting.await?;
        let moved = Moved::default();
        let stdout = collect(ends.stdout, moved.clone());
        let stderr = ends.stderr.map(|pipe| collect(pipe, moved.clone()));
        let deadline = async {
            match limit {
                Some(limit) => tokio::time::sleep_until(begun + limit).await,
                None => std::future::pending().await,
            }
        };
        // Cancel-safe: an abandoned wait loses nothing, the process is killed below.
        let exit = tokio::select! {
            exit = process.wait() => Some(exit),
            () = deadline => None,
            () = abandoned.cancelled() => None,
        };
        let Some(exit) = exit else {
            process.kill_tree().await;
            forget(&process).await;
            let after = limit.unwrap_or_default();
            return Err(ExecError::Timeout { command: command.join(" "), after });
        };
        settle(&moved, || stdout.is_finished() && stderr.as_ref().is_none_or(AbortOnDropHandle::is_finished))
            .await;
        forget(&process).await;
        let stdout = rest(stdout).await;
        let stderr = match stderr {
            Some(stderr) => rest(stderr).await,
            None => Vec::new(),
        };
        Ok(ExecOutput { stdout, stderr, exit_code: exit?.status })
    }
}

/// Waits until the output is `done` or stands still, not counting the time a slow client takes.
pub(super) async fn settle(moved: &Moved, done: impl Fn() -> bool) {
    const STEP: Duration = Duration::from_millis(2);
    let (mut last, mut since) = (moved.get(), tokio::time::Instant::now());
    while !done() && since.elapsed() < QUIET {
        tokio::time::sleep(STEP).await;
        let now = moved.get();
        if now.is_none() || now != last {
            (last, since) = (now, tokio::time::Instant::now());
        }
    }
}

pub(super) async fn forget(process: &ExecProcess) {
    if let Err(error) = process.delete().await {
        tracing::warn!(error = error.chain(), "an ended exec process stays until its container ends");
    }
}

fn collect(mut pipe: pipe::Receiver, moved: Moved) -> AbortOnDropHandle<Vec<u8>> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        let mut kept = Vec::new();
        while let Some(piece) = read_piece(&mut pipe, &moved).await {
            let room = MAX_OUTPUT - kept.len();
            kept.extend_from_slice(&piece[..piece.len().min(room)]);
        }
        kept
    }))
}

async fn rest(reader: AbortOnDropHandle<Vec<u8>>) -> Vec<u8> {
    match tokio::time::timeout(DRAIN_DEADLINE, reader).await {
        Ok(Ok(bytes)) => bytes,
        Ok(Err(error)) => {
            tracing::warn!(%error, "the output of an exec process was lost");
            Vec::new()
        }
        Err(_elapsed) => {
            tracing::warn!("the shim does not close the output of an exec process");
            Vec::new()
        }
    }
}
