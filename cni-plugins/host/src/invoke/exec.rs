//! One plugin call: an executable, its environment, a JSON object in and one out.

use std::{
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use cni_plugins_types::{CniError, config::is_plugin_type};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::{Child, Command},
    time::timeout,
};

use super::{RuntimeArgs, join_path};

/// Bound of what is read from a plugin's standard output and error, each.
pub(super) const MAX_OUTPUT: u64 = 1 << 20;
/// How much of a plugin's standard error goes into our error.
const MAX_STDERR_SHOWN: usize = 2048;

/// Why a plugin call failed.
#[derive(Debug, thiserror::Error)]
pub enum PluginError {
    /// The type is not the name of a file in a directory of plugins.
    #[error("invalid plugin type {0:?}: expected the name of an executable in CNI_PATH")]
    Type(String),
    /// No such executable.
    #[error("failed to find plugin {kind:?} in path [{dirs}]")]
    NotFound {
        /// Plugin type.
        kind: String,
        /// Directories searched.
        dirs: String,
    },
    /// It could not be started or talked to.
    #[error("cannot run {}", path.display())]
    Run {
        /// The executable.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It was killed at the deadline.
    #[error("no answer within {} s; killed", deadline.as_secs_f32())]
    Deadline {
        /// The limit.
        deadline: Duration,
    },
    /// It reported an error.
    #[error("{error}{stderr}")]
    Reported {
        /// The error object.
        error: Box<CniError>,
        /// What it wrote to standard error, as `; stderr: …`, or nothing.
        stderr: String,
    },
    /// It failed without an error object.
    #[error("{status}{output}")]
    Failed {
        /// Exit status or signal.
        status: String,
        /// What it wrote, or nothing.
        output: String,
    },
    /// It succeeded with output that is not a result.
    #[error("output is not a CNI result")]
    Output(#[source] serde_json::Error),
}

/// Searches the executable of a plugin type. A type that is a path is refused: it would run whatever is there.
pub fn find_plugin(dirs: &[PathBuf], kind: &str) -> Result<PathBuf, PluginError> {
    if !is_plugin_type(kind) {
        return Err(PluginError::Type(kind.to_owned()));
    }
    let is_executable = |path: &Path| {
        path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    dirs.iter()
        .map(|dir| dir.join(kind))
        .find(|path| is_executable(path))
        .ok_or_else(|| PluginError::NotFound { kind: kind.to_owned(), dirs: join_path(dirs) })
}

/// The `CNI_*` variables of a call.
pub(super) fn environment(
    command: &str,
    bin_dirs: &[PathBuf],
    rt: Option<&RuntimeArgs>,
) -> Vec<(&'static str, String)> {
    let mut environment = vec![("CNI_COMMAND", command.to_owned()), ("CNI_PATH", join_path(bin_dirs))];
    if let Some(rt) = rt {
        let args: Vec<String> = rt.args.iter().map(|(key, value)| format!("{key}={value}")).collect();
        environment.extend([
            ("CNI_CONTAINERID", rt.container_id.clone()),
            ("CNI_NETNS", rt.netns.to_string_lossy().into_owned()),
            ("CNI_IFNAME", rt.ifname.clone()),
            ("CNI_ARGS", args.join(";")),
        ]);
    }
    environment
}

/// Runs `executable` and returns the object it printed, if any. The process leads a group of its own,
/// which is killed at the deadline and when the returned future is dropped.
pub(super) async fn run(
    executable: &Path,
    environment: &[(&'static str, String)],
    input: &Value,
    deadline: Duration,
) -> Result<Option<Value>, PluginError> {
    let run_error = |source| PluginError::Run { path: executable.to_owned(), source };
    let child = command(executable)
        .envs(environment.iter().map(|(key, value)| (key, value)))
        .process_group(0)
        .spawn()
        .map_err(run_error)?;
    let mut group = KillGroup::of(&child);
    let finished = timeout(deadline, communicate(child, input.to_string())).await;
    let Ok(finished) = finished else { return Err(PluginError::Deadline { deadline }) };
    let finished = finished.map_err(run_error)?;
    group.disarm();
    outcome(&finished)
}

/// Exit status, standard output, standard error.
pub(super) type Finished = (std::process::ExitStatus, Vec<u8>, Vec<u8>);

fn command(executable: &Path) -> Command {
    let mut command = Command::new(executable);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

/// What a finished call means.
pub(super) fn outcome((status, stdout, stderr): &Finished) -> Result<Option<Value>, PluginError> {
    if status.success() {
        if stdout.iter().all(u8::is_ascii_whitespace) {
            return Ok(None);
        }
        return serde_json::from_slice(stdout).map(Some).map_err(PluginError::Output);
    }
    let said = shown(stderr);
    if let Ok(error) = serde_json::from_slice::<CniError>(stdout) {
        return Err(PluginError::Reported { error: Box::new(error), stderr: labelled("; stderr: ", &said) });
    }
    let said = if said.is_empty() { shown(stdout) } else { said };
    Err(PluginError::Failed { status: status.to_string(), output: labelled(": ", &said) })
}

async fn communicate(mut child: Child, input: String) -> io::Result<Finished> {
    let missing = || io::Error::other("a standard stream is missing");
    let mut stdin = child.stdin.take().ok_or_else(missing)?;
    let mut stdout = child.stdout.take().ok_or_else(missing)?.take(MAX_OUTPUT);
    let mut stderr = child.stderr.take().ok_or_else(missing)?.take(MAX_OUTPUT);
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let write = async move {
        match stdin.write_all(input.as_bytes()).await {
            // A plugin that fails early does not read its input; its exit status tells why.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
            _ => Ok(()),
        }
    };
    tokio::try_join!(write, stdout.read_to_end(&mut out), stderr.read_to_end(&mut err))?;
    let status = child.wait().await?;
    Ok((status, out, err))
}

fn shown(bytes: &[u8]) -> String {
    let start = bytes.len().saturating_sub(MAX_STDERR_SHOWN);
    String::from_utf8_lossy(&bytes[start..]).trim().to_owned()
}

fn labelled(label: &str, text: &str) -> String {
    if text.is_empty() { String::new() } else { format!("{label}{text}") }
}

/// Kills a plugin's whole process group, delegates included, unless disarmed.
struct KillGroup(Option<Pid>);

impl KillGroup {
    fn of(child: &Child) -> Self {
        Self(child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw))
    }

    fn disarm(&mut self) {
        self.0 = None;
    }
}

impl Drop for KillGroup {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.0.map(|group| killpg(group, Signal::SIGKILL)) {
            tracing::debug!(%error, "plugin process group is already gone");
        }
    }
}
